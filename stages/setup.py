"""Check the configuration and hold what every stage needs: device, shapes, images; and keep finished stages.

The only file that seeds torch's global generator.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from core.config import GIVEN, PipelineConfig, UserError, changed_settings, derive_seed, plain
from core.hashes import key_of, load_plugins
from core.observe import Tracker, visible
from core.store import Stage, build_stage
from graphs.layout import check_budget
from model import HookedModel, vision_model_loader
from trainer import check_recipe
from training.distributed import by_torchrun, choose_device, local_device
from utils_data import UnlearningDataset, dataset_facts, get_unlearning_dataset

MOST_NAMED, MOST_BYTES = 6, 200  # settings that differ from the defaults, in the name of a tracked run; of that name


def seed_weights(seed: int, *parts: object) -> None:
    """Seed torch's global generator, from which the initial weights of the next network are drawn.

    Args:
        seed: of the run. parts: what the weights are for, so that two networks of one run differ.
    """
    torch.manual_seed(derive_seed(seed, *parts))


def check_paths(config: PipelineConfig) -> None:
    """Check that the products that are given by path exist: two files and a folder.

    Raises:
        UserError: one does not, or is a folder instead of a file or a file instead of a folder.
    """
    for name in GIVEN:
        path, is_folder = getattr(config, name), name == "graph_dir"
        if path is None:
            continue
        if not path.exists():
            raise UserError(f"there is nothing at {path}: check the path, or leave it out to compute it")
        if path.is_dir() != is_folder:
            found, needed = (
                ("a file", "the folder that holds it")
                if is_folder
                else ("a folder", "the file in it, e.g. its .safetensors")
            )
            raise UserError(f"{path} is {found}: name {needed}")


class Setup:
    """A configuration that was checked against its dataset and architecture, with all that stages share.

    Args:
        config: what to do.

    Attributes:
        config: the same, with classes as labels.
        shape: (classes, channels, height and width) of the classifier.
        graph: who touches whom among the weights that a mask may switch off.
        layers: indices of the masked layers, from the first.
        outline: the classifier on torch's meta device: shapes without values.
        depth: how many linear layers the classifier has.
        seconds: of each stage that was made or found, by name.

    Raises:
        UserError: the configuration cannot be run.
    """

    def __init__(self, config: PipelineConfig):
        load_plugins(config.plugins)
        place, given = config.output_dir / "datasets", config.dataset_path
        facts = dataset_facts(config.vision_dataset, config.forget_class, given, place, config.data)
        gcn = replace(config.gcn, train_classes=facts.labels(config.gcn.train_classes, "gcn.train_classes"))
        self.config = config = replace(config, forget_class=facts.forget, gcn=gcn)
        self.device = choose_device(config.device)
        if config.train.use_ddp and by_torchrun():
            self.device = local_device(self.device)
        self.seconds: dict[str, float] = {}
        self._kept: dict[str, Stage] = {}
        self.shape = (len(facts.classes), facts.channels, facts.size)
        with torch.device("meta"):
            self.outline = fresh = self.network()
        check_recipe(config.train, fresh, facts.size, self.device)
        self.graph, self.layers = fresh.weight_graph(config.mask_layer), fresh.layer_indices(config.mask_layer)
        self.depth = len(fresh.linears)
        for name in ("topK_list", "kappa_list"):
            for value in getattr(config, name):
                check_budget(value, self.graph.num_vertices, name)
        check_paths(config)

    def network(self, path: Path | None = None) -> HookedModel:
        """Build the classifier of this architecture and shape on the CPU, with random weights or those in a file."""
        return vision_model_loader(self.config.model_architecture, *self.shape, path)

    @property
    def multiplications(self) -> float:
        """Multiplications of the classifier's forward pass for one batch; infinite if it is more than linear layers."""
        parts = [part for part in self.outline.modules() if list(part.parameters(recurse=False))]
        linear = all(isinstance(part, nn.Linear) for part in parts)
        weights = sum(value.numel() for part in parts for value in part.parameters())
        return weights * self.config.train.batch_size if linear else math.inf

    @cached_property
    def data(self) -> UnlearningDataset:
        """Read the dataset when it is first needed."""
        config = self.config
        return get_unlearning_dataset(
            config.vision_dataset,
            config.train.batch_size,
            config.forget_class,
            config.dataset_path,
            datasets_dir=config.output_dir / "datasets",
            data=config.data,
            seed=config.seed,
        )

    @cached_property
    def common(self) -> dict:
        """Name the inputs that every stage depends on."""
        config = self.config
        return {
            "model": config.model_architecture.value,
            "dataset": config.vision_dataset.value,
            "images": self.data.fingerprint(),
            "seed": config.seed,
            "device": self.device.type,
            "plugins": list(load_plugins(config.plugins).values()),
        }

    @property
    def label(self) -> str:
        """Name the architecture and the dataset, as folders and curves are called."""
        return f"{self.config.model_architecture.value}_{self.config.vision_dataset.value}"

    @property
    def kept(self) -> list[Stage]:
        """The stages that were made or found, in this order."""
        return list(self._kept.values())

    def tracker(self, stage: str, *sections: str) -> Tracker:
        """Make a tracker for the curves of one stage, named by what tells it from other runs.

        Args:
            sections: of the settings, that the stage depends on; none: all settings count.
        """
        changed = changed_settings(self.config)
        apart = [one for one in changed if not sections or one.partition(".")[0] in sections]
        more = [f"and-{len(apart) - MOST_NAMED}-more"] if len(apart) > MOST_NAMED else []
        name = "_".join([self.label, stage, f"seed-{self.config.seed}", *apart[:MOST_NAMED], *more])
        written = visible(name).encode()
        if len(written) > MOST_BYTES:  # trackio makes a folder of this name
            name = f"{written[: MOST_BYTES - 9].decode(errors='ignore')}-{key_of({'': name})[:8]}"
        return Tracker(self.config.tracker, name, plain(self.config))

    def keep(self, name: str, folder: str, label: str, inputs: dict, make: Callable[[Path], dict]) -> Path:
        """Return a stage's folder; it is built, or found and checked, once per run.

        Args:
            folder: below the output folder. label: the readable part of the folder's name.
            inputs: all that the stage depends on. make: fills a folder and returns facts.
        """
        if name not in self._kept:
            self._kept[name] = build_stage(self.config.output_dir / folder, label, inputs, make)
            self.seconds[name] = self._kept[name].seconds
        return self._kept[name].path
