"""Rivals that take a class out of what linear layers read, by algebra on activations.

No paper's text or code was at hand: each was written from a summary of its idea, and says what is our own choice. All
take apart the stack of linear layers; what lies ahead of the stack is left alone.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from core.config import derive_seed
from model import HookedModel
from rivals.closed_form import RANK_TOLERANCE, Spectrum, layer_inputs, linear_names, training_images
from training.optimisers import Adam
from unlearn.registry import Context, Edit, NotApplicable, Point, method
from utils_data import Images

MOST_IMAGES = 10_240  # of a side, that activations are taken from
ESC = "2504.02199"
MASK_STEPS, MASK_BATCH = 300, 128  # of descent on ESC-T's mask; a batch of either side
RIDGE = 1e-3  # of the mean squared input: keeps the regression's matrix invertible where units are dead


# --- directions of what the last layer reads --------------------------------------------------------------


class Projecting(HookedModel):
    """A classifier whose last layer reads a projection of what it read before; `projecting` makes one.

    Attributes:
        kept: the projection P [n, n], symmetric; not in the state dict, whose last weight W P gives the same logits.
    """

    kept: Tensor

    def read_by(self, place: int, z: Tensor) -> Tensor:
        """As `HookedModel.read_by`, and projected if the last layer is to read it."""
        x = super().read_by(place, z)
        return x @ self.kept if place + 1 == len(self.linears) else x


def projecting(model: HookedModel, kept: Tensor) -> HookedModel:
    """A copy of a classifier whose last layer reads h P instead of h, P = kept [n, n] an orthogonal projection.

    The last weight becomes W P, which gives the same logits once more, so that a state dict alone carries the edit.
    """
    made = copy.deepcopy(model).eval()
    made.__class__ = type(f"Projecting{type(model).__name__}", (Projecting, type(model)), {})
    weight = made.target(-1).weight
    made.register_buffer("kept", kept.to(weight), persistent=False)
    with torch.no_grad():
        weight.copy_(weight.double() @ kept)
    return made


def without_directions(directions: Tensor) -> Tensor:
    """P = I - D D^T [n, n], for D [n, k] orthonormal."""
    eye = torch.eye(len(directions), dtype=directions.dtype, device=directions.device)
    return eye - directions @ directions.T


def _projected(context: Context, kept: Tensor) -> Edit:
    model = projecting(context.own, kept)
    name, weight = linear_names(model)[-1], model.target(-1).weight
    return Edit(model, {name: torch.ones_like(weight, dtype=torch.bool)})


def last_inputs_of(context: Context, side: bool) -> tuple[Tensor, Tensor]:
    """What the last layer reads of training images of one side, [S, n], and their labels [S]; once for all settings.

    Raises:
        NotApplicable: there is no layer ahead of the last, whose output could be projected.
    """
    if len(context.own.linears) < 2:
        raise NotApplicable("projects what the last of several linear layers reads, and there is one layer")

    def make() -> tuple[Tensor, Tensor]:
        images = training_images(context, side, MOST_IMAGES)
        return layer_inputs(context.own, images, context.device)[-1], images.labels.to(context.device)

    return context.shared.once(("last inputs", context.config.forget_labels, side), make).value


@method("esc", "ESC", source=ESC, grid=[{"share": share} for share in (0.02, 0.03, 0.05, 0.1, 0.2)])
def esc(context: Context, point: Point, share: float) -> Edit:
    """The principal subspace of D_f's features is erased: what the last layer reads loses the first `share` of the
    right singular directions of D_f's features (not centred). A projection behind a ReLU is no edit of the weights
    ahead of it; it stands between them and the last layer, and is folded into the last weight as well. Features ahead
    of it stay as they are. Written from a summary of the paper, not checked against it.
    """
    features, _ = last_inputs_of(context, True)
    directions = Spectrum.of(features).directions  # ascending energy
    return _projected(context, without_directions(directions[:, -max(1, round(share * len(directions))) :]))


def direction_mask(
    directions: Tensor,
    weight: Tensor,
    forget: Tensor,
    retain: tuple[Tensor, Tensor],
    classes: Sequence[int],
    lr: float,
    generator: torch.Generator,
) -> Tensor:
    """Learn how much of each direction may stay: m [n] in [0, 1], from all ones, by Adam.

    Minimises CE(retained) - log(1 - p(forgotten classes | forgotten)) of the logits h V diag(m) V^T W^T.

    Args:
        directions: V [n, n], orthonormal columns. weight: W [C, n]. forget: features [A, n]. retain: [B, n] and [B].
    """
    coordinates, (features, labels) = directions.T @ weight.T, retain
    mask = torch.ones(len(directions), dtype=directions.dtype, device=directions.device, requires_grad=True)
    gone = torch.isin(torch.arange(len(weight)), torch.tensor(list(classes))).to(weight.device)
    optimizer = Adam([mask], lr)

    def drawn(size: int) -> Tensor:
        return torch.randint(size, (MASK_BATCH,), generator=generator).to(directions.device)

    for _ in range(MASK_STEPS):
        picks, kept = drawn(len(forget)), drawn(len(features))
        said = ((forget[picks] @ directions) * mask @ coordinates).log_softmax(1)
        stays = -said[:, ~gone].logsumexp(1).mean()
        fits = functional.cross_entropy((features[kept] @ directions) * mask @ coordinates, labels[kept])
        optimizer.zero_grad()
        (stays + fits).backward()
        optimizer.step()
        with torch.no_grad():
            mask.clamp_(0, 1)
    return mask.detach()


@method(
    "esc_t",
    "ESC-T",
    axes=("seed",),
    source=ESC,
    grid=[
        {"lr": lr, "threshold": least}
        for lr, least in ((0.03, 0.5), (0.01, 0.5), (0.1, 0.5), (0.01, 0.9), (0.003, 0.9))
    ],
)
def esc_t(context: Context, point: Point, lr: float, threshold: float) -> Edit:
    """ESC with a learned choice of directions: a mask over all right singular directions of D_f's features, in [0, 1],
    descends on CE(D_r) - log(1 - p(forgotten classes)) on D_f, 300 steps of Adam; directions below the threshold go,
    all others stay whole. Written from a summary of the paper; its loss is our choice.
    """
    (forget, _), (retain, labels) = (last_inputs_of(context, side) for side in (True, False))
    directions = Spectrum.of(forget).directions
    generator = torch.Generator().manual_seed(derive_seed(point.seed, "esc_t"))
    weight, classes = context.own.target(-1).weight.detach().double(), context.config.forget_labels
    sides = forget.double(), (retain.double(), labels)
    mask = direction_mask(directions, weight, *sides, classes, lr, generator)
    return _projected(context, without_directions(directions[:, mask < threshold]))


# --- layer by layer ---------------------------------------------------------------------------------------

NewWeight = Callable[[Tensor, Sequence[Tensor]], Tensor]
"""W [m, n] and the layer's inputs on some sets of images, [S, n] each, all float64 -> the new W."""


def layer_by_layer(context: Context, images: Sequence[Images], layers: int, new_weight: NewWeight) -> Edit:
    """Edit the last `layers` layers of a copy's stack, inputs first: each sees what the edits before it have made."""
    model = copy.deepcopy(context.own).eval()
    places = range(max(0, len(model.linears) - layers), len(model.linears))
    for place in places:
        inputs = [layer_inputs(model, one, context.device)[place].double() for one in images]
        weight = model.target(place).weight
        with torch.no_grad():
            weight.copy_(new_weight(weight.double(), inputs))
    names = [linear_names(model)[place] for place in places]
    return Edit(model, {name: torch.ones_like(model.get_parameter(name), dtype=torch.bool) for name in names})


def leace_edit(h: Tensor, concepts: Tensor) -> Tensor:
    """E [n, n]: of all linear maps after which no linear function of E h covaries with a concept, the one that moves h
    least: E = I - C (C^T M^-1 C)^-1 C^T M^-1 with M = mean h h^T and C = cov(h, concepts).

    LEACE itself (2306.03819, theorem 4.3) has the covariance for M and adds a constant, which layers without bias
    cannot: of maps without one, the second moment makes E |E h - h|^2 smallest.

    Args:
        h: [S, n], float64. concepts: [S, k].
    """
    spectrum = Spectrum.of(h)
    used = spectrum.shares > RANK_TOLERANCE * spectrum.shares.max()
    basis, shares = spectrum.directions[:, used], spectrum.shares[used]
    covariance = h.T @ (concepts - concepts.mean(0)) / len(h)
    whitened = basis / shares @ (basis.T @ covariance)
    eye = torch.eye(h.shape[1], dtype=h.dtype, device=h.device)
    return eye - covariance @ torch.linalg.pinv(covariance.T @ whitened) @ whitened.T


@method("leace", "LEACE", source="control after 2306.03819", grid=[{"layers": layers} for layers in (1, 2, 3)])
def leace(context: Context, point: Point, layers: int) -> Edit:
    """Inputs of the last layers lose, one layer after the other, what a linear function needs to tell a forgotten class
    from all other classes: W := W E, with the E that moves inputs least of all linear maps under which input and class
    do not covary, on at most 10,240 training images. Without LEACE's constant, since layers have no bias.
    """
    images = training_images(context, None, MOST_IMAGES)
    forgotten = torch.tensor(context.config.forget_labels)
    concepts = (images.labels[:, None] == forgotten).double().to(context.device)
    return layer_by_layer(context, [images], layers, lambda weight, inputs: weight @ leace_edit(inputs[0], concepts))


def collapsed(weight: Tensor, forget: Tensor, partners: Tensor, retain: Tensor, mu: float) -> Tensor:
    """W + dW [m, n], dW = (W H_q - W H_f) H_f^T (H_f H_f^T + mu H_r H_r^T + eps I)^-1: the least squares by which
    forgotten inputs give what their partners give, while retained inputs give what they gave.

    Args:
        weight: W [m, n]. forget, partners: inputs, as rows, of images and of their partners in turn, [A, n].
        retain: of retained images, [B, n]. mu: weight of these, a mean against the forgotten images' mean.
    """
    before = forget.T @ forget / len(forget) + mu * retain.T @ retain / len(retain)
    eps = RIDGE * before.diagonal().mean()
    matrix = before + eps * torch.eye(len(before), dtype=before.dtype, device=before.device)
    asked = (partners - forget) @ weight.T
    return weight + torch.linalg.solve(matrix, forget.T @ asked / len(forget)).T


def partners_of(context: Context, forget: Images, retain: Images) -> Images:
    """For each image to forget a retained one, drawn by the run's seed from the class that the untouched classifier
    answers once the forgotten classes, and those without images, are out of the race.
    """
    (h,) = (layer_inputs(context.own, one, context.device)[-1].cpu() for one in [forget])
    logits = h @ context.own.target(-1).weight.detach().cpu().T
    held = torch.bincount(retain.labels, minlength=logits.shape[1]) > 0
    following = logits.masked_fill(~held, -torch.inf).argmax(1)
    generator = torch.Generator().manual_seed(derive_seed(context.config.seed, "partners"))
    chosen = torch.zeros(len(forget), dtype=torch.long)
    for label in following.unique().tolist():
        pool, asked = (retain.labels == label).nonzero().flatten(), following == label
        chosen[asked] = pool[torch.randint(len(pool), (int(asked.sum()),), generator=generator)]
    return retain.only(chosen)


@method(
    "collapse",
    "collapse in closed form",
    source="control: ridge regression onto other classes",
    grid=[{"mu": mu, "layers": layers} for mu, layers in ((10.0, 3), (3.0, 3), (3.0, 2), (1.0, 2), (30.0, 3))],
)
def collapse(context: Context, point: Point, mu: float, layers: int) -> Edit:
    """The last layers, one after the other, by least squares: an input of D_f is to give what the layer gives for an
    image of the retained class that the untouched classifier would take it for, and one of D_r, with weight mu, what it
    gave. On at most 10,240 training images of either side.
    """
    forget, retain = (training_images(context, side, MOST_IMAGES) for side in (True, False))
    images = [forget, partners_of(context, forget, retain), retain]
    return layer_by_layer(context, images, layers, lambda weight, inputs: collapsed(weight, *inputs, mu))
