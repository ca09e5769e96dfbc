"""From theta to masks: relaxed k-subset samplers, mask strategies, and switching weights off and on again.

Polarity, everywhere: 1 = weight kept, 0 = weight switched off. Symbols as in the README's table.
"""

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from artifacts import read_tensors, write_tensors
from config import TopKSamplers, UserError


class Sampler(Protocol):
    """Relaxed k-subset: theta [..., N] -> inclusion degrees [..., N] in (0, 1)."""

    def __call__(
        self, theta: Tensor, k: int, temperature: float, generator: torch.Generator | None = None
    ) -> Tensor: ...


SAMPLERS: dict[TopKSamplers, Sampler] = {}
NEWTON_STEPS = 60  # safeguarded: bisection alone reaches float32 resolution in fewer


def _sampler(name: TopKSamplers) -> Callable[[Sampler], Sampler]:
    def register(function: Sampler) -> Sampler:
        SAMPLERS[name] = function
        return function

    return register


def check_budget(k: int, size: int, name: str = "k") -> None:
    """Raise `UserError` unless 1 <= k <= size."""
    if not 1 <= k <= size:
        raise UserError(f"{name} is {k}, but the masked layer has {size} weights: choose from 1 to {size}")


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


def _budget_degrees(u: Tensor, k: int) -> Tensor:
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
        if float(excess.abs().max()) <= 1e-7 * k:
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
    def forward(ctx: Any, theta: Tensor, k: int, scale: Tensor) -> Tensor:
        u = (theta / scale).to(torch.promote_types(theta.dtype, torch.float32))
        degrees = _budget_degrees(u, k)
        ctx.save_for_backward(degrees, scale)
        return degrees.to(theta.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # ty: ignore[incompatible-method-override]
        degrees, scale = ctx.saved_tensors
        slope = degrees * (1 - degrees)
        weighted = (slope * grad).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True).clamp_min(1e-30)
        return ((grad - weighted) * slope / scale).to(grad.dtype), None, None


@_sampler(TopKSamplers.sinkhorn)
def sinkhorn_topk(theta: Tensor, k: int, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Entropic optimal-transport top-k (Xie et al. 2020, arXiv:2002.06504), two bins: sum(d) = k exactly.

    The gradient is projected onto the directions that keep the budget, so that pushing every logit up
    gains nothing. O(N) memory. Arguments and result as `threshold_topk`.
    """
    check_budget(k, theta.shape[-1])
    if k == theta.shape[-1]:
        return torch.ones_like(theta) + 0 * theta  # the only subset there is
    return _ExactBudget.apply(theta, k, _scale(theta, temperature))


def hard_topk(scores: Tensor, k: int) -> Tensor:
    """Boolean tensor, True at the k largest entries over *all* dimensions; ties go to the lower flat index.

    Raises:
        UserError: k is not in 1..N. ValueError: a score is NaN.
    """
    check_budget(k, scores.numel())
    if bool(scores.isnan().any()):
        raise ValueError("scores hold NaN: the GCN or its input diverged")
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    chosen[scores.flatten().argsort(descending=True, stable=True)[:k]] = True
    return chosen.view(scores.shape)


# --- masks ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mask:
    """Which weights of one layer are kept: `keep` [m, n] bool, and facts that travel with it."""

    keep: Tensor
    facts: dict = field(default_factory=dict)

    @property
    def switched_off(self) -> int:
        """How many weights the mask switches off."""
        return int((~self.keep).sum())

    def save(self, path: Path) -> None:
        """Write safetensors: `mask` [m, n] uint8, 1 = kept; facts as metadata."""
        write_tensors(path, {"mask": self.keep.to(torch.uint8).cpu().numpy()}, self.facts)

    @classmethod
    def load(cls, path: Path) -> "Mask":
        """Read what `save` wrote.

        Raises:
            UserError: not such a file.
        """
        tensors, facts = read_tensors(path)
        if list(tensors) != ["mask"] or tensors["mask"].max(initial=0) > 1:
            raise UserError(f"{path} holds no 0/1 tensor `mask`: give a mask file that `run` wrote")
        return cls(torch.from_numpy(tensors["mask"]).bool(), facts)


def random_mask(shape: tuple[int, int], kappa: int, generator: torch.Generator) -> Mask:
    """Switch off kappa weights drawn uniformly without replacement."""
    return Mask(~hard_topk(torch.rand(shape, generator=generator), kappa))


def feasibility_score(importance: Tensor, forget_class: int) -> Tensor:
    """s_ij = importance for the forget class minus mean importance over the retained classes (METHOD 4).

    Args:
        importance: graded importance per class [C, m, n].

    Returns:
        s [m, n].
    """
    retained = importance.sum(0) - importance[forget_class]
    return importance[forget_class] - retained / (len(importance) - 1)


def feasibility_mask(importance: Tensor, forget_class: int, kappa: int) -> Mask:
    """Switch off the kappa weights of largest `feasibility_score`; ties go to the lower flat index."""
    return Mask(~hard_topk(feasibility_score(importance, forget_class), kappa))


def set_difference_mask(importance: Tensor, forget_class: int, topK: int) -> Mask:
    """Switch off what is in the forget class's top-K mask and in no retained class's.

    Args:
        importance: [C, m, n].

    Returns:
        A mask that switches off at most topK weights, possibly none.
    """
    chosen = torch.stack([hard_topk(scores, topK) for scores in importance])
    others = torch.cat([chosen[:forget_class], chosen[forget_class + 1 :]]).any(0)
    return Mask(~(chosen[forget_class] & ~others))


@contextmanager
def masked(weight: nn.Parameter, mask: Mask) -> Generator[None]:
    """Switch weights off for the length of the block; afterwards the parameter is bit-identical.

    Args:
        weight: parameter [m, n]. mask: `keep` of the same shape.

    Raises:
        UserError: the shapes differ.
    """
    if mask.keep.shape != weight.shape:
        found, needed = tuple(mask.keep.shape), tuple(weight.shape)
        raise UserError(f"the mask is {found}, the layer {needed}: use a mask made for this model and mask_layer")
    original = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.masked_fill_(~mask.keep.to(weight.device), 0.0)
        yield
    finally:
        with torch.no_grad():
            weight.copy_(original)
