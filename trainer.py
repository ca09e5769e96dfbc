"""Everything that optimises: the classifier, in one process or in several, and the graph network by the ELBO."""

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
from core.config import (
    GCNConfig,
    GCNPriorDistribution,
    Trackers,
    TrainConfig,
    UserError,
    derive_seed,
)
from core.observe import Tracker, log, progress
from data import GraphDataset, Vectors
from graphs.layout import WeightGraph
from model import HookedModel, MaskingGCN, MaskLayer, inspecting, predictions
from training.distributed import ALONE, Group, by_torchrun, check_shared_memory, launch, torchrun_meeting
from training.processes import reuse_freed_memory
from training.resume import Progress, StateFile, Training
from unlearn.masks import SAMPLERS, check_budget
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
    reuse_freed_memory()
    own = tracker if group.leads else Tracker(Trackers.none, tracker.name, tracker.config)
    trainer = VisionModelTrainer(copy.deepcopy(model).to(device), data, config, device, own, state)
    return trainer.fit(group, folder, hand_over=True)


# --- the graph network ------------------------------------------------------------------------------------


PRIOR_FLOOR = 1e-3  # share of the uniform distribution mixed into p, so that KL(q || p) stays finite where p = 0

NODES_PER_PASS = 2**14  # nodes whose activations (2 MB at width 32) stay in cache: twice as fast on a CPU
DEAD_SHARE = 0.99  # of log C: a classifier whose loss is that of a guess


def log_prior(kind: GCNPriorDistribution, graph: WeightGraph, weight: Tensor, vectors: Vectors) -> Tensor:
    """log p over the N weights of the graph, per sample: p proportional to |W|, |g|, |W g|, or flat.

    A thousandth of p is uniform, so that the KL is finite where a gradient is exactly 0; a sample whose
    gradients are all 0 gets the uniform prior.

    Args:
        weight: W [*graph.shape]. vectors: h and delta of B samples.

    Returns:
        log p [B, N].
    """
    pairs = zip(vectors.delta, vectors.h, strict=True)
    gradient = graph.join([(delta.unsqueeze(2) * h.unsqueeze(1)).abs() for delta, h in pairs])
    raw = {
        GCNPriorDistribution.WEIGHT: lambda: weight.abs().expand_as(gradient),
        GCNPriorDistribution.GRADIENT: lambda: gradient,
        GCNPriorDistribution.SALIENCY: lambda: weight.abs() * gradient,
        GCNPriorDistribution.UNIFORM: lambda: torch.ones_like(gradient),
    }[kind]().flatten(1)
    total = raw.sum(1, keepdim=True)
    flat = torch.full_like(raw, 1 / raw.shape[1])
    p = torch.where(total > 0, raw / total.clamp_min(torch.finfo(raw.dtype).tiny), flat)
    return torch.log((1 - PRIOR_FLOOR) * p + PRIOR_FLOOR * flat)


def categorical_kl(theta: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p) = sum q (log q - log p) with q = softmax(theta), in nats. [B, N], [B, N] -> [B]."""
    log_q = functional.log_softmax(theta, -1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


class GCNTrainer:
    """Learns mask priors by the ELBO: minimise -E[log p(y | x; W * m)] + beta KL(q || p), m = relaxed top-K of theta.

    The gradient flows through both terms into theta.

    Args:
        gcn: trained in place. model: the classifier, left as it is. graphs: of its layers `mask_layer`.
        topK: how many weights a mask keeps.

    Raises:
        UserError: topK is not in 1..N.
    """

    def __init__(
        self,
        gcn: MaskingGCN,
        model: HookedModel,
        graphs: GraphDataset,
        mask_layer: MaskLayer,
        topK: int,
        config: GCNConfig,
        seed: int,
        device: torch.device,
        tracker: Tracker,
    ):
        check_budget(topK, graphs.graph.num_vertices, "topK")
        self.gcn, self.model, self.graphs, self.mask_layer, self.topK = gcn, model, graphs, mask_layer, topK
        self.config, self.device, self.tracker = config, device, tracker
        self.weight = graphs.weight.to(device)
        self.order = torch.Generator().manual_seed(derive_seed(seed, "gcn", "order"))
        self.noise = torch.Generator(device).manual_seed(derive_seed(seed, "gcn", "noise"))
        self.optimizer = torch.optim.AdamW(gcn.parameters(), lr=config.lr, weight_decay=config.weight_decay)

    def temperature(self, step: int) -> float:
        """Sampler temperature at a step, annealed geometrically, in units of std(theta)."""
        start, end = self.config.temperature_start, self.config.temperature_end
        return start * (end / start) ** (step / max(1, self.config.steps - 1))

    def objective(self, indices: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """The two terms on some graphs: mean negative log-likelihood and mean KL, in nats."""
        vectors, graph = self.graphs.vectors(indices).to(self.device), self.graphs.graph
        theta = self.gcn(self.graphs.features(indices).to(self.device), graph)
        sampler = SAMPLERS[self.config.sampler]
        degrees = sampler(theta.flatten(1), self.topK, temperature, self.noise).view_as(theta)
        logits = self.model.head(vectors.h[0], self.mask_layer, graph.split(self.weight * degrees))
        nll = functional.cross_entropy(logits, self.graphs.labels[indices].to(self.device))
        kl = categorical_kl(theta.flatten(1), log_prior(self.config.prior, graph, self.weight, vectors)).mean()
        return nll, kl

    def _batches(self):  # noqa: ANN202 - generator of index tensors
        """`steps` batches of indices, epoch after epoch in new random orders."""
        done, size = 0, min(self.config.batch_size, len(self.graphs))
        while done < self.config.steps:
            for batch in torch.randperm(len(self.graphs), generator=self.order).split(size):
                if done < self.config.steps:
                    done += 1
                    yield batch

    def _accumulate(self, indices: Tensor, temperature: float) -> dict[str, float]:
        """Loss terms of one batch, and the GCN's gradients, gathered over parts that fit the processor's cache."""
        nodes = self.graphs.graph.num_vertices
        part_size = len(indices) if self.device.type == "cuda" else max(1, NODES_PER_PASS // nodes)
        terms = {"loss": 0.0, "nll": 0.0, "kl": 0.0}
        for part in indices.split(part_size):
            share = len(part) / len(indices)
            nll, kl = self.objective(part, temperature)
            loss = nll + self.config.beta * kl
            (share * loss).backward()
            for name, value in (("loss", loss), ("nll", nll), ("kl", kl)):
                terms[name] += share * float(value.detach())
        return terms

    def train(self, folder: Path) -> dict:
        """Train; write the loss terms to `folder`/history.json; return the last tenth's means.

        Raises:
            UserError: the loss is no longer finite.
        """
        batches = list(self._batches())
        self.gcn.to(self.device).train()
        with self.tracker, inspecting(self.model):
            for step, indices in enumerate(progress(batches, f"GCN, topK {self.topK}")):
                temperature, begun = self.temperature(step), time.perf_counter()
                self.optimizer.zero_grad(set_to_none=True)
                terms = self._accumulate(indices, temperature)
                norm = gradient_norm(self.gcn)
                if not all(map(math.isfinite, (*terms.values(), norm))):
                    raise UserError("the GCN's loss or gradient is not finite: lower gcn.lr or gcn.beta")
                self.optimizer.step()
                rate = len(indices) / (time.perf_counter() - begun)
                facts = {"grad_norm": norm, "temperature": temperature, "samples_per_second": rate}
                self.tracker.log(step + 1, **terms, **facts)
        self.gcn.eval()
        write_json(folder / HISTORY, {"history": self.tracker.history})
        last = self.tracker.history[-max(1, len(batches) // 10) :]
        values = {name: sum(entry[name] for entry in last) / len(last) for name in ("loss", "nll", "kl")}
        if values["nll"] > DEAD_SHARE * math.log(self.model.target(-1).out_features):
            log(f"GCN: masks of topK {self.topK} leave nothing that predicts; try gcn.sampler gumbel or a larger topK")
        return values
