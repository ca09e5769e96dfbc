"""The order of the stages: classifier -> graphs -> GCN for each topK -> sweep over topK x kappa -> report.

Every stage is kept under the hash of all its inputs, so that an unchanged one is not run again, and an
interrupted run goes on where it stopped.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from artifacts import (
    SCHEMA,
    Stage,
    build_stage,
    code_key,
    key_of,
    now,
    provenance,
    read_json,
    record_path,
    sha256_file,
    sha256_folder,
    write_json,
)
from config import PipelineConfig, UserError, derive_seed, plain
from data import FEATURES, GraphDataset, GraphGenerator
from eval import Eval
from gcn import MaskingGCN, reuse_freed_memory
from masks import check_budget
from methods import Context, check_methods
from model import HookedModel, save_classifier, vision_model_loader
from observe import Tracker, log
from reporter import Reporter
from trainer import GCNTrainer, VisionModelTrainer
from utils_data import UnlearningDataset, dataset_spec, get_unlearning_dataset

__all__ = ["Pipeline", "PipelineConfig"]

CLASSIFIER_CODE = ("config.py", "utils_data.py", "model.py", "trainer.py", "pipeline.py")
GRAPH_CODE = (*CLASSIFIER_CODE, "graph.py", "data.py")
GCN_CODE = (*GRAPH_CODE, "gcn.py", "masks.py")
RECORD_CODE = (*GCN_CODE, "methods.py", "eval.py", "artifacts.py")
POINT_INPUTS = ("top_k", "kappa", "gcn")  # what may differ within one run
CLASSIFIER_FILE, GCN_FILE = "classifier.safetensors", "gcn.safetensors"


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device is {name}, but {torch.cuda.device_count()} CUDA devices are here: use --device auto")
    return device


class Pipeline:
    """One run of MIMU.

    Args:
        config: what to do. Products passed in by path (`trained_vision_model_path`, `graph_dir`, `gcn_path`)
            are used instead of computed.

    Raises:
        UserError: the configuration cannot be run; said before anything is trained.
    """

    def __init__(self, config: PipelineConfig):
        self.config = config
        self.device = _choose_device(config.device)
        reuse_freed_memory()
        self.started = now()
        self.seconds: dict[str, float] = {}
        self._stages: dict[str, Stage] = {}
        spec = dataset_spec(config.vision_dataset)
        self.shape = (spec.num_classes, spec.channels, spec.size)
        check_methods(config.eval.methods)
        with torch.device("meta"):
            fresh = vision_model_loader(config.model_architecture, *self.shape)
        self.graph, self.layers = fresh.weight_graph(config.mask_layer), fresh.layer_indices(config.mask_layer)
        self.depth = len(fresh.linears)
        for name in ("topK_list", "kappa_list"):
            for value in getattr(config, name):
                check_budget(value, self.graph.num_vertices, name)
        for path in (config.trained_vision_model_path, config.graph_dir, config.gcn_path):
            if path is not None and not path.exists():
                raise UserError(f"there is nothing at {path}: check the path, or leave it out to compute it")
        for path in (config.trained_vision_model_path, config.gcn_path):
            if path is not None and not path.is_file():
                raise UserError(f"{path} is a folder: name the .safetensors file in it")
        if config.trained_vision_model_path:
            vision_model_loader(config.model_architecture, *self.shape, config.trained_vision_model_path)
        if config.gcn_path:
            found = MaskingGCN.load(config.gcn_path)[0].num_node_features
            if found != len(FEATURES):
                raise UserError(
                    f"{config.gcn_path} reads {found} node features, graphs have {len(FEATURES)}: train one"
                )

    # --- inputs of every stage ---

    @cached_property
    def data(self) -> UnlearningDataset:
        """The dataset, read when first needed."""
        config = self.config
        return get_unlearning_dataset(
            config.vision_dataset,
            config.train.batch_size,
            config.forget_class,
            config.dataset_path,
            datasets_dir=config.output_dir / "datasets",
            data=config.data,
            seed=config.seed,
        )

    @cached_property
    def _common(self) -> dict:
        """Inputs that every stage depends on."""
        config = self.config
        return {
            "model": config.model_architecture.value,
            "dataset": config.vision_dataset.value,
            "images": self.data.fingerprint(),
            "seed": config.seed,
            "device": self.device.type,
        }

    @property
    def _label(self) -> str:
        return f"{self.config.model_architecture.value}_{self.config.vision_dataset.value}"

    def _tracker(self, stage: str) -> Tracker:
        name = f"{self._label}_{stage}_seed-{self.config.seed}"
        return Tracker(self.config.tracker, name, plain(self.config))

    def _stage(self, name: str, folder: str, label: str, inputs: dict, make: Callable[[Path], dict]) -> Path:
        """A stage's folder; built, or found and checked, once per pipeline."""
        if name not in self._stages:
            self._stages[name] = build_stage(self.config.output_dir / folder, label, inputs, make)
            self.seconds[name] = self._stages[name].seconds
        return self._stages[name].path

    # --- stages ---

    def run_vision_model_training(self) -> Path:
        """Train the classifier (or take the given one); returns its checkpoint."""
        if self.config.trained_vision_model_path:
            return self.config.trained_vision_model_path
        inputs = self._common | {"train": plain(self.config.train), "code": code_key(*CLASSIFIER_CODE)}

        def make(folder: Path) -> dict:
            torch.manual_seed(derive_seed(self.config.seed, "classifier"))
            model = vision_model_loader(self.config.model_architecture, *self.shape).to(self.device)
            tracker = self._tracker("classifier")
            facts = VisionModelTrainer(model, self.data, self.config.train, self.device, tracker).train(folder)
            save_classifier(model, folder / CLASSIFIER_FILE, self.config.model_architecture, self.shape, facts)
            return facts

        return self._stage("classifier", "checkpoints/classifier", self._label, inputs, make) / CLASSIFIER_FILE

    @cached_property
    def classifier(self) -> HookedModel:
        """The trained classifier, eval mode."""
        model = vision_model_loader(self.config.model_architecture, *self.shape, self.classifier_path)
        return model.to(self.device).eval()

    @cached_property
    def classifier_path(self) -> Path:
        """The checkpoint behind `classifier`."""
        return self.run_vision_model_training()

    def run_gcn_graph_generation(self) -> Path:
        """Make the graphs (or take the given ones); returns their folder."""
        if self.config.graph_dir:
            return self.config.graph_dir
        inputs = self._common | {
            "classifier": sha256_file(self.classifier_path),
            "mask_layer": self.layers,
            "graph": plain(self.config.graph),
            "code": code_key(*GRAPH_CODE),
        }
        generator = GraphGenerator(
            self.classifier, self.data, self.config.mask_layer, self.config.graph, self.config.seed, self.device
        )
        return self._stage("graphs", "datasets/Graphs", self._label, inputs, generator.generate)

    @cached_property
    def graphs(self) -> GraphDataset:
        """The graphs.

        Raises:
            UserError: they are of another layer, or of a classifier with other weights.
        """
        graphs = GraphDataset(self.run_gcn_graph_generation())
        weights = [weight.detach().cpu() for weight in self.classifier.weights(self.config.mask_layer)]
        if graphs.graph != self.graph or not torch.equal(graphs.weight, self.graph.join(weights)):
            raise UserError(
                f"{graphs.root} holds graphs of another classifier or layer: leave graph_dir out to make them"
            )
        return graphs

    @cached_property
    def _graphs_key(self) -> str:
        return sha256_folder(self.graphs.root)

    def run_gcn_training(self, topK: int) -> Path:
        """Train the GCN for one topK (or take the given one); returns its file."""
        if self.config.gcn_path:
            return self.config.gcn_path
        config = self.config.gcn
        inputs = self._common | {
            "classifier": sha256_file(self.classifier_path),
            "graphs": self._graphs_key,
            "gcn": plain(config),
            "topK": topK,
            "code": code_key(*GCN_CODE),
        }

        def make(folder: Path) -> dict:
            torch.manual_seed(derive_seed(self.config.seed, "gcn", "weights"))
            gcn = MaskingGCN(len(FEATURES), config.num_message_passing_rounds, config.hidden_dim, config.aggregation)
            facts = GCNTrainer(
                gcn,
                self.classifier,
                self.graphs,
                self.config.mask_layer,
                topK,
                config,
                self.config.seed,
                self.device,
                self._tracker(f"gcn_top-{topK}"),
            ).train(folder)
            gcn.save(folder / GCN_FILE, facts | {"topK": topK, "objective": "elbo", "config": plain(config)})
            log(f"GCN, topK {topK}: " + ", ".join(f"{name} {value:.3f}" for name, value in facts.items()))
            return facts

        label = f"{self._label}_top-{topK}"
        return self._stage(f"gcn_top-{topK}", "checkpoints/gcn", label, inputs, make) / GCN_FILE

    def _learn_importance(self, topK: int) -> torch.Tensor:
        """theta [C, *graph.shape] of every class's representative, in one forward pass per class."""
        gcn, facts = MaskingGCN.load(self.run_gcn_training(topK))
        if facts.get("topK", topK) != topK:
            log(f"GCN: {self.config.gcn_path} was trained for topK {facts['topK']}, it is used for {topK}")
        gcn.to(self.device).eval()

        def theta(label: int) -> torch.Tensor:
            return gcn(self.graphs.class_features(label).unsqueeze(0).to(self.device), self.graph).cpu()

        with torch.inference_mode():
            return torch.cat([theta(label) for label in range(self.data.num_classes)])

    @cached_property
    def evaluation(self) -> Eval:
        """The evaluation, with its cached activations."""
        data = self.data
        judged = UnlearningDataset(data.name, data.splits, self.config.eval.batch_size, data.forget_class, data.seed)
        return Eval(Context(self.classifier, judged, self.config, self.device, self._learn_importance))

    def run_single_evaluation_round(self, topK: int, kappa: int) -> dict:
        """Measure every method at one point; write and return its record (or return the one that is there)."""
        gcn_path = self.run_gcn_training(topK)
        config = self.config
        below_top = [place - self.depth for place in self.layers]
        inputs = self._common | {
            "classifier": sha256_file(self.classifier_path),
            "graphs": self._graphs_key,
            "gcn": sha256_file(gcn_path),
            "gcn_config": plain(config.gcn),
            "mask_layer": self.layers,
            "forget_class": config.forget_class,
            "top_k": topK,
            "kappa": kappa,
            "eval": plain(config.eval),
            "sft": plain(config.sft),
            "code": code_key(*RECORD_CODE),
            "versions": provenance()["versions"],
        }
        record = {
            "schema": SCHEMA,
            "id": key_of(inputs)[:12],
            "run": key_of({key: value for key, value in inputs.items() if key not in POINT_INPUTS})[:12],
            "model": config.model_architecture.value,
            "dataset": config.vision_dataset.value,
            "forget_class": config.forget_class,
            "mask_layer": below_top[0] if len(below_top) == 1 else below_top,
            "num_graph_vertices": self.graph.num_vertices,
            "num_graph_edges": self.graph.num_edges,
            "top_k": topK,
            "kappa": kappa,
            "seed": config.seed,
            "classifier_path": self._relative(self.classifier_path),
            "gcn_path": self._relative(gcn_path),
            "config": plain(replace(config, output_dir=Path(), topK_list=(topK,), kappa_list=(kappa,))),
        }
        path = record_path(config.output_dir, record)
        if path.exists() and self._mask_path(path).exists():
            return read_json(path)
        log(f"evaluation: topK {topK}, kappa {kappa}")
        return self._measure(record, path)

    @staticmethod
    def _mask_path(path: Path) -> Path:
        """Where the mask of a record lies."""
        return path.parents[2] / "masks" / path.parent.name / f"{path.stem}.safetensors"

    def _measure(self, record: dict, path: Path) -> dict:
        """Fill a record, write its mask and, last, the record itself."""
        begun = time.perf_counter()
        measured, mask = self.evaluation.eval(record["top_k"], record["kappa"])
        mask_path = self._mask_path(path)
        facts = {key: record[key] for key in ("schema", "id", "model", "dataset", "forget_class", "mask_layer")}
        facts |= {key: record[key] for key in ("top_k", "kappa", "seed", "classifier_path", "gcn_path")}
        facts["classifier_sha256"] = sha256_file(self.classifier_path)
        replace(mask, facts=facts).save(mask_path)
        seconds = self.seconds | {"evaluation": time.perf_counter() - begun}
        run = {"device": str(self.device), "started": self.started, "seconds": seconds}
        record |= {"mask_path": self._relative(mask_path), "provenance": provenance() | run, **measured}
        write_json(path, record)
        return record

    def _relative(self, path: Path) -> str:
        """A path below the output folder as seen from there, any other as it is."""
        root = self.config.output_dir.resolve()
        path = path.resolve()
        return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)

    def eval(self) -> list[dict]:
        """The sweep: one record per (topK, kappa)."""
        config = self.config
        return [self.run_single_evaluation_round(k, kappa) for k in config.topK_list for kappa in config.kappa_list]

    def run(self) -> list[dict]:
        """All stages, then the report; returns one record per (topK, kappa) point."""
        log(f"{self._label}, forget class {self.config.forget_class}, seed {self.config.seed}, {self.device}")
        records = self.eval()
        Reporter(self.config.output_dir, self.config.reporter).plot(records)
        return records
