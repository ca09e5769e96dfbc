"""Everything that optimises: the classifier, in one process or in several, and the graph network for an objective."""

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from core.artifacts import HISTORY, DamagedError, write_json
from core.choices import Diverged
from core.config import GCNConfig, Trackers, TrainConfig, UserError, derive_seed
from core.observe import Tracker, log, progress
from model import HookedModel, MaskingGCN, inspecting, predictions
from training.distributed import ALONE, Group, by_torchrun, check_shared_memory, launch, torchrun_meeting
from training.resume import Progress, StateFile, Training
from utils_data import UnlearningDataset

SECONDS_BETWEEN_LINES = 2.0  # short epochs do not flood a log


def mean_loss_and_score(
    model: nn.Module, loader: DataLoader, device: torch.device, group: Group = ALONE
) -> tuple[float, float]:
    """Mean cross-entropy (nats) and accuracy (percent) over a whole loader, eval mode.

    In a group, `loader` holds this process's share, and the values are those of all shares together.
    """
    total = correct = count = 0.0
    with inspecting(model), torch.inference_mode():
        for images, labels in loader:
            logits, labels = model(images.to(device)).float(), labels.to(device)
            total += float(functional.cross_entropy(logits, labels, reduction="sum"))
            correct += float((predictions(logits) == labels).sum())
            count += len(labels)
    total, correct, count = group.sum(
        torch.tensor([total, correct, count], dtype=torch.float64, device=device)
    ).tolist()
    return total / count, 100 * correct / count


def gradient_norm(model: nn.Module) -> float:
    """L2 norm of all gradients together."""
    return float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def check_recipe(config: TrainConfig, model: HookedModel, size: int, device: torch.device) -> None:
    """Check that a recipe can train this model on images of `size` pixels.

    Raises:
        UserError: it would give wrong gradients.
    """
    if config.bf16 and device.type == "cpu" and size < model.smallest_in_bf16:
        what = f"train.bf16 is on for images of {size} px, of which a CPU computes wrong gradients"
        raise UserError(f"{what}: leave it out, or take images of {model.smallest_in_bf16} px or more")


class VisionModelTrainer:
    """Trains a classifier with AdamW, in this process or (`use_ddp`) in several.

    Args:
        model: fresh classifier; trained in place. data: its dataset. tracker: receives the curves.
        state: where to keep what an interrupted training goes on from (None: nowhere).
    """

    def __init__(
        self,
        model: HookedModel,
        data: UnlearningDataset,
        config: TrainConfig,
        device: torch.device,
        tracker: Tracker,
        state: StateFile | None = None,
    ):
        self.model, self.data, self.config, self.device, self.tracker = model, data, config, device, tracker
        self.state = state
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        # Each of several processes updates all weights: fused, that takes a third of the time, up to rounding the same.
        fused, rate, decay = config.use_ddp or None, config.lr, config.weight_decay
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay, fused=fused)

    def train(self, folder: Path) -> dict:
        """Train; write the curves to `folder`/history.json; return the last epoch's values.

        Raises:
            UserError: the loss is no longer finite, or the state to go on from cannot be read.
        """
        return self.train_ddp(folder) if self.config.use_ddp else self.fit(ALONE, folder)

    def train_ddp(self, folder: Path) -> dict:
        """The same in several processes, each with its share of every batch; weights equal up to rounding.

        Starts `num_workers` processes on this machine, or trains together with those that torchrun started.
        BatchNorm sees a process's share of a batch alone; running statistics are averaged after each epoch.

        Raises:
            UserError: as `train`, or the processes do not find each other. RuntimeError: one of them failed.
        """
        config = self.config
        if by_torchrun():
            return self.fit(torchrun_meeting(self.device, config.ddp_timeout).group, folder)
        check_shared_memory(self.data.splits.values())
        state = self.state or StateFile(folder / "state.safetensors", "")
        if not state.resume:
            state.clear()
        loader = self.data.get_train_loader()
        # What an attempt left is what the next one goes on from.
        given = (copy.deepcopy(self.model).cpu(), self.data, config, self.tracker, replace(state, resume=True), folder)
        values = launch(
            _train_share,
            given,
            workers=config.num_workers,
            device=self.device,
            seconds=config.ddp_timeout,
            restarts=config.ddp_restarts,
        )
        self.tracker.history = self._training(loader).load(state).history
        if self.state is None:
            state.clear()
        return values

    def _training(self, loader: DataLoader) -> Training:
        assert isinstance(loader.generator, torch.Generator)
        return Training(self.model, self.optimizer, loader.generator, self.device)

    def fit(self, group: Group, folder: Path, hand_over: bool = False) -> dict:
        """This process's part of a training. Rank 0 alone writes and prints.

        Args:
            hand_over: save the last epoch's state as well, from which the launcher takes the trained weights.
        """
        loader = group.shard(self.data.get_train_loader())
        val_loader = group.shard(self.data.get_val_loader(), keep_empty=False)
        training = self._training(loader)
        done = self._take_up(training, group)
        network, step, values = group.wrap(self.model), done.step, done.values
        self.tracker.history = done.history
        said, saved = -math.inf, time.monotonic()
        with self.tracker:
            for epoch in range(done.epoch + 1, self.config.epochs + 1):
                begun = time.perf_counter()
                step = self._epoch(network, loader, group, epoch, step)
                rate = len(self.data.splits["train"]) / (time.perf_counter() - begun)
                group.average_buffers(self.model)
                val_loss, val_score = mean_loss_and_score(self.model, val_loader, self.device, group)
                if not math.isfinite(val_loss):
                    raise Diverged("the classifier's loss on validation images is not finite: lower train.lr")
                values = {"epoch": epoch, "val_loss": val_loss, "val_score": val_score}
                self.tracker.log(step, **values, images_per_second=rate)
                last = epoch == self.config.epochs
                if group.leads and (last or time.monotonic() - said > SECONDS_BETWEEN_LINES):
                    said = time.monotonic()
                    place = f"epoch {epoch}/{self.config.epochs}"
                    log(f"classifier: {place}, validation {val_score:.1f} %, {rate:.0f} images/s")
                due = (hand_over or group.world > 1) if last else time.monotonic() - saved >= self.config.save_seconds
                if group.leads and self.state and due:
                    training.save(self.state, Progress(epoch, step, self.tracker.history, values))
                    saved = time.monotonic()
        if group.leads:
            write_json(folder / HISTORY, {"history": self.tracker.history})
        return values

    def _take_up(self, training: Training, group: Group) -> Progress:
        """Where to go on; the state in the file is taken up if that is asked for."""
        state = self.state
        if state and state.resume and state.path.exists():
            try:
                done = training.load(state)
            except DamagedError as error:
                log(f"classifier: {error.found}, so that the training begins anew")
            else:
                if group.leads:
                    log(f"classifier: going on after epoch {done.epoch}/{self.config.epochs}")
                return done
        if state and group.leads:
            state.clear()
        return Progress(0, 0, [], {})

    def _epoch(
        self,
        network: nn.Module,
        loader: DataLoader,
        group: Group,
        epoch: int,
        step: int,
    ) -> int:
        """One pass over the training images; logs every step's loss and gradient norm; returns the last step."""
        count, batch_size = len(self.data.splits["train"]), self.data.batch_size
        sizes = [min(batch_size, count - first) for first in range(0, count, batch_size)]
        losses, norms = [], []
        name = f"classifier, epoch {epoch}/{self.config.epochs}"
        batches = progress(loader, name) if group.leads else loader
        for index, (images, labels) in enumerate(batches):
            loss, norm = self._step(network, images, labels, sizes[index], group)
            if group.world == 1:
                self.tracker.log(step + index + 1, loss=loss, grad_norm=norm)
            losses.append(loss)
            norms.append(norm)
        if group.world > 1:  # one exchange for all steps: each process knows its share of the losses
            total = group.sum(torch.tensor(losses, dtype=torch.float64, device=self.device)) / group.world
            for index, (loss, norm) in enumerate(zip(total.tolist(), norms, strict=True)):
                self.tracker.log(step + index + 1, loss=loss, grad_norm=norm)
        return step + len(sizes)

    def _step(self, network: nn.Module, images: Tensor, labels: Tensor, size: int, group: Group) -> tuple[float, float]:
        """One optimiser step on [B, C, H, W] and [B], this process's share of a batch of `size`.

        Returns:
            The loss, whose mean over all processes is that of the whole batch, and the gradient norm.
        """
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        # BatchNorm cannot normalise the single image that the last batch, or one process's share of it, may hold.
        self.model.train(len(images) > 1)
        own = group.share(size)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            logits = network(images)
            if group.world == 1:
                loss = functional.cross_entropy(logits, labels)
            else:  # gradients are averaged over processes, so that this gives the whole batch's mean
                loss = functional.cross_entropy(logits[:own], labels[:own], reduction="sum") * (group.world / size)
        value = float(loss.detach())
        if not math.isfinite(value):
            loss = loss * math.nan  # then the gradient, which all processes share, tells every one of them
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = gradient_norm(self.model)
        if not math.isfinite(norm) or not math.isfinite(value):
            what = "gradient" if math.isinf(norm) else "loss"
            raise Diverged(f"the classifier's {what} is no longer finite: lower train.lr")
        self.optimizer.step()
        return value, norm


def _train_share(
    group: Group,
    device: torch.device,
    model: HookedModel,
    data: UnlearningDataset,
    config: TrainConfig,
    tracker: Tracker,
    state: StateFile,
    folder: Path,
) -> dict:
    """What each process of `train_ddp` runs. The model came through shared memory: each trains a copy of its own."""
    own = tracker if group.leads else Tracker(Trackers.none, tracker.name, tracker.config)
    trainer = VisionModelTrainer(copy.deepcopy(model).to(device), data, config, device, own, state)
    return trainer.fit(group, folder, hand_over=True)


# --- the graph network ------------------------------------------------------------------------------------


WARM_UP = 0.1  # share of the steps of a one-cycle schedule in which the learning rate grows


def annealed(start: float, end: float, step: int, steps: int) -> float:
    """Return the value at one of `steps` steps (0-based) of a geometric way from start to end."""
    return start * (end / start) ** (step / max(1, steps - 1))


@dataclass(frozen=True)
class Part:
    """The part of a step that is differentiated at once.

    Args:
        terms: scalar tensors by name, means over the part, in nats; "loss" is the one that is minimised.
        count: graphs or requests in the part.
        weigh: a mean over the part -> its contribution to the mean over the step; for tensors and floats alike.
    """

    terms: dict[str, Tensor]
    count: int
    weigh: Callable[[Any], Any]


class Objective(ABC):
    """What a graph network is trained for; `GCNTrainer` asks it for the losses of each step.

    The loop knows its objective from here alone, so that this file imports neither graphs nor masks, and an edit of
    theirs retrains no classifier. `unlearn.objectives` holds the objectives.

    Args:
        gcn: trained in place.
        config: the section `gcn`.
        seed: of the run; the names of two generators are derived from it.
        device: where the objective is computed.

    Attributes:
        seeds: the name that the generators' seeds are derived from.
        label: the name of the training in the log.
        terms: what is logged of each step, by name.
        unit: what `Part.count` counts, in the plural.
        remedy: the settings to lower where the loss diverges.
        clip: the gradient's L2 norm at most.
        one_cycle: whether the learning rate follows one cycle; otherwise it stays.
    """

    seeds: ClassVar[str]
    terms: ClassVar[tuple[str, ...]]
    unit: ClassVar[str]
    remedy: ClassVar[str]
    label = "GCN"
    clip = math.inf
    one_cycle = False

    def __init__(self, gcn: MaskingGCN, config: GCNConfig, seed: int, device: torch.device):
        self.gcn, self.config, self.device = gcn, config, device
        self.order = torch.Generator().manual_seed(derive_seed(seed, self.seeds, "order"))
        self.noise = torch.Generator(device).manual_seed(derive_seed(seed, self.seeds, "noise"))

    @abstractmethod
    def parts(self, temperature: float) -> Iterator[Part]:
        """Draw the next step's samples and yield their losses, part by part, at a temperature of the sampler."""

    def remarks(self, figures: dict[str, float]) -> list[str]:
        """List sentences for the user about a finished training, from its mean terms over the last steps."""
        return []


class GCNTrainer:
    """Trains a graph network with AdamW for an objective; the sampler's temperature falls geometrically.

    Args:
        objective: makes the losses, and holds the network, its configuration and device.
        tracker: receives the curves.
    """

    def __init__(self, objective: Objective, tracker: Tracker):
        self.objective, self.config, self.tracker = objective, objective.config, tracker
        self.gcn = objective.gcn.to(objective.device)
        rate, steps = self.config.lr, max(2, self.config.steps)
        self.optimizer = torch.optim.AdamW(self.gcn.parameters(), lr=rate, weight_decay=self.config.weight_decay)
        self.schedule = None
        if objective.one_cycle:
            warm_up = WARM_UP if WARM_UP * steps > 1 else 0.0  # PyTorch would divide by a first phase of no step
            self.schedule = OneCycleLR(self.optimizer, rate, total_steps=steps, pct_start=warm_up)

    def step(self, temperature: float) -> tuple[dict[str, float], int]:
        """Take one optimiser step.

        Returns:
            The objective's mean terms and `grad_norm`, the gradient's L2 norm before it is clipped; and how many
            graphs or requests they are means over.

        Raises:
            UserError: one of them is not finite; the network is left as it was.
        """
        objective, count = self.objective, 0
        terms = dict.fromkeys(objective.terms, 0.0)
        self.optimizer.zero_grad(set_to_none=True)
        for part in objective.parts(temperature):
            # Each part's graph is freed before the next one is built: gradients add up in the parameters.
            part.weigh(part.terms["loss"]).backward()
            count += part.count
            for name, value in part.terms.items():
                terms[name] += part.weigh(float(value.detach()))
        # A bound of infinity multiplies by 1, which changes no bit: the norm is then only measured.
        terms["grad_norm"] = float(nn.utils.clip_grad_norm_(self.gcn.parameters(), objective.clip))
        if not all(map(math.isfinite, terms.values())):
            raise UserError(f"the GCN's loss or gradient is not finite: lower {objective.remedy}")
        self.optimizer.step()
        if self.schedule:
            self.schedule.step()
        return terms, count

    def train(self, folder: Path) -> dict[str, float]:
        """Train; write the terms of each step to `folder`/history.json; return their means over the last tenth.

        Raises:
            UserError: the loss is no longer finite.
        """
        objective, config = self.objective, self.config
        self.gcn.train()
        with self.tracker:
            for step in progress(range(config.steps), objective.label):
                temperature = annealed(config.temperature_start, config.temperature_end, step, config.steps)
                begun = time.perf_counter()
                terms, count = self.step(temperature)
                rate = {f"{objective.unit}_per_second": count / (time.perf_counter() - begun)}
                self.tracker.log(step + 1, **terms, temperature=temperature, **rate)
        self.gcn.eval()
        write_json(folder / HISTORY, {"history": self.tracker.history})
        last = self.tracker.history[-max(1, config.steps // 10) :]
        figures = {name: sum(entry[name] for entry in last) / len(last) for name in objective.terms}
        means = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
        for text in (*objective.remarks(figures), f"{objective.label}: {means}"):
            log(text)
        return figures
