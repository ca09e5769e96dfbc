"""The stages of a run: classifier -> graphs -> GCN, each kept under the hash of all its inputs.

An unchanged stage is not run again, and an interrupted run goes on where it stopped.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from core.choices import Diverged
from core.config import GIVEN, Objectives, PipelineConfig, Trackers, TrainConfig, derive_seed, plain
from core.hashes import check_same_code, code_key, key_of, provenance, sha256_file, versions, whole_code
from core.observe import Tracker, log
from core.store import Stage, build_stage, sha256_folder
from data import FEATURES, GraphDataset, GraphGenerator
from graphs.gcn import MaskingGCN, check_memory, reuse_freed_memory
from model import HookedModel, save_classifier, vision_model_loader
from stages.given import check_answers, check_layout, check_paths, check_weights, given_objective
from trainer import GCNTrainer, VisionModelTrainer
from training.classifier import check_recipe
from training.distributed import (
    Meeting,
    by_torchrun,
    choose_device,
    local_device,
    make_repeatable,
    part,
    torchrun_meeting,
)
from training.resume import StateFile, recipe
from unlearn.masks import check_budget
from unlearn.requests import Checkpoint, Request, Unlearner, UnlearningTrainer, check_scores
from utils_data import UnlearningDataset, dataset_facts, get_unlearning_dataset

CLASSIFIER_FILE, GCN_FILE = "classifier.safetensors", "gcn.safetensors"


class Stages:
    """What a run is made from: classifier, graphs, GCN; each made when first asked for.

    Args:
        config: what to do. Products passed in by path (`trained_vision_model_path`, `graph_dir`, `gcn_path`)
            are used instead of computed.

    Raises:
        UserError: the configuration cannot be run; said before anything is trained.
    """

    def __init__(self, config: PipelineConfig):
        place, given = config.output_dir / "datasets", config.dataset_path
        facts = dataset_facts(config.vision_dataset, config.forget_class, given, place, config.data)
        gcn = replace(config.gcn, train_classes=facts.labels(config.gcn.train_classes, "gcn.train_classes"))
        self.config = config = replace(config, forget_class=facts.forget, gcn=gcn)
        self.device = choose_device(config.device)
        if config.train.use_ddp and by_torchrun():
            self.device = local_device(self.device)
        make_repeatable(self.device)
        reuse_freed_memory()
        self.seconds: dict[str, float] = {}
        self._stages: dict[str, Stage] = {}
        self.shape = (len(facts.classes), facts.channels, facts.size)
        with torch.device("meta"):
            fresh = vision_model_loader(config.model_architecture, *self.shape)
        check_recipe(config.train, fresh, facts.size, self.device)
        self.graph, self.layers = fresh.weight_graph(config.mask_layer), fresh.layer_indices(config.mask_layer)
        self.depth = len(fresh.linears)
        for name in ("topK_list", "kappa_list"):
            for value in getattr(config, name):
                check_budget(value, self.graph.num_vertices, name)
        check_memory(config, fresh, self.graph, self.device)
        check_paths(config)
        if config.trained_vision_model_path:
            vision_model_loader(config.model_architecture, *self.shape, config.trained_vision_model_path)
        if config.graph_dir:
            check_layout(GraphDataset(config.graph_dir), self.graph, self.shape[0])
            if config.trained_vision_model_path:
                _ = self.graphs
        self.objective = given_objective(config.gcn_path) if config.gcn_path else config.gcn.objective

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
    def common(self) -> dict:
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
    def label(self) -> str:
        return f"{self.config.model_architecture.value}_{self.config.vision_dataset.value}"

    def _tracker(self, stage: str) -> Tracker:
        name = f"{self.label}_{stage}_seed-{self.config.seed}"
        return Tracker(self.config.tracker, name, plain(self.config))

    def _stage(self, name: str, folder: str, label: str, inputs: dict, make: Callable[[Path], dict]) -> Path:
        """A stage's folder; built, or found and checked, once per pipeline."""
        if name not in self._stages:
            self._stages[name] = build_stage(self.config.output_dir / folder, label, inputs, make)
            self.seconds[name] = self._stages[name].seconds
        return self._stages[name].path

    # --- several machines ---

    @property
    def meeting(self) -> Meeting | None:
        """The other processes, if torchrun started this one among them."""
        train = self.config.train
        return torchrun_meeting(self.device, train.ddp_timeout) if train.use_ddp and by_torchrun() else None

    @property
    def train_config(self) -> TrainConfig:
        """How the classifier is trained; torchrun's number of processes counts, where it started this one."""
        train, meeting = self.config.train, self.meeting
        return replace(train, num_workers=meeting.group.world) if meeting else train

    def take_part(self) -> bool:
        """In all processes of torchrun's but the first: train with it what it announces, and write nothing.

        Returns:
            False, at once, in the first process and where there is just one.
        """
        meeting = self.meeting
        if meeting is None or meeting.group.leads:
            return False
        while (job := meeting.next_job()) is not None:
            with suppress(Diverged):  # the first process meets the same at the same step, and says it
                self._trainer(job, Tracker(Trackers.none, "", {})).fit(meeting.group, Path())
        part()
        return True

    def dismiss(self) -> None:
        """In the first process, at the end: let the others go."""
        if meeting := self.meeting:
            meeting.announce(None)
            part()

    # --- stages ---

    def run_vision_model_training(self) -> Path:
        """Train the classifier (or take the given one); returns its checkpoint."""
        if self.config.trained_vision_model_path:
            return self.config.trained_vision_model_path
        return self._train("classifier", self.label, self.config.seed, {})

    def _train(self, name: str, label: str, seed: int, without: dict) -> Path:
        """A stage that trains a classifier; `without` says which classes it never sees, if any."""
        train, meeting = self.train_config, self.meeting
        inputs = self.common | {"train": recipe(train), "code": code_key("stages.chain")} | without
        key = key_of({"versions": versions(), **inputs})
        path = self.config.output_dir.resolve() / "checkpoints/resume" / f"{label}-{key[:12]}.safetensors"
        state = StateFile(path, key, self.config.resume)

        def make(folder: Path) -> dict:
            state.check()
            job = {"seed": seed, "retained": bool(without), "train": plain(train), "code": whole_code()}
            job["state"] = [str(path), key, state.resume and path.exists()]
            if meeting:
                meeting.announce(job)
            trainer = self._trainer(job, self._tracker(name))
            try:
                facts, kind = trainer.train(folder), self.config.model_architecture
            except Diverged as error:
                if meeting:  # torchrun starts again whatever ended with an error
                    state.give_up(str(error))
                raise
            save_classifier(trainer.model, folder / CLASSIFIER_FILE, kind, self.shape, facts)
            return facts

        folder = f"checkpoints/{name.partition('-')[0]}"
        made = self._stage(name, folder, label, inputs, make)
        state.clear()
        return made / CLASSIFIER_FILE

    def _trainer(self, job: dict, tracker: Tracker) -> VisionModelTrainer:
        """A fresh classifier and what it is to be trained on; `job` is plain, and the same for every process."""
        check_same_code(job["code"])
        train, seed, (path, key, resume) = TrainConfig(**job["train"]), job["seed"], job["state"]
        data = self.data
        if (train.batch_size, seed) != (data.batch_size, data.seed):
            data = UnlearningDataset(data.name, data.splits, train.batch_size, data.forget_class, seed)
        if job["retained"]:
            data = data.retained(seed)
        torch.manual_seed(derive_seed(seed, "classifier"))
        model = vision_model_loader(self.config.model_architecture, *self.shape).to(self.device)
        return VisionModelTrainer(model, data, train, self.device, tracker, StateFile(Path(path), key, resume))

    def retrained(self, index: int = 0) -> HookedModel:
        """The classifier's own recipe on the images of all other classes, eval mode; each number is a training seed.

        Number 0 starts from the classifier's own initial weights.
        """
        data, seed = self.data, self.config.seed if index == 0 else derive_seed(self.config.seed, "retrained", index)
        label = f"{self.label}_without-{'-'.join(map(str, data.forget_class))}_{index}"
        without = {"without": sorted(data.forget_class), "index": index}
        path = self._train(f"retrained-{index}", label, seed, without)
        return vision_model_loader(self.config.model_architecture, *self.shape, path).to(self.device).eval()

    def untrained(self) -> HookedModel:
        """The classifier with other initial weights than it had, eval mode; the global generator is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.config.seed, "untrained"))
            return vision_model_loader(self.config.model_architecture, *self.shape).to(self.device).eval()

    @cached_property
    def classifier(self) -> HookedModel:
        """The trained classifier, eval mode."""
        model = vision_model_loader(self.config.model_architecture, *self.shape, self.classifier_path)
        model = model.to(self.device).eval()
        if given := self.config.trained_vision_model_path:
            images, _ = next(iter(self.data.get_val_loader()))
            check_answers(model, images.to(self.device), given)
        return model

    @cached_property
    def classifier_path(self) -> Path:
        """The checkpoint behind `classifier`."""
        return self.run_vision_model_training()

    def run_gcn_graph_generation(self) -> Path:
        """Make the graphs (or take the given ones); returns their folder."""
        if self.config.graph_dir:
            return self.config.graph_dir
        inputs = self.common | {
            "classifier": sha256_file(self.classifier_path),
            "mask_layer": self.layers,
            "graph": plain(self.config.graph),
            "code": code_key("stages.chain"),
        }

        def make(folder: Path) -> dict:
            config = self.config
            images, layers = (self.classifier, self.data), (config.mask_layer, config.graph)
            return GraphGenerator(*images, *layers, config.seed, self.device).generate(folder)

        return self._stage("graphs", "datasets/Graphs", self.label, inputs, make)

    @cached_property
    def graphs(self) -> GraphDataset:
        """The graphs.

        Raises:
            UserError: they are of another layer, of a classifier with other weights, or of other classes.
        """
        graphs = GraphDataset(self.run_gcn_graph_generation())
        check_layout(graphs, self.graph, self.shape[0])
        check_weights(graphs, self.classifier, self.config.mask_layer)
        if self.config.graph_dir:
            graphs.check_numbers(self.classifier, self.config.mask_layer)
        return graphs

    @cached_property
    def source(self) -> dict:
        """What a GCN learns from, by hash."""
        graphs = self.run_gcn_graph_generation()
        keys = {"classifier": sha256_file(self.classifier_path), "graphs": sha256_folder(graphs)}
        return keys | {"mask_layer": self.layers}

    def run_gcn_training(self, topK: int) -> Path:
        """Train the GCN (the ELBO: one for each topK), or take the given one; returns its file."""
        if self.config.gcn_path:
            return self.config.gcn_path
        elbo = self.objective is Objectives.elbo
        return self._train_elbo(topK) if elbo else self._train_unlearner()

    def _train_elbo(self, topK: int) -> Path:
        config = self.config.gcn
        inputs = self.common | self.source | {"gcn": plain(config), "topK": topK, "code": code_key("stages.chain")}

        def make(folder: Path) -> dict:
            torch.manual_seed(derive_seed(self.config.seed, "gcn", "weights"))
            shape = (config.num_message_passing_rounds, config.hidden_dim, config.aggregation)
            gcn = MaskingGCN(len(FEATURES), *shape, config.activation, config.residual)
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

        label = f"{self.label}_top-{topK}"
        return self._stage(f"gcn_top-{topK}", "checkpoints/gcn", label, inputs, make) / GCN_FILE

    def _train_unlearner(self) -> Path:
        config, teachers = self.config.gcn, self._teachers
        sources = [teacher.source for teacher in teachers]
        inputs = self.common | {"sources": sources, "gcn": plain(config), "code": code_key("stages.chain")}

        def make(folder: Path) -> dict:
            torch.manual_seed(derive_seed(self.config.seed, "gcn", "weights"))
            unlearner = Unlearner.fresh(config)
            checkpoints = [teacher.checkpoint for teacher in teachers]
            seed, tracker = self.config.seed, self._tracker("gcn")
            facts = UnlearningTrainer(unlearner, checkpoints, config, seed, self.device, tracker).train(folder)
            trained_on = {name: self.common[name] for name in ("model", "dataset")} | {"shapes": self.graph.shapes}
            trained_on["classifiers"] = [
                {"seed": teacher.config.seed, "train": plain(teacher.config.train)} for teacher in teachers
            ]
            made = {
                "config": plain(config),
                "seed": seed,
                "trained_on": trained_on,
                "versions": provenance()["versions"],
            }
            unlearner.gcn.save(folder / GCN_FILE, facts | unlearner.facts | made)
            return facts

        return self._stage("gcn", "checkpoints/gcn", f"{self.label}_unlearning", inputs, make) / GCN_FILE

    @cached_property
    def _teachers(self) -> list["Stages"]:
        """The stages whose classifiers the GCN learns on: this one, unless others are named."""
        config, data = self.config, self.data
        if not config.gcn.train_seeds and not config.gcn.train_batch_sizes:
            return [self]
        teachers, given = [], dict.fromkeys(GIVEN)
        for seed in config.gcn.train_seeds or (config.seed,):
            for size in config.gcn.train_batch_sizes or (config.train.batch_size,):
                other = replace(config, seed=seed, train=replace(config.train, batch_size=size), **given)
                teachers.append(Stages(other))
                teachers[-1].data = UnlearningDataset(data.name, data.splits, size, data.forget_class, seed)
        return teachers

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The classifier with what is needed to answer requests."""
        graphs, begun = self.graphs, time.perf_counter()
        made = Checkpoint(self.classifier, graphs, self.config.mask_layer, self.data.num_classes, self.device)
        self.seconds["checkpoint"] = time.perf_counter() - begun
        return made

    @cached_property
    def unlearner(self) -> Unlearner | None:
        """The GCN that answers requests; None if it was trained for the ELBO."""
        if self.objective is Objectives.elbo:
            return None
        unlearner, _ = Unlearner.load(self.run_gcn_training(self.config.topK_list[0]))
        unlearner.given = self.config.gcn_path
        unlearner.gcn.to(self.device).eval()
        return unlearner

    def learn_importance(self, topK: int) -> torch.Tensor:
        """theta [C, *graph.shape] of every class, as if it alone were to be forgotten."""
        classes = range(self.data.num_classes)
        if self.unlearner:
            with torch.no_grad():
                thetas = [self.unlearner.theta(self.checkpoint, Request((label,), topK)) for label in classes]
            return torch.stack(thetas).cpu()
        gcn, facts = MaskingGCN.load(self.run_gcn_training(topK))
        if facts.get("topK", topK) != topK:
            log(f"GCN: {self.config.gcn_path} was trained for topK {facts['topK']}, it is used for {topK}")
        gcn.to(self.device).eval()

        def theta(label: int) -> torch.Tensor:
            return gcn(self.graphs.class_features(label).unsqueeze(0).to(self.device), self.graph).cpu()

        with torch.inference_mode():
            return check_scores(torch.cat([theta(label) for label in classes]), self.config.gcn_path)
