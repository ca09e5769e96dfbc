"""From theta to masks: relaxed k-subset samplers, mask strategies, and switching weights off and on again.

Polarity, everywhere: 1 = weight kept, 0 = weight switched off. Symbols as in docs/concepts.md.
"""

import hashlib
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from core.artifacts import read_tensors, write_tensors
from core.config import TopKSamplers, UserError, as_tuple
from graphs.layout import WeightGraph, check_budget


class Sampler(Protocol):
    """Relaxed k-subset: theta [..., N] -> inclusion degrees [..., N] in (0, 1)."""

    def __call__(
        self, theta: Tensor, k: int, temperature: float, generator: torch.Generator | None = None
    ) -> Tensor: ...


SAMPLERS: dict[TopKSamplers, Sampler] = {}
NEWTON_STEPS = 60  # safeguarded: bisection alone reaches float32 resolution in fewer
BUDGET_TOLERANCE = 1e-7  # of k, on the sum of the degrees


def _sampler(name: TopKSamplers) -> Callable[[Sampler], Sampler]:
    def register(function: Sampler) -> Sampler:
        SAMPLERS[name] = function
        return function

    return register


# --- samplers ---------------------------------------------------------------------------------------------


def _scale(theta: Tensor, temperature: float) -> Tensor:
    """[..., 1]: the temperature, relative to std(theta), kept off zero; constant for the gradient."""
    spread = theta.detach().std(-1, keepdim=True, correction=0)
    floor = 1e-6 * theta.detach().abs().amax(-1, keepdim=True).clamp_min(1e-6)
    return temperature * torch.maximum(spread, floor)


def _kth_largest(theta: Tensor, k: int) -> Tensor:
    return theta.kthvalue(theta.shape[-1] - k + 1, dim=-1, keepdim=True).values


@_sampler(TopKSamplers.threshold)
def threshold_topk(theta: Tensor, k: int, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """sigmoid((theta - k-th largest) / T): k entries are >= 1/2; the sum is not k.

    Args:
        theta: logits [..., N]. k: 1..N. temperature: in units of std(theta). generator: unused.

    Returns:
        Inclusion degrees [..., N] in (0, 1).
    """
    check_budget(k, theta.shape[-1])
    return torch.sigmoid((theta - _kth_largest(theta, k)) / _scale(theta, temperature))


@_sampler(TopKSamplers.gumbel)
def gumbel_topk(theta: Tensor, k: int, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Gumbel-top-k (Kool, van Hoof, Welling 2019, arXiv:1903.06059), relaxed by the threshold sigmoid.

    The top k of theta + Gumbel noise is a draw of k entries without replacement from softmax(theta).
    Arguments and result as `threshold_topk`; `generator` draws the noise.
    """
    uniform = torch.rand(theta.shape, generator=generator, device=theta.device, dtype=torch.float32)
    tiny = torch.finfo(torch.float32).tiny
    noise = -torch.log(-torch.log(uniform.clamp(tiny, 1 - 2**-24)))
    return threshold_topk(theta + noise.to(theta.dtype), k, temperature)


def _budget_degrees(u: Tensor, k: int, tolerance: float) -> Tensor:
    """d = sigmoid(u - tau) [..., N] with tau such that sum(d) = k, by Newton steps kept inside a shrinking bracket.

    N sigmoid(min u - tau) <= sum <= N sigmoid(max u - tau) brackets the root. Values are centred on the k-th
    largest, where float32 resolves best just where it matters.
    """
    size = u.shape[-1]
    centred = u - _kth_largest(u, k)
    logit = math.log(k / (size - k))
    low, high = centred.amin(-1, keepdim=True) - logit, centred.amax(-1, keepdim=True) - logit
    tau = torch.zeros_like(low).clamp(low, high)
    degrees = torch.sigmoid(centred - tau)
    for _ in range(NEWTON_STEPS):
        excess = degrees.sum(-1, keepdim=True, dtype=torch.float64) - k
        if float(excess.abs().max()) <= tolerance * k:
            break
        low, high = torch.where(excess > 0, tau, low), torch.where(excess > 0, high, tau)
        slope = (degrees * (1 - degrees)).sum(-1, keepdim=True, dtype=torch.float64)
        newton = (tau + excess / slope.clamp_min(1e-30)).to(tau.dtype)
        tau = torch.where((newton > low) & (newton < high), newton, (low + high) / 2)
        degrees = torch.sigmoid(centred - tau)
    return degrees


class _ExactBudget(torch.autograd.Function):
    """d = sigmoid((theta - tau) / T) with sum(d) = k; implicit gradient s (g - <s g> / <s>) / T."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, k: int, scale: Tensor, tolerance: float) -> Tensor:
        u = (theta / scale).to(torch.promote_types(theta.dtype, torch.float32))
        degrees = _budget_degrees(u, k, tolerance)
        ctx.save_for_backward(degrees, scale)
        return degrees.to(theta.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # ty: ignore[incompatible-method-override]
        degrees, scale = ctx.saved_tensors
        slope = degrees * (1 - degrees)
        weighted = (slope * grad).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True).clamp_min(1e-30)
        return ((grad - weighted) * slope / scale).to(grad.dtype), None, None, None


def exact_budget(theta: Tensor, k: int, scale: Tensor, tolerance: float = BUDGET_TOLERANCE) -> Tensor:
    """d = sigmoid((theta - tau) / scale) [..., N] with sum(d) = k; scale [..., 1] is constant for the gradient.

    Args:
        tolerance: of k, on the sum.
    """
    return _ExactBudget.apply(theta, k, scale, tolerance)


@_sampler(TopKSamplers.sinkhorn)
def sinkhorn_topk(theta: Tensor, k: int, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Entropic optimal-transport top-k (Xie et al. 2020, arXiv:2002.06504), two bins: sum(d) = k exactly.

    The gradient is projected onto the directions that keep the budget, so that pushing every logit up
    gains nothing. O(N) memory. Arguments and result as `threshold_topk`.
    """
    check_budget(k, theta.shape[-1])
    if k == theta.shape[-1]:
        return torch.ones_like(theta) + 0 * theta  # the only subset there is
    return exact_budget(theta, k, _scale(theta, temperature))


def hard_topk(scores: Tensor, k: int) -> Tensor:
    """Boolean tensor, True at the k largest entries over *all* dimensions; ties go to the lower flat index.

    Raises:
        UserError: k is not in 1..N, or a score is NaN.
    """
    check_budget(k, scores.numel())
    if bool(scores.isnan().any()):
        raise UserError("scores of weights are not numbers (the GCN diverged): lower gcn.lr, or train.lr")
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    chosen[scores.flatten().argsort(descending=True, stable=True)[:k]] = True
    return chosen.view(scores.shape)


# --- masks ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mask:
    """Which weights of some layers are kept: `keep` [*graph.shape] bool, their layout, and facts that travel along."""

    keep: Tensor
    graph: WeightGraph
    facts: dict = field(default_factory=dict)

    @property
    def switched_off(self) -> int:
        """How many weights the mask switches off."""
        return int((~self.keep).sum())

    def save(self, path: Path) -> None:
        """Write safetensors, uint8, 1 = kept: `mask` [m, n] of one layer, `mask.<parameter>` [m, n] of several.

        Facts and the layers' parameter names travel as metadata.
        """
        layers = [part.to(torch.uint8).cpu().contiguous().numpy() for part in self.graph.split(self.keep)]
        names = self.graph.names or tuple(str(place) for place in range(len(layers)))
        keys = ["mask"] if len(layers) == 1 else [f"mask.{name}" for name in names]
        layout = {"names": self.graph.names, "joined": self.graph.joined, "keys": keys}
        write_tensors(path, dict(zip(keys, layers, strict=True)), self.facts | {"layout": layout})

    @classmethod
    def load(cls, path: Path | str) -> "Mask":
        """Read what `save` wrote.

        Raises:
            UserError: not such a file.
        """
        path = Path(path)
        tensors, facts = read_tensors(path, foreign=True)
        layout = facts.pop("layout", {})
        keys = layout.get("keys", ["mask"])
        if set(keys) != set(tensors) or any(t.ndim != 2 or t.max(initial=0) > 1 for t in tensors.values()):
            raise UserError(f"{path} holds no 0/1 tensor `mask`: give a mask file that `run` wrote")
        keep = [torch.from_numpy(tensors[key]).bool() for key in keys]
        shapes = tuple((part.shape[0], part.shape[1]) for part in keep)
        graph = WeightGraph(shapes, tuple(layout.get("joined", ())), tuple(layout.get("names", ())))
        return cls(graph.join(keep), graph, facts)


def random_mask(graph: WeightGraph, kappa: int, generator: torch.Generator) -> Mask:
    """Switch off kappa weights drawn uniformly without replacement."""
    return Mask(~hard_topk(torch.rand(graph.shape, generator=generator), kappa), graph)


def feasibility_score(importance: Tensor, forget_class: int | Sequence[int]) -> Tensor:
    """s_ij = mean importance for the classes to forget minus mean importance over the retained ones.

    Args:
        importance: graded importance per class [C, *shape].

    Returns:
        s [*shape].
    """
    forget, retain = _sides(importance, forget_class)
    return forget.mean(0) - retain.mean(0)


def _sides(values: Tensor, forget_class: int | Sequence[int]) -> tuple[Tensor, Tensor]:
    """Values of the classes to forget and of the retained ones. [C, ...] -> [F, ...], [C - F, ...]."""
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[list(as_tuple(forget_class))] = True
    return values[chosen], values[~chosen]


def top_mask(score: Tensor, kappa: int, graph: WeightGraph) -> Mask:
    """Switch off the kappa weights of largest score [*graph.shape]; ties go to the lower flat index."""
    return Mask(~hard_topk(score, kappa).cpu(), graph)


def set_difference_mask(importance: Tensor, forget_class: int | Sequence[int], top_k: int, graph: WeightGraph) -> Mask:
    """Switch off what is in the top-K mask of a class to forget and in no retained class's.

    Args:
        importance: [C, *graph.shape].

    Returns:
        A mask that switches off at most top_k weights for each class, possibly none.
    """
    chosen = torch.stack([hard_topk(scores, top_k) for scores in importance])
    forget, retain = _sides(chosen, forget_class)
    return Mask(~(forget.any(0) & ~retain.any(0)), graph)


def weights_sha256(weights: Sequence[Tensor]) -> str:
    """SHA-256 of the target layers' weights [m, n], inputs first: types, shapes and bits, wherever they lie."""
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(f"{weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_parent(mask: Mask, weights: Sequence[Tensor]) -> None:
    """Check that a mask from a file is applied to the weights that it was made for.

    On other weights of the same shape it would switch off places that mean nothing there. A mask made in memory
    carries no facts, and is not asked.

    Raises:
        UserError: the weights are others.
    """
    made_for = mask.facts.get("weights_sha256")
    if made_for is None and "classifier_sha256" not in mask.facts:
        return
    found = weights_sha256(weights)
    if made_for != found:
        known = f"are {made_for[:12]}" if isinstance(made_for, str) else "its file does not name"
        raise UserError(
            f"the mask is of another classifier, {mask.facts.get('classifier_path')}, whose weights {known}, these are "
            f"{found[:12]}: load that one, unmasked, or say masked(..., any_weights=True)"
        )


@contextmanager
def masked(weights: nn.Parameter | Sequence[nn.Parameter], mask: Mask, any_weights: bool = False) -> Generator[None]:
    """Switch weights off for the length of the block; afterwards the parameters are bit-identical.

    Args:
        weights: the parameters that the mask is for, one or (inputs first) several: [m, n], or [m, n, kh, kw], of which
            the mask has the matrix [m, n * kh * kw].
        mask: of the same shapes.
        any_weights: apply a mask from a file to other weights than it was made for, too.

    Raises:
        UserError: the shapes differ, or the mask's file says that it was made for other weights.
    """
    layers = [weights] if isinstance(weights, nn.Parameter) else list(weights)
    needed = tuple((len(weight), weight.numel() // len(weight)) for weight in layers)
    if mask.graph.shapes != needed:
        found, wanted = (", ".join(f"{m} x {n}" for m, n in shapes) for shapes in (mask.graph.shapes, needed))
        raise UserError(f"the mask is for {found}, the layers are {wanted}: use one made for this model and mask_layer")
    if not any_weights:
        check_parent(mask, layers)
    originals = [weight.detach().clone() for weight in layers]
    try:
        with torch.no_grad():
            for weight, keep in zip(layers, mask.graph.split(mask.keep), strict=True):
                weight.masked_fill_(~keep.reshape(weight.shape).to(weight.device), 0.0)
        yield
    finally:
        with torch.no_grad():
            for weight, original in zip(layers, originals, strict=True):
                weight.copy_(original)
