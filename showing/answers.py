"""What the demo answers: a mask for a class and a budget, made, judged and lifted by the code of every run.

The classifier, graphs and graph network are the stages of a run, the mask is the method `mimu`, and the scores are
those of `Eval`: a run with the same settings writes the same values.
"""

import threading
from collections import OrderedDict
from dataclasses import replace

from core.config import PROJECT_ROOT, EvalConfig, PipelineConfig, SupportedVisionModels, Trackers, UserError
from core.observe import log
from core.records import SCORES
from eval import Eval
from graphs.layout import check_budget
from measure.auto_kappa import kappas
from measure.exhibits import said_of_samples, thumbnails
from measure.integrity import unchanged
from measure.metrics import OutputsOf
from mimu import state_sha256
from pipeline import Pipeline
from rivals.compared import METHODS
from unlearn.registry import Point

METHOD = "mimu"
SHIPPED = PROJECT_ROOT / "pretrained"
NETWORKS = {SupportedVisionModels.HookedResnet: "gcn_resnet.safetensors"}  # of every other classifier: gcn_mlp
MOST_KEPT = 8  # classes whose activations and scores are kept
SIDES = {"forgotten": True, "others": False}


def for_demo(config: PipelineConfig) -> PipelineConfig:
    """Return a run's configuration with the graph network that ships, unless one is given, and no rivals."""
    network = SHIPPED / NETWORKS.get(config.model_architecture, "gcn_mlp.safetensors")
    asked = EvalConfig(methods=(METHOD, "default"), metrics=("core",), references=0, batch_size=config.eval.batch_size)
    return replace(config, gcn_path=config.gcn_path or network, eval=asked, tracker=Trackers.none)


class Answers:
    """Answers requests, one after the other, whichever thread asks.

    Args:
        config: of a run; its class to forget is the one that is shown first.

    Raises:
        UserError: the configuration cannot be run.
    """

    def __init__(self, config: PipelineConfig):
        self.pipeline = Pipeline(for_demo(config))
        self.config = self.pipeline.config
        self._lock = threading.Lock()
        self._evals: OrderedDict[int, Eval] = OrderedDict()

    @property
    def size(self) -> int:
        """How many weights a mask may switch off."""
        return self.pipeline.evaluation.setup.graph.num_vertices

    def prepare(self) -> dict:
        """Make or find the classifier and the graphs, answer the first request, and return what the page is told."""
        config = self.config
        answer = self.forget(config.forget_labels[0], max(config.kappa_list))
        return {
            "model": config.model_architecture.value,
            "dataset": config.vision_dataset.value,
            "seed": config.seed,
            "classes": list(self.pipeline.stages.data.classes),
            "size": self.size,
            "layers": len(self.pipeline.evaluation.setup.layers),
            "budgets": sorted({*kappas(self.size, config.auto), *config.kappa_list}),
            "network": config.gcn_path.name if config.gcn_path else "",
            "warning": self.pipeline.evaluation.footing["footing"]["near_chance"],
            "first": answer,
        }

    def forget(self, label: int, kappa: int) -> dict:
        """Make a mask, put it on, judge it on test images, and take it off again.

        Raises:
            UserError: there is no such class, or no so many weights.
        """
        with self._lock:
            found, point = self._eval(label), self._point(kappa)
            after = found.eval_unlearning(METHOD, point)["test"]
            before = found.eval_unlearning("default", point)["test"]
            with METHODS[METHOD].enter(found.context, point) as edit:
                outputs = found.remembered(METHOD, edit.model, True, keep=False)
                said = {side: said_of_samples(outputs("test", flag)) for side, flag in SIDES.items()}
            log(f"demo: class {label}, {kappa:,} weights: mask in {1000 * after['seconds']:.0f} ms")
            return {
                "class": label,
                "kappa": kappa,
                "changed": after["weights_changed"],
                "seconds": after["seconds"],
                "before": {score: before[score] for score in SCORES},
                "after": {score: after[score] for score in SCORES},
                "samples": {side: self._samples(found, side, said[side]) for side in SIDES},
            }

    def lift(self, label: int, kappa: int) -> dict:
        """Put the same mask on and take it off; judge the classifier anew, and compare its bits with those before.

        Raises:
            UserError: as `forget`.
        """
        with self._lock:
            found, point = self._eval(label), self._point(kappa)
            with METHODS[METHOD].enter(found.context, point):
                masked = state_sha256(found.context.model)
            outputs = found.remembered("lifted", found.context.model, True, keep=False)
            said = {side: said_of_samples(outputs("test", flag)) for side, flag in SIDES.items()}
            return {
                "class": label,
                "kappa": kappa,
                "identical": unchanged(found.context.model, found.original),
                "sha256": {
                    "before": found.original_hash,
                    "masked": masked,
                    "lifted": state_sha256(found.context.model),
                },
                "after": _scores(outputs),
                "samples": {side: self._samples(found, side, said[side]) for side in SIDES},
            }

    def _point(self, kappa: int) -> Point:
        check_budget(kappa, self.size, "kappa")
        return Point(self.config.topK_list[0], kappa, self.config.seed)

    def _eval(self, label: int) -> Eval:
        """Return what judges requests to forget a class; those asked for last are kept."""
        classes = self.pipeline.stages.data.classes
        if not 0 <= label < len(classes):
            raise UserError(f"there is no class {label}: choose from 0 to {len(classes) - 1}")
        if label not in self._evals:
            self._evals[label] = self.pipeline.evaluation.for_classes((label,))
        self._evals.move_to_end(label)
        while len(self._evals) > MOST_KEPT:
            self._evals.popitem(last=False)
        return self._evals[label]

    @staticmethod
    def _samples(found: Eval, side: str, said: list | None) -> list[dict]:
        """Some test images with what the classifier says of them before and after: class and probability."""
        flag, reference = SIDES[side], found.reference("test")
        pictures = thumbnails(found.context.data, flag)
        before = said_of_samples(reference.forget if flag else reference.retain)
        nothing = [None] * len(pictures["labels"])
        columns = (pictures["images"], pictures["labels"], before or nothing, said or nothing)
        names = ("image", "label", "before", "after")
        return [dict(zip(names, one, strict=True)) for one in zip(*columns, strict=True)]


def _scores(outputs: OutputsOf) -> dict[str, float]:
    return {score: outputs("test", flag).score() for score, flag in zip(SCORES, SIDES.values(), strict=True)}
