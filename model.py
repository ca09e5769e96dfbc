"""The classifiers, hooks to look inside one, and the graph network over a classifier's weights.

A classifier is `embed`, which may be any network, and then a stack of bias-free linear layers. One or more of these
are target layers W [m, n]. `prefix` computes the first target layer's input h [B, n]; `head` goes on from h to the
logits, with other weights in place of W if asked.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from core.artifacts import write_tensors
from core.choices import Registry
from core.config import Activations, Aggregations, SupportedVisionModels, UserError
from graphs.layout import WeightGraph, layer_graph
from graphs.message_passing import message_passing
from models.checkpoints import FITTING, load_state, read_checkpoint
from models.classifier import Classifier

MaskLayer = int | Sequence[int] | None
"""Target layers by their place in the stack, negative from the end: one, several, or (None) all."""

# --- classifiers ------------------------------------------------------------------------------------------


def apply_linear(h: Tensor, weight: Tensor) -> Tensor:
    """Compute h W^T for one W [m, n], or sample by sample for W [B, m, n]. h [B, n] -> [B, m]."""
    if weight.dim() == 2:
        return nn.functional.linear(h, weight)
    return torch.bmm(weight, h.unsqueeze(-1)).squeeze(-1)


class HookedModel(Classifier):
    """A classifier whose last layers are a stack of bias-free linear ones.

    Subclasses define `embed` and may set `between`, the non-linearity between two layers of the stack.

    Args:
        widths: input width of the stack, then the output width of each layer, classes last.
    """

    between: Callable[[Tensor], Tensor] = staticmethod(torch.relu)
    smallest_in_bf16 = 1
    """Side of the smallest images that a CPU trains this model on in bfloat16."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(n, m, bias=False) for n, m in pairwise(widths))

    def embed(self, images: Tensor) -> Tensor:
        """Compute the stack's input [B, widths[0]] from images [B, C, H, W]."""
        raise TypeError(f"{type(self).__name__} must define embed")

    def layer_index(self, layer: int) -> int:
        """Return the place of a layer in the stack, counted from 0.

        Raises:
            UserError: there is no such layer.
        """
        count = len(self.linears)
        if not -count <= layer < count:
            raise UserError(
                f"mask_layer is {layer}, but {type(self).__name__} has {count} linear layers: "
                f"choose from {-count} to {count - 1}"
            )
        return layer % count

    def layer_indices(self, mask_layer: MaskLayer) -> tuple[int, ...]:
        """Return the places of the target layers in the stack, ascending; None means all of them.

        Raises:
            UserError: there is no such layer, one is named twice, or none is named.
        """
        if mask_layer is None:
            return tuple(range(len(self.linears)))
        named = (mask_layer,) if isinstance(mask_layer, int) else tuple(mask_layer)
        places = tuple(sorted({self.layer_index(layer) for layer in named}))
        if len(places) != len(named) or not places:
            raise UserError(f"mask_layer is {list(named)}: name each layer once, e.g. -2, or None for all")
        return places

    def target(self, layer: int) -> nn.Linear:
        """Return one layer of the stack.

        Raises:
            UserError: the layer is not linear, or has a bias, which a mask of single weights cannot switch off.
        """
        module = self.linears[self.layer_index(layer)]
        if not isinstance(module, nn.Linear) or module.bias is not None:
            kind = f"a {type(module).__name__}" + (" with a bias" if getattr(module, "bias", None) is not None else "")
            raise UserError(f"layer {layer} is {kind}: a masked layer must be linear and without bias")
        return module

    def weight_graph(self, mask_layer: MaskLayer) -> WeightGraph:
        """Return the layout of the graph over the weights of the target layers."""
        places = self.layer_indices(mask_layer)
        shapes = []
        for place in places:
            m, n = self.target(place).weight.shape
            shapes.append((m, n))
        joined = tuple(after == before + 1 for before, after in pairwise(places))
        return WeightGraph(tuple(shapes), joined, tuple(f"linears.{place}.weight" for place in places))

    def weights(self, mask_layer: MaskLayer) -> list[nn.Parameter]:
        """Return W [m, n] of every target layer, from the first one on."""
        layers = (self.target(place).weight for place in self.layer_indices(mask_layer))
        return [weight for weight in layers if isinstance(weight, nn.Parameter)]

    def read_by(self, place: int, z: Tensor) -> Tensor:
        """What layer `place` of the stack (from 0) reads of the output z [B, n] of the layer before it. [B, n]."""
        return self.between(z)

    def prefix(self, images: Tensor, mask_layer: MaskLayer) -> Tensor:
        """Compute the input h [B, n] of the first target layer from images [B, C, H, W]; no mask changes h."""
        x = self.embed(images)
        for place in range(self.layer_indices(mask_layer)[0]):
            x = self.read_by(place + 1, self.linears[place](x))
        return x

    def head(self, h: Tensor, mask_layer: MaskLayer, weights: Sequence[Tensor] | None = None) -> Tensor:
        """Compute logits [B, classes] from the first target layer's input.

        Args:
            h: [B, n].
            mask_layer: the target layers.
            weights: used in place of the target layers' own, for each one [m, n], or [B, m, n] for a weight matrix
                per sample (None: their own).
        """
        places = self.layer_indices(mask_layer)
        instead = dict(zip(places, weights, strict=True)) if weights is not None else {}
        x = h
        for index in range(places[0], len(self.linears)):
            layer = self.linears[index]
            x = apply_linear(x, instead[index]) if index in instead else layer(x)
            if index + 1 < len(self.linears):
                x = self.read_by(index + 1, x)
        return x

    def in_prefix(self, mask_layer: MaskLayer) -> Callable[[str], bool]:
        """Tell, by name, which parameters and buffers lie ahead of the first target layer."""
        first = self.layer_indices(mask_layer)[0]
        after = tuple(f"linears.{place}." for place in range(first, len(self.linears)))
        return lambda name: not name.startswith(after)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits [B, classes] from images [B, C, H, W]."""
        return self.head(self.embed(images), 0)


VISION_MODELS: Registry[Callable[..., HookedModel]] = Registry("vision model", SupportedVisionModels)
"""By the name of the class."""
Kind = TypeVar("Kind", bound=type[HookedModel])


def vision_model(kind: Kind) -> Kind:
    """Register a classifier under the name of its class, which is made as (num_classes, channels, size).

    Raises:
        ValueError: the name is taken.
    """
    VISION_MODELS.add(kind.__name__, kind, kind.__module__)
    return kind


@vision_model
class HookedMLPClassifier(HookedModel):
    """A perceptron: pixels -> 128 -> 64 -> classes, with ReLU, without biases."""

    def __init__(self, num_classes: int, channels: int, size: int):
        super().__init__((channels * size * size, 128, 64, num_classes))

    def embed(self, images: Tensor) -> Tensor:
        """Flatten the images to [B, C H W]."""
        return images.flatten(1)


@vision_model
class HookedResnet(HookedModel):
    """ResNet-18 (He et al. 2016, arXiv:1512.03385; 7x7 stem) -> 512 -> 128 -> classes, both without bias."""

    between = staticmethod(lambda x: x)
    smallest_in_bf16 = 17  # below, a convolution of stride 2 meets maps of one pixel, where the CPU library is wrong

    def __init__(self, num_classes: int, channels: int, size: int):
        super().__init__((512, 128, num_classes))
        from torchvision.models import resnet18

        self.backbone = resnet18(weights=None)
        self.backbone.fc = nn.Identity()
        if channels != 3:
            self.backbone.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)

    def embed(self, images: Tensor) -> Tensor:
        """Compute the pooled features [B, 512]."""
        return self.backbone(images)


def vision_model_loader(
    architecture: SupportedVisionModels, num_classes: int, channels: int, size: int, path: Path | None = None
) -> HookedModel:
    """Make a classifier on the CPU, with random weights or with those of a file.

    Args:
        architecture: which one.
        num_classes: of the dataset.
        channels: of the images.
        size: height and width of the images, in pixels.
        path: a file of `save_classifier` or any state dict that fits (None: random weights).

    Raises:
        UserError: the file is of another architecture, class count or image shape, or damaged.
    """
    model = VISION_MODELS[architecture](num_classes, channels, size)
    if path is None:
        return model
    stored = read_checkpoint(path)
    facts = stored.facts
    if "masking_gcn" in facts:
        raise UserError(f"{path} is a GCN, no classifier: name it with gcn_path, and the classifier here")
    needed = _classifier_facts(architecture, num_classes, channels, size)
    wrong = [
        f"{name} {facts[name]}, needed {value}" for name, value in needed.items() if facts.get(name, value) != value
    ]
    if wrong:
        raise UserError(f"{path} has {'; '.join(wrong)}: {FITTING}")
    outputs = stored.rows_of(f"linears.{len(model.linears) - 1}.weight")
    if outputs not in (None, num_classes):
        raise UserError(f"{path} tells {outputs} classes apart, the dataset has {num_classes}: {FITTING}")
    load_state(model, stored)
    return model


def _classifier_facts(architecture: SupportedVisionModels, num_classes: int, channels: int, size: int) -> dict:
    return {"architecture": architecture.value, "num_classes": num_classes, "channels": channels, "size": size}


def save_classifier(
    model: HookedModel, path: Path, architecture: SupportedVisionModels, shape: tuple[int, int, int], facts: dict
) -> None:
    """Write a classifier as safetensors, its architecture, shape (classes, channels, size) and facts as metadata."""
    arrays = {name: value.detach().cpu().contiguous().numpy() for name, value in model.state_dict().items()}
    write_tensors(path, arrays, facts | _classifier_facts(architecture, *shape))


# --- answers ----------------------------------------------------------------------------------------------

NO_ANSWER = -1


def predictions(logits: Tensor) -> Tensor:
    """Return each image's predicted class: argmax of its logits [S, C] -> [S], or NO_ANSWER if a logit is not finite.

    Every accuracy uses this rule. `argmax` takes NaN for the largest value, so that a model whose logits are NaN would
    answer class 0 for every image and be right about that class. NO_ANSWER equals no label.
    """
    return torch.where(logits.isfinite().all(1), logits.argmax(1), NO_ANSWER)


# --- looking inside ---------------------------------------------------------------------------------------


@dataclass
class Capture:
    """What a hook recorded of a module: its input, its output, and how many times it ran."""

    calls: int = 0
    input: Tensor | None = None
    output: Tensor | None = None

    def take(self) -> tuple[Tensor, Tensor]:
        """Return input and output of the one call since the last `take`.

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
        # The detached copy is returned, and so takes the output's place in the rest of the forward pass.
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
    """Put a model into eval mode and freeze its parameters for the length of the block; then all is as before.

    Each module's mode and each parameter's flag is restored by itself: a model may be in training mode in part.
    """
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


class MaskingGCN(nn.Module):
    """A graph network over the weights of a classifier: one logit theta for each weight, from its node features.

    There is one node per weight; two weights are neighbours when they touch the same neuron. A round computes
    x' = act(x S + agg(x) V + b), with `residual` x' = x + act(...) from the second round on. With `mean`, agg is the
    mean over the neighbours (GraphSAGE, Hamilton et al. 2017, arXiv:1706.02216); with `gcn`, S = 0 and agg is the
    normalised sum over the neighbours and the node itself (Kipf and Welling 2017, arXiv:1609.02907). Both need sums
    over neurons only. For one m x n layer:

        mean:  agg(x)_ij = (row_i + col_j - 2 x_ij) / (m + n - 2)
        gcn:   agg(x)_ij = (row_i + col_j -   x_ij) / (m + n - 1)

    where row_i and col_j are the sums of x over the weights of output i and of input j.

    Args:
        num_node_features: F.
        num_message_passing_rounds: how many rounds.
        hidden_dim: width of every round's result.
        aggregation: `mean` or `gcn`.
        activation: act.
        residual: add x to a round's result, from the second round on.

    Shapes:
        features [B, m, n, F] -> theta [B, m, n], one logit per weight; with a `WeightGraph` of several layers
        [B, N, F] -> [B, N].
    """

    def __init__(
        self,
        num_node_features: int = 4,
        num_message_passing_rounds: int = 3,
        hidden_dim: int = 32,
        aggregation: Aggregations = Aggregations.mean,
        activation: Activations = Activations.sigmoid,
        residual: bool = False,
    ):
        super().__init__()
        self.num_node_features, self.hidden_dim = num_node_features, hidden_dim
        self.num_message_passing_rounds, self.aggregation = num_message_passing_rounds, aggregation
        self.activation, self.residual = activation, residual
        widths = [num_node_features] + [hidden_dim] * num_message_passing_rounds
        self.neighbours, self.selves, self.biases = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for width in widths[:-1]:
            self.neighbours.append(nn.init.xavier_uniform_(torch.empty(width, hidden_dim)))
            if aggregation is Aggregations.mean:
                self.selves.append(nn.init.xavier_uniform_(torch.empty(width, hidden_dim)))
            self.biases.append(nn.Parameter(torch.zeros(hidden_dim)))
        self.readout = nn.Linear(widths[-1], 1)

    def forward(self, features: Tensor, graph: WeightGraph | None = None) -> Tensor:
        """Compute theta [B, *graph.shape] from node features [B, *graph.shape, F].

        Args:
            features: the node features.
            graph: layout of the weights (None: one m x n layer, features [B, m, n, F]).
        """
        graph = graph or layer_graph(*features.shape[1:-1])
        nodes = [part.contiguous() for part in graph.split(features, trailing=1)]
        selves = list(self.selves) or [None] * self.num_message_passing_rounds
        rounds = list(zip(selves, self.neighbours, self.biases, strict=True))
        readout, how = (self.readout.weight, self.readout.bias), (self.aggregation, self.activation, self.residual)
        return graph.join(message_passing(graph, nodes, rounds, readout, *how))

    def forward_edges(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Compute theta over explicit edges with PyTorch Geometric: an oracle for `forward`, in memory O(E).

        Args:
            x: node features, [N, F].
            edge_index: directed edges without self loops, [2, E].

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
            out = getattr(torch, self.activation.value)(out)
            x = x + out if self.residual and index else out
        return self.readout(x).squeeze(-1)

    def save(self, path: Path, facts: dict) -> None:
        """Write safetensors with the network's shape and `facts` as metadata."""
        shape = {
            "num_node_features": self.num_node_features,
            "num_message_passing_rounds": self.num_message_passing_rounds,
            "hidden_dim": self.hidden_dim,
            "aggregation": self.aggregation.value,
            "activation": self.activation.value,
            "residual": self.residual,
        }
        arrays = {name: value.detach().cpu().numpy() for name, value in self.state_dict().items()}
        write_tensors(path, arrays, facts | {"masking_gcn": shape})

    @classmethod
    def load(cls, path: Path) -> tuple["MaskingGCN", dict]:
        """Read a network and the facts that `save` wrote with it.

        Raises:
            UserError: not such a file.
        """
        stored = read_checkpoint(path)
        facts, shape = stored.facts, stored.facts.get("masking_gcn")
        if not isinstance(shape, dict):
            kind = "a classifier, no GCN" if "architecture" in facts else "no GCN"
            raise UserError(f"{path} is {kind}: give a gcn.safetensors that `run` wrote, or leave it out to train one")
        try:
            kinds = {"aggregation": Aggregations(shape["aggregation"]), "activation": Activations(shape["activation"])}
            # The file comes from anybody: a width in its facts must not exceed the values that it holds, or a few
            # bytes of text could ask for all memory.
            room = sum(tensor.numel() for tensor in stored.tensors.values())
            if any(isinstance(size, int) and size > room for size in shape.values()):
                raise ValueError("its facts name more values than it holds")
            gcn = cls(**shape | kinds)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{path} is a GCN of another version ({error!r}): train it anew") from None
        load_state(gcn, stored)
        return gcn, facts


@lru_cache(maxsize=1)
def _neighbour_sum():  # noqa: ANN202 - PyTorch Geometric takes seconds to import
    from torch_geometric.nn import SimpleConv

    return SimpleConv(aggr="sum")  # ty: ignore[abstract-class-instantiation]
