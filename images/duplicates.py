"""Images that occur more than once, told by what they hold: on both sides of a split, a score measures memory."""

from collections.abc import Callable, Mapping
from itertools import combinations

import numpy as np

ACROSS = "across classes"


def find_duplicates(
    digests: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray], name_of: Callable[[str, int], str]
) -> dict[str, dict]:
    """Copies within and across splits and classes.

    Args:
        digests: of each split's images, uint8 [S, 16], equal where images are. labels: int [S], as many.
        name_of: what an image is called, from its split and place.

    Returns:
        {kind: {"images": how many, "example": [name, name of its equal]}} of the kinds that occur: a split (an image
        that equals an earlier one of it), two splits as `train/test` (an image of the second that equals one of the
        first), and `across classes` (an image that equals one of another class).
    """
    names = list(digests)
    split = np.repeat(np.arange(len(names)), [len(digests[name]) for name in names])
    place = np.concatenate([np.arange(len(digests[name])) for name in names])
    whole = np.ascontiguousarray(np.concatenate([digests[name] for name in names]))
    _, group, sizes = np.unique(whole.view("V16")[:, 0], return_inverse=True, return_counts=True)
    twins = np.flatnonzero(sizes[group] > 1)
    split, place, group = split[twins], place[twins], group[twins]
    label = np.concatenate([labels[name] for name in names])[twins]
    found: dict[str, dict] = {}

    def note(kind: str, copies: np.ndarray, others: np.ndarray) -> None:
        """Count `copies`, each of which equals some of `others`; both are places among the twins."""
        if len(copies):
            equal = others[(group[others] == group[copies[0]]) & (others != copies[0])][0]
            pair = [name_of(names[split[one]], int(place[one])) for one in (copies[0], equal)]
            found[kind] = {"images": len(copies), "example": pair}

    for a, b in combinations(range(len(names)), 2):
        left, right = np.flatnonzero(split == a), np.flatnonzero(split == b)
        note(f"{names[a]}/{names[b]}", right[np.isin(group[right], group[left])], left)
    for number, name in enumerate(names):
        members = np.flatnonzero(split == number)
        _, first = np.unique(group[members], return_index=True)
        note(name, np.delete(members, first), members)
    lowest = np.full(len(sizes), np.iinfo(np.int64).max)
    np.minimum.at(lowest, group, label)
    highest = np.zeros(len(sizes), np.int64)
    np.maximum.at(highest, group, label)
    mixed = np.flatnonzero(lowest[group] < highest[group])
    if len(mixed):
        note(ACROSS, mixed, mixed[label[mixed] != label[mixed[0]]])
    return found


def say_duplicates(found: Mapping[str, dict]) -> str:
    """One line for people."""
    parts = [f"{one['images']} {kind}" for kind, one in found.items()]
    first = next(iter(found.values()))["example"]
    return f"the same image more than once: {', '.join(parts)}; e.g. {first[0]} is {first[1]}"
