"""The classifier's training, in one process or in several."""

import copy
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from core.artifacts import HISTORY, DamagedError, write_json
from core.choices import Diverged
from core.config import Trackers, TrainConfig, UserError
from core.observe import Tracker, log, progress
from model import HookedModel, inspecting, predictions
from training.distributed import ALONE, Group, by_torchrun, check_shared_memory, launch, torchrun_meeting
from training.processes import reuse_freed_memory
from training.resume import Progress, StateFile, Training
from utils_data import UnlearningDataset

SECONDS_BETWEEN_LINES = 2.0  # short epochs do not flood a log


def mean_loss_and_score(
    model: nn.Module, loader: DataLoader, device: torch.device, group: Group = ALONE
) -> tuple[float, float]:
    """Mean cross-entropy (nats) and accuracy (percent) over a whole loader, eval mode.

    In a group, `loader` holds this process's share, and the figures are those of all shares together.
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
        """Train; write the curves to `folder`/history.json; return the last epoch's figures.

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
        figures = launch(
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
        return figures

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
        network, step, figures = group.wrap(self.model), done.step, done.figures
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
                figures = {"epoch": epoch, "val_loss": val_loss, "val_score": val_score}
                self.tracker.log(step, **figures, images_per_second=rate)
                last = epoch == self.config.epochs
                if group.leads and (last or time.monotonic() - said > SECONDS_BETWEEN_LINES):
                    said = time.monotonic()
                    place = f"epoch {epoch}/{self.config.epochs}"
                    log(f"classifier: {place}, validation {val_score:.1f} %, {rate:.0f} images/s")
                due = (hand_over or group.world > 1) if last else time.monotonic() - saved >= self.config.save_seconds
                if group.leads and self.state and due:
                    training.save(self.state, Progress(epoch, step, self.tracker.history, figures))
                    saved = time.monotonic()
        if group.leads:
            write_json(folder / HISTORY, {"history": self.tracker.history})
        return figures

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
    reuse_freed_memory()
    own = tracker if group.leads else Tracker(Trackers.none, tracker.name, tracker.config)
    trainer = VisionModelTrainer(copy.deepcopy(model).to(device), data, config, device, own, state)
    return trainer.fit(group, folder, hand_over=True)
