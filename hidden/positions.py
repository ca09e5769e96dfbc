"""What an attacker makes of a mask's places: zeros give them away, and noise is to hide them.

The attacker has a sealed model and 10 training images of each class, but not the parent. Whether knowing the places is
worth something shows beside as many random places of the same parameters (arXiv:2603.06640).
"""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from core.config import derive_seed
from hidden.heads import SHOTS, some_forgotten
from measure.metrics import Evidence, Undefined, metric
from measure.probes import accuracy, training_images
from mimu.sealing import noise_like
from model import HookedModel
from training.optimisers import Adam

SOURCE = "2603.06640"
RATE, STEPS = 1e-2, 50  # of training the places alone, all images at once

Places = Mapping[str, Tensor]
"""Which entries of which parameters, bool, by name."""
Attack = Callable[[HookedModel, Places], HookedModel]


def switched_off(e: Evidence) -> Places:
    """Entries that are 0 and were not.

    Raises:
        Undefined: there are none.
    """
    if e.original is None:
        raise Undefined("there is no untouched classifier to compare with")
    before = e.original.model.state_dict()
    every = {name: (value == 0) & (before[name] != 0) for name, value in e.model.named_parameters()}
    found = {name: off for name, off in every.items() if bool(off.any())}
    if not found:
        raise Undefined("no weight is switched off")
    return found


def counts_of(places: Places) -> dict[str, int]:
    """How many entries of each parameter."""
    return {name: int(off.sum()) for name, off in places.items()}


def highest(scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> Places:
    """The entries with the highest scores, so many of each parameter."""
    found = {}
    for name, count in counts.items():
        chosen = torch.zeros_like(scores[name], dtype=torch.bool)
        chosen.view(-1)[scores[name].flatten().topk(count).indices] = True
        found[name] = chosen
    return found


def elsewhere(places: Places, seed: int) -> Places:
    """As many random entries of each parameter, none of them a place (of all entries, where too few are left)."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for name, off in places.items():
        drawn = torch.rand(off.shape, generator=generator).to(off.device)
        scores[name] = drawn - off.float()  # places come last
    return highest(scores, counts_of(places))


def gradients(model: HookedModel, images: Tensor, labels: Tensor, names: Mapping[str, object]) -> dict[str, Tensor]:
    """Of the cross-entropy of images [S, C, H, W], by parameter."""
    learner = copy.deepcopy(model).eval().requires_grad_(True)
    values = {name: value for name, value in learner.named_parameters() if name in names}
    with torch.enable_grad():
        loss = nn.functional.cross_entropy(learner(images), labels)
        found = torch.autograd.grad(loss, list(values.values()))
    return dict(zip(values, found, strict=True))


# --- attacks ----------------------------------------------------------------------------------------------


def with_signs(model: HookedModel, places: Places, images: Tensor, labels: Tensor) -> HookedModel:
    """A copy whose places hold the mean magnitude of a parameter's other entries, with the sign that lowers the
    cross-entropy of images (one gradient; where it is 0 the value stays).
    """
    slopes, attacked = gradients(model, images, labels, places), copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, value in attacked.named_parameters():
            if name in places:
                off, sign = places[name], slopes[name].sign()
                size = value[~off].abs().mean()
                value.copy_(torch.where(off & (sign != 0), -size * sign, value))
    return attacked


def with_training(model: HookedModel, places: Places, images: Tensor, labels: Tensor) -> HookedModel:
    """A copy whose places are trained on images, all else as it was: STEPS steps of Adam at RATE on all of them."""
    attacked = copy.deepcopy(model).eval().requires_grad_(True)
    values = {name: value for name, value in attacked.named_parameters() if name in places}
    optimizer = Adam(values.values(), lr=RATE)
    for _ in range(STEPS):
        with torch.enable_grad():
            loss = nn.functional.cross_entropy(attacked(images), labels)
            slopes = torch.autograd.grad(loss, list(values.values()))
        for (name, value), slope in zip(values.items(), slopes, strict=True):
            value.grad = slope * places[name]  # Adam leaves alone what never had a gradient
        optimizer.step()
    return attacked.requires_grad_(False)


def noisy(model: HookedModel, places: Places, seed: int) -> HookedModel:
    """A copy with noise in its places, as `seal --fill noise` writes it."""
    sealed = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in sealed.named_parameters():
            if name in places:
                where = places[name].flatten().nonzero().flatten().cpu()
                noise = noise_like(value.cpu(), where, len(where), name, seed)
                value[places[name]] = noise.to(value.device)
    return sealed


def guessed(model: HookedModel, counts: Mapping[str, int], images: Tensor, labels: Tensor) -> Places:
    """Where a mask was, as an attacker guesses who sees no zeros: the entries whose gradient is largest, who is told
    how many of each parameter.

    A mask takes weights that the class needs; these are the ones that images of the class pull at.
    """
    slopes = gradients(model, images, labels, counts)
    return highest({name: slope.abs() for name, slope in slopes.items()}, counts)


# --- metrics ----------------------------------------------------------------------------------------------


def forgotten_images(e: Evidence) -> tuple[Tensor, Tensor]:
    """SHOTS training images of each forgotten class, and labels [S].

    Raises:
        Undefined: a class has fewer.
    """
    images, labels = some_forgotten(e)
    return images.to(e.device), labels.to(e.device)


def brought_back(e: Evidence, model: HookedModel) -> float:
    """Accuracy of an attacked copy on T's forgotten images, percent."""
    images, labels = e.images(e.split, True)
    return accuracy(model, images.to(e.device), labels.to(e.device))


def by_signs(e: Evidence, places: Places) -> float:
    """What completing signs brings back, percent."""
    return brought_back(e, with_signs(e.model, places, *forgotten_images(e)))


def by_training(e: Evidence, places: Places, start: HookedModel | None = None) -> float:
    """What training the places on SHOTS images of every class brings back, percent; `start`: of another copy."""
    return brought_back(e, with_training(start or e.model, places, *training_images(e, "positions", SHOTS)))


def random_places(e: Evidence) -> Places:
    """As many places elsewhere, drawn by the run's seed."""
    return elsewhere(e.needed(switched_off), derive_seed(e.seed, "positions"))


def sealed_with_noise(e: Evidence) -> HookedModel:
    """The judged model with noise in place of zeros, drawn by the run's seed."""
    return noisy(e.model, e.needed(switched_off), derive_seed(e.seed, "noise"))


def guessed_places(e: Evidence) -> Places:
    """Where an attacker takes the mask for, of the model that is sealed with noise."""
    counts = counts_of(e.needed(switched_off))
    return guessed(e.needed(sealed_with_noise), counts, *forgotten_images(e))


@metric("position_attack", "%", "lower", group="features", target="as position_attack_random", source=SOURCE)
def position_attack(e: Evidence) -> float:
    """Accuracy on T's forgotten images after an attack that knows where a mask's zeros are: each gets the mean
    magnitude of the parameter's other entries, with the sign that lowers the cross-entropy of 10 training images of
    each forgotten class (one gradient; where it is 0 the zero stays). Of a model without such zeros, and so of a
    retrained one, there is no such value.
    """
    return by_signs(e, e.needed(switched_off))


@metric("position_attack_random", "%", "lower", group="features", target="what knowing no place brings", source=SOURCE)
def position_attack_random(e: Evidence) -> float:
    """position_attack by somebody who does not know the places: on as many random entries of each parameter."""
    return by_signs(e, e.needed(random_places))


@metric("position_relearn", "%", "lower", group="features", target="as position_relearn_random", source=SOURCE)
def position_relearn(e: Evidence) -> float:
    """Accuracy on T's forgotten images after the zeros alone are trained on 10 training images of every class: 50 steps
    of Adam at 1e-2, all images at once, all other weights as they are.
    """
    return by_training(e, e.needed(switched_off))


@metric("position_relearn_random", "%", "lower", group="features", target="what knowing no place brings", source=SOURCE)
def position_relearn_random(e: Evidence) -> float:
    """position_relearn of as many random entries of each parameter."""
    return by_training(e, e.needed(random_places))


@metric("noise_found", "%", "lower", group="features", target="chance: the share switched off", source=SOURCE)
def noise_found(e: Evidence) -> float:
    """Share of a mask's places that an attacker finds who sees noise in place of zeros (seal --fill noise): told how
    many of each parameter, the entries with the largest gradient of the cross-entropy of 10 training images of each
    forgotten class.
    """
    places, taken_for = e.needed(switched_off), e.needed(guessed_places)
    found = sum(int((places[name] & taken_for[name]).sum()) for name in places)
    return 100 * found / sum(counts_of(places).values())


@metric("noise_relearn", "%", "lower", group="features", target="as position_relearn_random", source=SOURCE)
def noise_relearn(e: Evidence) -> float:
    """position_relearn of a model with noise in place of zeros, at the places that the attacker of noise_found takes
    for the mask's.
    """
    return by_training(e, e.needed(guessed_places), e.needed(sealed_with_noise))
