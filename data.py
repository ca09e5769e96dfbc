"""Graphs from a classifier and its images: one node per weight of the target layers, one graph per sample.

A sample's graph is three vectors for each layer W [m, n]: the input h [n], the output z [m] and delta = dl/dz [m] of
its loss l. Its gradient by the weights is their outer product, g_ij = dl/dW_ij = delta_i h_j, so that features of all
m n nodes are made from m + n stored values when they are needed.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from core.artifacts import DamagedError, appending_array, read_array, read_json, write_json
from core.config import GraphConfig, UserError, derive_seed
from core.observe import log, progress
from core.store import MANIFEST, read_manifest
from graphs.edge_list import edge_index
from graphs.layout import WeightGraph
from model import HookedModel, MaskLayer, capture, inspecting
from utils_data import Images, UnlearningDataset, make_loader

if TYPE_CHECKING:
    from torch_geometric.data import Data

FEATURES = ("h", "z", "W", "g")
EPSILON = 1e-8  # added to a standard deviation that may be 0
ROWS_AT_ONCE = 4096  # samples that pass through the last layers at once
TOLERANCE = 1e-3  # between stored vectors and those that the classifier gives now, as a share of the largest value
LAYOUT_FILE = "layout.json"
_ARRAYS = ("h", "z", "delta", "labels", "weight")


def _moments(means: Sequence[Tensor], squares: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Compute the mean and std + EPSILON over all nodes, [B, 1] each.

    Args:
        means: of the nodes of each layer, [B].
        squares: mean squares of the nodes of each layer, [B].
        sizes: number of nodes of each layer.
    """
    share = torch.tensor(sizes, dtype=torch.float64, device=means[0].device) / sum(sizes)
    mean = (torch.stack(list(means), 1) * share).sum(1, keepdim=True)
    square = (torch.stack(list(squares), 1) * share).sum(1, keepdim=True)
    std = (square - mean.square()).clamp_min(0).sqrt()
    return mean.float(), (std + EPSILON).float()


@dataclass(frozen=True)
class Vectors:
    """Graphs of B samples as vectors, one tensor for each layer W [m, n].

    Args:
        h: inputs of the layers, [B, n].
        z: outputs, [B, m].
        delta: dl/dz, [B, m].
    """

    h: list[Tensor]
    z: list[Tensor]
    delta: list[Tensor]

    def to(self, device: torch.device) -> "Vectors":
        """Move the vectors to a device."""
        return Vectors(*([value.to(device) for value in group] for group in (self.h, self.z, self.delta)))

    def moments(self, sizes: Sequence[int]) -> tuple[tuple[Tensor, Tensor], ...]:
        """Compute (mean, std + EPSILON) over all nodes, [B, 1] each, of the columns h, z and g.

        No column [B, m, n] is made: over the nodes of a layer h_j has the mean of h, and g_ij = delta_i h_j has the
        product of the means of delta and h. The same holds for squares. In float64, because E[x^2] - E[x]^2 cancels.

        Args:
            sizes: number of nodes of each layer.
        """
        h, z, delta = ([values.double() for values in group] for group in (self.h, self.z, self.delta))

        def first(values: list[Tensor]) -> list[Tensor]:
            return [value.mean(1) for value in values]

        def second(values: list[Tensor]) -> list[Tensor]:
            return [value.square().mean(1) for value in values]

        mean_g = [a * b for a, b in zip(first(delta), first(h), strict=True)]
        square_g = [a * b for a, b in zip(second(delta), second(h), strict=True)]
        return (
            _moments(first(h), second(h), sizes),
            _moments(first(z), second(z), sizes),
            _moments(mean_g, square_g, sizes),
        )

    def standardised(self, sizes: Sequence[int]) -> tuple["Vectors", Tensor]:
        """Compute what standardised columns are made from: h_j, z_i, and delta_i (raw h_j) - shift.

        Args:
            sizes: number of nodes of each layer.

        Returns:
            The vectors h, z and delta, scaled, and the shift [B, 1].
        """
        (mean_h, std_h), (mean_z, std_z), (mean_g, std_g) = self.moments(sizes)
        h, z = [(value - mean_h) / std_h for value in self.h], [(value - mean_z) / std_z for value in self.z]
        return Vectors(h, z, [value / std_g for value in self.delta]), mean_g / std_g


class GraphDataset(Dataset):
    """Graphs of S samples in a folder that `GraphGenerator` filled.

    Args:
        root: the folder. Its manifest, if it has one, lists what it holds.
        transform: applied to each `Data` that indexing gives.

    Attributes:
        graph: layout of the target layers.
        h: [S, sum of n], layer after layer; memory-mapped, as z and delta.
        z: [S, sum of m].
        delta: [S, sum of m].
        labels: [S], in memory.
        weight: [*graph.shape], in memory.

    Raises:
        UserError: a file is missing or damaged, or the arrays do not belong together.
    """

    def __init__(self, root: Path, transform: "Callable[[Data], Data] | None" = None):
        self.root, self.transform = Path(root), transform
        if (self.root / MANIFEST).exists():
            read_manifest(self.root, foreign=True)
        self.graph = _layout(self.root / LAYOUT_FILE)
        self.outs, self.ins = [m for m, _ in self.graph.shapes], [n for _, n in self.graph.shapes]
        arrays = {name: read_array(self.root / f"{name}.npy") for name in _ARRAYS}
        self._check_arrays(arrays)
        self.h, self.z, self.delta = arrays["h"], arrays["z"], arrays["delta"]
        self.labels = torch.from_numpy(np.array(arrays["labels"]))
        self.weight = torch.from_numpy(np.array(arrays["weight"]))

    def _check_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Raise `UserError` unless the arrays are what `GraphGenerator` writes for these layers."""
        count = arrays["labels"].shape[0] if arrays["labels"].ndim else 0
        shapes = {"h": (count, sum(self.ins)), "weight": self.graph.shape, "labels": (count,)}
        shapes |= dict.fromkeys(("z", "delta"), (count, sum(self.outs)))
        for name, shape in shapes.items():
            needed, found = np.dtype(np.int64 if name == "labels" else np.float32), arrays[name]
            if (found.shape, found.dtype) != (shape, needed) or not count:
                is_ = (
                    f"is {found.dtype} {list(found.shape)}, needed {needed} {list(shape) if count else 'of any length'}"
                )
                raise UserError(
                    f"{self.root / name}.npy {is_}: its arrays do not belong together, make the graphs again"
                )

    def __len__(self) -> int:
        return len(self.labels)

    def check_classes(self, num_classes: int) -> None:
        """Check that every class of the dataset has graphs, and no other one.

        Raises:
            UserError: a class has none, or a label is not in 0..num_classes - 1.
        """
        found = set(self.labels.unique().tolist())
        strange, lacking = sorted(found - set(range(num_classes))), sorted(set(range(num_classes)) - found)
        if not strange and not lacking:
            return
        what = f"graphs of class {strange[0]}" if strange else f"no graph of class {lacking[0]}"
        needed = f"the dataset has classes 0 to {num_classes - 1}"
        raise UserError(f"{self.root} holds {what}, {needed}: leave graph_dir out to make graphs of all of them")

    def check_numbers(self, model: HookedModel, mask_layer: MaskLayer) -> None:
        """Check that the arrays are those of this classifier: z = h W^T, and delta = dl/dz of the stored labels.

        Arrays of another run, classifier or order of samples fail this, whoever wrote them. The check passes over all
        vectors once, from h on; no image is needed.

        Args:
            model: the classifier.
            mask_layer: its target layers.

        Raises:
            UserError: a number is not finite, or the arrays are of another classifier, of other images than the
                labels, or of several runs.
        """
        device = next(model.parameters()).device
        for rows in torch.arange(len(self)).split(ROWS_AT_ONCE):
            vectors = self.vectors(rows)
            for name in ("h", "z", "delta"):
                if not all(bool(part.isfinite().all()) for part in getattr(vectors, name)):
                    raise UserError(f"{self.root / name}.npy holds values that are not finite: make the graphs again")
            made = remade(model, mask_layer, vectors.h[0].to(device), self.labels[rows].to(device))
            for name in ("h", "z", "delta"):
                for found, expected in zip(getattr(vectors, name), getattr(made, name), strict=True):
                    if not _close(found, expected.cpu()):
                        what = f"{self.root / name}.npy is not what this classifier makes of h.npy and labels.npy"
                        raise UserError(f"{what} (arrays of another run or images): leave graph_dir out to make them")

    def vectors(self, indices: Sequence[int] | np.ndarray | Tensor) -> Vectors:
        """Read h, z and delta of some samples, and of no others, from the memory-mapped files."""
        chosen = np.asarray(indices)
        h, z, delta = (torch.from_numpy(np.array(array[chosen])) for array in (self.h, self.z, self.delta))
        return Vectors(list(h.split(self.ins, 1)), list(z.split(self.outs, 1)), list(delta.split(self.outs, 1)))

    @cached_property
    def _standard_weight(self) -> Tensor:
        """Standardise the column W over the nodes, once for all samples. [*graph.shape]."""
        return (self.weight - self.weight.mean()) / (self.weight.std(correction=0) + EPSILON)

    def features(self, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Make node features [B, *graph.shape, 4]: h_j, z_i, W_ij, g_ij, each standardised over all nodes."""
        vectors = self.vectors(indices)
        out = torch.empty(len(vectors.h[0]), *self.graph.shape, len(FEATURES))
        out[..., 2] = self._standard_weight
        standard, shift = vectors.standardised(self.graph.sizes)
        layers = zip(self.graph.split(out, trailing=1), vectors.h, standard.h, standard.z, standard.delta, strict=True)
        for part, raw_h, h, z, delta in layers:
            part[..., 0], part[..., 1] = h.unsqueeze(1), z.unsqueeze(2)
            part[..., 3] = delta.unsqueeze(2) * raw_h.unsqueeze(1) - shift.unsqueeze(2)
        return out

    def class_features(self, label: int) -> Tensor:
        """Average `features` over the samples of a class: its representative, [*graph.shape, 4].

        The mean of the columns g is one matrix product, so that no sample's [*graph.shape, 4] is ever made.

        Raises:
            UserError: the class has no graph.
        """
        members = (self.labels == label).nonzero().flatten()
        if len(members) == 0:
            raise UserError(f"{self.root} holds no graph of class {label}: leave graph_dir out to make some of each")
        vectors = self.vectors(members)
        out = torch.empty(*self.graph.shape, len(FEATURES))
        out[..., 2] = self._standard_weight
        standard, shift = vectors.standardised(self.graph.sizes)
        layers = zip(self.graph.split(out, trailing=1), vectors.h, standard.h, standard.z, standard.delta, strict=True)
        for part, raw_h, h, z, delta in layers:
            part[..., 0], part[..., 1] = h.mean(0), z.mean(0).unsqueeze(1)
            part[..., 3] = delta.T @ raw_h / len(members) - shift.mean()
        return out

    def edge_index(self) -> Tensor:
        """List the directed edges [2, E], the same for every sample; for inspection, export and tests.

        Raises:
            UserError: they would not fit.
        """
        return edge_index(self.graph)

    def to_pyg(self, index: int) -> "Data":
        """Make PyG's `Data` of one sample: x [N, 4], edge_index [2, E], y [1] (the label)."""
        from torch_geometric.data import Data

        x = self.features([index]).view(-1, len(FEATURES))
        return Data(x=x, edge_index=self.edge_index(), y=self.labels[index : index + 1])

    def __getitem__(self, index: int) -> "Data":
        data = self.to_pyg(index)
        return self.transform(data) if self.transform else data


def _layout(path: Path) -> WeightGraph:
    """Read the layout of the layers that a folder's graphs are of.

    Raises:
        UserError: the file holds no layout.
    """
    layout = read_json(path, foreign=True)
    try:
        shapes = tuple((int(m), int(n)) for m, n in layout["shapes"])
        graph = WeightGraph(shapes, tuple(map(bool, layout["joined"])), tuple(map(str, layout["names"])))
    except (KeyError, TypeError, ValueError, LookupError, AssertionError) as error:
        raise DamagedError(path, f"no layout of layers: {error!r}") from None
    if not shapes or min(min(shape) for shape in shapes) < 1:
        raise DamagedError(path, f"no layout of layers: {shapes}")
    return graph


def _close(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are equal up to rounding, which differs by machine and by the size of a batch."""
    return float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max()) + EPSILON


def remade(model: HookedModel, mask_layer: MaskLayer, h: Tensor, labels: Tensor) -> Vectors:
    """Compute h, z and delta of every target layer from the first one's input h [B, n] and labels [B]."""
    places = model.layer_indices(mask_layer)
    with inspecting(model), ExitStack() as stack:
        layers = [model.target(place) for place in places]
        records = [stack.enter_context(capture(layer, cut=layer is layers[0])) for layer in layers]
        loss = torch.nn.functional.cross_entropy(model.head(h, places), labels, reduction="sum")
        pairs = [record.take() for record in records]
        gradients = torch.autograd.grad(loss, [outputs for _, outputs in pairs])
    return Vectors(
        [inputs.detach() for inputs, _ in pairs], [outputs.detach() for _, outputs in pairs], list(gradients)
    )


class GraphGenerator:
    """Turns training images into graphs of the target layers, in batched passes in eval mode.

    Args:
        model: the classifier.
        dataset: its images.
        mask_layer: the target layers.
        config: the section `graph`.
        seed: of the choice of samples.
        device: where the passes run.
    """

    def __init__(
        self,
        model: HookedModel,
        dataset: UnlearningDataset,
        mask_layer: MaskLayer = -2,
        config: GraphConfig | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        self.model, self.dataset, self.mask_layer = model, dataset, mask_layer
        self.config, self.seed, self.device = config or GraphConfig(), seed, torch.device(device)

    def choose_samples(self) -> np.ndarray:
        """Choose indices [S] of training images: as many of each class, at least `min_per_class` if it has so many."""
        labels = self.dataset.splits["train"].labels.numpy()
        per_class = max(self.config.min_per_class, -(-self.config.num_samples // self.dataset.num_classes))
        generator = np.random.default_rng(derive_seed(self.seed, "graphs"))
        members = [generator.permutation(np.flatnonzero(labels == c))[:per_class] for c in np.unique(labels)]
        scarce = sum(len(chosen) < self.config.min_per_class for chosen in members)
        if scarce:
            log(f"graphs: {scarce} classes have fewer than {self.config.min_per_class} training images")
        return generator.permutation(np.concatenate(members))

    def flatten_in_out_activation_single_layer(self, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return a target layer's input and output as vectors h [B, n] and z [B, m].

        To use target layers of another type, override this method.

        Raises:
            UserError: the layer's input or output is not one vector per sample.
        """
        if inputs.dim() != 2 or outputs.dim() != 2:
            shapes = f"{tuple(inputs.shape)} -> {tuple(outputs.shape)}"
            raise UserError(f"the target layer maps {shapes}, not vectors to vectors: choose another mask_layer")
        return inputs, outputs

    def capture_batch(self, images: Tensor, labels: Tensor) -> Vectors:
        """Compute h, z and delta = dl/dz of every sample and target layer in one forward and one backward pass.

        The loss is the *sum* of cross-entropies and the model is in eval mode, so that samples do not interact and
        each row of delta is its own sample's. The backward pass ends at the first target layer's z, where `capture`
        cuts the autograd graph: nothing below is differentiated.

        Args:
            images: [B, C, H, W].
            labels: [B].
        """
        places = self.model.layer_indices(self.mask_layer)
        targets = [self.model.target(place) for place in places]
        with inspecting(self.model), ExitStack() as stack:
            records = [stack.enter_context(capture(layer, cut=layer is targets[0])) for layer in targets]
            logits = self.model(images)
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            pairs = [record.take() for record in records]
            gradients = torch.autograd.grad(loss, [outputs for _, outputs in pairs])
        flat = [self.flatten_in_out_activation_single_layer(*pair) for pair in pairs]
        h, z = [inputs.detach() for inputs, _ in flat], [outputs.detach() for _, outputs in flat]
        return Vectors(h, z, [delta.view_as(value) for delta, value in zip(gradients, z, strict=True)])

    def generate(self, folder: Path) -> dict:
        """Write the graphs into `folder`, batch by batch, so that memory holds one batch; return their facts."""
        images: Images = self.dataset.splits["train"]
        chosen = torch.from_numpy(self.choose_samples())
        graph = self.model.weight_graph(self.mask_layer)
        sizes = {"h": sum(n for _, n in graph.shapes), "z": sum(m for m, _ in graph.shapes)}
        sizes["delta"] = sizes["z"]
        loader: DataLoader = make_loader(images.only(chosen), self.config.batch_size)
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(appending_array(folder / f"{name}.npy", (len(chosen), size)))
                for name, size in sizes.items()
            }
            for batch, labels in progress(loader, "graphs"):
                vectors = self.capture_batch(batch.to(self.device), labels.to(self.device))
                for name, append in files.items():
                    append(torch.cat(getattr(vectors, name), 1).cpu().numpy())
        weight = graph.join([parameter.detach().cpu() for parameter in self.model.weights(self.mask_layer)]).numpy()
        for name, values in {"weight": weight, "labels": images.labels[chosen].numpy()}.items():
            with appending_array(folder / f"{name}.npy", values.shape, values.dtype.type) as append:
                append(values)
        write_json(folder / LAYOUT_FILE, {"shapes": graph.shapes, "joined": graph.joined, "names": graph.names})
        return {"num_samples": len(chosen), "num_vertices": graph.num_vertices, "num_edges": graph.num_edges}
