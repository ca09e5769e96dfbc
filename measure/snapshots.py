"""Logits of the judged, the untouched and the retrained classifiers on every image set.

A mask changes the target layers alone. The input h of the first of them is therefore computed once for each image set
and kept, and a masked model is judged by `head(h, W)` alone. A model whose earlier layers differ takes the full forward
pass.
"""

import copy
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from core.choices import Diverged
from core.observe import log, progress
from measure.metrics import MOST_VALUES, Again, Choose, Evidence, Outputs, OutputsOf, PerImage
from measure.verdicts import reference_fault
from mimu import state_sha256
from model import MaskLayer, inspecting
from models.classifier import Classifier
from unlearn.registry import Context, Edit


class _Head(nn.Module):
    """The part of a classifier from the first target layer's input h [B, n] on."""

    def __init__(self, model: Classifier, mask_layer: MaskLayer):
        super().__init__()
        self.model, self.mask_layer = model, mask_layer

    def forward(self, h: Tensor) -> Tensor:
        return self.model.head(h, self.mask_layer)


class Snapshots:
    """Outputs of models on image sets, each computed when first asked for.

    Args:
        context: classifier, data and configuration.
    """

    def __init__(self, context: Context):
        self.context, self.config = context, context.config
        self.untouched = copy.deepcopy(context.model)
        """A copy of the classifier that no method can change."""
        self.original = self.untouched.state_dict()
        self.original_hash = state_sha256(self.untouched)
        self.in_prefix = context.model.in_prefix(self.config.mask_layer)
        self._references: dict[tuple, Evidence] = {}
        self._models: dict[int, Classifier] = {}
        self._seen: dict[tuple, Outputs] = {}

    # --- where logits come from ---

    def prefix_activations(self, split: str, is_forget_set: bool) -> DataLoader:
        """Return the forget or the retain set of a split as cached (h [B, n], label [B]) batches."""
        tensors = TensorDataset(*self.context.activations(split, is_forget_set))
        return DataLoader(tensors, batch_size=None, sampler=_spans(tensors))

    def prefix_unchanged(self, model: Classifier) -> bool:
        """Return whether every parameter and buffer ahead of the target layer is bit-identical to the original."""
        return all(
            torch.equal(value, self.original[name])
            for name, value in model.state_dict().items()
            if self.in_prefix(name)
        )

    def _prefix_kept(self, edit: Edit) -> bool:
        """Tell the same of a method's edit; tensors are compared only if `allowed` lets the edit change the prefix."""
        allowed = edit.allowed
        kept = allowed is not None and not any(map(self.in_prefix, allowed))
        return kept or self.prefix_unchanged(edit.model)

    def _may_differ(self, name: str, prefix_unchanged: bool) -> bool:
        """Return whether a tensor of the state dict may differ from the original's."""
        return not self.in_prefix(name) or not prefix_unchanged

    def inference(
        self,
        model: nn.Module,
        data_loader: DataLoader,
        is_forget_set: bool,
        description: str,
        most_values: int = MOST_VALUES,
    ) -> Outputs:
        """Compute a model's outputs on a whole loader, eval mode; the last batch may be short.

        Args:
            model: maps the loader's inputs to logits [B, C]. With many images and classes, logits are made again when
                they are read, so model and loader must not change until then.
            is_forget_set: which set it is, for subclasses that treat them apart.
            description: shown while it runs.
            most_values: of logits that are kept.
        """
        device, logits, labels, made, values, classes = self.context.device, [], [], [], 0, 0

        def read(part: Tensor, true: Tensor) -> PerImage:
            rows = max(1, most_values // part.shape[1])
            pairs = zip(part.split(rows), true.split(rows), strict=True)
            return PerImage.joined([PerImage.of(one, one.double().log_softmax(1), two) for one, two in pairs])

        with inspecting(model), torch.inference_mode():
            for inputs, true in progress(data_loader, description):
                logits.append(model(inputs.to(device)).float())
                labels.append(true.to(device))
                values, classes = values + logits[-1].numel(), logits[-1].shape[1]
                if values > most_values:  # keep one number of each kind per image, and drop the logits
                    begin = len(labels) - len(logits)
                    made += [read(*pair) for pair in zip(logits, labels[begin:], strict=True)]
                    logits.clear()
        if not made:
            return Outputs(torch.cat(logits), torch.cat(labels))

        def again() -> Iterator[Tensor]:
            for inputs, _ in data_loader:
                # Not around the loop: of two models read in turn, the one that ends last would leave its mode behind.
                with inspecting(model), torch.inference_mode():
                    part = model(inputs.to(device)).float()
                yield part

        return Outputs(Again(again, classes, most_values), torch.cat(labels), PerImage.joined(made))

    def outputs(
        self,
        model: Classifier,
        split: str,
        is_forget_set: bool,
        description: str,
        prefix_unchanged: bool | None = None,
    ) -> Outputs:
        """Compute outputs on a set, from the cached h if the model's prefix is unchanged (None: compare it)."""
        head = _Head(model, self.config.mask_layer)
        if self.prefix_unchanged(model) if prefix_unchanged is None else prefix_unchanged:
            return self.inference(head, self.prefix_activations(split, is_forget_set), is_forget_set, description)
        images = self.context.images(split, is_forget_set)
        labels = self.context.data.splits[split].labels
        count = int((self.context.data.is_forgotten(labels) == is_forget_set).sum())
        compared = split != "train" or is_forget_set  # image by image, with other models
        if compared and count * self.context.data.num_classes > MOST_VALUES:
            tensors = TensorDataset(*self._activations(model, images, description))
            own = DataLoader(tensors, batch_size=None, sampler=_spans(tensors))
            return self.inference(head, own, is_forget_set, description)
        return self.inference(model, images, is_forget_set, description)

    def _activations(self, model: Classifier, images: DataLoader, description: str) -> tuple[Tensor, Tensor]:
        """Compute a model's own h [S, n] and labels [S], so that its logits can be made again without the images."""
        h, labels = [], []
        with inspecting(model), torch.inference_mode():
            for batch, true in progress(images, description):
                h.append(model.prefix(batch.to(self.context.device), self.config.mask_layer))
                labels.append(true)
        return torch.cat(h), torch.cat(labels)

    # --- what models are compared with ---

    def remembered(self, name: str, model: Classifier, same: bool | None = None, keep: bool = True) -> OutputsOf:
        """Return a function to a model's outputs by split and set, computed once; `keep`: for the whole run."""
        seen = self._seen if keep else {}

        def of(split: str, is_forget_set: bool) -> Outputs:
            key = (name, split, is_forget_set)
            if key not in seen:
                seen[key] = self.outputs(model, split, is_forget_set, f"{name} on {split}", same)
            return seen[key]

        return of

    def evidence(self, model: Classifier, outputs: OutputsOf, split: str, **more: object) -> Evidence:
        """Gather what metrics may read of a model."""
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
        """Return the untouched classifier."""
        if ("default", split) not in self._references:
            outputs = self.remembered("untouched", self.untouched, True)
            self._references["default", split] = self.evidence(self.untouched, outputs, split)
        return self._references["default", split]

    @cached_property
    def references(self) -> list[dict]:
        """Each retrained classifier's index, whether it passed its check, why not, and the scores that decide this.

        Two kinds of retrained classifiers would make a method that does nothing look best: one that answers with the
        classes although it never saw them (with a single class left, nothing trains the other logits), and one that
        learned nothing.
        """
        count = self.config.eval.references if self.context.retrain is not None else 0
        checked = [self._checked(index) for index in range(count)]
        for one in checked:
            if not one["sane"]:
                log(f"retrained model {one['index']} is not used to choose or to compare with: {one['why']}")
        if checked and not any(one["sane"] for one in checked):
            log("no retrained model is left: points are chosen by retain score minus forget score")
        return checked

    def _checked(self, index: int) -> dict:
        try:
            e = self._retrained(index, "val")
        except Diverged as error:
            return {"index": index, "sane": False, "why": str(error), "forget_score": None, "retain_score": None}
        seen, kept = e.outputs("train", True), e.retain.score()
        retained = self.context.data.num_classes - len(self.config.forget_labels)
        why = reference_fault(seen.score(), len(seen.labels), kept, retained)
        return {"index": index, "sane": why is None, "why": why, "forget_score": seen.score(), "retain_score": kept}

    def _retrained(self, index: int, split: str) -> Evidence:
        if ("retrain", index, split) not in self._references:
            assert self.context.retrain is not None
            model = self._models.get(index) or self.context.retrain(index)
            self._models[index] = model
            outputs = self.remembered(f"retrained {index}", model, False)
            beside = {"original": self.reference(split), "untrained": self.untrained}
            self._references["retrain", index, split] = self.evidence(model, outputs, split, **beside)
        return self._references["retrain", index, split]

    def retrained(self, split: str, but: int | None = None) -> tuple[Evidence, ...]:
        """Return the classifiers retrained without the classes that passed their check, one for each training seed.

        Args:
            split: "test" or "val".
            but: index of a retrained classifier to leave out.

        Returns:
            Their evidence; empty if none was asked for, or none passed.
        """
        chosen = [one["index"] for one in self.references if one["sane"] and one["index"] != but]
        return tuple(self._retrained(index, split) for index in chosen)

    def others(self, name: str, split: str) -> tuple[Evidence, ...]:
        """Return the retrained models that a method is compared with: `retrain` with all but itself, the noise floor.

        With a single one there are none: its gap to itself, 0, would pass for a floor.
        """
        return self.retrained(split, but=0 if name == "retrain" else None)

    @cached_property
    def untrained(self) -> OutputsOf | None:
        """Outputs of a classifier that has learned nothing (for ZRF)."""
        fresh = self.context.untrained
        return None if fresh is None else self.remembered("untrained", fresh(), False)


def _spans(tensors: TensorDataset, size: int = 4096) -> list[slice]:
    """Slices that cover a dataset: a `DataLoader` over them reads views, not single items."""
    return [slice(begin, begin + size) for begin in range(0, len(tensors), size)]
