"""Measure methods x sweep points: every chosen metric, on validation images (for choosing) and on test images.

Only the target layers change under a mask, so the first one's input h is computed once per image set and kept; a
masked model is then judged by `head(h, W)` alone. A model whose earlier layers differ takes the full forward pass.
"""

import copy
import math
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import baselines  # noqa: F401 - registers its methods
import edits  # noqa: F401 - registers its methods
import probes  # noqa: F401 - registers its metrics
from comparisons import avg_gap  # registers the metrics against the retrained models too
from config import KappaModes
from counts import intervals_of
from finetuning import Diverged
from integrity import COSTS, changed_outside, extent, state_hash, unchanged
from masks import Mask, hard_topk, masked
from methods import METHODS, Context, Point, Settings, mask_of
from metrics import Choose, Evidence, Outputs, OutputsOf, chosen_metrics
from model import HookedModel, MaskLayer, inspecting
from observe import log, progress
from records import SCORES
from verdicts import References, as_facts, verdict
from views import TABLES, mask_map, tables_of, thumbnails

JUDGED = {"test": "methods", "val": "validation"}  # split -> its key in a record
HISTOGRAM_BINS = 40
OURS = ("mimu_refined", "mimu")  # best first
Judged = TypeVar("Judged")
Costs = dict[str, float | None]


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
        self.metrics = chosen_metrics((*self.config.eval.metrics, *SCORES))
        self.untouched = copy.deepcopy(context.model)
        """The classifier as it was, out of reach of every method."""
        self.original = self.untouched.state_dict()
        self.original_hash = state_hash(self.untouched)
        place = context.model.layer_indices(self.config.mask_layer)[0]
        self.after_prefix = tuple(f"linears.{index}." for index in range(place, len(context.model.linears)))
        self.about: dict[tuple, dict] = {}
        """By method key: settings and what tuning tried, integrity, and the tables that are no single number."""
        self._measured: dict[tuple, dict] = {}
        self._efficacy: dict[int, dict[str, float]] = {}
        self._references: dict[tuple, Evidence] = {}
        self._seen: dict[tuple, Outputs] = {}

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

    def _prefix_kept(self, model: HookedModel) -> bool:
        """The same of an entered method's model: where it may change nothing there, `_enter` has just seen to it."""
        allowed = self.context.allowed
        kept = allowed is not None and all(name.startswith(self.after_prefix) for name in allowed)
        return kept or self.prefix_unchanged(model)

    def _may_differ(self, name: str, prefix_unchanged: bool) -> bool:
        """Whether a tensor of the state dict may differ from the original's."""
        return name.startswith(self.after_prefix) or not prefix_unchanged

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

    # --- what models are compared with ---

    def remembered(self, name: str, model: HookedModel, same: bool | None = None, keep: bool = True) -> OutputsOf:
        """Outputs of a model by split and set, each computed when first asked for; `keep`: for the whole run."""
        seen = self._seen if keep else {}

        def of(split: str, is_forget_set: bool) -> Outputs:
            key = (name, split, is_forget_set)
            if key not in seen:
                seen[key] = self.outputs(model, split, is_forget_set, f"{name} on {split}", same)
            return seen[key]

        return of

    def evidence(self, model: HookedModel, outputs: OutputsOf, split: str, **more: object) -> Evidence:
        """What the metrics are given of a model."""
        config, data = self.config, self.context.data

        def images(split: str, is_forget_set: bool, choose: Choose | None = None) -> tuple[Tensor, Tensor]:
            part = data.splits[split]
            places = (data.is_forgotten(part.labels) == is_forget_set).nonzero().squeeze(1)
            if choose is not None:
                places = places[choose if isinstance(choose, Tensor) else choose(part.labels[places])]
            return part.batch(places)

        shared = (config.mask_layer, config.forget_labels, config.seed, self.context.device)
        return Evidence(model, outputs, split, *shared, images, **more)  # ty: ignore[invalid-argument-type]

    def reference(self, split: str) -> Evidence:
        """The untouched classifier."""
        if ("default", split) not in self._references:
            outputs = self.remembered("untouched", self.untouched, True)
            self._references["default", split] = self.evidence(self.untouched, outputs, split)
        return self._references["default", split]

    def retrained(self, split: str) -> tuple[Evidence, ...]:
        """The classifiers retrained without the classes, one per training seed; none if none was asked for."""
        if self.context.retrain is None:
            return ()
        for index in range(self.config.eval.references):
            if ("retrain", index, split) not in self._references:
                model = self.context.retrain(index)
                outputs = self.remembered(f"retrained {index}", model, False)
                beside = {"original": self.reference(split), "untrained": self.untrained}
                self._references["retrain", index, split] = self.evidence(model, outputs, split, **beside)
        return tuple(self._references["retrain", index, split] for index in range(self.config.eval.references))

    @cached_property
    def untrained(self) -> OutputsOf | None:
        """Outputs of a classifier that has learned nothing (for ZRF)."""
        fresh = self.context.untrained
        return None if fresh is None else self.remembered("untrained", fresh(), False)

    # --- what is measured ---

    def eval_unlearning(self, name: str, point: Point) -> dict[str, dict]:
        """Every metric of one method at one point, {"test": {...}, "val": {...}}; measured once per method key."""
        key = METHODS[name].key(self.context, point)
        if key not in self._measured:
            for is_forget_set in (True, False):  # shared by all methods, so no method's seconds hold it
                self.context.activations("val", is_forget_set)
            self._measured[key] = self._enter(name, point, self.tuned(name, point), self._judge)
        return self._measured[key]

    def _enter(
        self,
        name: str,
        point: Point,
        settings: Settings,
        judge: Callable[[str, tuple, HookedModel, Costs], Judged],
    ) -> Judged:
        """Enter a method, judge its model, leave it, and check that it kept to what it may change.

        Raises:
            RuntimeError: it changed what it must not, or left the classifier changed.
        """
        context, key = self.context, METHODS[name].key(self.context, point)
        context.charged, context.allowed, begun = 0.0, None, time.perf_counter()
        with METHODS[name].enter(context, point, **settings) as model:
            costs: Costs = {"seconds": time.perf_counter() - begun + context.charged}
            costs["seconds_offline"] = context.learning_seconds(point.topK) if METHODS[name].learned else 0.0
            free = context.allowed is None
            outside = 0 if free else changed_outside(model, self.original, context.allowed)
            if outside:
                raise RuntimeError(f"{name} changed {outside} weights that it must leave as they are")
            judged = judge(name, key, model, costs)
        restored = unchanged(context.model, self.original)
        if not restored:
            raise RuntimeError(f"{name} left the classifier changed")
        checked = {"unreached_bit_identical": None if free else True, "restored": restored}
        self.about.setdefault(key, {})["integrity"] = checked | {"sha256": self.original_hash}
        return judged

    def tuned(self, name: str, point: Point) -> Settings:
        """The settings of a method: of its grid, what comes closest to retraining on validation images (Avg Gap)."""
        grid, key = METHODS[name].grid, METHODS[name].key(self.context, point)
        about = self.about.setdefault(key, {"settings": dict(grid[0]), "tuning": []})
        if len(grid) > 1 and not about["tuning"]:
            if not self.retrained("val"):
                log(f"{name}: not tuned, its first settings are used; eval.references 1 tunes it")
                return grid[0]
            gaps = [self._tried(name, point, settings) for settings in grid]
            about["tuning"] = [dict(one) | {"avg_gap": gap} for one, gap in zip(grid, gaps, strict=True)]
            about["settings"] = dict(grid[min(range(len(grid)), key=lambda place: gaps[place])])
        return about["settings"]

    def _tried(self, name: str, point: Point, settings: Settings) -> float:
        """Avg Gap of one setting on validation images; infinite, and said so, where its training diverges."""
        try:
            return self._enter(name, point, settings, self._gap)
        except Diverged as error:
            log(f"{name} {dict(settings)}: {error}")
            return math.inf

    def validation_gap(self, name: str, point: Point) -> float:
        """Avg Gap of a method at a point on validation images: what points and settings are chosen by."""
        return self._enter(name, point, self.tuned(name, point), self._gap)

    def _gap(self, name: str, key: tuple, model: HookedModel, costs: Costs) -> float:
        """Avg Gap on validation images; infinite where it is not a number."""
        outputs = self.remembered(name, model, self._prefix_kept(model), keep=False)
        value = self.evidence(model, outputs, "val", retrained=self._others(name, "val")).figure(avg_gap)
        return math.inf if value is None else value

    def _judge(self, name: str, key: tuple, model: HookedModel, costs: Costs) -> dict[str, dict]:
        same = self._prefix_kept(model)
        weights, size = extent(model, self.original, [n for n in self.original if self._may_differ(n, same)])
        outputs = self.remembered(name, model, same, keep=False)
        extra = costs | {"weights_changed": weights, "edit_bytes": size}
        judged = {}
        for split in JUDGED:
            references = {"original": self.reference(split), "retrained": self._others(name, split)}
            e = self.evidence(model, outputs, split, **references, untrained=self.untrained)
            asked = {name: entry for name, entry in self.metrics.items() if split == "test" or entry.group != "deep"}
            judged[split] = {name: e.figure(entry.compute) for name, entry in asked.items()} | extra
            if split == "test":
                self.about[key]["intervals"] = intervals_of(e, asked)
        self.about[key] |= tables_of(outputs("test", True), outputs("test", False))
        return judged

    def _others(self, name: str, split: str) -> tuple[Evidence, ...]:
        """The retrained models that a method is compared with: `retrain` with all but itself, the noise floor.

        With a single one there are none: its gap to itself, 0, would pass for a floor.
        """
        references = self.retrained(split)
        return references[1:] if name == "retrain" else references

    def eval_performance_degradation(self, measured: Mapping[str, Mapping[str, float]]) -> dict[str, dict]:
        """Each method's metrics minus the untouched model's, from {method: {metric: value}}."""
        base = self.eval_unlearning("default", Point(0, 0, self.config.seed))["test"]

        def differences(values: Mapping[str, float]) -> dict[str, float | None]:
            pairs = {name: (values[name], base[name]) for name in self.metrics}
            return {name: None if a is None or b is None else a - b for name, (a, b) in pairs.items()}

        return {name: differences(values) for name, values in measured.items()}

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

    @cached_property
    def samples(self) -> dict[str, list]:
        """Some images of the forgotten classes, for people to look at."""
        return thumbnails(self.context.data)

    def masks(self, point: Point) -> dict[str, Mask]:
        """The masks of the measured mask methods at a point, and in any case that of the answer."""
        names = dict.fromkeys((self.answer, *self.config.eval.methods))
        return {name: mask_of(name, self.context, point) for name in names if METHODS[name].mask}

    def verdicts(self, measured: Mapping[str, Mapping[str, dict]], point: Point) -> dict[str, list[dict[str, str]]]:
        """What is to be said against each measured method, in words, from its test figures at a point."""
        untouched = self.eval_unlearning("default", Point(0, 0, point.seed))["test"]
        base = self.about[METHODS["default"].key(self.context, point)]["intervals"]
        figures = {name: values["test"] for name, values in measured.items()}
        said = {}
        for name in measured:
            references = References(
                *(int(base[score]["n"]) for score in SCORES),
                self.context.data.num_classes,
                untouched,
                logit_drop=figures.get("logit_drop") if name != "logit_drop" else None,
                is_mask=METHODS[name].mask is not None and name != "random",
                random=figures.get("random"),
                retrained=figures.get("retrain"),
            )
            said[name] = as_facts(verdict(figures[name], references))
        return said

    def eval(self, topK: int, kappa: int) -> tuple[dict, dict[str, Mask]]:
        """Everything that a record says about one (topK, kappa) point, and the masks of its methods."""
        point, context = Point(topK, kappa, self.config.seed), self.context
        measured = {name: self.eval_unlearning(name, point) for name in self.config.eval.methods}
        masks = self.masks(point)
        part = {key: {name: values[split] for name, values in measured.items()} for split, key in JUDGED.items()}
        return part | {
            "answer": self.answer,
            "metrics": {name: entry.about() for name, entry in self.metrics.items()},
            "costs": COSTS,
            "labels": {name: METHODS[name].label for name in measured},
            "axes": {name: list(METHODS[name].axes_in(context)) for name in measured},
            "degradation": self.eval_performance_degradation(part["methods"]),
            "verdicts": self.verdicts(measured, point),
            "mask_efficacy": self.eval_mask_efficacy(topK),
            "weight_histogram": self.weight_histogram(masks[self.answer]),
            "mask_map": mask_map(masks[self.answer]),
            "samples": self.samples,
            **{
                title: {name: self.about[METHODS[name].key(context, point)].get(title) for name in measured}
                for title in ("settings", "tuning", "integrity", "intervals", *TABLES)
            },
        }, masks


def _spans(tensors: TensorDataset, size: int = 4096) -> list[slice]:
    """Slices that cover a dataset: a `DataLoader` over them reads views, not single items."""
    return [slice(begin, begin + size) for begin in range(0, len(tensors), size)]
