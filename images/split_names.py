"""Names of folders that say what the images in them are for: training, validation or test."""

import re
from collections import defaultdict
from collections.abc import Sequence

UNSPLIT, TRAIN, VAL, TEST = range(4)
EITHER = 4  # `eval`, `holdout`: the test set, or the validation set beside a test set
WORDS = {
    **dict.fromkeys(("train", "training", "trn", "trainval"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation", "validate", "validating", "dev", "devel", "development"), VAL),
    **dict.fromkeys(("test", "testing", "tst"), TEST),
    **dict.fromkeys(("eval", "evaluation", "holdout", "heldout"), EITHER),
}
AFFIXES = (
    *("images", "image", "imgs", "img", "pictures", "pics", "photos", "data", "dataset", "sets", "set", "splits"),
    *("split", "part", "dir", "folder", "files", "samples", "jpg", "jpeg", "png", "raw"),
)


def _words(name: str) -> list[str]:
    """The words of a name, small: `trainSet_2` -> train, set."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return [word.casefold() for word in re.findall(r"[^\W\d_]+", apart)]


def _meant(word: str) -> int | None:
    """The split that a word names, with or without an affix (`trainset`)."""
    if word in WORDS:
        return WORDS[word]
    return next((WORDS[rest] for end in AFFIXES if (rest := word.removesuffix(end)) != word and rest in WORDS), None)


def _read(name: str) -> tuple[int | None, tuple[str, ...]]:
    """(split that a name speaks of, its other words but for affixes)."""
    words = _words(name)
    if (whole := WORDS.get("".join(words))) is not None:  # `train_val`, `hold-out`
        return whole, ()
    found = [split for word in words if (split := _meant(word)) is not None]
    rest = tuple(word for word in words if _meant(word) is None and word not in AFFIXES)
    return (found[0] if len(found) == 1 else None), rest


def splits_by_name(names: Sequence[str]) -> dict[str, int]:
    """Those names, of folders beside each other, that are known names of splits -> the split.

    `train`, `Training`, `train_images`, `trainset` are; so are `x_train` and `x_test` where both are there.
    """
    read = {name: _read(name) for name in names}
    found = {name: split for name, (split, rest) in read.items() if split is not None and not rest}
    groups: dict[tuple[str, ...], dict[str, int]] = defaultdict(dict)
    for name, (split, rest) in read.items():
        if split is not None and rest:
            groups[rest][name] = split
    for group in groups.values() if not found else ():
        if TRAIN in group.values() and len(set(group.values())) > 1:
            found |= group
    other = VAL if TEST in found.values() and VAL not in found.values() else TEST
    return {name: other if split == EITHER else split for name, split in found.items()}


def same_but_for_numbers(names: Sequence[str]) -> bool:
    """Whether names differ by a number alone, as those of the parts of one split do."""
    return len({re.sub(r"\d+", "0", name) for name in names}) == 1
