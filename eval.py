"""Measure every chosen metric of every method at a point (top_k, kappa): on validation images, by which settings and
points are chosen, and on test images."""

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from core.choices import Diverged
from core.config import KappaModes
from core.observe import log, progress
from core.records import SCORES, axes_as_written
from graphs.subsets import hard_topk
from hidden.layers import by_stage
from hidden.words import bands
from measure.comparisons import avg_gap
from measure.exhibits import TABLES, intervals_of, mask_map, tables_of, thumbnails
from measure.integrity import COSTS, changed_outside, extent, unchanged
from measure.metrics import INSIDE, chosen_metrics
from measure.snapshots import Snapshots
from measure.verdicts import DIVERGED, NOT_APPLICABLE, Band, Other, Pair, References, Verdict, as_facts, verdict
from models.classifier import as_matrices
from rivals.compared import METHODS, mask_of
from unlearn.masks import Mask, masked
from unlearn.registry import Context, Edit, NotApplicable, Point, Settings

JUDGED = {"test": "methods", "val": "validation"}  # split -> its key in a record
HISTOGRAM_BINS = 40
OURS = ("mimu_refined", "mimu")  # best first
Judged = TypeVar("Judged")


class Eval(Snapshots):
    """Measures the methods of a context.

    Args:
        context: classifier, data, configuration and learned importances.
    """

    def __init__(self, context: Context):
        super().__init__(context)
        self.metrics = chosen_metrics((*self.config.eval.metrics, *SCORES))
        self.about: dict[tuple, dict] = {}
        """By method key: settings and what tuning tried, integrity, and the tables that are no single number."""
        self.lacking: dict[tuple, Verdict] = {}
        """By method key: why a method has no values."""
        self._measured: dict[tuple, dict] = {}
        self._efficacy: dict[int, dict[str, float]] = {}
        self._bands: dict[tuple, dict[str, Band]] = {}  # by method key: where features lie beside retrained models'
        self._right: dict[tuple, dict[str, Tensor]] = {}  # by method key and score: which test images are recognised

    # --- what is measured ---

    def eval_unlearning(self, name: str, point: Point) -> dict[str, dict]:
        """Measure every metric of one method at one point, once per method key: {"test": {...}, "val": {...}}.

        A method that cannot be used on this classifier, or whose training diverges, has None for every metric, and
        `lacking` says why: the others go on.
        """
        key = self._key(name, point)
        if key not in self._measured:
            for is_forget_set in (True, False):  # shared by all methods, so no method's seconds hold it
                self.context.activations("val", is_forget_set)
            try:
                self._measured[key] = self._enter(name, point, self.tuned(name, point), self._judge)
            except (Diverged, NotApplicable) as error:  # this method has no model here; all others have
                diverged = isinstance(error, Diverged)
                self.lacking[key] = (
                    Verdict(DIVERGED, str(error)) if diverged else Verdict(NOT_APPLICABLE, f"it {error}")
                )
                log(f"{name} is recorded as {self.lacking[key].key}: {self.lacking[key].sentence}")
                nothing = dict.fromkeys((*self.metrics, *COSTS))
                self._measured[key] = {split: dict(nothing) for split in JUDGED}
                return self._measured[key]
            if len(METHODS[name].grid) > 1 and not self.about[key]["tuning"]:
                log(f"{name}: not tuned, its first settings are used; eval.references 1 tunes it")
        return self._measured[key]

    def _enter(
        self,
        name: str,
        point: Point,
        settings: Settings,
        judge: Callable[[str, tuple, Edit], Judged],
    ) -> Judged:
        """Run a method, judge its edit, undo the edit, and check that the method changed only what it may.

        Raises:
            Diverged: the method's training diverged, or its weights are not finite.
            RuntimeError: it changed a weight that it may not change, or did not restore the shared classifier.
        """
        context, key = self.context, self._key(name, point)
        with METHODS[name].enter(context, point, **settings) as edit:
            if not all(bool(value.isfinite().all()) for value in edit.model.parameters()):
                raise Diverged(f"the weights that {name} leaves are no longer finite")
            free = edit.allowed is None
            outside = 0 if edit.allowed is None else changed_outside(edit.model, self.original, edit.allowed)
            if outside:
                raise RuntimeError(f"{name} changed {outside} weights that it must leave as they are")
            judged = judge(name, key, edit)
        restored = unchanged(context.model, self.original)
        if not restored:
            raise RuntimeError(f"{name} left the classifier changed")
        checked = {"unreached_bit_identical": None if free else True, "restored": restored}
        self.about.setdefault(key, {})["integrity"] = checked | {"sha256": self.original_hash}
        return judged

    def tuned(self, name: str, point: Point) -> Settings:
        """Choose a method's settings from its grid: the smallest Avg Gap to retraining on validation images."""
        grid, key = METHODS[name].grid, self._key(name, point)
        about = self.about.setdefault(key, {"settings": dict(grid[0]), "tuning": []})
        if len(grid) > 1 and not about["tuning"] and self.retrained("val"):
            gaps = [self._tried(name, point, settings) for settings in progress(grid, f"tuning {name}")]
            known = [gap if math.isfinite(gap) else None for gap in gaps]  # JSON has no word for infinity
            about["tuning"] = [dict(one) | {"avg_gap": gap} for one, gap in zip(grid, known, strict=True)]
            about["settings"] = dict(grid[min(range(len(grid)), key=lambda place: gaps[place])])
        return about["settings"]

    def _tried(self, name: str, point: Point, settings: Settings) -> float:
        """Compute one setting's Avg Gap on validation images; infinite, with a line in the log, if it diverges."""
        try:
            return self._enter(name, point, settings, self._gap)
        except Diverged as error:
            log(f"{name} {dict(settings)}: {error}")
            return math.inf

    def validation_gap(self, name: str, point: Point) -> float:
        """Compute a method's Avg Gap at a point on validation images, by which points are chosen."""
        return self._enter(name, point, self.tuned(name, point), self._gap)

    def _gap(self, name: str, key: tuple, edit: Edit) -> float:
        """Compute the Avg Gap on validation images; infinite where it is not a finite number."""
        outputs = self.remembered(name, edit.model, self._prefix_kept(edit), keep=False)
        value = self.evidence(edit.model, outputs, "val", retrained=self.others(name, "val")).value(avg_gap)
        return math.inf if value is None else value

    def _judge(self, name: str, key: tuple, edit: Edit) -> dict[str, dict]:
        """Compute every metric on each split, and the edit's costs; tables and intervals go to `about`."""
        model, same = edit.model, self._prefix_kept(edit)
        weights, size = extent(model, self.original, [n for n in self.original if self._may_differ(n, same)])
        outputs = self.remembered(name, model, same, keep=False)
        seconds = {name: getattr(edit, name) for name in ("seconds", "seconds_offline", "seconds_alone")}
        extra = seconds | {"weights_changed": weights, "edit_bytes": size}
        judged = {}
        for split in JUDGED:
            references = {"original": self.reference(split), "retrained": self.others(name, split)}
            e = self.evidence(model, outputs, split, **references, untrained=self.untrained)
            inside = () if split == "test" else INSIDE
            asked = {name: entry for name, entry in self.metrics.items() if entry.group not in inside}
            judged[split] = {name: e.value(entry.compute) for name, entry in asked.items()} | extra
            if split == "test":
                self.about[key]["intervals"] = intervals_of(e, asked)
                self.about[key]["undefined"] = {n: why for n, one in asked.items() if (why := e.why(one.compute))}
                self.about[key]["by_stage"] = by_stage(e, asked)
                self._bands[key] = bands(e, judged[split], self.retrained(split))
                self._right[key] = {"forget_score": e.forget.right, "retain_score": e.retain.right}
        self.about[key] |= tables_of(outputs("test", True), outputs("test", False))
        return judged

    def eval_performance_degradation(self, measured: Mapping[str, Mapping[str, float]]) -> dict[str, dict]:
        """Subtract the untouched model's metrics from each method's, {method: {metric: value}}."""
        base = self.eval_unlearning("default", Point(0, 0, self.config.seed))["test"]

        def differences(values: Mapping[str, float]) -> dict[str, float | None]:
            pairs = {name: (values[name], base[name]) for name in self.metrics}
            return {name: None if a is None or b is None else a - b for name, (a, b) in pairs.items()}

        return {name: differences(values) for name, values in measured.items()}

    def eval_mask_efficacy(self, top_k: int) -> dict[str, float]:
        """Measure how well the forget class's own top-K mask explains it: accuracies with only those weights kept.

        A good class mask keeps `forget_score` high; both are on validation images, percent. Measured once per top_k.
        """
        if top_k in self._efficacy:
            return self._efficacy[top_k]
        chosen = hard_topk(self.context.class_theta(top_k), top_k).cpu()
        with masked(self.context.weights, Mask(chosen, self.context.graph)):
            sets = {"forget_score": True, "retain_score": False}
            self._efficacy[top_k] = {
                name: self.outputs(self.context.model, "val", is_forget, "class mask").score()
                for name, is_forget in sets.items()
            }
        return self._efficacy[top_k]

    @property
    def answer(self) -> str:
        """The method whose mask the run recommends: `mimu_refined` if it is measured, else `mimu`."""
        if self.config.kappa is KappaModes.auto:
            return self.config.auto.method
        return next((name for name in OURS if name in self.config.eval.methods), OURS[-1])

    def weight_histogram(self, mask: Mask) -> dict[str, list]:
        """Count kept and switched-off weights in common bins."""
        weight = self.context.graph.join(as_matrices([weight.detach().cpu() for weight in self.context.weights]))
        edges = torch.linspace(float(weight.min()), float(weight.max()), HISTOGRAM_BINS + 1)
        count = {
            name: torch.histogram(weight[chosen].contiguous(), edges).hist.int().tolist()
            for name, chosen in (("kept", mask.keep), ("switched_off", ~mask.keep))
        }
        return {"edges": edges.tolist(), **count}

    @cached_property
    def samples(self) -> dict[str, list]:
        """Thumbnails of some test images of the forgotten classes."""
        return thumbnails(self.context.data)

    def _names_of_samples(self, tables: Mapping[str, Mapping[str, list | None]]) -> dict[str, str]:
        """Names of the classes that `samples` are of or are taken for, by label."""
        said = (int(label) for one in tables["said_of_samples"].values() for label, _ in one or ())
        return {str(label): self.context.data.classes[label] for label in sorted({*self.samples["labels"], *said})}

    def masks(self, point: Point) -> dict[str, Mask]:
        """Return the masks of the measured mask methods at a point, and in any case that of the answer."""
        names = dict.fromkeys((self.answer, *self.config.eval.methods))
        made = (name for name in names if METHODS[name].mask and self._key(name, point) not in self.lacking)
        return {name: mask_of(name, self.context, point) for name in made}

    def _key(self, name: str, point: Point) -> tuple:
        return METHODS[name].key(self.context, point)

    def _against(self, name: str, other: str, point: Point, measured: Mapping[str, Mapping[str, dict]]) -> Other | None:
        """Compare a method's test predictions with another's at a point; None if either has none."""
        keys = [METHODS[one].key(self.context, point) for one in (name, other)]
        if other not in measured or any(key not in self._right for key in keys):
            return None
        (mine, theirs) = (self._right[key] for key in keys)
        pairs = (_pair(mine[score], theirs[score]) for score in SCORES)
        return Other(measured[other]["test"], *pairs)

    def _by_class(self, right: Tensor, before: Tensor) -> dict[int, Pair]:
        """Compare predictions on retained test images before and after, class by class. Both bool [S]."""
        labels = self.reference("test").retain.labels
        return {c: _pair(right[labels == c], before[labels == c]) for c in labels.unique().tolist()}

    def verdicts(self, measured: Mapping[str, Mapping[str, dict]], point: Point) -> dict[str, list[dict[str, str]]]:
        """Say what speaks against each measured method, in words, from its test predictions at a point."""
        measured = {**measured, "default": self.eval_unlearning("default", Point(0, 0, point.seed))}
        sane, said = bool(self.references) and self.references[0]["sane"], {}
        before = self._right[METHODS["default"].key(self.context, point)]["retain_score"]
        gold = self.retrained("test")[:1]
        drops = {c: p.points for one in gold for c, p in self._by_class(one.retain.right, before).items()}
        for name in measured:
            key = self._key(name, point)
            untouched = self._against(name, "default", point, measured)
            if untouched is None:
                said[name] = as_facts([self.lacking[key]])
                continue
            references = References(
                self.context.data.num_classes,
                untouched,
                logit_drop=self._against(name, "logit_drop", point, measured) if name != "logit_drop" else None,
                random=self._against(name, "random", point, measured),
                by_class=self._by_class(self._right[key]["retain_score"], before),
                is_mask=METHODS[name].mask is not None and name != "random",
                is_retrained=name == "retrain",
                retrained=measured["retrain"]["test"] if sane and "retrain" in measured else None,
                retrained_drop=drops,
                bands=self._bands[key],
                names=self.context.data.classes,
            )
            said[name] = as_facts(verdict(measured[name]["test"], references))
        return said

    def eval(self, top_k: int, kappa: int) -> tuple[dict, dict[str, Mask]]:
        """Measure all that a record holds of one (top_k, kappa) point; also return the masks of its methods."""
        point, context = Point(top_k, kappa, self.config.seed), self.context
        names = progress(self.config.eval.methods, f"methods at kappa {kappa}")
        measured = {name: self.eval_unlearning(name, point) for name in names}
        masks = self.masks(point)
        part = {key: {name: values[split] for name, values in measured.items()} for split, key in JUDGED.items()}
        tables = {
            title: {name: self.about[METHODS[name].key(context, point)].get(title) for name in measured}
            for title in ("settings", "tuning", "integrity", "intervals", "undefined", "by_stage", *TABLES)
        }
        return part | tables | {
            "answer": self.answer,
            "metrics": {name: entry.about() for name, entry in self.metrics.items()},
            "costs": COSTS,
            "labels": {name: METHODS[name].label for name in measured},
            "axes": {name: axes_as_written(METHODS[name].axes_in(context)) for name in measured},
            "degradation": self.eval_performance_degradation(part["methods"]),
            "verdicts": {name: said for name, said in self.verdicts(measured, point).items() if name in measured},
            "references": self.references,
            "mask_efficacy": self.eval_mask_efficacy(top_k),
            "weight_histogram": self.weight_histogram(masks[self.answer]),
            "mask_map": mask_map(masks[self.answer]),
            "samples": {**self.samples, "names": self._names_of_samples(tables)},
        }, masks


def _pair(right: Tensor, before: Tensor) -> Pair:
    """Count the images that one model recognises and another does not, both ways. Both bool [S]."""
    return Pair(int((before & ~right).sum()), int((right & ~before).sum()), len(right))
