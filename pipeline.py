"""The whole of MIMU: classifier -> graphs -> GCN -> sweep over topK x kappa -> report.

Stages are kept under the hash of all their inputs, and so is every record: what is there is not measured again.
"""

import time
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

from core.artifacts import SCHEMA, write_json
from core.config import (
    GIVEN,
    KappaModes,
    MaskStrategies,
    Objectives,
    PipelineConfig,
    Trackers,
    UserError,
    plain,
    written,
)
from core.hashes import code_key, key_of, now, provenance, sha256_file, versions
from core.observe import log, progress
from core.records import complaint, read_whole, record_path
from eval import Eval
from measure.auto_kappa import Search, check_provable, search
from measure.metrics import chosen_metrics
from reporter import Reporter
from stages.chain import Stages
from stages.preflight import footing, say
from training.distributed import repeatability
from training.resume import recipe
from unlearn.masks import Mask, weights_sha256
from unlearn.methods import METHODS, chosen_methods
from unlearn.registry import Context
from utils_data import UnlearningDataset

__all__ = ["Pipeline", "PipelineConfig"]

SECTIONS = ("eval", "refine", "sft", "gcn")  # of the configuration, that figures depend on directly


class Pipeline(Stages):
    """One run of MIMU; configuration and errors as `Stages`."""

    def __init__(self, config: PipelineConfig):
        names = chosen_methods(config.eval.methods)
        chosen_metrics(config.eval.metrics)
        super().__init__(replace(config, eval=replace(config.eval, methods=names)))
        self.started = now()
        self._check_choices()

    def _check_choices(self) -> None:
        """Raise `UserError` where two settings cannot both hold."""
        config = self.config
        direct, elbo = config.eval.mask_strategy is MaskStrategies.direct, self.objective is Objectives.elbo
        if direct and elbo:
            raise UserError("eval.mask_strategy is direct, but the GCN's objective is elbo: choose feasibility")
        if config.kappa is KappaModes.auto and config.auto.method not in config.eval.methods:
            raise UserError(f"auto.method is {config.auto.method}: name one of eval.methods")
        if config.kappa is KappaModes.auto and METHODS[config.auto.method].mask is None:
            raise UserError(f"auto.method is {config.auto.method}, which switches no kappa weights off: name mimu")
        if "retrain" in config.eval.methods and not config.eval.references:
            raise UserError("eval.methods names retrain, but eval.references is 0: ask for 1, or leave retrain out")

    @cached_property
    def evaluation(self) -> Eval:
        """The evaluation, with its cached activations."""
        data = self.data
        judged = UnlearningDataset(data.name, data.splits, self.config.eval.batch_size, data.forget_class, data.seed)
        shared = (self.classifier, judged, self.config, self.device, self.learn_importance)
        retrain = self.retrained if self.config.eval.references else None
        made = (self.checkpoint, self.unlearner, retrain, self.untrained)
        return Eval(Context(*shared, *made, stage_seconds=self.seconds))

    @cached_property
    def run_inputs(self) -> dict:
        """All that the figures of every point of this run depend on; a point adds topK, kappa and its GCN.

        What is given by path counts by its contents, and so does that it is given: a run that trained a network itself
        and one that was handed it are two runs.
        """
        config, automatic = self.config, self.config.kappa is KappaModes.auto
        inputs = self.common | self.source | {name: plain(getattr(config, name)) for name in SECTIONS}
        inputs |= {
            "classes": list(self.data.classes),
            "forget_class": config.forget_labels,
            "given": [name for name in GIVEN if getattr(config, name)],
            "kappa_mode": config.kappa.value,
            "auto": plain(config.auto) if automatic else None,
            "references": recipe(self.train_config) if config.eval.references else None,
            "code": code_key("pipeline"),
            "versions": versions(),
        }
        # The ELBO trains a network for each topK: one run has several, and what they are made from is in `inputs`.
        if config.gcn_path or self.objective is not Objectives.elbo:
            inputs["network"] = sha256_file(self.run_gcn_training(config.topK_list[0]))
        return inputs

    def run_single_evaluation_round(self, topK: int, kappa: int, auto: Search | None = None) -> dict:
        """Measure every method at one point; write and return its record (or return the one that is there).

        Args:
            auto: the search that chose kappa; its outcome goes into the record and the masks.
        """
        gcn_path = self.run_gcn_training(topK)
        config = self.config
        below_top = [place - self.depth for place in self.layers]
        chosen = auto.facts(config.auto) if auto else None
        point = {"top_k": topK, "kappa": kappa, "gcn": sha256_file(gcn_path), "chosen": chosen}
        record = {
            "schema": SCHEMA,
            "id": key_of(self.run_inputs | point)[:12],
            "run": key_of(self.run_inputs)[:12],
            "model": config.model_architecture.value,
            "dataset": config.vision_dataset.value,
            "objective": self.objective.value,
            **self._origin,
            "forget_class": list(config.forget_labels),
            "forget_names": [self.data.classes[label] for label in config.forget_labels],
            "mask_layer": below_top,
            "num_graph_vertices": self.graph.num_vertices,
            "num_graph_edges": self.graph.num_edges,
            "top_k": topK,
            "kappa": kappa,
            "auto": chosen,
            "seed": config.seed,
            "classifier_path": self._relative(self.classifier_path),
            "gcn_path": self._relative(gcn_path),
            "config": plain(written(replace(config, output_dir=Path(), topK_list=(topK,), kappa_list=(kappa,)))),
        }
        path = record_path(config.output_dir, record)
        if found := read_whole(config.output_dir, path):
            return found
        log(f"evaluation: topK {topK}, kappa {kappa}")
        return self._measure(record, path)

    @cached_property
    def _origin(self) -> dict:
        """What a run is of, by content: reports pool and pair runs by it, wherever files and folders lie."""
        config, data, source = self.config, self.data, self.source
        given = (config.trained_vision_model_path, config.graph_dir, config.gcn_path)
        hashes = (source["classifier"], source["graphs"], config.gcn_path and sha256_file(config.gcn_path))
        return {
            "images": self.common["images"],
            "num_classes": data.num_classes,
            "split_sizes": {split: len(part.labels) for split, part in data.splits.items()},
            "classifier_sha256": source["classifier"],
            "given": {
                name: digest if path else None
                for name, path, digest in zip(("classifier", "graphs", "gcn"), given, hashes, strict=True)
            },
            "code": code_key("pipeline"),
        }

    def _measure(self, record: dict, path: Path) -> dict:
        """Fill a record, write its masks and, last, the record itself."""
        begun, standing = time.perf_counter(), self.footing
        measured, masks = self.evaluation.eval(record["top_k"], record["kappa"])
        files = {name: self._save_mask(name, mask, record, path) for name, mask in masks.items()}
        paths = {name: self._relative(file) for name, file in files.items()}
        seconds = self.seconds | {"evaluation": time.perf_counter() - begun}
        run = {"device": str(self.device), "started": self.started, "seconds": seconds}
        run |= {"repeatability": repeatability(self.device)}
        places = {"mask_path": paths[measured["answer"]], "mask_paths": paths}
        places |= {"mask_sha256": {name: sha256_file(file) for name, file in files.items()}}
        record |= {**places, "provenance": provenance() | run, **measured, **self.data.image_facts, **standing}
        if wrong := complaint(record):
            raise RuntimeError(f"this record does not fit core/records.py: {wrong}")
        write_json(path, record)
        return record

    @cached_property
    def footing(self) -> dict:
        """For records: how far the untouched classifier is from chance; said at once if it is near."""
        found = footing(self.evaluation.context)
        if found.near_chance:
            log(f"warning: {found.sentence}")
        return {"footing": asdict(found) | {"near_chance": found.sentence if found.near_chance else None}}

    def _save_mask(self, name: str, mask: Mask, record: dict, path: Path) -> Path:
        """Write a method's mask beside the records, with the facts that say what it is for."""
        keys = ("schema", "id", "model", "dataset", "forget_class", "mask_layer", "top_k", "kappa", "seed")
        facts = {key: record[key] for key in (*keys, "auto", "classifier_path", "gcn_path")}
        facts |= {"method": name, "classifier_sha256": sha256_file(self.classifier_path)}
        facts["weights_sha256"] = weights_sha256(self.classifier.weights(self.config.mask_layer))
        target = path.parents[2] / "masks" / path.parent.name / f"{path.stem}_{name}.safetensors"
        replace(mask, facts=facts).save(target)
        return target

    def _relative(self, path: Path) -> str:
        """A path below the output folder as seen from there, any other as it is."""
        root = self.config.output_dir.resolve()
        path = path.resolve()
        return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)

    def eval(self) -> list[dict]:
        """The sweep: one record per (topK, kappa); with `kappa: auto` one per topK, at the kappa that is found."""
        config = self.config
        if config.kappa is KappaModes.list:
            points = [(k, kappa) for k in config.topK_list for kappa in config.kappa_list]
            return [self.run_single_evaluation_round(*point) for point in progress(points, "sweep")]
        labels = self.data.splits["val"].labels
        forgotten = int(self.data.is_forgotten(labels).sum())
        check_provable(config.auto, forgotten, len(labels) - forgotten)
        found = [(topK, search(self.evaluation.context, topK)) for topK in config.topK_list]
        return [self.run_single_evaluation_round(topK, outcome.kappa, outcome) for topK, outcome in found]

    def run(self) -> list[dict]:
        """All stages, then the report; returns one record per (topK, kappa) point."""
        say(self)
        records = self.eval()
        self._show_masks(records)
        Reporter(self.config.output_dir, self.config.reporter).plot(records)
        return records

    def _show_masks(self, records: list[dict]) -> None:
        """Where the newly measured masks lie, as images in trackio; step is kappa."""
        fresh = [record for record in records if record["provenance"]["started"] == self.started]
        if self.config.tracker is Trackers.trackio and fresh:
            with self._tracker("masks") as tracker:
                for record in fresh:
                    for layer in record["mask_map"]:
                        name = f"{layer['layer']}, topK {record['top_k']}, kappa {record['kappa']}"
                        tracker.picture(record["kappa"], name, layer["cells"])
