"""The first stage: train the classifier, and its references, which are retrained without the classes to forget."""

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from core.choices import Diverged
from core.config import Trackers, TrainConfig, UserError, derive_seed, plain
from core.hashes import check_same_code, code_key, key_of, versions, whole_code
from core.observe import Tracker, log
from model import HookedModel, save_classifier
from stages.crew import Crew
from stages.setup import Setup, seed_weights
from trainer import VisionModelTrainer
from training.distributed import Group
from training.resume import StateFile, recipe
from utils_data import UnlearningDataset

CLASSIFIER_FILE = "classifier.safetensors"


def check_answers(model: HookedModel, images: Tensor, path: Path) -> None:
    """Check that a given classifier, [B, C, H, W] -> [B, classes], answers with finite numbers.

    Raises:
        UserError: it does not.
    """
    with torch.inference_mode():
        finite = bool(model(images).isfinite().all())
    if not finite:
        raise UserError(f"{path} answers with numbers that are not finite: its weights are too large, give others")


class ClassifierStage:
    """The classifier of a run, trained when first asked for, or given.

    Raises:
        UserError: the file that is given holds no classifier of this architecture and shape.
    """

    def __init__(self, setup: Setup, crew: Crew):
        self.setup, self.crew = setup, crew
        if given := setup.config.trained_vision_model_path:
            setup.network(given)

    def train(self) -> Path:
        """Train the classifier (or take the given one); returns its checkpoint."""
        setup = self.setup
        return setup.config.trained_vision_model_path or self._train("classifier", setup.label, setup.config.seed, {})

    @cached_property
    def path(self) -> Path:
        """The classifier's checkpoint."""
        return self.train()

    @cached_property
    def model(self) -> HookedModel:
        """The trained classifier, eval mode."""
        setup = self.setup
        model = setup.network(self.path).to(setup.device).eval()
        if given := setup.config.trained_vision_model_path:
            images, _ = next(iter(setup.data.get_val_loader()))
            check_answers(model, images.to(setup.device), given)
        return model

    def retrained(self, index: int = 0) -> HookedModel:
        """Train by the classifier's own recipe on the images of all other classes; returned in eval mode.

        Args:
            index: of the training seed. Number 0 starts from the classifier's own initial weights.
        """
        setup, data = self.setup, self.setup.data
        seed = setup.config.seed if index == 0 else derive_seed(setup.config.seed, "retrained", index)
        label = f"{setup.label}_without-{'-'.join(map(str, data.forget_class))}_{index}"
        without = {"without": sorted(data.forget_class), "index": index}
        path = self._train(f"retrained-{index}", label, seed, without)
        return setup.network(path).to(setup.device).eval()

    def untrained(self) -> HookedModel:
        """Draw other initial weights than the classifier had, eval mode; the global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            seed_weights(self.setup.config.seed, "untrained")
            return self.setup.network().to(self.setup.device).eval()

    def help_train(self, job: dict, group: Group) -> None:
        """Train what another process of the group announced; writes nothing."""
        self._trainer(job, Tracker(Trackers.none, "", {})).fit(group, Path())

    def _train(self, name: str, label: str, seed: int, without: dict) -> Path:
        """Make the stage that trains a classifier; `without` says which classes it never sees, if any."""
        setup = self.setup
        train, meeting = self.crew.train_config, self.crew.meeting
        inputs = setup.common | {"train": recipe(train), "code": code_key("stages.classifier")} | without
        key = key_of({"versions": versions(), **inputs})
        path = setup.config.output_dir.resolve() / "checkpoints/resume" / f"{label}-{key[:12]}.safetensors"
        state = StateFile(path, key, setup.config.resume)

        def make(folder: Path) -> dict:
            state.check()
            job = {
                "seed": seed,
                "retained": bool(without),
                "train": plain(train),
                "code": whole_code(setup.config.plugins),
            }
            job["state"] = [str(path), key, state.resume and path.exists()]
            if meeting:
                meeting.announce(job)
            if without:
                log(f"{name}: training a classifier that never sees the classes to forget, to compare with")
            trainer = self._trainer(job, setup.tracker(name, "train"))
            try:
                facts, kind = trainer.train(folder), setup.config.model_architecture
            except Diverged as error:
                if meeting:  # torchrun starts again whatever ended with an error
                    state.give_up(str(error))
                raise
            save_classifier(trainer.model, folder / CLASSIFIER_FILE, kind, setup.shape, facts)
            return facts

        folder = f"checkpoints/{name.partition('-')[0]}"
        made = setup.keep(name, folder, label, inputs, make)
        state.clear()
        return made / CLASSIFIER_FILE

    def _trainer(self, job: dict, tracker: Tracker) -> VisionModelTrainer:
        """Return a fresh classifier and what it is to be trained on; `job` is plain, and the same for every process."""
        check_same_code(job["code"], self.setup.config.plugins)
        train, seed, (path, key, resume) = TrainConfig(**job["train"]), job["seed"], job["state"]
        data = self.setup.data
        if (train.batch_size, seed) != (data.batch_size, data.seed):
            data = UnlearningDataset(data.name, data.splits, train.batch_size, data.forget_class, seed)
        if job["retained"]:
            data = data.retained(seed)
        seed_weights(seed, "classifier")
        model = self.setup.network().to(self.setup.device)
        return VisionModelTrainer(model, data, train, self.setup.device, tracker, StateFile(Path(path), key, resume))
