"""Every `nn.Module`: the hooked classifiers, how to look inside one, and the graph network that learns masks.

A classifier is `embed` (anything) and then a stack of bias-free linear layers, one of which is the target
layer W [m, n]. `prefix` stops at its input h [B, n]; `head` goes on from there, with W replaced if asked.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from artifacts import read_tensors, write_tensors
from config import Aggregations, SupportedVisionModels, UserError

# --- classifiers ------------------------------------------------------------------------------------------


def apply_linear(h: Tensor, weight: Tensor) -> Tensor:
    """h W^T for one W [m, n], or sample by sample for W [B, m, n]. h [B, n] -> [B, m]."""
    if weight.dim() == 2:
        return nn.functional.linear(h, weight)
    return torch.bmm(weight, h.unsqueeze(-1)).squeeze(-1)


class HookedModel(nn.Module):
    """A classifier whose last layers are a stack of bias-free linear ones.

    Subclasses define `embed` and may set `between`, the non-linearity between two layers of the stack.

    Args:
        widths: input width of the stack, then the output width of each layer, classes last.
    """

    between: Callable[[Tensor], Tensor] = staticmethod(torch.relu)

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(n, m, bias=False) for n, m in pairwise(widths))

    def embed(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> the stack's input [B, widths[0]]."""
        raise TypeError(f"{type(self).__name__} must define embed")

    def layer_index(self, mask_layer: int) -> int:
        """Place of a target layer in the stack, counted from 0.

        Raises:
            UserError: there is no such layer.
        """
        count = len(self.linears)
        if not -count <= mask_layer < count:
            raise UserError(
                f"mask_layer is {mask_layer}, but {type(self).__name__} has {count} linear layers: "
                f"choose from {-count} to {count - 1}"
            )
        return mask_layer % count

    def target(self, mask_layer: int) -> nn.Linear:
        """The target layer."""
        layer = self.linears[self.layer_index(mask_layer)]
        assert isinstance(layer, nn.Linear)
        return layer

    def prefix(self, images: Tensor, mask_layer: int) -> Tensor:
        """Input activation h [B, n] of the target layer; no mask changes it."""
        x = self.embed(images)
        for layer in self.linears[: self.layer_index(mask_layer)]:
            x = self.between(layer(x))
        return x

    def head(self, h: Tensor, mask_layer: int, weight: Tensor | None = None) -> Tensor:
        """Logits [B, classes] from h [B, n]; `weight` [m, n] or [B, m, n] stands in for the target's."""
        place = self.layer_index(mask_layer)
        x = h
        for index in range(place, len(self.linears)):
            layer = self.linears[index]
            x = layer(x) if index > place or weight is None else apply_linear(x, weight)
            if index + 1 < len(self.linears):
                x = self.between(x)
        return x

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, classes]."""
        return self.head(self.embed(images), 0)


class HookedMLPClassifier(HookedModel):
    """flatten -> 128 -> 64 -> classes, ReLU, no biases."""

    def __init__(self, num_classes: int, channels: int, size: int):
        super().__init__((channels * size * size, 128, 64, num_classes))

    def embed(self, images: Tensor) -> Tensor:
        """Images, flattened."""
        return images.flatten(1)


class HookedResnet(HookedModel):
    """ResNet-18 (He et al. 2016, arXiv:1512.03385; 7x7 stem) -> 512 -> 128 -> classes, both without bias."""

    between = staticmethod(lambda x: x)

    def __init__(self, num_classes: int, channels: int, size: int):
        super().__init__((512, 128, num_classes))
        from torchvision.models import resnet18

        self.backbone = resnet18(weights=None)
        self.backbone.fc = nn.Identity()
        if channels != 3:
            self.backbone.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)

    def embed(self, images: Tensor) -> Tensor:
        """Pooled features [B, 512]."""
        return self.backbone(images)


VISION_MODELS: dict[SupportedVisionModels, type] = {
    SupportedVisionModels.HookedMLPClassifier: HookedMLPClassifier,
    SupportedVisionModels.HookedResnet: HookedResnet,
}


def vision_model_loader(
    architecture: SupportedVisionModels, num_classes: int, channels: int, size: int, path: Path | None = None
) -> HookedModel:
    """A classifier, fresh or (with `path`) as `save_classifier` wrote it.

    Raises:
        UserError: the file is of another architecture, class count or image shape, or damaged.
    """
    model = VISION_MODELS[architecture](num_classes, channels, size)
    if path is None:
        return model
    tensors, facts = read_tensors(path)
    needed = _classifier_facts(architecture, num_classes, channels, size)
    wrong = [f"{name} {facts.get(name)}, needed {value}" for name, value in needed.items() if facts.get(name) != value]
    if wrong:
        raise UserError(f"{path} has {'; '.join(wrong)}: give a checkpoint of this model and dataset")
    _load_state(model, tensors, path)
    return model


def _classifier_facts(architecture: SupportedVisionModels, num_classes: int, channels: int, size: int) -> dict:
    return {"architecture": architecture.value, "num_classes": num_classes, "channels": channels, "size": size}


def save_classifier(
    model: HookedModel, path: Path, architecture: SupportedVisionModels, shape: tuple[int, int, int], facts: dict
) -> None:
    """Write a classifier as safetensors; `shape` is (classes, channels, size)."""
    arrays = {name: value.detach().cpu().contiguous().numpy() for name, value in model.state_dict().items()}
    write_tensors(path, arrays, facts | _classifier_facts(architecture, *shape))


def _load_state(model: nn.Module, tensors: dict, path: Path) -> None:
    try:
        model.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})
    except RuntimeError as error:
        what = " ".join(str(error).split())
        raise UserError(f"{path} does not fit the model ({what}): give a checkpoint that `run` wrote") from None


# --- looking inside ---------------------------------------------------------------------------------------


@dataclass
class Capture:
    """What went through a module: its input, its output, and how many times it ran."""

    calls: int = 0
    input: Tensor | None = None
    output: Tensor | None = None

    def take(self) -> tuple[Tensor, Tensor]:
        """Input and output of the one call since the last `take`.

        Raises:
            RuntimeError: the module ran no time or several times, so that one record hides another.
        """
        if self.calls != 1 or self.input is None or self.output is None:
            raise RuntimeError(f"the captured module ran {self.calls} times in one forward pass, not once")
        pair = self.input, self.output
        self.calls, self.input, self.output = 0, None, None
        return pair


@contextmanager
def capture(module: nn.Module, cut: bool = False) -> Generator[Capture]:
    """Record a module's input and output for the length of the block; the hook is always removed.

    Args:
        cut: let the output start a new autograd graph, so that a backward pass ends there.
    """
    record = Capture()

    def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output = output.detach().requires_grad_() if cut else output
        record.calls, record.input, record.output = record.calls + 1, arguments[0], output
        return output

    handle = module.register_forward_hook(hook)
    try:
        yield record
    finally:
        handle.remove()


@contextmanager
def inspecting(model: nn.Module) -> Generator[None]:
    """Eval mode (BatchNorm too) and frozen parameters for the length of the block, then as before."""
    modes = [(module, module.training) for module in model.modules()]
    frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in frozen:
            parameter.requires_grad_(flag)


# --- the graph network ------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _neighbour_sum():  # noqa: ANN202 - PyTorch Geometric takes seconds to import
    from torch_geometric.nn import SimpleConv

    return SimpleConv(aggr="sum")  # ty: ignore[abstract-class-instantiation]


class _RookRound(torch.autograd.Function):
    """y_ij = sigmoid(x_ij L + (row_i + col_j) R + b) with row and column sums of x, O(m n) time and memory.

    Written out because autograd would keep, and walk, every intermediate; here only x and y are kept.

    Shapes: x [B, m, n, d], L [d, k], R [d, k], b [k] -> y [B, m, n, k].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, local: Tensor, spread: Tensor, bias: Tensor) -> Tensor:
        rows, columns = x.sum(2), x.sum(1)
        y = (x.reshape(-1, x.shape[-1]) @ local).view(*x.shape[:3], -1)
        y += (rows @ spread + bias).unsqueeze(2)
        y += (columns @ spread).unsqueeze(1)
        y.sigmoid_()
        ctx.save_for_backward(x, y, rows, columns, local, spread)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, y, rows, columns, local, spread = ctx.saved_tensors
        grad = torch.ops.aten.sigmoid_backward(grad_y, y)
        grad_rows, grad_columns = grad.sum(2), grad.sum(1)
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (flat @ local.T).view_as(x)
            grad_x += (grad_rows @ spread.T).unsqueeze(2)
            grad_x += (grad_columns @ spread.T).unsqueeze(1)
        grad_local = x.reshape(-1, x.shape[-1]).T @ flat
        grad_spread = _matched(rows, grad_rows) + _matched(columns, grad_columns)
        return grad_x, grad_local, grad_spread, grad_rows.sum((0, 1))


def _matched(a: Tensor, b: Tensor) -> Tensor:
    """Sum of outer products over all leading positions. [..., d], [..., k] -> [d, k]."""
    return a.flatten(0, -2).T @ b.flatten(0, -2)


class MaskingGCN(nn.Module):
    """One node per weight of a layer; two weights are neighbours when they share a row or a column.

    A round is x' = sigmoid(x S + agg(x) V + b). With `mean`, agg is the mean over the m + n - 2 neighbours
    (GraphSAGE, Hamilton et al. 2017, arXiv:1706.02216); with `gcn`, S = 0 and agg is the normalised sum over
    the neighbours and the node itself (Kipf and Welling 2017, arXiv:1609.02907). The graph K_m x K_n is
    regular, so both need only row and column sums (METHOD 1):

        mean:  agg(x)_ij = (row_i + col_j - 2 x_ij) / (m + n - 2)
        gcn:   agg(x)_ij = (row_i + col_j -   x_ij) / (m + n - 1)

    and as agg is linear, V is applied to the m + n sums, not to the m n nodes.

    Shapes:
        features [B, m, n, F] -> theta [B, m, n], one logit per weight.
    """

    def __init__(
        self,
        num_node_features: int = 4,
        num_message_passing_rounds: int = 3,
        hidden_dim: int = 32,
        aggregation: Aggregations = Aggregations.mean,
    ):
        super().__init__()
        self.num_node_features, self.hidden_dim = num_node_features, hidden_dim
        self.num_message_passing_rounds, self.aggregation = num_message_passing_rounds, aggregation
        widths = [num_node_features] + [hidden_dim] * num_message_passing_rounds
        self.neighbours, self.selves, self.biases = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for width in widths[:-1]:
            self.neighbours.append(nn.init.xavier_uniform_(torch.empty(width, hidden_dim)))
            if aggregation is Aggregations.mean:
                self.selves.append(nn.init.xavier_uniform_(torch.empty(width, hidden_dim)))
            self.biases.append(nn.Parameter(torch.zeros(hidden_dim)))
        self.readout = nn.Linear(widths[-1], 1)

    def _own_share(self, m: int, n: int) -> tuple[float, float]:
        """(c, o): agg(x)_ij = c (row_i + col_j - o x_ij)."""
        if self.aggregation is Aggregations.mean:
            return 1 / max(1, m + n - 2), 2.0
        return 1 / (m + n - 1), 1.0

    def _round(self, x: Tensor, index: int) -> Tensor:
        """One round in closed form. [B, m, n, d] -> [B, m, n, hidden]."""
        share, own = self._own_share(*x.shape[1:3])
        spread = self.neighbours[index] * share
        local = -own * spread
        if self.aggregation is Aggregations.mean:
            local = local + self.selves[index]
        return _RookRound.apply(x, local, spread, self.biases[index])

    def forward(self, features: Tensor) -> Tensor:
        """Node features [B, m, n, F] -> theta [B, m, n]."""
        x = features
        for index in range(self.num_message_passing_rounds):
            x = self._round(x, index)
        return self.readout(x).squeeze(-1)

    def forward_edges(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """The same network over explicit edges, through PyTorch Geometric; the oracle of `forward`.

        Args:
            x: [N, F]. edge_index: directed edges [2, E], no self loops.

        Returns:
            theta [N].
        """
        if self.aggregation is Aggregations.mean:
            degree = torch.bincount(edge_index[1], minlength=len(x)).clamp_min(1)
            weight = 1 / degree[edge_index[1]].to(x.dtype)
        else:
            from torch_geometric.nn.conv.gcn_conv import gcn_norm

            edge_index, weight = gcn_norm(edge_index, num_nodes=len(x), add_self_loops=True, dtype=x.dtype)
        for index in range(self.num_message_passing_rounds):
            out = _neighbour_sum()(x, edge_index, weight) @ self.neighbours[index] + self.biases[index]
            if self.aggregation is Aggregations.mean:
                out = out + x @ self.selves[index]
            x = out.sigmoid()
        return self.readout(x).squeeze(-1)

    def save(self, path: Path, facts: dict) -> None:
        """Write safetensors with the network's shape and `facts` as metadata."""
        shape = {
            "num_node_features": self.num_node_features,
            "num_message_passing_rounds": self.num_message_passing_rounds,
            "hidden_dim": self.hidden_dim,
            "aggregation": self.aggregation.value,
        }
        arrays = {name: value.detach().cpu().numpy() for name, value in self.state_dict().items()}
        write_tensors(path, arrays, facts | {"masking_gcn": shape})

    @classmethod
    def load(cls, path: Path) -> tuple["MaskingGCN", dict]:
        """The network and the facts that `save` wrote.

        Raises:
            UserError: not such a file.
        """
        tensors, facts = read_tensors(path)
        shape = facts.get("masking_gcn")
        if not isinstance(shape, dict):
            raise UserError(f"{path} is no GCN: give a gcn.safetensors that `run` wrote, or leave it out to train one")
        gcn = cls(**shape | {"aggregation": Aggregations(shape["aggregation"])})
        _load_state(gcn, tensors, path)
        return gcn, facts
