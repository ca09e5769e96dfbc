"""Count what a configuration asks for: images of each split, classes, graphs, steps, points, methods.

Labels are those of the dataset; of a folder tree they stand in its index, so that no image is read for them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from core.config import KappaModes, Objectives, PipelineConfig, SupportedDatasets
from data import GraphGenerator
from images.decode import How
from images.index import Tree
from images.specs import SPECS, dataset_root
from images.splits import open_tree_of, split_rows
from measure.metrics import INSIDE, chosen_metrics
from rivals.compared import chosen_methods
from stages.setup import Setup
from utils_data import SPLITS, Images, UnlearningDataset

FORESEEN = ("mimu", "mimu_refined", "taylor_mask", "random", "sft", "logit_drop", "retrain", "default")
"""Methods whose costs follow from what is measured: the default ones. Others are named, and not guessed."""


class Drawn(UnlearningDataset):
    """A dataset of the right shapes, labels and class names, whose images are noise and take next to no memory.

    Each image begins one byte after the one ahead of it, in one run of noise. All differ: BatchNorm divides by how far
    the images of a batch are from one another, and the gradients of equal ones are not finite.
    """

    def __init__(
        self, like: SupportedDatasets, labels: Mapping[str, Tensor], setup: Setup, classes: Sequence[str], batch: int
    ):
        _, channels, size = setup.shape
        most, strides = max(map(len, labels.values())), (1, size * size, size, 1)
        shape, generator = (most + channels * size * size,), torch.Generator().manual_seed(0)
        noise = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        level = torch.full((channels, 1, 1), 100.0)
        self.name, self.batch_size, self.seed, self.tree = like, batch, setup.config.seed, None
        self.splits = {
            name: Images(noise.as_strided((len(one), channels, size, size), strides), one, level, level)
            for name, one in labels.items()
        }
        self.classes, self.forget_class = tuple(classes), setup.config.forget_labels


def at_its_place(config: PipelineConfig, store: Path) -> PipelineConfig:
    """Return the configuration with another output folder, but the dataset where it lies."""
    place, name = config.dataset_path, config.vision_dataset
    if name is not SupportedDatasets.DIGITS:
        place = dataset_root(name, place, config.output_dir / "datasets")
    methods = chosen_methods(config.eval.methods)
    return replace(config, output_dir=store, dataset_path=place, eval=replace(config.eval, methods=methods))


@dataclass(frozen=True)
class Extent:
    """What a run consists of.

    Args:
        setup: its checked configuration; writes, if anything, below a temporary folder.
        labels: of each split's images, [S] each.
        classes: their names.
        tree: the index of a folder tree; None: images that lie in arrays.
        pixel_bytes: that images in arrays keep in memory.
    """

    setup: Setup
    labels: Mapping[str, Tensor]
    classes: tuple[str, ...]
    tree: Tree | None
    rows: Mapping[str, Sequence[int]]
    pixel_bytes: int

    @classmethod
    def of(cls, setup: Setup) -> "Extent":
        """Read the labels of a configuration's dataset.

        Raises:
            UserError: there are no such images.
        """
        config = setup.config
        if not SPECS[config.vision_dataset].layout:
            data = setup.data
            labels = {name: data.splits[name].labels for name in SPLITS}
            held = sum(part.pixels.nbytes for part in data.splits.values())
            return cls(setup, labels, tuple(data.classes), None, {}, held)
        tree = open_tree_of(config.vision_dataset, config.dataset_path, config.output_dir / "datasets")
        rows = split_rows(config.vision_dataset, tree, config.data)
        labels = {name: torch.from_numpy(tree.labels[rows[name]]).long() for name in SPLITS}
        return cls(setup, labels, tuple(tree.classes), tree, {name: rows[name].tolist() for name in SPLITS}, 0)

    @property
    def config(self) -> PipelineConfig:
        """The configuration, with classes as labels."""
        return self.setup.config

    def drawn(self, most: int | None = None, batch: int | None = None) -> Drawn:
        """Return a dataset with these labels, or with `most` of them, in the same proportions of splits and sides."""
        labels = dict(self.labels)
        if most is not None and most < self.images:
            labels = {
                name: torch.cat([_spaced(one, most / self.images) for one in self._sides(name)]) for name in SPLITS
            }
        config = self.config
        return Drawn(config.vision_dataset, labels, self.setup, self.classes, batch or config.train.batch_size)

    def _sides(self, split: str) -> list[Tensor]:
        labels = self.labels[split]
        forgotten = torch.isin(labels, torch.tensor(self.config.forget_labels))
        return [labels[forgotten], labels[~forgotten]]

    def side(self, split: str, is_forget_set: bool) -> int:
        """Count the images of a set."""
        return len(self._sides(split)[0 if is_forget_set else 1])

    @property
    def images(self) -> int:
        """Images of all splits."""
        return sum(map(len, self.labels.values()))

    @property
    def how(self) -> How:
        """How images of a tree are decoded."""
        data = self.config.data
        return How(self.setup.shape[2], data.max_pixels, data.sample_bits)

    @property
    def cached_bytes(self) -> int:
        """Bytes of all decoded pixels of a tree; 0: none are kept on the disk."""
        _, channels, size = self.setup.shape
        needed = self.images * channels * size**2
        return needed if self.tree and needed <= self.config.data.cache_gb * 1e9 else 0

    @property
    def decodings(self) -> int:
        """How many images of a tree are decoded: each once, and without a cache again in every epoch."""
        if not self.tree:
            return 0
        trained, epochs = len(self.labels["train"]) + len(self.labels["val"]), self.config.train.epochs
        again = 0 if self.cached_bytes else trained * epochs * (1 + self.config.eval.references) + self.images
        return self.images + again

    @cached_property
    def graphs(self) -> int:
        """Graphs that are made."""
        with torch.device("meta"):
            model = self.setup.network()
        config = self.config
        maker = GraphGenerator(model, self.drawn(), config.mask_layer, config.graph, config.seed)
        return len(maker.choose_samples())

    @property
    def trained_images(self) -> int:
        """Training images that the classifier's training sees, over all epochs."""
        return 0 if self.config.trained_vision_model_path else self.config.train.epochs * len(self.labels["train"])

    @property
    def retrained_images(self) -> int:
        """The same of all references."""
        one = self.config.train.epochs * self.side("train", False)
        return one * self.config.eval.references

    @property
    def networks(self) -> int:
        """Graph networks that are trained."""
        if self.config.gcn_path:
            return 0
        return len(self.config.topK_list) if self.config.gcn.objective is Objectives.elbo else 1

    @property
    def points(self) -> int:
        """Points (top_k, kappa) that are measured; a search for kappa is not counted."""
        kappas = len(self.config.kappa_list) if self.config.kappa is KappaModes.list else 1
        return len(self.config.topK_list) * kappas

    @property
    def methods(self) -> tuple[str, ...]:
        """The chosen methods whose costs are foreseen."""
        return tuple(name for name in self.config.eval.methods if name in FORESEEN)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The chosen metrics whose costs are foreseen: those that look inside are only where a run has them unasked."""
        usual = chosen_metrics(type(self.config.eval)().metrics)
        chosen = chosen_metrics(self.config.eval.metrics)
        return tuple(name for name, one in chosen.items() if one.group not in INSIDE or name in usual)

    @property
    def unforeseen(self) -> list[str]:
        """What is left out of all sums."""
        config, left = self.config, [name for name in self.config.eval.methods if name not in FORESEEN]
        slow = [name for name in chosen_metrics(config.eval.metrics) if name not in self.metrics]
        said = ["the report (figures, tables, page)"]
        said += [f"methods: {', '.join(left)}"] if left else []
        said += [f"metrics: {', '.join(slow)}"] if slow else []
        said += ["the search for kappa (kappa: auto)"] if config.kappa is KappaModes.auto else []
        several = config.gcn.train_seeds or config.gcn.train_batch_sizes
        said += ["classifiers of other seeds that the graph network learns on"] if several and self.networks else []
        return said


def _spaced(labels: Tensor, share: float) -> Tensor:
    """Take a share of labels, evenly spaced, and at least four if there are so many."""
    count = min(len(labels), max(4, math.ceil(share * len(labels))))
    return labels[torch.linspace(0, len(labels) - 1, count).long()] if count else labels
