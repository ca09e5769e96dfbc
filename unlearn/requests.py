"""What answers a request to forget: theta from a graph network in a few passes, by refinement, or by both.

A request switches off kappa weights. In each pass the graph network reads the request's features and the first-order
importances at the classifier that its own last theta masks, and corrects theta. Refinement descends on theta itself.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.config import FeatureSets, ForgetLosses, GCNConfig, RefineConfig, UserError, derive_seed
from data import GraphDataset
from graphs.layout import check_budget
from graphs.subsets import signed_log, sinkhorn_topk, tail
from model import MaskingGCN, MaskLayer, inspecting
from models.classifier import Classifier
from trainer import annealed
from training.optimisers import Adam
from unlearn.features import FEATURES, ClassStatistics, centred_rank, request_features, standardised

STATE = ("log_kappa", "u_forget", "u_retain", "degree", "theta")
MATCH_SHARE = 0.1  # weight of `match` in ForgetLosses.both: enough for the probabilities, too little to forget later
MARGIN = 0.5  # logits by which a class to forget must lose before the margin loss levels off
MOST_RETAINED = 1536  # retained samples at which a request's loss is computed
MOST_BYTES = 2**27  # kept for requests that come again: the samples of every pair of ten classes on an MLP
TYPICAL_SHARE = 0.02  # share of all weights, kappa / N, at which the column log_kappa is 0
CANDIDATES = 8  # times kappa: so many weights are refined from `tail_start`
LOOK_TEMPERATURE = 0.15  # of the soft mask under which a later pass sees the classifier, in units of std(theta)


@dataclass(frozen=True)
class Request:
    """Forget these classes by switching off kappa weights."""

    classes: tuple[int, ...]
    kappa: int


@dataclass(frozen=True)
class Sides:
    """The samples of a request: A to forget, then B to retain.

    Args:
        h: input of the first target layer, [A + B, n].
        forget: A.
        labels: of all samples, [A + B].
        target: the untouched classifier's probabilities on the samples to forget, with those of the classes to forget
            set to 0 and the others renormalised, [A, C].
    """

    h: Tensor
    forget: int
    labels: Tensor
    target: Tensor

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in (self.h, self.labels, self.target))


class Sized(Protocol):
    """What knows how much memory it takes."""

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        ...


Key = TypeVar("Key")
Value = TypeVar("Value", bound=Sized)


class Recent(Generic[Key, Value]):
    """What was asked for last, up to MOST_BYTES, and at least one.

    Training asks for many pairs of classes again and again, and the pairs of a thousand classes would fill the memory.
    Several threads may ask; one of them makes what is not there, and the others wait for it.
    """

    def __init__(self) -> None:
        self._kept: dict[Key, Value] = {}  # least recently asked for first
        self._asked = Lock()

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """Return what was made under a key; `make` makes it unless it is kept."""
        with self._asked:
            value = self._kept.pop(key, None) or make()
            self._kept[key] = value
            while len(self._kept) > 1 and sum(one.bytes for one in self._kept.values()) > MOST_BYTES:
                del self._kept[next(iter(self._kept))]
        return value


class Rows(Protocol):
    """Rows of numbers that are gathered when they are asked for, as a tensor's are."""

    @property
    def device(self) -> torch.device:
        """Where they are."""
        ...

    def __getitem__(self, index: Tensor, /) -> Tensor:
        """Some of them, [index, n]."""
        ...


class FrozenHead:
    """A classifier from its first masked layer on, with weights that nothing changes and images to judge masks by.

    Args:
        model: the classifier; used frozen, in eval mode.
        mask_layer: its target layers.
        statistics: of them.
        h: what lies ahead of the first target layer, one row per image, [S, n].
        labels: [S].
    """

    def __init__(
        self, model: Classifier, mask_layer: MaskLayer, statistics: ClassStatistics, h: Tensor | Rows, labels: Tensor
    ):
        self.model, self.mask_layer, self.statistics, self.h, self.labels = model, mask_layer, statistics, h, labels
        self.graph, self.num_classes, self.weight = statistics.graph, statistics.num_classes, statistics.weight
        self.device = h.device
        self._sides: Recent[tuple[int, ...], Sides] = Recent()

    @classmethod
    def of_graphs(
        cls, model: Classifier, graphs: GraphDataset, mask_layer: MaskLayer, num_classes: int, device: torch.device
    ) -> "FrozenHead":
        """Take the images that the graphs of `mask_layer` were made of; `num_classes`: of the dataset."""
        statistics = ClassStatistics.of_graphs(graphs, num_classes, device)
        h = graphs.vectors(torch.arange(len(graphs))).h[0].to(device)
        return cls(model, mask_layer, statistics, h, graphs.labels.to(device))

    def sides(self, classes: tuple[int, ...]) -> Sides:
        """Return the samples to forget and those to retain.

        They are kept as `Recent` does; samples that are made again have the same bits.
        """
        return self._sides.get(classes, lambda: self._made_sides(classes))

    def _made_sides(self, classes: tuple[int, ...]) -> Sides:
        forget = torch.isin(self.labels, torch.tensor(classes, device=self.device))
        retain = (~forget).nonzero().flatten()[:MOST_RETAINED]
        order = torch.cat([forget.nonzero().flatten(), retain])
        h, count = self.h[order], int(forget.sum())
        with torch.no_grad():
            target = self._without(self.model.head(h[:count], self.mask_layer), classes)
        return Sides(h, count, self.labels[order], target.softmax(1))

    def _without(self, logits: Tensor, classes: tuple[int, ...]) -> Tensor:
        """Return logits [A, C] with those of some classes at -inf."""
        return logits.index_fill(1, torch.tensor(classes, device=self.device), -torch.inf)

    def losses(self, degrees: Tensor, classes: tuple[int, ...], how: ForgetLosses) -> tuple[Tensor, Tensor]:
        """Compute the forget loss and the retain loss of the classifier with weights `W * (1 - degrees)`.

        Args:
            degrees: how far each weight is switched off, [*graph.shape] in [0, 1].
            classes: labels of the classes to forget.
            how: which forget loss. margin: softplus(largest logit of the classes to forget - largest other logit
                + MARGIN). match: KL(target || masked). both: margin + MATCH_SHARE match.

        Returns:
            The forget loss over the samples to forget and the cross-entropy over the retained ones, means in nats.
        """
        sides = self.sides(classes)
        logits = self.model.head(sides.h, self.mask_layer, self.graph.split(self.weight * (1 - degrees)))
        retain = functional.cross_entropy(logits[sides.forget :], sides.labels[sides.forget :])
        logits = logits[: sides.forget]
        margin = logits[:, list(classes)].amax(1) - self._without(logits, classes).amax(1)
        leading = functional.softplus(margin + MARGIN).mean()
        if how is ForgetLosses.margin:
            return leading, retain
        match = functional.kl_div(logits.log_softmax(1), sides.target, reduction="batchmean")
        return match if how is ForgetLosses.match else leading + MATCH_SHARE * match, retain

    def importances(self, degrees: Tensor, classes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Compute how fast the margin loss and the retain loss grow when a weight is switched off further.

        Args:
            degrees: where the derivatives are taken, [*graph.shape] in [0, 1].
            classes: labels of the classes to forget.

        Returns:
            The derivatives of both losses by `degrees`, [*graph.shape] each, constant for any further gradient.
        """
        with torch.enable_grad(), inspecting(self.model):  # a pass without gradients for theta needs these all the same
            degrees = degrees.detach().requires_grad_()
            forget, retain = self.losses(degrees, classes, ForgetLosses.margin)
            (u_forget,) = torch.autograd.grad(forget, degrees, retain_graph=True)
            (u_retain,) = torch.autograd.grad(retain, degrees)
        return u_forget, u_retain


def soft_mask(theta: Tensor, kappa: int, temperature: float) -> Tensor:
    """Compute how far each weight is switched off, degrees that sum to kappa exactly. [*shape] -> [*shape]."""
    return sinkhorn_topk(theta.flatten(), kappa, temperature).view_as(theta)


def taylor_start(head: FrozenHead, classes: tuple[int, ...]) -> Tensor:
    """Compute 2 * rank of the signed Taylor score, the theta that all learning starts from. [*graph.shape]."""
    return 2 * centred_rank(head.statistics.contributions(classes).signed_taylor())


def tail_start(head: FrozenHead, classes: tuple[int, ...]) -> Tensor:
    """Compute -log(share of weights with a larger signed Taylor score), a start for masks of few among many weights.

    `taylor_start` spreads weights evenly, so that a soft mask of .3 % of them takes in many times as many at any
    temperature. Here the number of weights within a distance of the kappa-th is a share of kappa, whatever N is.
    [*graph.shape].
    """
    return tail(head.statistics.signed_taylor(classes))


def check_scores(theta: Tensor, given: Path | None) -> Tensor:
    """Return a GCN's scores if all are finite.

    Args:
        theta: the scores, of any shape.
        given: the GCN's file, if the user gave it; the message then names it.

    Raises:
        UserError: a score is not finite.
    """
    if bool(theta.isfinite().all()):
        return theta
    if given:
        raise UserError(f"{given} gives scores that are not finite for this classifier: give another GCN, or train one")
    raise UserError("the GCN's scores are not finite, its training diverged: lower gcn.lr, or train.lr")


class Unlearner:
    """A GCN and how it is used: theta for a request, in several passes over the graph.

    Args:
        gcn: reads the columns of `features` and STATE.
        features: the named set of columns that stay the same in all passes.
        passes: how often the GCN corrects theta.
        taylor_prior: theta starts from `taylor_start` instead of 0.
    """

    def __init__(self, gcn: MaskingGCN, features: FeatureSets, passes: int, taylor_prior: bool = True):
        self.gcn, self.features, self.passes, self.taylor_prior = gcn, features, passes, taylor_prior
        self.given: Path | None = None
        """The GCN's file, if the user gave it: messages about its scores name it."""

    @staticmethod
    def num_node_features(features: FeatureSets) -> int:
        """Count the columns that the GCN of a feature set reads."""
        return len(FEATURES[features].columns) + len(STATE)

    @classmethod
    def fresh(cls, config: GCNConfig) -> "Unlearner":
        """Make an untrained one; with a Taylor prior its GCN adds 0 to theta, so that training starts at the prior."""
        columns, rounds = cls.num_node_features(config.features), config.num_message_passing_rounds
        shape = (rounds, config.hidden_dim, config.aggregation, config.activation, config.residual)
        gcn = MaskingGCN(columns, *shape)
        if config.taylor_prior:
            nn.init.zeros_(gcn.readout.weight)
            nn.init.zeros_(gcn.readout.bias)
        return cls(gcn, config.features, config.passes, config.taylor_prior)

    @property
    def facts(self) -> dict:
        """What a GCN's file must say so that `load` gives the same unlearner."""
        used = {"features": self.features.value, "passes": self.passes, "taylor_prior": self.taylor_prior}
        return {"objective": "unlearning", "columns": [*FEATURES[self.features].columns, *STATE], **used}

    @classmethod
    def load(cls, path: Path) -> tuple["Unlearner", dict]:
        """Read an unlearner, and all facts, from a GCN's file of the unlearning objective.

        Raises:
            UserError: the file is of another kind, or names other columns than this version makes.
        """
        gcn, facts = MaskingGCN.load(path)
        if facts.get("objective") != "unlearning":
            raise UserError(f"{path} was trained with another objective: train one with gcn.objective unlearning")
        try:
            features, passes = FeatureSets(facts["features"]), int(facts["passes"])
            found, taylor_prior = facts["columns"], bool(facts["taylor_prior"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is a GCN of another version ({error!r}): train one anew") from None
        unlearner = cls(gcn, features, passes, taylor_prior)
        needed = unlearner.facts["columns"]
        if found != needed or gcn.num_node_features != len(needed):
            raise UserError(f"{path} reads the columns {found}, this version makes {needed}: train one anew")
        return unlearner, facts

    def prepare(self, head: FrozenHead, classes: tuple[int, ...]) -> "Prepared":
        """Compute what a request's first pass reads, which neither kappa nor the GCN's weights change."""
        contributions = head.statistics.contributions(classes)
        static = request_features(head.statistics, contributions, classes, self.features)
        theta = torch.zeros_like(head.weight)
        if self.taylor_prior:
            theta = 2 * centred_rank(contributions.signed_taylor())
        return Prepared(static, theta, _seen(head, classes, theta, torch.zeros_like(theta)))

    def theta(self, head: FrozenHead, request: Request, prepared: "Prepared | None" = None) -> Tensor:
        """Compute one logit per weight, large where the weight is to be switched off, [*graph.shape].

        Args:
            head: the classifier and its samples.
            request: the classes to forget, and kappa.
            prepared: `prepare` of this head and these classes (None: it is called).

        Raises:
            UserError: kappa is more than there are weights, or a logit is not finite (in training, the loop says so).
        """
        check_budget(request.kappa, head.graph.num_vertices, "kappa")
        prepared = prepared or self.prepare(head, request.classes)
        theta, seen = prepared.theta, prepared.seen
        share = request.kappa / head.graph.num_vertices
        log_kappa = torch.full_like(theta, math.log(share / TYPICAL_SHARE)).unsqueeze(-1)
        for index in range(self.passes):
            if index:
                degrees = soft_mask(theta.detach(), request.kappa, LOOK_TEMPERATURE)
                seen = _seen(head, request.classes, theta.detach(), degrees)
            # A pass reads the last theta as data: the gradient reaches every pass through the sum alone, and backward
            # never differentiates the importances, which are gradients themselves.
            columns = torch.cat([prepared.static, log_kappa, seen], -1)
            theta = theta + self.gcn(columns.unsqueeze(0), head.graph)[0]
        return theta if torch.is_grad_enabled() else check_scores(theta, self.given)


@dataclass(frozen=True)
class Prepared:
    """What the first pass over a graph reads for some classes to forget.

    Args:
        static: node features that stay the same in all passes, [*graph.shape, columns].
        theta: the start, [*graph.shape].
        seen: the columns STATE without log_kappa, at the untouched classifier.
    """

    static: Tensor
    theta: Tensor
    seen: Tensor

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in (self.static, self.theta, self.seen))


def _seen(head: FrozenHead, classes: tuple[int, ...], theta: Tensor, degrees: Tensor) -> Tensor:
    """Compute the columns STATE, which say where theta leads, but log_kappa. [*graph.shape, len(STATE) - 1]."""
    u_forget, u_retain = head.importances(degrees, classes)
    return torch.stack([signed_log(u_forget), signed_log(u_retain), 4 * degrees, standardised(theta)], -1)


def refine(
    head: FrozenHead, theta: Tensor, request: Request, config: RefineConfig, candidates: int | None = None
) -> Tensor:
    """Descend on theta itself with Adam, for one request, at an annealed soft mask.

    Args:
        head: the classifier and its samples.
        theta: the start, [*graph.shape]; only its standardised values count.
        request: the classes to forget, and kappa.
        config: the section `refine`.
        candidates: only so many weights, those where theta starts largest, may be switched off; None: any.

    Returns:
        theta, [*graph.shape]; -inf where a weight is no candidate.
    """
    if candidates is not None and max(request.kappa, candidates) < theta.numel():
        return _refine_among(head, theta, request, config, max(request.kappa, candidates))
    theta = standardised(theta.detach()).requires_grad_()
    return _descend(head, theta, request, config, lambda degrees: degrees)


def _refine_among(head: FrozenHead, theta: Tensor, request: Request, config: RefineConfig, candidates: int) -> Tensor:
    """Do as `refine` where only the first `candidates` weights may be switched off: Adam and the soft mask see these.

    A layer of 2 million weights needs a few thousand of them: the rest would only cost time, and add up to a haze that
    the soft mask has and the final one has not.
    """
    flat = theta.detach().flatten()
    places = flat.topk(candidates).indices
    chosen = standardised(flat[places]).requires_grad_()
    nothing = torch.zeros_like(flat)
    found = _descend(
        head, chosen, request, config, lambda degrees: nothing.index_put((places,), degrees).view(theta.shape)
    )
    return torch.full_like(flat, -torch.inf).index_put((places,), found).view(theta.shape)


def _descend(
    head: FrozenHead, theta: Tensor, request: Request, config: RefineConfig, spread: Callable[[Tensor], Tensor]
) -> Tensor:
    """Carry out the steps of `refine`; `spread`: degrees of theta's weights -> degrees of all, [*graph.shape]."""
    optimizer = Adam([theta], lr=config.lr)
    with torch.enable_grad(), inspecting(head.model):
        for step in range(config.steps):
            temperature = annealed(config.temperature_start, config.temperature_end, step, config.steps)
            degrees = soft_mask(theta, request.kappa, temperature)
            forget, retain = head.losses(spread(degrees), request.classes, config.forget_loss)
            optimizer.zero_grad(set_to_none=True)
            (forget + config.lambda_retain * retain).backward()
            optimizer.step()
    return theta.detach()


def noise_start(head: FrozenHead, request: Request, seed: int) -> Tensor:
    """Draw normal noise, a start that knows nothing of the request. [*graph.shape]."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "noise", *request.classes, request.kappa))
    return torch.randn(head.graph.shape, generator=generator).to(head.device)
