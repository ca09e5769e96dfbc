"""A classifier and its images -> graphs. One sample's graph is three vectors, because g_ij = delta_i h_j.

Per sample h [n], z [m] and delta [m] are stored, and W [m, n] once; node features are made on the fly.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from artifacts import create_array, log, progress, read_array
from config import GraphConfig, UserError, derive_seed
from model import HookedModel, capture, inspecting
from utils_data import Images, UnlearningDataset, make_loader

if TYPE_CHECKING:
    from torch_geometric.data import Data

FEATURES = ("h", "z", "W", "g")
EPSILON = 1e-8
MAX_EDGES = 200_000_000  # 3.2 GB of int64; 128 x 512 has 41.8 million
_ARRAYS = ("h", "z", "delta", "labels", "weight")


def num_vertices(m: int, n: int) -> int:
    """Nodes of the graph of one m x n layer: one per weight."""
    return m * n


def num_edges(m: int, n: int) -> int:
    """Directed edges of the rook's graph K_m x K_n: m n (m + n - 2)."""
    return m * n * (m + n - 2)


def rook_edges(m: int, n: int) -> Tensor:
    """Directed edges [2, E] between weights of one row or one column; node (i, j) is number i n + j.

    Raises:
        UserError: the list would not fit; said before memory is taken.
    """
    edges = num_edges(m, n)
    if edges > MAX_EDGES:
        size = f"{edges:,} edges ({edges * 16 / 1e9:.0f} GB) of a {m} x {n} layer"
        raise UserError(f"{size} do not fit: use MaskingGCN.forward, which needs no edges (limit {MAX_EDGES:,})")
    nodes = torch.arange(m * n).view(m, n)
    pairs_in_rows = _ordered_pairs(n)
    pairs_in_columns = _ordered_pairs(m)
    rows = nodes[:, pairs_in_rows].permute(1, 0, 2).reshape(2, -1)
    columns = nodes[pairs_in_columns].reshape(2, -1)
    return torch.cat([rows, columns], 1)


def _ordered_pairs(count: int) -> Tensor:
    """All (a, b) with a != b, [2, count (count - 1)]."""
    return (~torch.eye(count, dtype=torch.bool)).nonzero().T


def _standardise(values: Tensor) -> Tensor:
    """(v - mean) / (std + 1e-8) over the last dimension; the same as over the nodes after broadcasting."""
    mean, std = values.mean(-1, keepdim=True), values.std(-1, keepdim=True, correction=0)
    return (values - mean) / (std + EPSILON)


def _outer_moments(delta: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std + 1e-8, [B, 1] each, of the outer products delta_i h_j over all (i, j)."""
    delta, h = delta.double(), h.double()
    mean = delta.mean(-1, keepdim=True) * h.mean(-1, keepdim=True)
    square = delta.square().mean(-1, keepdim=True) * h.square().mean(-1, keepdim=True)
    std = (square - mean.square()).clamp_min(0).sqrt()
    return mean.float(), (std + EPSILON).float()


class GraphDataset(Dataset):
    """Graphs in a folder that `GraphGenerator` filled.

    Args:
        root: the folder. transform: applied to each `Data` that indexing gives.

    Attributes:
        h [S, n], z [S, m], delta [S, m]: memory-mapped. labels [S], weight W [m, n]: in memory.
    """

    def __init__(self, root: Path, transform: "Callable[[Data], Data] | None" = None):
        self.root, self.transform = Path(root), transform
        arrays = {name: read_array(self.root / f"{name}.npy") for name in _ARRAYS}
        self.h, self.z, self.delta = arrays["h"], arrays["z"], arrays["delta"]
        self.labels = torch.from_numpy(np.array(arrays["labels"]))
        self.weight = torch.from_numpy(np.array(arrays["weight"]))
        self.m, self.n = self.weight.shape
        count = len(self.labels)
        shapes = (self.h.shape, self.z.shape, self.delta.shape)
        if shapes != ((count, self.n), (count, self.m), (count, self.m)):
            raise UserError(f"{root} holds arrays {shapes} that do not belong together: make the graphs again")

    def __len__(self) -> int:
        return len(self.labels)

    def vectors(self, indices: Sequence[int] | np.ndarray | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h [B, n], z [B, m], delta [B, m] of some samples."""
        chosen = np.asarray(indices)
        h, z, delta = (torch.from_numpy(np.array(array[chosen])) for array in (self.h, self.z, self.delta))
        return h, z, delta

    def features(self, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Node features [B, m, n, 4]: h_j, z_i, W_ij, g_ij, each standardised over the nodes."""
        h, z, delta = self.vectors(indices)
        out = h.new_empty(len(h), self.m, self.n, len(FEATURES))
        mean, spread = _outer_moments(delta, h)
        out[..., 0] = _standardise(h).unsqueeze(1)
        out[..., 1] = _standardise(z).unsqueeze(2)
        out[..., 2] = _standardise(self.weight.flatten()).view(self.m, self.n)
        torch.mul((delta / spread).unsqueeze(2), h.unsqueeze(1), out=(gradient := h.new_empty(out.shape[:3])))
        out[..., 3] = gradient - (mean / spread).unsqueeze(2)
        return out

    def class_features(self, num_classes: int) -> Tensor:
        """Class representatives [C, m, n, 4]: `features` averaged over each class's samples.

        g's mean is one matrix product, so no dense feature of a sample is ever made.

        Raises:
            UserError: a class has no graph.
        """
        out = torch.empty(num_classes, self.m, self.n, len(FEATURES))
        out[..., 2] = _standardise(self.weight.flatten()).view(self.m, self.n)
        for label in range(num_classes):
            members = (self.labels == label).nonzero().flatten()
            if len(members) == 0:
                raise UserError(f"{self.root} holds no graph of class {label}: make the graphs with more samples")
            h, z, delta = self.vectors(members)
            mean, spread = _outer_moments(delta, h)
            out[label, ..., 0] = _standardise(h).mean(0)
            out[label, ..., 1] = _standardise(z).mean(0).unsqueeze(1)
            out[label, ..., 3] = (delta / spread).T @ h / len(h) - (mean / spread).mean()
        return out

    def edge_index(self) -> Tensor:
        """The explicit edges [2, E], the same for every sample; for inspection, export and tests."""
        return rook_edges(self.m, self.n)

    def to_pyg(self, index: int) -> "Data":
        """One sample as PyG `Data`: x [N, 4], edge_index [2, E], y [1] (the label)."""
        from torch_geometric.data import Data

        x = self.features([index]).view(-1, len(FEATURES))
        return Data(x=x, edge_index=self.edge_index(), y=self.labels[index : index + 1])

    def __getitem__(self, index: int) -> "Data":
        data = self.to_pyg(index)
        return self.transform(data) if self.transform else data


class GraphGenerator:
    """Turns training images into graphs of one layer, in batched passes, eval mode.

    Args:
        model: the classifier. dataset: its images. mask_layer: the target layer. seed: of the choice of samples.
    """

    def __init__(
        self,
        model: HookedModel,
        dataset: UnlearningDataset,
        mask_layer: int = -2,
        config: GraphConfig | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        self.model, self.dataset, self.mask_layer = model, dataset, mask_layer
        self.config, self.seed, self.device = config or GraphConfig(), seed, torch.device(device)

    def choose_samples(self) -> np.ndarray:
        """Indices into the training split: as many of each class, at least `min_per_class` where there are."""
        labels = self.dataset.splits["train"].labels.numpy()
        per_class = max(self.config.min_per_class, -(-self.config.num_samples // self.dataset.num_classes))
        generator = np.random.default_rng(derive_seed(self.seed, "graphs"))
        members = [generator.permutation(np.flatnonzero(labels == c))[:per_class] for c in np.unique(labels)]
        scarce = sum(len(chosen) < self.config.min_per_class for chosen in members)
        if scarce:
            log(f"graphs: {scarce} classes have fewer than {self.config.min_per_class} training images")
        return generator.permutation(np.concatenate(members))

    def flatten_in_out_activation_single_layer(self, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """The target layer's input and output as vectors h [B, n] and z [B, m].

        A model with another layer type adapts this place.

        Raises:
            UserError: the layer's input or output is not one vector per sample.
        """
        if inputs.dim() != 2 or outputs.dim() != 2:
            shapes = f"{tuple(inputs.shape)} -> {tuple(outputs.shape)}"
            raise UserError(f"the target layer maps {shapes}, not vectors to vectors: choose another mask_layer")
        return inputs, outputs

    def capture_batch(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h [B, n], z [B, m] and delta = dl/dz [B, m] of every sample from one forward and one backward pass.

        The loss is the *sum* of cross-entropies and the model is in eval mode, so samples do not interact.
        The backward pass ends at z.
        """
        target = self.model.target(self.mask_layer)
        with inspecting(self.model), capture(target, cut=True) as record:
            logits = self.model(images)
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            inputs, outputs = record.take()
            (delta,) = torch.autograd.grad(loss, outputs)
        h, z = self.flatten_in_out_activation_single_layer(inputs, outputs)
        return h.detach(), z.detach(), delta.view_as(z)

    def generate(self, folder: Path) -> dict:
        """Write the graphs into `folder`, chunk by chunk; returns their facts."""
        images: Images = self.dataset.splits["train"]
        chosen = torch.from_numpy(self.choose_samples())
        weight = self.model.target(self.mask_layer).weight.detach().cpu().numpy()
        m, n = weight.shape
        sizes = {"h": n, "z": m, "delta": m}
        arrays = {name: create_array(folder / f"{name}.npy", (len(chosen), size)) for name, size in sizes.items()}
        loader: DataLoader = make_loader(images.only(chosen), self.config.batch_size)
        begin = 0
        for batch, labels in progress(loader, "graphs"):
            vectors = self.capture_batch(batch.to(self.device), labels.to(self.device))
            for name, values in zip(sizes, vectors, strict=True):
                arrays[name][begin : begin + len(labels)] = values.cpu().numpy()
            begin += len(labels)
        for array in arrays.values():
            array.flush()
        create_array(folder / "weight.npy", weight.shape)[:] = weight
        labels = images.labels[chosen].numpy()
        create_array(folder / "labels.npy", labels.shape, np.int64)[:] = labels
        return {"num_samples": len(chosen), "num_vertices": num_vertices(m, n), "num_edges": num_edges(m, n)}
