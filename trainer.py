"""Everything that optimises: the classifier, the graph network (ELBO), and the fine-tuning baseline."""

import copy
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from core.artifacts import HISTORY, write_json
from core.config import (
    GCNConfig,
    GCNPriorDistribution,
    SFTConfig,
    SFTModes,
    UserError,
    derive_seed,
)
from core.observe import Tracker, log, progress
from data import GraphDataset, Vectors
from graphs.layout import WeightGraph
from model import HookedModel, MaskingGCN, MaskLayer, inspecting
from training.classifier import VisionModelTrainer, gradient_norm, mean_loss_and_score
from unlearn.masks import SAMPLERS, check_budget
from utils_data import UnlearningDataset

__all__ = [
    "GCNTrainer",
    "SFTTrainer",
    "VisionModelTrainer",
    "categorical_kl",
    "gradient_norm",
    "log_prior",
    "mean_loss_and_score",
]

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
        figures = {name: sum(entry[name] for entry in last) / len(last) for name in ("loss", "nll", "kl")}
        if figures["nll"] > DEAD_SHARE * math.log(self.model.target(-1).out_features):
            log(f"GCN: masks of topK {self.topK} leave nothing that predicts; try gcn.sampler gumbel or a larger topK")
        return figures


class SFTTrainer:
    """Supervised fine-tuning of the target layers alone (AdamW), on a copy of the classifier.

    Args:
        model: left as it is. mode: random labels on the forget set, true labels on the retain set, or half
            a batch of each.
    """

    def __init__(
        self,
        model: HookedModel,
        data: UnlearningDataset,
        mask_layer: MaskLayer,
        config: SFTConfig,
        seed: int,
        device: torch.device,
    ):
        self.model, self.mask_layer, self.config, self.device = model, mask_layer, config, device
        self.images, self.num_classes = data.splits["train"], data.num_classes
        forgotten = data.is_forgotten(self.images.labels)
        self.forget, self.retain = forgotten.nonzero().flatten(), (~forgotten).nonzero().flatten()
        self.generator = torch.Generator().manual_seed(derive_seed(seed, "sft"))

    def _draw(self, pool: Tensor, count: int) -> tuple[Tensor, Tensor]:
        picks = torch.randint(len(pool), (count,), generator=self.generator)
        return self.images.batch(pool[picks])

    def batch(self) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] and the labels [B] to fit; random labels are uniform over all classes."""
        size, mode = self.config.batch_size, self.config.mode
        if mode is SFTModes.Finetune_Retain:
            return self._draw(self.retain, size)
        forgetting = size if mode is SFTModes.Randomize_Forget else size // 2
        images, labels = self._draw(self.forget, forgetting)
        labels = torch.randint(self.num_classes, labels.shape, generator=self.generator)
        kept_images, kept_labels = self._draw(self.retain, size - forgetting)
        return torch.cat([images, kept_images]), torch.cat([labels, kept_labels])

    def train(self) -> HookedModel:
        """The fine-tuned copy, in eval mode."""
        tuned = copy.deepcopy(self.model).eval().requires_grad_(False)
        weights = [weight.requires_grad_(True) for weight in tuned.weights(self.mask_layer)]
        optimizer = torch.optim.AdamW(weights, lr=self.config.lr)
        for _ in progress(range(self.config.steps), "sft"):
            images, labels = (values.to(self.device) for values in self.batch())
            with torch.no_grad():
                h = tuned.prefix(images, self.mask_layer)
            loss = functional.cross_entropy(tuned.head(h, self.mask_layer), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return tuned.requires_grad_(False)
