"""Message passing between all weights, in time and memory linear in their number: the operator of `model.MaskingGCN`.

The edge list is never built. A node's neighbours are the weights of the two neurons that it touches, so that one sum
per neuron holds all that its weights aggregate. Aggregation is linear: the matrix V is applied to the sums of m + n
neurons instead of to m n nodes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from core.config import Activations, Aggregations
from graphs.layout import Neurons, WeightGraph

SPLITS = 32  # parts of a tall product A^T B: BLAS computes one such product on a single core, a batch of them on all


def _matched(a: Tensor, b: Tensor) -> Tensor:
    """Sum the outer products over all leading positions. [..., d], [..., k] -> [d, k]."""
    a, b = a.flatten(0, -2), b.flatten(0, -2)
    even = len(a) // SPLITS * SPLITS
    left, right = a[:even].view(SPLITS, -1, a.shape[1]), b[:even].view(SPLITS, -1, b.shape[1])
    product = torch.bmm(left.transpose(1, 2), right).sum(0)
    return product if even == len(a) else product.addmm_(a[even:].T, b[even:])


def _total(parts: Sequence[Tensor]) -> Tensor:
    return reduce(torch.add, parts)


@dataclass(frozen=True)
class _Aggregation:
    """How neighbours are summed: a node's two neurons' sums, less the node itself, normalised by degrees.

    agg(x)_v = outer_v (sum of inner_u x_u over the weights u of both neurons of v - own inner_v x_v)

    Args:
        graph: layout of the weights.
        inner: normalisation by degrees before the sum, one factor for each layer: all its nodes have the same degree.
        outer: normalisation after the sum, one factor for each layer.
        own: how often a node's own x is to be taken out of the two sums that hold it: 2 leaves its neighbours alone,
            1 the neighbours and the node itself.
    """

    graph: WeightGraph
    inner: tuple[float, ...]
    outer: tuple[float, ...]
    own: float

    @classmethod
    def of(cls, kind: Aggregations, graph: WeightGraph) -> "_Aggregation":
        """Make the `mean` over the neighbours, or `gcn`: D^-1/2 (A + I) D^-1/2, D the degrees with self loops."""
        if kind is Aggregations.mean:
            return cls(graph, (1.0,) * len(graph.shapes), tuple(1 / max(1, d) for d in graph.degrees), 2.0)
        root = tuple((d + 1) ** -0.5 for d in graph.degrees)
        return cls(graph, root, root, 1.0)

    def transposed(self) -> "_Aggregation":
        """Return the adjoint: the adjacency is symmetric, so that only the normalisations change sides."""
        return _Aggregation(self.graph, self.outer, self.inner, self.own)

    def gather(self, nodes: Sequence[Tensor]) -> list[Tensor]:
        """Sum over the weights of each neuron. For each layer [B, m, n, d] -> for each row of neurons [B, count, d]."""

        def over(place: int | None, axis: int) -> list[Tensor]:
            if place is None:
                return []
            total, factor = nodes[place].sum(axis), self.inner[place]
            return [total if factor == 1.0 else total.mul_(factor)]

        def at(row: Neurons) -> Tensor:  # an output's weights are a row of W, an input's a column
            parts = over(row.below, 2) + over(row.above, 1)
            return parts[0] if len(parts) == 1 else parts[0].add_(parts[1])

        return [at(row) for row in self.graph.neurons]

    def scatter(self, place: int, sums: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
        """Compute outer (sum at output i + sum at input j) + bias for the nodes of a layer.

        Args:
            place: of the layer in the graph.
            sums: for each row of neurons, [B, count, k].
            bias: [k].

        Returns:
            [B, m, n, k].
        """
        rows = self.graph.neurons
        outputs = next(value for row, value in zip(rows, sums, strict=True) if row.below == place) * self.outer[place]
        inputs = next(value for row, value in zip(rows, sums, strict=True) if row.above == place) * self.outer[place]
        if bias is not None:
            outputs += bias
        return outputs.unsqueeze(2) + inputs.unsqueeze(1)

    def local(self, place: int, neighbour: Tensor, alone: Tensor | None) -> Tensor:
        """Return the matrix [d, k] that a node's own x is multiplied by.

        It is S (`alone`) less the part of V (`neighbour`) that stands for the node itself in the sums of its neurons,
        so that taking the node out of its neighbours costs no pass over the nodes.
        """
        less = neighbour * (-self.own * self.inner[place] * self.outer[place])
        return less if alone is None else less.add_(alone)


@dataclass(frozen=True)
class _Activation:
    """A non-linearity whose derivative follows from its output, so that its input need not be kept.

    Args:
        apply_: in place.
        backward: (gradient of the output, output, tensor to write the gradient of the input into).
    """

    apply_: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]


_ATEN = torch.ops.aten
_ACTIVATIONS = {
    Activations.sigmoid: _Activation(
        torch.sigmoid_, lambda g, y, out: _ATEN.sigmoid_backward.grad_input(g, y, grad_input=out)
    ),
    Activations.relu: _Activation(
        torch.relu_, lambda g, y, out: _ATEN.threshold_backward.grad_input(g, y, 0, grad_input=out)
    ),
}


@dataclass(frozen=True)
class _Rounds:
    """What all rounds share.

    Args:
        agg: how neighbours are summed.
        activation: the non-linearity.
        residual: whether x is added to a round's result, from the second round on.
    """

    agg: _Aggregation
    activation: _Activation
    residual: bool

    def rounds(self, tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """S, V and b of each round, from the arguments of `_MessagePassing`."""
        return [tensors[i : i + 3] for i in range(len(self.agg.graph.shapes), len(tensors) - 2, 3)]


@dataclass(frozen=True)
class _Passed:
    """What a pass makes of all rounds, that its gradient is computed from.

    Args:
        outputs: node features, then y of each round; for each layer [B, m, n, d].
        sums: for each round, sums of its x at each row of neurons, [B, count, d].
        x: what the readout reads, for each layer [B, m, n, k]: the sum of all y with `residual`, else the last y.
    """

    outputs: list[list[Tensor]]
    sums: list[list[Tensor]]
    x: list[Tensor]

    @classmethod
    def of(cls, how: _Rounds, tensors: Sequence[Tensor]) -> "_Passed":
        """Carry out all rounds; arguments as those of `_MessagePassing`."""
        agg, layers = how.agg, len(how.agg.graph.shapes)
        outputs, sums, x = [list(tensors[:layers])], [], list(tensors[:layers])
        for index, (alone, neighbour, bias) in enumerate(how.rounds(tensors)):
            sums.append(agg.gather(x))
            spread = [total @ neighbour for total in sums[-1]]
            out = [agg.scatter(place, spread, bias) for place in range(layers)]
            for place, y in enumerate(out):
                y.flatten(0, 2).addmm_(x[place].flatten(0, 2), agg.local(place, neighbour, alone))
                how.activation.apply_(y)
            outputs.append(out)
            # The first sum needs a place of its own, because the y that it begins with is kept.
            adding = how.residual and index
            x = [torch.add(a, y, out=a if index > 1 else None) for a, y in zip(x, out, strict=True)] if adding else out
        return cls(outputs, sums, x)


class _MessagePassing(torch.autograd.Function):
    """All rounds y = act(x S + agg(x) V + b), x' = y (residual: x + y, from the second on), and the readout.

    Autograd would keep every intermediate [B, m, n, k]. This function keeps y alone of each round, the last x, and the
    sums at the neurons, which are small; earlier x are made again on the way back. The way back uses up what was kept,
    round by round, and takes one layer after the other, so that it holds little more than the way there. A second way
    back, as `retain_graph` allows, first goes there again.

    Args of `apply`:
        how: what all rounds share.
        tensors: each layer's x [B, m, n, d]; then S (None for `gcn`), V and b of each round; then the readout's
            w [1, k] and b [1].

    Returns:
        For each layer, theta [B, m, n].
    """

    @staticmethod
    def forward(ctx: Any, how: _Rounds, *tensors: Any) -> tuple[Tensor, ...]:
        ctx.how, ctx.passed = how, _Passed.of(how, tensors)
        ctx.save_for_backward(*tensors)
        weight, bias = tensors[-2:]
        return tuple(nn.functional.linear(y, weight, bias).squeeze(-1) for y in ctx.passed.x)

    @staticmethod
    @torch.autograd.function.once_differentiable  # works in place: a second derivative is refused
    def backward(ctx: Any, *grad_theta: Tensor) -> tuple[Tensor | None, ...]:
        how, agg, tensors = ctx.how, ctx.how.agg, ctx.saved_tensors
        passed, ctx.passed = ctx.passed or _Passed.of(how, tensors), None
        outputs, sums, x = passed.outputs, passed.sums, passed.x
        gradients: list[Tensor | None] = [
            _total([_matched(g.unsqueeze(-1), y) for g, y in zip(grad_theta, x, strict=True)]),
            _total([g.sum() for g in grad_theta]).reshape(1),
        ]
        grad: list[Any] = [g.unsqueeze(-1) * tensors[-2][0] for g in grad_theta]
        rounds = how.rounds(tensors)
        for index in reversed(range(len(rounds))):
            alone, neighbour, _ = rounds[index]
            adding = how.residual and index > 0
            # From here on x is this round's input, and `inner` the gradient of what its non-linearity was applied to.
            # Where x was added to the result, `grad` also reaches x past this round: then `inner` takes the place of y.
            out = outputs.pop()
            x = [a.sub_(y) for a, y in zip(x, out, strict=True)] if adding else list(outputs[-1])
            inner: list[Any] = [
                how.activation.backward(g, y, y if adding else g) for g, y in zip(grad, out, strict=True)
            ]
            del out
            heard = agg.transposed().gather(inner)  # sums of the gradient at the neurons, for V and for x alike
            gradients = _parameter_gradients(agg, x, sums[index], inner, heard, alone) + gradients
            for place, g in enumerate(grad):
                grad[place] = None
                if index or ctx.needs_input_grad[1]:  # node features are data mostly: their gradient is spared
                    sent = _grad_input(agg, place, inner[place], heard, neighbour, alone)
                    grad[place] = sent.add_(g) if adding else sent
                inner[place] = None
        return None, *grad, *gradients


def _parameter_gradients(
    agg: _Aggregation,
    nodes: Sequence[Tensor],
    sums: Sequence[Tensor],
    grad: Sequence[Tensor],
    heard: Sequence[Tensor],
    alone: Tensor | None,
) -> list[Tensor | None]:
    """Compute the gradients of S, V and b of a round.

    sum over nodes of agg(x)_v^T g_v is taken at the neurons, where both sides are sums already; then the nodes' own
    products are taken out, as in `_Aggregation.local`.

    Args:
        nodes: the round's x of each layer, [B, m, n, d].
        sums: of x at each row of neurons, [B, count, d].
        grad: dl/d(pre-activation) of each layer, [B, m, n, k].
        heard: sums of `grad` at each row of neurons, [B, count, k].
        alone: S, None for `gcn`.
    """
    local = [_matched(x, g) for x, g in zip(nodes, grad, strict=True)]
    neighbour = _total([_matched(a, b) for a, b in zip(sums, heard, strict=True)])
    for place, product in enumerate(local):
        neighbour = neighbour - agg.own * agg.inner[place] * agg.outer[place] * product
    bias = _total([g.flatten(0, 2).sum(0) for g in grad])
    return [None if alone is None else _total(local), neighbour, bias]


def _grad_input(
    agg: _Aggregation, place: int, grad: Tensor, heard: Sequence[Tensor], neighbour: Tensor, alone: Tensor | None
) -> Tensor:
    """Compute dl/dx [B, m, n, d] of a layer's nodes: the adjoint aggregation of `grad`, with transposed matrices."""
    out = agg.transposed().scatter(place, [total @ neighbour.T for total in heard])
    out.flatten(0, 2).addmm_(grad.flatten(0, 2), agg.local(place, neighbour, alone).T)
    return out


def message_passing(
    graph: WeightGraph,
    nodes: Sequence[Tensor],
    rounds: Sequence[tuple[Tensor | None, Tensor, Tensor]],
    readout: tuple[Tensor, Tensor],
    aggregation: Aggregations,
    activation: Activations,
    residual: bool,
) -> tuple[Tensor, ...]:
    """Apply all rounds x' = act(x S + agg(x) V + b) and the readout theta = x w + b, differentiable.

    `mean` averages over the neighbours (GraphSAGE, Hamilton et al. 2017, arXiv:1706.02216); `gcn` sums over the
    neighbours and the node itself, normalised by degrees (Kipf and Welling 2017, arXiv:1609.02907), without S.

    Args:
        graph: layout of the weights.
        nodes: x of each layer, contiguous, [B, m, n, F].
        rounds: S [F, d] (None for `gcn`), V [F, d] and b [d] of each round; F is d from the second on.
        readout: w [1, d] and b [1].
        aggregation: how neighbours are summed.
        activation: the non-linearity act.
        residual: from the second round on, x is added to the result.

    Shapes:
        for each layer, [B, m, n, F] -> theta [B, m, n].
    """
    how = _Rounds(_Aggregation.of(aggregation, graph), _ACTIVATIONS[activation], residual)
    return _MessagePassing.apply(how, *nodes, *(tensor for one in rounds for tensor in one), *readout)
