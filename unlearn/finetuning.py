"""The one loop that fine-tunes a copy of a classifier, on images to forget (D_f) and to retain (D_r).

Every rival that trains weights uses it. The copy stays in eval mode: BatchNorm normalises by the original's running
statistics and leaves them as they are, so that only parameters change.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.choices import Diverged
from core.config import SFTConfig, SFTModes, derive_seed
from core.observe import progress
from model import MaskLayer
from models.classifier import Classifier
from utils_data import UnlearningDataset

BATCH, SMALLEST_BATCH = 128, 8
STEPS = 20  # of an epoch over D_f, at least: a small D_f gives small batches, or a rival would hardly move
RETAINED = 2  # images of D_r for each image of D_f, in one epoch: the same budget for every method
Optimizing = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Held:
    """A parameter of which only some entries may change.

    Args:
        parameter: of any shape.
        free: which entries may change, bool of the same shape.
        before: the values that all other entries keep, of the same shape.
    """

    parameter: nn.Parameter
    free: Tensor
    before: Tensor


class Finetuner:
    """A copy of a classifier in training, and the batches that it is trained on.

    Args:
        name: of the method, for the seed and for messages.
        model: left as it is.
        data: its dataset; D_f and D_r are parts of the training images.
        seed: of the point; one generator, seeded by it and the name, makes every draw.
        device: where the model lies.
        optimizing: makes the optimiser of the parameters that may change.
        free: what may change, a bool tensor for each parameter by name (None: every parameter). All other parameters
            are frozen, and all other entries keep their bits, whatever momentum or weight decay would do to them.
        clip: the gradient's L2 norm, at most (None: any); keeps ascent, whose loss has no bound, finite.

    Attributes:
        forget, retain: indices of D_f and D_r in the training images.
        batch: images of D_f in a step: BATCH, or fewer so that an epoch has STEPS steps.
    """

    def __init__(
        self,
        name: str,
        model: Classifier,
        data: UnlearningDataset,
        seed: int,
        device: torch.device,
        optimizing: Optimizing,
        free: Mapping[str, Tensor] | None = None,
        clip: float | None = None,
    ):
        self.name, self.device, self.clip, self.num_classes = name, device, clip, data.num_classes
        self.model = copy.deepcopy(model).eval()
        named = dict(self.model.named_parameters())
        for key, parameter in named.items():
            parameter.requires_grad_(free is None or key in free)
        self.images = data.splits["train"]
        forgotten = data.is_forgotten(self.images.labels)
        self.forget, self.retain = forgotten.nonzero().flatten(), (~forgotten).nonzero().flatten()
        self.batch = min(BATCH, max(SMALLEST_BATCH, len(self.forget) // STEPS))
        self.generator = torch.Generator().manual_seed(derive_seed(seed, name))
        self.optimizer = optimizing([parameter for parameter in named.values() if parameter.requires_grad])
        partly = {key: entries.to(device) for key, entries in (free or {}).items() if not bool(entries.all())}
        self.held = [Held(named[key], entries, named[key].detach().clone()) for key, entries in partly.items()]

    # --- batches ---

    def _load(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = self.images.batch(indices)
        return images.to(self.device), labels.to(self.device)

    def forgotten(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pass over D_f once in random order; yield images [B, C, H, W] and labels [B], B <= batch."""
        order = torch.randperm(len(self.forget), generator=self.generator)
        yield from (self._load(self.forget[picks]) for picks in order.split(self.batch))

    def retained(self, share: int = RETAINED, batches: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw `share` images of D_r for each one of D_f, with replacement; yield batches of `batches` x batch."""
        picks = torch.randint(len(self.retain), (share * len(self.forget),), generator=self.generator)
        yield from (self._load(self.retain[part]) for part in picks.split(batches * self.batch))

    def paired(self) -> Iterator[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
        """Pass over D_f once; yield each batch with RETAINED times as many images of D_r: ((x_f, y_f), (x_r, y_r))."""
        yield from zip(self.forgotten(), self.retained(batches=RETAINED), strict=True)

    def random_labels(self, labels: Tensor) -> Tensor:
        """Draw as many labels [B], uniform over all classes, the true one not excluded."""
        return torch.randint(self.num_classes, labels.shape, generator=self.generator).to(self.device)

    # --- steps ---

    def descend(self, loss: Tensor) -> None:
        """Take one step of the optimiser down a loss of the copy, then put back the entries that may not change.

        Raises:
            Diverged: the loss is not finite.
        """
        if not bool(loss.isfinite()):
            raise Diverged(f"{self.name}'s loss is no longer finite: leave it out of eval.methods for this classifier")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        # A gradient set to 0 would not do: momentum and weight decay move an entry without one.
        with torch.no_grad():
            for held in self.held:
                held.parameter.copy_(torch.where(held.free, held.parameter, held.before))

    def finished(self) -> Classifier:
        """Return the fine-tuned copy, frozen, in eval mode."""
        self.optimizer.zero_grad(set_to_none=True)
        return self.model.requires_grad_(False)

    # --- supervised fine-tuning of the target layers ---

    def _drawn(self, pool: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return self._load(pool[torch.randint(len(pool), (count,), generator=self.generator)])

    def mixed(self, size: int, mode: SFTModes) -> tuple[Tensor, Tensor]:
        """Draw `size` images [B, C, H, W] with replacement and the labels [B] to fit.

        Args:
            size: B.
            mode: images of D_f with random labels, of D_r with their own, or half of each, those of D_f first.
        """
        if mode is SFTModes.Finetune_Retain:
            return self._drawn(self.retain, size)
        forgetting = size if mode is SFTModes.Randomize_Forget else size // 2
        images, labels = self._drawn(self.forget, forgetting)
        labels = self.random_labels(labels)
        kept_images, kept_labels = self._drawn(self.retain, size - forgetting)
        return torch.cat([images, kept_images]), torch.cat([labels, kept_labels])

    def fit_targets(self, mask_layer: MaskLayer, config: SFTConfig) -> Classifier:
        """Minimise cross-entropy on `mixed` batches (SFT); nothing below the target layers may be `free`.

        Args:
            mask_layer: the target layers.
            config: the section `sft`; its rate is the optimiser's.

        Returns:
            As `finished`.
        """
        for _ in progress(range(config.steps), self.name):
            images, labels = self.mixed(config.batch_size, config.mode)
            with torch.no_grad():  # the prefix is frozen: without an autograd graph, backward ends at the first layer
                h = self.model.prefix(images, mask_layer)
            self.descend(functional.cross_entropy(self.model.head(h, mask_layer), labels))
        return self.finished()
