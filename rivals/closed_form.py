"""Rivals that change a classifier's weights or outputs in closed form: nothing is trained.

Each is a decorated function as in `unlearn/methods.py`, with its source and the settings that it is tuned over.
"""

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.config import derive_seed
from core.observe import log
from model import HookedModel, capture, inspecting
from models.classifier import Classifier, as_matrices
from unlearn.masks import Mask, top_mask
from unlearn.registry import Context, Edit, Point, mask_method, method
from utils_data import Images, make_loader

LOW_LOGIT = -1e4  # stands for -inf, whose product with a probability of 0 is no number
FISHER_SAMPLES = 10_240  # of a set, at most, that its Fisher information is taken from
SINGLE_SAMPLES = 256  # the same where gradients are held sample by sample (convolutions)
SVD_SAMPLES = 900  # of each side, as in 2312.00761
SSD_BATCH = 64  # of the original SSD
LINEAR_BATCH = 1024  # of samples whose gradients stay outer products
RANK_TOLERANCE = 1e-7  # of the largest singular value, float64: below it a direction is rounding


class DroppedLogits(nn.Linear):
    """A classifier's last layer with the logits of some classes set to LOW_LOGIT."""

    def __init__(self, layer: nn.Linear, classes: tuple[int, ...]):
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        self.classes = classes

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).index_fill(-1, torch.tensor(self.classes, device=input.device), LOW_LOGIT)


@method("logit_drop", "logit drop", source="control: the trivial answer")
def logit_drop(context: Context, point: Point) -> Edit:
    """Never answer with a forgotten class: its logit is set to -inf, no weight is changed."""
    model = copy.deepcopy(context.own)
    model.linears[-1] = DroppedLogits(model.target(-1), context.config.forget_labels)
    return Edit(model.eval(), allowed={})


@method("head_row_zero", "head row := 0", source="control: the trivial edit")
def head_row_zero(context: Context, point: Point) -> Edit:
    """Set the forgotten classes' rows of the last layer to 0: their logits are 0, which can still be the largest."""
    model, name = copy.deepcopy(context.own), linear_names(context.own)[-1]
    weight, rows = model.target(-1).weight, list(context.config.forget_labels)
    chosen = torch.zeros_like(weight, dtype=torch.bool)
    chosen[rows] = True
    with torch.no_grad():
        weight[rows] = 0
    return Edit(model.eval(), allowed={name: chosen})


def linear_names(model: HookedModel) -> list[str]:
    """Parameter names of the stack of linear layers, inputs first."""
    return [f"linears.{place}.weight" for place in range(len(model.linears))]


def training_images(context: Context, side: bool | None, most: int) -> Images:
    """At most `most` training images, drawn without replacement by the run's seed, in the order of the draw.

    Args:
        side: True: of the classes to forget; False: of all others; None: of all classes.
    """
    images = context.data.splits["train"]
    if side is not None:
        images = images.only(context.data.is_forgotten(images.labels) == side)
    seed = derive_seed(context.config.seed, "edits", str(side))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images.only(order[:most])


# --- Fisher information -----------------------------------------------------------------------------------
# Diagonal and empirical: mean squared gradients of the cross-entropy, one value per parameter. Two estimates of
# different meaning. Of batch means, as the original SSD computes it (arXiv:2308.07707): I = mean_b (dL_b/dW)^2 with L_b
# the mean loss of a batch. Per sample: I = mean_s (dL_s/dW)^2, free of the batch size. Labels are the true ones;
# BatchNorm is in eval mode; nothing is drawn, so equal images give equal results.

Fisher = dict[str, Tensor]
"""I >= 0 in nats squared per unit of weight squared, float64, by parameter name, of the parameter's shape."""


def batch_fisher(model: Classifier, images: Images, device: torch.device, batch_size: int = SSD_BATCH) -> Fisher:
    """Mean over batches of the squared gradient of a batch's mean loss; the last batch may be short.

    Args:
        images: in this order, S of them. batch_size: the estimate shrinks with it, roughly as 1 / batch_size.
    """
    with inspecting(model), torch.enable_grad():
        model.requires_grad_(True)
        parameters = dict(model.named_parameters())
        total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in parameters.items()}
        loader = make_loader(images, batch_size)
        for batch, labels in loader:
            loss = functional.cross_entropy(model(batch.to(device)), labels.to(device))
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            for name, gradient in zip(parameters, gradients, strict=True):
                total[name] += gradient.double().square()
    return {name: value / len(loader) for name, value in total.items()}


def sample_fisher(model: Classifier, images: Images, device: torch.device) -> Fisher:
    """Mean over samples of the squared gradient of a sample's own loss.

    The gradient of a linear layer is delta h^T, so the sum over samples is (delta^2)^T (h^2), delta [S, m], h [S, n];
    a model with parameters of other kinds is differentiated sample by sample (faster on a CPU than `torch.func.vmap`).
    """
    layers = {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    if set(layers) != {name for name, _ in model.named_parameters()}:
        return batch_fisher(model, images, device, batch_size=1)
    return {name: total / len(images) for name, total in _linear_squares(model, layers, images, device).items()}


def _linear_squares(model: Classifier, layers: Mapping[str, nn.Linear], images: Images, device: torch.device) -> Fisher:
    """Sum over samples of squared gradients, [m, n] for each linear layer."""
    total = {name: torch.zeros_like(layer.weight, dtype=torch.float64) for name, layer in layers.items()}
    with inspecting(model), torch.enable_grad(), ExitStack() as stack:
        for layer in layers.values():
            layer.requires_grad_(True)
        records = [stack.enter_context(capture(layer)) for layer in layers.values()]
        for batch, labels in make_loader(images, LINEAR_BATCH):
            loss = functional.cross_entropy(model(batch.to(device)), labels.to(device), reduction="sum")
            inputs, outputs = zip(*(record.take() for record in records), strict=True)
            deltas = torch.autograd.grad(loss, outputs)
            for name, h, delta in zip(layers, inputs, deltas, strict=True):
                total[name] += delta.double().square().T @ h.detach().double().square()
    return total


# --- selective synaptic dampening -------------------------------------------------------------------------

SSD = "2308.07707"
SSD_GRID = tuple(
    {"alpha": alpha, "weight": weight}
    for alpha, weight in ((10.0, 1.0), (50.0, 1.0), (20.0, 0.1), (5.0, 0.1), (2.0, 0.1))
)
SAMPLE_SSD_GRID = tuple(
    {"alpha": alpha, "weight": weight}
    for alpha, weight in ((10.0, 1.0), (5.0, 1.0), (5.0, 0.1), (2.0, 0.1), (1.5, 0.1))
)


def fisher_of(context: Context, side: bool | None, per_sample: bool) -> Fisher:
    """Fisher information on training images of one side, or (None) of all classes; once for all settings."""
    model, device = context.model, context.device

    def make() -> Fisher:
        if not per_sample:
            return batch_fisher(model, training_images(context, side, FISHER_SAMPLES), device)
        linear = all(parameter.dim() == 2 for parameter in model.parameters())
        most = FISHER_SAMPLES if linear else SINGLE_SAMPLES
        return sample_fisher(model, training_images(context, side, most), device)

    asked = None if side is None else context.config.forget_labels
    return context.shared.once(("fisher", asked, side, per_sample), make, standing=side is None).value


def dampened(
    weights: Mapping[str, Tensor], forget: Fisher, whole: Fisher, alpha: float, weight: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """W min(1, lambda I_D / I_f) where I_f > alpha I_D, W elsewhere (2308.07707, equations 3 and 4).

    Args:
        weights, forget (I_f), whole (I_D): by parameter name. weight: lambda.

    Returns:
        New weights, and which were selected (bool), by name.
    """
    chosen = {name: forget[name] > alpha * whole[name] for name in weights}
    new = {}
    for name, value in weights.items():
        factor = (weight * whole[name] / forget[name]).clamp(max=1).to(value.dtype)
        new[name] = torch.where(chosen[name], value * factor, value)
    return new, chosen


def _ssd(context: Context, name: str, per_sample: bool, alpha: float, weight: float) -> Edit:
    """Dampen a copy of the classifier; say how many weights were selected."""
    model = copy.deepcopy(context.model)
    parameters = dict(model.named_parameters())
    forget, whole = fisher_of(context, True, per_sample), fisher_of(context, None, per_sample)
    with torch.no_grad():
        new, chosen = dampened(parameters, forget, whole, alpha, weight)
        for key, value in new.items():
            parameters[key].copy_(value)
    count, size = (sum(int(f(value)) for value in chosen.values()) for f in (torch.sum, torch.numel))
    log(f"{name}: alpha {alpha:g}, lambda {weight:g} select {count:,} of {size:,} weights")
    return Edit(model.eval(), chosen)


@method("ssd", "SSD", source=SSD, grid=SSD_GRID)
def ssd(context: Context, point: Point, alpha: float, weight: float) -> Edit:
    """Dampen the weights whose Fisher information on D_f is above alpha times that on the whole training set:
    W := W min(1, lambda I_D / I_f), I = mean squared gradient of batch means (64 images), on at most 10,240 images of
    either set, drawn once (the original: on all).
    """
    return _ssd(context, "ssd", False, alpha, weight)


@method("ssd_per_sample", "SSD, per sample", source=f"{SSD}, per-sample variant", grid=SAMPLE_SSD_GRID)
def ssd_per_sample(context: Context, point: Point, alpha: float, weight: float) -> Edit:
    """SSD with each image's own squared gradient in place of a batch's: free of batch size and order. On at most 10,240
    images of either set, 256 where there are convolutions.
    """
    return _ssd(context, "ssd_per_sample", True, alpha, weight)


# --- projections of a layer's input -----------------------------------------------------------------------


@dataclass(frozen=True)
class Spectrum:
    """Principal directions of a layer's input on some images: U [n, n], columns, and shares of energy [n], sum 1."""

    directions: Tensor
    shares: Tensor

    @classmethod
    def of(cls, h: Tensor) -> "Spectrum":
        """Of activations h [S, n], not centred: h^T h = U diag(sigma^2) U^T."""
        energies, directions = torch.linalg.eigh(h.double().T @ h.double())
        energies = energies.clamp_min(0)
        return cls(directions, energies / energies.sum().clamp_min(torch.finfo(energies.dtype).tiny))

    def projection(self, alpha: float) -> Tensor:
        """P = U Lambda U^T [n, n], Lambda_i = alpha s_i / ((alpha - 1) s_i + 1) for shares s_i (2312.00761)."""
        scale = alpha * self.shares / ((alpha - 1) * self.shares + 1)
        return self.directions * scale @ self.directions.T


def layer_inputs(model: HookedModel, images: Images, device: torch.device, batch_size: int = 512) -> list[Tensor]:
    """h [S, n] that enters each linear layer of the stack, inputs first."""
    layers = [model.target(place) for place in range(len(model.linears))]
    parts: list[list[Tensor]] = [[] for _ in layers]
    with inspecting(model), torch.inference_mode(), ExitStack() as stack:
        records = [stack.enter_context(capture(layer)) for layer in layers]
        for begin in range(0, len(images), batch_size):
            model(images.batch(slice(begin, begin + batch_size))[0].to(device))
            for part, record in zip(parts, records, strict=True):
                part.append(record.take()[0])
    return [torch.cat(part) for part in parts]


def _with_inputs_edited(context: Context, edit: Callable[[int], Tensor], places: range) -> Edit:
    """Set W := W E in some layers of a copy's stack, E [n, n] = edit(place)."""
    model = copy.deepcopy(context.own)
    names = linear_names(model)
    weights = {names[place]: model.target(place).weight for place in places}
    with torch.no_grad():
        for place, weight in zip(places, weights.values(), strict=True):
            weight.copy_(weight.double() @ edit(place))
    allowed = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    return Edit(model.eval(), allowed)


def svd_edit(forget: Spectrum, retain: Spectrum, alpha_forget: float, alpha_retain: float) -> Tensor:
    """E [n, n] with h E^T = h (I - P_f (I - P_r)) for a row h: what of h lies in the forget space, less what of that
    the retain space holds as well, is taken away.
    """
    eye = torch.eye(len(forget.shares), dtype=forget.shares.dtype, device=forget.shares.device)
    return eye - (eye - retain.projection(alpha_retain)) @ forget.projection(alpha_forget)


@method(
    "svd_projection",
    "SVD projection",
    source="2312.00761",
    grid=tuple(
        {"alpha_forget": forget, "alpha_retain": retain}
        for forget, retain in ((3.0, 100.0), (3.0, 30.0), (3.0, 10.0), (30.0, 100.0), (3.0, 300.0))
    ),
)
def svd_projection(context: Context, point: Point, alpha_forget: float, alpha_retain: float) -> Edit:
    """Inputs of every linear layer lose h P_f (I - P_r), so W := W (I - P_f (I - P_r))^T, P scaled projections onto the
    principal directions of the input on 900 images of D_f and 900 of D_r, as the untouched classifier has them.
    Convolutions are left alone (the original edits them too). Not checked against the paper's text or code: which side
    of W the transpose stands on was settled by scores on validation images.
    """

    def make() -> list[tuple[Spectrum, Spectrum]]:
        sides = (training_images(context, side, SVD_SAMPLES) for side in (True, False))
        inputs = (layer_inputs(context.own, images, context.device) for images in sides)
        return [(Spectrum.of(forget), Spectrum.of(retain)) for forget, retain in zip(*inputs, strict=True)]

    spectra = context.shared.once(("spectra", context.config.forget_labels), make).value
    edits = range(len(spectra))
    return _with_inputs_edited(context, lambda place: svd_edit(*spectra[place], alpha_forget, alpha_retain), edits)


def residual_directions(prototypes: Tensor, forget: Tensor) -> Tensor:
    """Orthonormal D [n, F]: what the forgotten classes' prototypes have beyond the span of the retained ones'.

    Args:
        prototypes: mean input of each class [C, n]. forget: bool [C].
    """
    _, size, basis = torch.linalg.svd(prototypes[~forget], full_matrices=False)
    basis = basis[size > RANK_TOLERANCE * size[0]]
    residual = prototypes[forget] - prototypes[forget] @ basis.T @ basis
    _, size, directions = torch.linalg.svd(residual, full_matrices=False)
    return directions[size > RANK_TOLERANCE * torch.linalg.matrix_norm(prototypes)].T


def damp_edit(directions: Tensor, strength: float) -> Tensor:
    """E = I - s D D^T [n, n], for D [n, F] orthonormal."""
    eye = torch.eye(len(directions), dtype=directions.dtype, device=directions.device)
    return eye - strength * directions @ directions.T


@method(
    "damp",
    "DAMP-like projection",
    source="after 2604.15166",
    grid=tuple(
        {"strength": strength, "layers": layers}
        for strength, layers in ((1.0, 1), (1.0, 2), (1.5, 1), (2.0, 1), (2.5, 1))
    ),
)
def damp(context: Context, point: Point, strength: float, layers: int) -> Edit:
    """W := W (I - s d d^T) in the last layers: d is what the class's mean input has beyond the span of the retained
    classes' means, so that these pass unchanged. Written after a summary of the paper, not checked against it.
    """

    def means() -> tuple[Tensor, list[Tensor]]:
        images = training_images(context, None, FISHER_SAMPLES)
        present = images.labels.unique()
        inputs = [h.double() for h in layer_inputs(context.own, images, context.device)]
        return present, [torch.stack([h[images.labels == label].mean(0) for label in present]) for h in inputs]

    def make() -> list[Tensor]:
        present, prototypes = context.shared.once("mean inputs", means, standing=True).value
        chosen = context.data.is_forgotten(present)
        return [residual_directions(one, chosen.to(one.device)) for one in prototypes]

    found = context.shared.once(("residual directions", context.config.forget_labels), make).value
    places = range(max(0, len(found) - layers), len(found))
    return _with_inputs_edited(context, lambda place: damp_edit(found[place], strength), places)


# --- masks ------------------------------------------------------------------------------------------------


@mask_method("magnitude", "largest weights", axes=("kappa",), source="control")
def magnitude(context: Context, point: Point) -> Mask:
    """Switch off the kappa largest weights |W| of the target layers, whatever the classes to forget."""
    weight = context.graph.join(as_matrices([weight.detach().abs() for weight in context.weights]))
    return top_mask(weight, point.kappa, context.graph)


def fisher_ratio(forget: Tensor, retain: Tensor) -> Tensor:
    """I_f / I_r, of one shape; 0 where I_f is 0, infinite where I_r alone is 0."""
    return torch.where(forget > 0, forget / retain, torch.zeros_like(forget))


@mask_method("fisher_mask", "Fisher ratio", axes=("kappa",), source=f"control after {SSD}")
def fisher_mask(context: Context, point: Point) -> Mask:
    """Switch off the kappa weights of the target layers with the largest ratio I_f / I_r of per-sample Fisher
    information on D_f and on D_r: as importance without its sign.
    """
    forget, retain = (fisher_of(context, side, True) for side in (True, False))
    ratios = [fisher_ratio(forget[name], retain[name]) for name in context.graph.names]
    return top_mask(context.graph.join(as_matrices(ratios)), point.kappa, context.graph)
