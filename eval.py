"""Measure methods x sweep points: the five metrics, on validation images (for choosing) and test images.

Only the target layers change under a mask, so the first one's input h is computed once per image set and kept; a
masked model is then judged by `head(h, W)` alone. A model whose earlier layers differ takes the full forward pass.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from config import KappaModes
from masks import Mask, hard_topk, masked
from methods import METHODS, Context, Point, mask_of
from model import HookedModel, MaskLayer, inspecting
from observe import progress

JUDGED = {"test": "methods", "val": "validation"}  # split -> its key in a record
HISTOGRAM_BINS = 40
OURS = ("mimu_refined", "mimu")  # best first


@dataclass(frozen=True)
class Outputs:
    """What a model said about one set: logits [S, C] and true labels [S]."""

    logits: Tensor
    labels: Tensor

    def loss(self) -> float:
        """Mean cross-entropy of the true labels, nats."""
        return float(functional.cross_entropy(self.logits.double(), self.labels))

    def score(self) -> float:
        """Accuracy, percent."""
        return 100 * float((self.logits.argmax(1) == self.labels).double().mean())

    def probability(self) -> float:
        """Mean probability of the true class, over the whole set."""
        p = self.logits.double().softmax(1)
        return float(p.gather(1, self.labels[:, None]).mean())


@dataclass(frozen=True)
class Metric:
    """A registered metric with what a reader must know about its values."""

    name: str
    unit: str
    better: str
    compute: Callable[[Outputs, Outputs], float]


METRICS: dict[str, Metric] = {}


def metric(name: str, unit: str, better: str) -> Callable:
    """Register a function (forget outputs, retain outputs) -> float as a metric; better = "higher" or "lower"."""

    def register(function: Callable[[Outputs, Outputs], float]) -> Callable[[Outputs, Outputs], float]:
        METRICS[name] = Metric(name, unit, better, function)
        return function

    return register


@metric("forget_loss", "nats", better="higher")
def forget_loss(forget: Outputs, retain: Outputs) -> float:
    """Mean cross-entropy on the forget set."""
    return forget.loss()


@metric("retain_loss", "nats", better="lower")
def retain_loss(forget: Outputs, retain: Outputs) -> float:
    """Mean cross-entropy on the retain set."""
    return retain.loss()


@metric("forget_probability", "probability", better="lower")
def forget_probability(forget: Outputs, retain: Outputs) -> float:
    """Mean probability of the forget class on the forget set."""
    return forget.probability()


@metric("forget_score", "%", better="lower")
def forget_score(forget: Outputs, retain: Outputs) -> float:
    """Accuracy on the forget set."""
    return forget.score()


@metric("retain_score", "%", better="higher")
def retain_score(forget: Outputs, retain: Outputs) -> float:
    """Accuracy on the retain set."""
    return retain.score()


class _Head(nn.Module):
    """The part of a classifier from the first target layer's input h [B, n] on."""

    def __init__(self, model: HookedModel, mask_layer: MaskLayer):
        super().__init__()
        self.model, self.mask_layer = model, mask_layer

    def forward(self, h: Tensor) -> Tensor:
        return self.model.head(h, self.mask_layer)


class Eval:
    """Measures the methods of a context.

    Args:
        context: classifier, data, configuration and learned importances.
    """

    def __init__(self, context: Context):
        self.context, self.config = context, context.config
        self.original = {name: value.clone() for name, value in context.model.state_dict().items()}
        place = context.model.layer_indices(self.config.mask_layer)[0]
        self.after_prefix = tuple(f"linears.{index}." for index in range(place, len(context.model.linears)))
        self._measured: dict[tuple, dict] = {}
        self._efficacy: dict[int, dict[str, float]] = {}
        self.class_probability: dict[tuple, list[float]] = {}

    # --- where logits come from ---

    def prefix_activations(self, split: str, is_forget_set: bool) -> DataLoader:
        """The forget or the retain set of a split as cached (h [B, n], label [B]) batches."""
        tensors = TensorDataset(*self.context.activations(split, is_forget_set))
        return DataLoader(tensors, batch_size=None, sampler=_spans(tensors))

    def prefix_unchanged(self, model: HookedModel) -> bool:
        """Whether every parameter and buffer ahead of the target layer is bit-identical to the original."""
        return all(
            torch.equal(value, self.original[name])
            for name, value in model.state_dict().items()
            if not name.startswith(self.after_prefix)
        )

    def weights_changed(self, model: HookedModel, prefix_unchanged: bool = False) -> int:
        """How many parameters and buffer entries differ from the original; a prefix known as unchanged is left out."""
        return sum(
            int((value != self.original[name]).sum())
            for name, value in model.state_dict().items()
            if name.startswith(self.after_prefix) or not prefix_unchanged
        )

    def inference(self, model: nn.Module, data_loader: DataLoader, is_forget_set: bool, description: str) -> Outputs:
        """Outputs of a model on a whole loader, eval mode; last batches may be short.

        Args:
            model: maps the loader's inputs to logits [B, C].
            is_forget_set: which set it is, for subclasses that treat them apart.
            description: shown while it runs.
        """
        logits, labels = [], []
        with inspecting(model), torch.inference_mode():
            for inputs, true in progress(data_loader, description):
                logits.append(model(inputs.to(self.context.device)).float())
                labels.append(true.to(self.context.device))
        return Outputs(torch.cat(logits), torch.cat(labels))

    def outputs(
        self,
        model: HookedModel,
        split: str,
        is_forget_set: bool,
        description: str,
        prefix_unchanged: bool | None = None,
    ) -> Outputs:
        """Outputs on a set, through the prefix cache where the model's prefix allows it (None: compare and see)."""
        if self.prefix_unchanged(model) if prefix_unchanged is None else prefix_unchanged:
            head = _Head(model, self.config.mask_layer)
            return self.inference(head, self.prefix_activations(split, is_forget_set), is_forget_set, description)
        return self.inference(model, self.context.images(split, is_forget_set), is_forget_set, description)

    # --- what is measured ---

    def eval_unlearning(self, name: str, point: Point) -> dict[str, dict]:
        """Every metric of one method at one point, {"test": {...}, "val": {...}}; measured once per method key."""
        registered = METHODS[name]
        key = registered.key(self.context, point)
        if key not in self._measured:
            for is_forget_set in (True, False):  # shared by all methods, so no method's seconds hold it
                self.context.activations("val", is_forget_set)
            self.context.charged, begun = 0.0, time.perf_counter()
            with registered.enter(self.context, point) as model:
                seconds = time.perf_counter() - begun + self.context.charged
                same = self.prefix_unchanged(model)
                extra = {"seconds": seconds, "weights_changed": self.weights_changed(model, same)}
                self._measured[key] = {split: self._judge(model, split, key, same) | extra for split in JUDGED}
        return self._measured[key]

    def _judge(self, model: HookedModel, split: str, key: tuple, same: bool) -> dict[str, float]:
        forget, retain = (self.outputs(model, split, part, f"{key[0]} on {split}", same) for part in (True, False))
        if split == "test":
            self.class_probability[key] = forget.logits.double().softmax(1).mean(0).tolist()
        return {name: entry.compute(forget, retain) for name, entry in METRICS.items()}

    def eval_performance_degradation(self, measured: Mapping[str, Mapping[str, float]]) -> dict[str, dict]:
        """Each method's metrics minus the untouched model's, from {method: {metric: value}}."""
        base = self.eval_unlearning("default", Point(0, 0, self.config.seed))["test"]
        return {
            name: {metric: values[metric] - base[metric] for metric in METRICS} for name, values in measured.items()
        }

    def eval_mask_efficacy(self, topK: int) -> dict[str, float]:
        """How well the forget class's own top-K mask explains it: accuracies with only those weights kept.

        A good class mask keeps `forget_score` high; both are on validation images, percent. Measured once per topK.
        """
        if topK in self._efficacy:
            return self._efficacy[topK]
        chosen = hard_topk(self.context.class_theta(topK), topK).cpu()
        with masked(self.context.weights, Mask(chosen, self.context.graph)):
            sets = {"forget_score": True, "retain_score": False}
            self._efficacy[topK] = {
                name: self.outputs(self.context.model, "val", is_forget, "class mask").score()
                for name, is_forget in sets.items()
            }
        return self._efficacy[topK]

    @property
    def answer(self) -> str:
        """The method whose mask is what the run offers: the best of ours that is measured."""
        if self.config.kappa is KappaModes.auto:
            return self.config.auto.method
        return next((name for name in OURS if name in self.config.eval.methods), OURS[-1])

    def weight_histogram(self, mask: Mask) -> dict[str, list]:
        """Counts of kept and of switched-off weights over common bins."""
        weight = self.context.graph.join([weight.detach().cpu() for weight in self.context.weights])
        edges = torch.linspace(float(weight.min()), float(weight.max()), HISTOGRAM_BINS + 1)
        count = {
            name: torch.histogram(weight[chosen].contiguous(), edges).hist.int().tolist()
            for name, chosen in (("kept", mask.keep), ("switched_off", ~mask.keep))
        }
        return {"edges": edges.tolist(), **count}

    def masks(self, point: Point) -> dict[str, Mask]:
        """The masks of the measured mask methods at a point, and in any case that of the answer."""
        names = dict.fromkeys((self.answer, *self.config.eval.methods))
        return {name: mask_of(name, self.context, point) for name in names if METHODS[name].mask}

    def eval(self, topK: int, kappa: int) -> tuple[dict, dict[str, Mask]]:
        """Everything that a record says about one (topK, kappa) point, and the masks of its methods."""
        point, context = Point(topK, kappa, self.config.seed), self.context
        measured = {name: self.eval_unlearning(name, point) for name in self.config.eval.methods}
        masks = self.masks(point)
        part = {key: {name: values[split] for name, values in measured.items()} for split, key in JUDGED.items()}
        return part | {
            "answer": self.answer,
            "metrics": {name: {"unit": entry.unit, "better": entry.better} for name, entry in METRICS.items()},
            "labels": {name: METHODS[name].label for name in measured},
            "axes": {name: list(METHODS[name].axes_in(context)) for name in measured},
            "degradation": self.eval_performance_degradation(part["methods"]),
            "mask_efficacy": self.eval_mask_efficacy(topK),
            "weight_histogram": self.weight_histogram(masks[self.answer]),
            "class_probability": {name: self.class_probability[METHODS[name].key(context, point)] for name in measured},
        }, masks


def _spans(tensors: TensorDataset, size: int = 4096) -> list[slice]:
    """Slices that cover a dataset: a `DataLoader` over them reads views, not single items."""
    return [slice(begin, begin + size) for begin in range(0, len(tensors), size)]
