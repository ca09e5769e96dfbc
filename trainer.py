"""What trains networks: a classifier, in one process or in several, and a graph network for an objective.

A classifier's stage depends on every file that this one imports. So nothing of graphs' data, masks or requests enters:
the graph network's objective comes as an argument, from `unlearn.objectives`.
"""

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
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
from core.observe import Tracker, log, progress, seconds_left
from model import HookedModel, MaskingGCN, inspecting, predictions
from training.distributed import ALONE, Group, by_torchrun, check_shared_memory, launch, torchrun_meeting
from training.optimisers import AdamW
from training.resume import Progress, StateFile, Training
from utils_data import UnlearningDataset

SECONDS_BETWEEN_LINES = 2.0  # of the log, so that short epochs do not flood it


def mean_loss_and_score(
    model: nn.Module, loader: DataLoader, device: torch.device, group: Group = ALONE
) -> tuple[float, float]:
    """Compute the mean cross-entropy (nats) and the accuracy (percent) over a whole loader, in eval mode.

    Args:
        model: [B, C, H, W] -> logits [B, classes].
        loader: batches of images and labels; in a group, this process's share of them.
        group: whose shares are summed, so that every process returns the values of all images.
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
    """Compute the L2 norm of all parameters' gradients together."""
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
    """The training of a classifier with AdamW, in this process or (`use_ddp`) in several.

    Args:
        model: a fresh classifier; trained in place.
        data: its dataset.
        config: the section `train`.
        device: where the model lies.
        tracker: receives the curves.
        state: the file that an interrupted training goes on from (None: none is kept).
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
        # Every process updates all weights. The fused update takes a third of the time, but rounds otherwise: it is
        # left out without `use_ddp`, so that results there stay the same to the bit.
        fused, rate, decay = config.use_ddp or None, config.lr, config.weight_decay
        self.optimizer = AdamW(model.parameters(), lr=rate, weight_decay=decay, fused=fused)

    def train(self, folder: Path) -> dict:
        """Train; write the curves to `folder`/history.json; return the last epoch's loss and accuracy on validation.

        Raises:
            UserError: the loss is no longer finite, or the state to go on from cannot be read.
        """
        return self.train_ddp(folder) if self.config.use_ddp else self.fit(ALONE, folder)

    def train_ddp(self, folder: Path) -> dict:
        """Train as `train` does, in several processes, each with its share of every batch; equal up to rounding.

        Starts `num_workers` processes on this machine, or trains together with those that torchrun started.
        BatchNorm normalises by a process's own share of a batch; running statistics are averaged after each epoch.

        Raises:
            UserError: as `train`, or the processes do not find each other.
            RuntimeError: one of the processes failed.
        """
        config = self.config
        if by_torchrun():
            return self.fit(torchrun_meeting(self.device, config.ddp_timeout).group, folder)
        check_shared_memory(self.data.splits.values())
        state = self.state or StateFile(folder / "state.safetensors", "")
        if not state.resume:
            state.clear()
        loader = self.data.get_train_loader()
        # resume=True: processes that are started again after a failure go on from the state that the last ones left.
        # The model is copied to the CPU because it reaches the processes through shared memory.
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
        """Train this process's share of every batch. The process of rank 0 alone writes and prints.

        Args:
            group: the processes that train together.
            folder: where rank 0 writes the curves.
            hand_over: save the last epoch's state as well, from which the launcher takes the trained weights.

        Returns:
            The last epoch's number, loss and accuracy on validation images.
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
                begun, count = time.perf_counter(), len(self.data.splits["train"])
                step = self._epoch(network, loader, group, epoch, step)
                rate = count / (time.perf_counter() - begun)
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
                    left = "" if last else f", {seconds_left((self.config.epochs - epoch) * count / rate)}"
                    log(f"classifier: {place}, validation {val_score:.1f} %, {rate:.0f} images/s{left}")
                due = (hand_over or group.world > 1) if last else time.monotonic() - saved >= self.config.save_seconds
                if group.leads and self.state and due:
                    training.save(self.state, Progress(epoch, step, self.tracker.history, values))
                    saved = time.monotonic()
        if group.leads:
            write_json(folder / HISTORY, {"history": self.tracker.history})
        return values

    def _take_up(self, training: Training, group: Group) -> Progress:
        """Load the state that an interrupted training left, if that is asked for; return how far it had come."""
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
        """Pass over the training images once; log each step's loss and gradient norm; return the last step's number."""
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
        """Take one optimiser step on this process's share of a batch of `size` images.

        Args:
            network: the model, or what averages its gradients over processes.
            images: [B, C, H, W].
            labels: [B].

        Returns:
            The loss, whose mean over all processes is the whole batch's, and the L2 norm of the averaged gradient.

        Raises:
            Diverged: the loss or the gradient is not finite.
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
            else:  # a sum over unequal shares; DDP's mean over processes makes it the mean over the whole batch
                loss = functional.cross_entropy(logits[:own], labels[:own], reduction="sum") * (group.world / size)
        value = float(loss.detach())
        if not math.isfinite(value):
            # One process may have met the infinite loss alone. A gradient of NaN reaches every process by DDP's
            # average, so that all stop at this step instead of waiting for one that is gone.
            loss = loss * math.nan
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
    """Train in one of the processes that `train_ddp` started.

    The model came through shared memory, which all processes see: each trains a copy of its own.
    """
    own = tracker if group.leads else Tracker(Trackers.none, tracker.name, tracker.config)
    trainer = VisionModelTrainer(copy.deepcopy(model).to(device), data, config, device, own, state)
    return trainer.fit(group, folder, hand_over=True)


# --- the graph network ------------------------------------------------------------------------------------


WARM_UP = 0.1  # share of a one-cycle schedule's steps in which the learning rate grows


def annealed(start: float, end: float, step: int, steps: int) -> float:
    """Compute the value at step 0..steps - 1 of a geometric sequence from `start` to `end`."""
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

    Args:
        gcn: trained in place.
        config: the section `gcn`.
        seed: of the run.
        device: where the losses are computed.

    Attributes:
        order: draws the samples of each step, on the CPU.
        noise: draws the sampler's noise, on the device.
        seeds: the name by which both generators are seeded, with the run's seed.
        label: the name of the training in the log.
        terms: what is logged of each step, by name.
        unit: what `Part.count` counts, in the plural.
        remedy: the settings to lower where the loss diverges.
        clip: the gradient's L2 norm at most.
        one_cycle: whether the learning rate follows one cycle; otherwise it stays.
        at_once: how many parts of a step may be worked on at a time, in threads.
        models: classifiers that are kept frozen while parts of a step are worked on.
    """

    seeds: ClassVar[str]
    terms: ClassVar[tuple[str, ...]]
    unit: ClassVar[str]
    remedy: ClassVar[str]
    label = "GCN"
    clip = math.inf
    one_cycle = False
    at_once = 1
    models: Sequence[nn.Module] = ()

    def __init__(self, gcn: MaskingGCN, config: GCNConfig, seed: int, device: torch.device):
        self.gcn, self.config, self.device = gcn, config, device
        self.order = torch.Generator().manual_seed(derive_seed(seed, self.seeds, "order"))
        self.noise = torch.Generator(device).manual_seed(derive_seed(seed, self.seeds, "noise"))

    @abstractmethod
    def parts(self, temperature: float) -> Iterator[Part]:
        """Draw the next step's samples and yield their losses, part by part, at a temperature of the sampler."""

    def works(self, temperature: float) -> Iterator[Callable[[], Part]]:
        """As `parts`, but what was drawn is computed by a call; with `at_once`, calls come from several threads."""
        return (lambda part=part: part for part in self.parts(temperature))

    def remarks(self, means: dict[str, float]) -> list[str]:
        """List sentences for the user about a finished training, from the means of its terms over the last steps."""
        return []


class GCNTrainer:
    """The training of a graph network with AdamW for an objective; the sampler's temperature falls geometrically.

    Args:
        objective: makes the losses; holds the network, its configuration and the device.
        tracker: receives the curves.
    """

    def __init__(self, objective: Objective, tracker: Tracker):
        self.objective, self.config, self.tracker = objective, objective.config, tracker
        self.gcn = objective.gcn.to(objective.device)
        self._learning = [parameter for parameter in self.gcn.parameters() if parameter.requires_grad]
        self._map: Callable[..., Iterator[Any]] = map
        rate, steps = self.config.lr, max(2, self.config.steps)
        self.optimizer = AdamW(self.gcn.parameters(), lr=rate, weight_decay=self.config.weight_decay)
        self.schedule = None
        if objective.one_cycle:
            # With a warm-up of one step or less, PyTorch would divide by that phase's length, which is 0.
            warm_up = WARM_UP if WARM_UP * steps > 1 else 0.0
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
        with ExitStack() as frozen:
            for model in objective.models:
                frozen.enter_context(inspecting(model))
            for gradients, values, size in self._map(self._differentiated, objective.works(temperature)):
                count += size
                for name, value in values.items():
                    terms[name] += value
                self._add(gradients)
        # A bound of infinity multiplies every gradient by 1, which changes no bit: the norm is measured, not clipped.
        terms["grad_norm"] = float(nn.utils.clip_grad_norm_(self.gcn.parameters(), objective.clip))
        if not all(map(math.isfinite, terms.values())):
            raise UserError(f"the GCN's loss or gradient is not finite: lower {objective.remedy}")
        self.optimizer.step()
        if self.schedule:
            self.schedule.step()
        return terms, count

    def _differentiated(self, work: Callable[[], Part]) -> tuple[Sequence[Tensor | None], dict[str, float], int]:
        """Carry out a part of a step: gradients of the network's parameters, weighed terms by name, and its size.

        It frees the part's autograd graph, so that a part takes memory only while it is worked on.
        """
        part = work()
        gradients = torch.autograd.grad(part.weigh(part.terms["loss"]), self._learning, allow_unused=True)
        return gradients, {name: part.weigh(float(one.detach())) for name, one in part.terms.items()}, part.count

    def _add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add a part's gradients to the parameters', in the order of the parts: sums have the same bits every time."""
        for parameter, gradient in zip(self._learning, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient

    @contextmanager
    def _several_at_once(self) -> Generator[None]:
        """Work on `at_once` parts of a step at a time; their threads share the cores that torch may use."""
        several, threads = self.objective.at_once, torch.get_num_threads()
        if several == 1:
            yield
            return
        torch.set_num_threads(max(1, threads // several))  # threads that begin from here on take this number over
        try:
            with ThreadPoolExecutor(several) as pool:
                self._map = pool.map
                yield
        finally:
            self._map = map
            torch.set_num_threads(threads)

    def train(self, folder: Path) -> dict[str, float]:
        """Train; write the terms of each step to `folder`/history.json; return their means over the last tenth.

        Raises:
            UserError: the loss is no longer finite.
        """
        objective, config = self.objective, self.config
        self.gcn.train()
        with self.tracker, self._several_at_once():
            for step in progress(range(config.steps), objective.label):
                temperature = annealed(config.temperature_start, config.temperature_end, step, config.steps)
                begun = time.perf_counter()
                terms, count = self.step(temperature)
                rate = {f"{objective.unit}_per_second": count / (time.perf_counter() - begun)}
                self.tracker.log(step + 1, **terms, temperature=temperature, **rate)
        self.gcn.eval()
        write_json(folder / HISTORY, {"history": self.tracker.history})
        last = self.tracker.history[-max(1, config.steps // 10) :]
        means = {name: sum(entry[name] for entry in last) / len(last) for name in objective.terms}
        said = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
        for text in (*objective.remarks(means), f"{objective.label}: {said}"):
            log(text)
        return means
