"""What the outputs of a classifier are called, and where those names come from.

Order of sources: the model's own (Hugging Face's id2label, timm's label_names, torchvision's weights), then a file of
names, then the names of 1,000 ImageNet classes for a model of 1,000 outputs, then the folders of the images, then
numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment

from core.artifacts import read_bytes
from core.config import UserError
from core.intervals import Interval, wilson
from images.names import resolve_classes

IMAGENET = "torchvision's names of ImageNet's classes, because the model has 1,000 outputs"


@dataclass(frozen=True)
class ClassNames:
    """One name for each output of a model, in the order of the outputs.

    Args:
        names: what people call the classes. source: where the names come from.
    """

    names: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return len(self.names)

    def find(self, typed: str | int) -> int:
        """The output that a person means: a name, a number where no class has it as its name, `label:3`, `name:3`.

        A name with synonyms ("tench, Tinca tinca") is found by the first of them, too.

        Raises:
            UserError: there is no such class (with the nearest names), or the name fits several.
        """
        ids = tuple(name.partition(",")[0] for name in self.names)
        return resolve_classes([typed], self.names, ids if ids != self.names else (), "the model", "--class")[0]


def choose_names(
    outputs: int,
    own: ClassNames | None = None,
    file: Path | None = None,
    folders: Sequence[str] | None = None,
) -> tuple[ClassNames, tuple[str, ...]]:
    """The names of a model's outputs, and notes on what was given and not used.

    Args:
        outputs: how many the model has. own: the names that the model brings. file: one name a line.
        folders: names of the folders that the images are in.

    Raises:
        UserError: own names, or those of the file, are not one for each output.
    """
    notes: tuple[str, ...] = ()
    if own is not None:
        if len(own) != outputs:
            raise UserError(f"{own.source} names {len(own)} classes, the model has {outputs} outputs: put it right")
        notes += (f"{file} is not used: {own.source} names the classes",) if file else ()
        return own, notes
    if file is not None:
        names = read_names(file)
        if len(names) != outputs:
            raise UserError(f"{file} names {len(names)} classes, the model has {outputs} outputs: one name a line")
        return ClassNames(names, str(file)), notes
    if outputs == 1000:
        return ClassNames(imagenet_names(), IMAGENET), notes
    if folders is not None and len(folders) == outputs:
        return ClassNames(tuple(sorted(folders)), "sorted names of the folders of images"), notes
    if folders is not None:
        notes += (f"the images' {len(folders)} folders do not name the model's {outputs} outputs",)
    return ClassNames(tuple(map(str, range(outputs))), "numbers: nothing names the classes"), notes


def read_names(file: Path) -> tuple[str, ...]:
    """The names in a text file, one a line; empty lines at its end do not count.

    Raises:
        UserError: it is no text, or a line between names is empty.
    """
    try:
        lines = read_bytes(file).decode().rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no UTF-8 text ({error.reason}): write one class name a line") from None
    names = tuple(line.strip() for line in lines)
    if "" in names:
        raise UserError(f"{file} has no name in line {names.index('') + 1}: write one class name a line")
    return names


def imagenet_names() -> tuple[str, ...]:
    """ImageNet's 1,000 class names as torchvision's weights carry them."""
    from torchvision.models import ResNet18_Weights

    return tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


# --- do the outputs mean what the folders say? ------------------------------------------------------------


def clean_accuracy(predictions: np.ndarray, labels: np.ndarray) -> Interval:
    """The mean over classes of the share of right answers, with its 95 % interval.

    The mean over classes, because the largest class alone may hold most images. Its interval is Wilson's for as many
    images as give the same variance when all classes are equally hard: k^2 / sum of 1 / n_c.

    Args:
        predictions, labels: int [n], in one numbering.
    """
    classes, counts = np.unique(labels, return_counts=True)
    shares = [float(np.mean(predictions[labels == one] == one)) for one in classes]
    n = int(len(classes) ** 2 / np.sum(1 / counts))
    return wilson(round(float(np.mean(shares)) * n), n)


def is_at_chance(accuracy: Interval, outputs: int) -> bool:
    """Whether a model cannot be told from one that answers at random among its outputs."""
    return accuracy.low <= 1 / outputs


def permutation_that_fits(predictions: np.ndarray, labels: np.ndarray, outputs: int) -> Mapping[int, int] | None:
    """Label of a folder -> the output that answers for it, if accuracy is at chance and a renumbering mends it.

    The renumbering with the most right answers (Hungarian method) always looks better than it is on the images that
    chose it, so every second image of a class chooses, and the others judge.

    Args:
        predictions: int [n], in [0, outputs). labels: int [n], numbers of the folders.

    Returns:
        None if the numbering as it is does better than chance, or no other does.
    """
    if not is_at_chance(clean_accuracy(predictions, labels), outputs):
        return None
    turn = np.zeros(len(labels), dtype=int)
    for one in np.unique(labels):
        turn[labels == one] = np.arange(np.sum(labels == one)) % 2
    counts = np.zeros((int(labels.max()) + 1, outputs))
    np.add.at(counts, (labels[turn == 0], predictions[turn == 0]), 1)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    mapping = {int(row): int(column) for row, column in zip(rows, columns, strict=True)}
    judged = turn == 1
    if set(np.unique(labels)) - set(mapping) or not judged.any():
        return None
    expected = np.array([mapping[int(label)] for label in labels[judged]])
    return None if is_at_chance(clean_accuracy(predictions[judged], expected), outputs) else mapping
