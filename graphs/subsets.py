"""Relaxed and exact k-subsets of a graph's vertices: which weights, and how far, for a score of each."""

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from core.config import TopKSamplers, UserError
from graphs.layout import check_budget


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
    """[..., 1]; NumPy finds the same value in a tenth of the time, where no gradient is asked for."""
    place = theta.shape[-1] - k
    if theta.requires_grad or theta.device.type != "cpu":
        return theta.kthvalue(place + 1, dim=-1, keepdim=True).values
    return torch.from_numpy(np.partition(theta.numpy(), place, axis=-1)[..., place, None])


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


def tail(scores: Tensor) -> Tensor:
    """Compute -log(share of weights with a larger score): few stand out, whatever the number of all. [*shape]."""
    order = scores.flatten().argsort(descending=True, stable=True)
    theta = torch.empty(len(order), device=scores.device)
    theta[order] = -torch.log((torch.arange(len(order), device=scores.device) + 0.5) / len(order))
    return theta.view(scores.shape)


def signed_log(column: Tensor) -> Tensor:
    """sign(v) log(1 + |v| / mean |v|): free of scale, and heavy tails stay in sight."""
    size = column.abs()
    return column.sign() * torch.log1p(size / size.mean().clamp_min(torch.finfo(column.dtype).tiny))
