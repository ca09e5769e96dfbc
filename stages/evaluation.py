"""The last stage: measure every method at one point of the sweep, and keep the record under the hash of its inputs.

A record depends on nothing that draws or writes reports, so that editing the page measures nothing anew.
"""

import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from core.artifacts import SCHEMA, write_json
from core.config import (
    GIVEN,
    KappaModes,
    MaskStrategies,
    Objectives,
    PipelineConfig,
    UserError,
    plain,
    written,
)
from core.hashes import code_key, key_of, load_plugins, now, provenance, sha256_file, versions
from core.intervals import wilson
from core.observe import log
from core.records import Record, checked, read_whole, record_path
from data import ROWS_AT_ONCE
from eval import Eval
from measure.auto_kappa import Search
from model import predictions
from rivals.compared import METHODS
from stages.chain import Stages
from training.distributed import repeatability
from training.resume import recipe
from unlearn.masks import Mask, weights_sha256
from unlearn.registry import Context
from utils_data import UnlearningDataset

SECTIONS = ("eval", "refine", "sft", "gcn")  # of the configuration, that values depend on directly


@dataclass(frozen=True)
class Footing:
    """How often the untouched classifier is right on validation images, and how often by chance; percent."""

    accuracy: float
    low: float
    high: float
    chance: float

    @property
    def near_chance(self) -> bool:
        """Tell whether the 95 % interval holds what guessing reaches."""
        return self.low <= self.chance

    @property
    def sentence(self) -> str:
        """Say so in one sentence for the user."""
        found = f"{self.accuracy:.1f} % [{self.low:.1f}, {self.high:.1f}] of the validation images"
        return (
            f"the untouched classifier recognises {found}, guessing {self.chance:.1f} %: near chance, "
            "so that nothing said of forgetting holds; train it longer, or give another"
        )


def footing(context: Context) -> Footing:
    """Measure the untouched classifier on the validation activations that methods use anyway.

    Chance is 1 / classes, or always saying the largest class, whichever is more often right.
    """
    right, labels = 0, []
    for is_forget_set in (True, False):
        h, true = context.activations("val", is_forget_set)
        for part, own in zip(h.split(ROWS_AT_ONCE), true.split(ROWS_AT_ONCE), strict=True):
            with torch.inference_mode():
                right += int((predictions(context.model.head(part, context.config.mask_layer)) == own).sum())
        labels.append(true)
    counts = torch.cat(labels).bincount()
    count, interval = int(counts.sum()), wilson(right, int(counts.sum()))
    chance = max(1 / context.data.num_classes, int(counts.max()) / count)
    return Footing(100 * right / count, 100 * interval.low, 100 * interval.high, 100 * chance)


def check_choices(config: PipelineConfig, objective: Objectives) -> None:
    """Check that no two settings contradict each other.

    Raises:
        UserError: two do.
    """
    direct, elbo = config.eval.mask_strategy is MaskStrategies.direct, objective is Objectives.elbo
    if direct and elbo:
        raise UserError("eval.mask_strategy is direct, but the GCN's objective is elbo: choose feasibility")
    if config.kappa is KappaModes.auto and config.auto.method not in config.eval.methods:
        raise UserError(f"auto.method is {config.auto.method}: name one of eval.methods")
    if config.kappa is KappaModes.auto and METHODS[config.auto.method].mask is None:
        raise UserError(f"auto.method is {config.auto.method}, which switches no kappa weights off: name mimu")
    if "retrain" in config.eval.methods and not config.eval.references:
        raise UserError("eval.methods names retrain, but eval.references is 0: ask for 1, or leave retrain out")


class Evaluation:
    """Measures the points of one run.

    Args:
        stages: the classifier, graphs and GCN of the run; made when the first point is measured.

    Raises:
        UserError: two settings of the configuration contradict each other.
    """

    def __init__(self, stages: Stages):
        check_choices(stages.config, stages.objective)
        self.stages, self.setup, self.config = stages, stages.setup, stages.config
        self.started = now()

    @cached_property
    def eval(self) -> Eval:
        """The methods and metrics with the activations that they share."""
        return self.for_classes(self.stages.data.forget_class)

    def for_classes(self, labels: tuple[int, ...]) -> Eval:
        """Judge requests to forget other classes with the run's own classifier, graphs and graph network.

        Retrained models are without the run's own classes, so that for others there is none.
        """
        stages, data, config = self.stages, self.stages.data, replace(self.config, forget_class=labels)
        judged = UnlearningDataset(data.name, data.splits, config.eval.batch_size, labels, data.seed)
        shared = (stages.classifier, judged, config, stages.device, stages.learn_importance)
        compared = config.eval.references and labels == data.forget_class
        made = (stages.head, stages.gcn_stage.unlearner, stages.retrained if compared else None)
        return Eval(Context(*shared, *made, stages.classifier_stage.untrained, stage_seconds=stages.seconds))

    @cached_property
    def run_inputs(self) -> dict:
        """Name all that the values of every point of this run depend on; a point adds top_k, kappa and its GCN.

        What is given by path counts by its contents, and so does that it is given: a run that trained a network itself
        and one that was handed it are two runs.
        """
        config, automatic = self.config, self.config.kappa is KappaModes.auto
        inputs = self.setup.common | self.stages.graph_stage.source
        inputs |= {name: plain(getattr(config, name)) for name in SECTIONS}
        inputs |= {
            "classes": list(self.stages.data.classes),
            "forget_class": config.forget_labels,
            "given": [name for name in GIVEN if getattr(config, name)],
            "kappa_mode": config.kappa.value,
            "auto": plain(config.auto) if automatic else None,
            "references": recipe(self.stages.crew.train_config) if config.eval.references else None,
            "code": code_key("stages.evaluation"),
            "versions": versions(),
        }
        # The ELBO trains a network for each top_k: one run has several, and what they are made from is in `inputs`.
        if config.gcn_path or self.stages.objective is not Objectives.elbo:
            inputs["network"] = sha256_file(self.stages.run_gcn_training(config.topK_list[0]))
        return inputs

    def measure(self, top_k: int, kappa: int, auto: Search | None = None) -> Record:
        """Measure every method at one point; write and return its record (or return the one that is there).

        Args:
            auto: the search that chose kappa; its outcome goes into the record and the masks.
        """
        gcn_path = self.stages.run_gcn_training(top_k)
        config = self.config
        below_top = [place - self.setup.depth for place in self.setup.layers]
        chosen = auto.facts(config.auto) if auto else None
        point = {"top_k": top_k, "kappa": kappa, "gcn": sha256_file(gcn_path), "chosen": chosen}
        record = {
            "schema": SCHEMA,
            "id": key_of(self.run_inputs | point)[:12],
            "run": key_of(self.run_inputs)[:12],
            "model": config.model_architecture.value,
            "dataset": config.vision_dataset.value,
            "objective": self.stages.objective.value,
            **self._origin,
            "forget_class": list(config.forget_labels),
            "forget_names": [self.stages.data.classes[label] for label in config.forget_labels],
            "mask_layer": below_top,
            "num_graph_vertices": self.setup.graph.num_vertices,
            "num_graph_edges": self.setup.graph.num_edges,
            "top_k": top_k,
            "kappa": kappa,
            "auto": chosen,
            "seed": config.seed,
            "classifier_path": self._relative(self.stages.classifier_path),
            "gcn_path": self._relative(gcn_path),
            "config": plain(written(replace(config, output_dir=Path(), topK_list=(top_k,), kappa_list=(kappa,)))),
        }
        path = record_path(config.output_dir, record)
        if found := read_whole(config.output_dir, path):
            return found
        log(f"evaluation: top_k {top_k}, kappa {kappa}")
        return self._measure(record, path)

    @cached_property
    def _origin(self) -> dict:
        """Name images, classifier and code by content: reports pool and pair runs by them, wherever files lie."""
        config, data, source = self.config, self.stages.data, self.stages.graph_stage.source
        given = (config.trained_vision_model_path, config.graph_dir, config.gcn_path)
        hashes = (source["classifier"], source["graphs"], config.gcn_path and sha256_file(config.gcn_path))
        return {
            "images": self.setup.common["images"],
            "num_classes": data.num_classes,
            "split_sizes": {split: len(part.labels) for split, part in data.splits.items()},
            "classifier_sha256": source["classifier"],
            "given": {
                name: digest if path else None
                for name, path, digest in zip(("classifier", "graphs", "gcn"), given, hashes, strict=True)
            },
            "code": code_key("stages.evaluation"),
        }

    def _measure(self, record: dict, path: Path) -> Record:
        """Fill a record, write its masks and, last, the record itself."""
        begun, standing = time.perf_counter(), self.footing
        measured, masks = self.eval.eval(record["top_k"], record["kappa"])
        files = {name: self._save_mask(name, mask, record, path) for name, mask in masks.items()}
        paths = {name: self._relative(file) for name, file in files.items()}
        seconds = self.setup.seconds | {"evaluation": time.perf_counter() - begun}
        run: dict[str, object] = {"device": str(self.setup.device), "started": self.started, "seconds": seconds}
        run |= {"repeatability": repeatability(self.setup.device), "plugins": load_plugins(self.config.plugins)}
        places = {"mask_path": paths[measured["answer"]], "mask_paths": paths}
        places |= {"mask_sha256": {name: sha256_file(file) for name, file in files.items()}}
        record |= {**places, "provenance": provenance() | run, **measured, **self.stages.data.image_facts, **standing}
        whole = checked(record)
        write_json(path, record)
        return whole

    @cached_property
    def footing(self) -> dict:
        """Facts for records: how far the untouched classifier is from chance; said at once if it is near."""
        found = footing(self.eval.context)
        if found.near_chance:
            log(f"warning: {found.sentence}")
        return {"footing": asdict(found) | {"near_chance": found.sentence if found.near_chance else None}}

    def _save_mask(self, name: str, mask: Mask, record: dict, path: Path) -> Path:
        """Write a method's mask beside the records, with the facts that say what it is for."""
        keys = ("schema", "id", "model", "dataset", "forget_class", "mask_layer", "top_k", "kappa", "seed")
        facts = {key: record[key] for key in (*keys, "auto", "classifier_path", "gcn_path")}
        facts |= {"method": name, "classifier_sha256": sha256_file(self.stages.classifier_path)}
        facts["weights_sha256"] = weights_sha256(self.stages.classifier.weights(self.config.mask_layer))
        target = path.parents[2] / "masks" / path.parent.name / f"{path.stem}_{name}.safetensors"
        replace(mask, facts=facts).save(target)
        return target

    def _relative(self, path: Path) -> str:
        """Write a path below the output folder as seen from there, any other as it is."""
        root = self.config.output_dir.resolve()
        path = path.resolve()
        return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
