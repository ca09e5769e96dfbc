"""Save and load the state from which an interrupted training goes on: one file of tensors and JSON, no pickle."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from core.artifacts import DamagedError, read_json, read_tensors, remove, write_json, write_tensors
from core.choices import Diverged
from core.config import TrainConfig, plain

RNG, ORDER, HISTORY = "rng", "order", "history"


@dataclass(frozen=True)
class Progress:
    """How far a training has come: whole epochs, optimiser steps, curves so far, last epoch's loss and score."""

    epoch: int
    step: int
    history: list[dict]
    values: dict


@dataclass(frozen=True)
class StateFile:
    """The file of a training's state, the hash of all the training's inputs, and whether to resume from the file."""

    path: Path
    key: str
    resume: bool = False

    @property
    def _end(self) -> Path:
        return self.path.with_suffix(".diverged.json")

    def clear(self) -> None:
        """Remove the file, once its training has ended or is begun anew."""
        remove(self.path)
        remove(self._end)

    def give_up(self, why: str) -> None:
        """Leave word that this training ended, for whoever starts it again by itself, as torchrun does."""
        write_json(self._end, {"why": why})

    def check(self) -> None:
        """Raise `Diverged` at once where this training is to go on that has ended so before."""
        if self.resume and self._end.exists():
            raise Diverged(f"{read_json(self._end).get('why')} (it ended so before; without --resume it begins anew)")


@dataclass(frozen=True)
class Training:
    """Everything that changes while a model trains. `order` draws the order of images in each epoch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    order: torch.Generator
    device: torch.device

    def save(self, place: StateFile, progress: Progress) -> None:
        """Write the state, whole or not at all."""
        arrays = {f"model.{name}": value.detach().cpu().numpy() for name, value in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            for name, value in state.items():
                arrays[f"optimizer.{index}.{name}"] = torch.as_tensor(value).detach().cpu().numpy()
        arrays[ORDER] = self.order.get_state().numpy()
        arrays[RNG] = torch.get_rng_state().numpy()
        if self.device.type == "cuda":
            arrays[f"{RNG}.cuda"] = torch.cuda.get_rng_state(self.device).numpy()
        # A header of safetensors ends at 100 MB, and curves grow with every step: they are kept as an array.
        arrays[HISTORY] = np.frombuffer(json.dumps(progress.history).encode(), np.uint8)
        facts = {"key": place.key, "epoch": progress.epoch, "step": progress.step, "figures": progress.values}
        write_tensors(place.path, arrays, facts)

    def load(self, place: StateFile) -> Progress:
        """Take up the state in a file.

        Raises:
            DamagedError: it is damaged, or of another training.
        """
        arrays, facts = read_tensors(place.path)
        if facts.get("key") != place.key:
            raise DamagedError(place.path, "it is the state of another training")
        tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
        self.model.load_state_dict(_below("model.", tensors))
        state: dict[int, dict] = {}
        for name, value in _below("optimizer.", tensors).items():
            index, _, part = name.partition(".")
            state.setdefault(int(index), {})[part] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.order.set_state(tensors[ORDER])
        torch.set_rng_state(tensors[RNG])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors[f"{RNG}.cuda"], self.device)
        history = json.loads(arrays[HISTORY].tobytes())
        return Progress(facts["epoch"], facts["step"], history, facts["figures"])


def recipe(train: TrainConfig) -> dict:
    """Return the settings of a training that its result depends on.

    Several processes sum in another order than one, so that their number counts; how often states are saved does not.
    """
    aside = ("use_ddp", "num_workers", "ddp_timeout", "ddp_restarts", "save_seconds")
    values = {name: value for name, value in plain(train).items() if name not in aside}
    return values | ({"processes": train.num_workers} if train.use_ddp else {})


def _below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
