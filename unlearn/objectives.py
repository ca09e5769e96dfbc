"""What a graph network is trained for: the ELBO of single samples, or requests to forget.

Both multiply the classifier's weights by a relaxed top-k of theta and differentiate the loss of its logits, in nats.
`trainer.GCNTrainer` is the loop of both.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import mul

import torch
from torch import Tensor
from torch.nn import functional

from core.config import GCNConfig, GCNPriorDistribution, TopKSamplers
from data import GraphDataset, Vectors
from graphs.layout import WeightGraph, check_budget
from graphs.subsets import SAMPLERS
from model import HookedModel, MaskingGCN, MaskLayer, inspecting
from trainer import Objective, Part
from training.threads import allowed_threads
from unlearn.requests import FrozenHead, Prepared, Recent, Request, Unlearner

PRIOR_FLOOR = 1e-3  # share of the uniform distribution mixed into p, so that KL(q || p) stays finite where p = 0
NODES_PER_PASS = 2**14  # nodes whose activations (2 MB at width 32) stay in the cache: twice as fast on a CPU
DEAD_SHARE = 0.99  # of log C: from this loss on, a classifier only guesses among C classes
KAPPA_SHARES = (0.004, 0.08)  # smallest and largest kappa that is drawn, as shares of all weights, for each class
MOST_AT_ONCE = 2**15  # weights up to which a second core gains more from another request than from half of this one
PAIR_SHARE = 0.2  # of the requests: those that name two classes


# --- single samples ---------------------------------------------------------------------------------------


def log_prior(kind: GCNPriorDistribution, graph: WeightGraph, weight: Tensor, vectors: Vectors) -> Tensor:
    """Compute log p over the N weights of the graph, for each sample: p proportional to |W|, |g|, |W g|, or flat.

    PRIOR_FLOOR of p is uniform, so that the KL is finite where a gradient is exactly 0; a sample whose gradients are
    all 0 gets the uniform prior.

    Args:
        kind: what p is proportional to.
        graph: layout of the weights.
        weight: W, [*graph.shape].
        vectors: h and delta of B samples, of which g_ij = delta_i h_j.

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
    """Compute KL(q || p) = sum q (log q - log p) with q = softmax(theta), in nats. [B, N], [B, N] -> [B]."""
    log_q = functional.log_softmax(theta, -1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


class Elbo(Objective):
    """The negative ELBO of single samples: -E[log p(y | x; W * m)] + beta KL(q || p), m = relaxed top-K of theta.

    The gradient flows through both terms into theta.

    Args:
        gcn: trained in place; reads the columns `data.FEATURES`.
        model: the classifier, left as it is.
        graphs: of the classifier's layers `mask_layer`.
        top_k: how many weights a mask keeps.
        config, seed, device: as `Objective`.

    Raises:
        UserError: top_k is not in 1..N.
    """

    seeds, terms, unit, remedy = "gcn", ("loss", "nll", "kl"), "samples", "gcn.lr or gcn.beta"

    def __init__(
        self,
        gcn: MaskingGCN,
        model: HookedModel,
        graphs: GraphDataset,
        mask_layer: MaskLayer,
        top_k: int,
        config: GCNConfig,
        seed: int,
        device: torch.device,
    ):
        check_budget(top_k, graphs.graph.num_vertices, "top_k")
        super().__init__(gcn, config, seed, device)
        self.model, self.graphs, self.mask_layer, self.top_k = model, graphs, mask_layer, top_k
        self.label, self.weight, self.batches = f"GCN, top_k {top_k}", graphs.weight.to(device), self._batches()

    def _batches(self) -> Iterator[Tensor]:
        """Yield indices of graphs [B] without end, epoch after epoch in new random orders."""
        while True:
            yield from torch.randperm(len(self.graphs), generator=self.order).split(self.config.batch_size)

    def losses(self, indices: Tensor, temperature: float) -> dict[str, Tensor]:
        """Compute the mean terms over some graphs, each under a mask of its own.

        Args:
            indices: of the graphs, [B].
            temperature: of the sampler, in units of std(theta).
        """
        vectors, graph = self.graphs.vectors(indices).to(self.device), self.graphs.graph
        theta = self.gcn(self.graphs.features(indices).to(self.device), graph)
        degrees = SAMPLERS[self.config.sampler](theta.flatten(1), self.top_k, temperature, self.noise).view_as(theta)
        with inspecting(self.model):  # no parameter of the classifier enters the autograd graph or collects a gradient
            logits = self.model.head(vectors.h[0], self.mask_layer, graph.split(self.weight * degrees))
        nll = functional.cross_entropy(logits, self.graphs.labels[indices].to(self.device))
        kl = categorical_kl(theta.flatten(1), log_prior(self.config.prior, graph, self.weight, vectors)).mean()
        return {"loss": nll + self.config.beta * kl, "nll": nll, "kl": kl}

    def parts(self, temperature: float) -> Iterator[Part]:
        """As `Objective.parts`: one batch, in parts whose activations fit the processor's cache."""
        indices, nodes = next(self.batches), self.graphs.graph.num_vertices
        size = len(indices) if self.device.type == "cuda" else max(1, NODES_PER_PASS // nodes)
        for part in indices.split(size):
            yield Part(self.losses(part, temperature), len(part), partial(mul, len(part) / len(indices)))

    def remarks(self, means: dict[str, float]) -> list[str]:
        """Say so where the masked classifier only guesses."""
        if means["nll"] <= DEAD_SHARE * math.log(self.model.target(-1).out_features):
            return []
        found = f"GCN: masks of top_k {self.top_k} leave nothing that predicts"
        return [f"{found}; try gcn.sampler gumbel or a larger top_k"]


# --- requests to forget -----------------------------------------------------------------------------------


class Unlearning(Objective):
    """The loss of random requests at the soft mask of theta: forget loss + lambda * retain loss.

    A request names one class or two and a kappa, and is answered for one of the classifiers.

    Args:
        unlearner: its GCN is trained in place.
        heads: of the classifiers; each step draws one of them.
        config, seed, device: as `Objective`.
    """

    seeds, terms, unit, remedy = "unlearning", ("loss", "forget", "retain"), "requests", "gcn.lr or gcn.lambda_retain"
    clip, one_cycle = 1.0, True

    def __init__(
        self,
        unlearner: Unlearner,
        heads: Sequence[FrozenHead],
        config: GCNConfig,
        seed: int,
        device: torch.device,
    ):
        super().__init__(unlearner.gcn, config, seed, device)
        self.unlearner, self.heads, self.models = unlearner, heads, [head.model for head in heads]
        small = device.type == "cpu" and all(head.graph.num_vertices <= MOST_AT_ONCE for head in heads)
        if small and config.sampler is not TopKSamplers.gumbel:  # whose noise is drawn as the requests are answered
            self.at_once = min(config.requests_per_step, allowed_threads())
        self._prepared: Recent[tuple[int, tuple[int, ...]], Prepared] = Recent()

    def _uniform(self) -> float:
        return float(torch.rand((), generator=self.order))

    def draw(self, head: FrozenHead) -> Request:
        """Draw a request: one class or two, kappa log-uniform between KAPPA_SHARES of the weights for each."""
        known = torch.tensor(self.config.train_classes or range(head.num_classes))
        pair = len(known) > 1 and head.num_classes > 2 and self._uniform() < PAIR_SHARE
        several = 2 if pair else 1
        classes = known[torch.randperm(len(known), generator=self.order)[:several]]
        low, high = KAPPA_SHARES
        share = several * low * (high / low) ** self._uniform()
        size = head.graph.num_vertices
        return Request(tuple(sorted(classes.tolist())), min(max(1, round(share * size)), size))

    def parts(self, temperature: float) -> Iterator[Part]:
        """As `Objective.parts`: each request is a part, and all of one step are answered for the same classifier."""
        return (work() for work in self.works(temperature))

    def works(self, temperature: float) -> Iterator[Callable[[], Part]]:
        """As `Objective.works`."""
        place = int(torch.randint(len(self.heads), (), generator=self.order))
        head, count = self.heads[place], self.config.requests_per_step
        for _ in range(count):
            request = self.draw(head)
            key, classes = (place, request.classes), request.classes
            prepared = self._prepared.get(key, lambda classes=classes: self.unlearner.prepare(head, classes))
            yield partial(self._answered, head, request, prepared, temperature)

    def _answered(self, head: FrozenHead, request: Request, prepared: Prepared, temperature: float) -> Part:
        """Compute theta of a request, and the losses at its soft mask."""
        theta = self.unlearner.theta(head, request, prepared)
        degrees = SAMPLERS[self.config.sampler](theta.flatten(), request.kappa, temperature, self.noise)
        forget, retain = head.losses(degrees.view_as(theta), request.classes, self.config.forget_loss)
        loss = forget + self.config.lambda_retain * retain
        terms = {"loss": loss, "forget": forget, "retain": retain}
        return Part(terms, 1, lambda mean: mean / self.config.requests_per_step)
