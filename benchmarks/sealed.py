"""What a sealed file gives away: attacks on the places of a mask, zeros or noise; Fashion-MNIST, test images.

    uv run benchmarks/sealed.py                   one classifier, four classes, 3 minutes
    uv run benchmarks/sealed.py --full            ten classes
    [--seeds N ...] [--classes N ...] [--json PATH] [--docs]

Classifiers are those of benchmarks/features.py. A mask is made by `forget` of the training images, once of one layer
(`refined`) and once of all layers (`erase`), 2 % of their weights each. The parent's file is sealed with zeros
and with noise, and read back. The attacker has the sealed file and 10 training images of every class. Zeros show the
places. In noise they are guessed, told how many there are of each parameter: by the gradient of the forgotten images'
cross-entropy, as the metric `noise_found` does, or by how much likelier a value is as noise than among the others.
An attack completes signs (one gradient) or trains the places alone (50 steps of Adam). The same of a model that never
saw the class, at random places, is what ten images teach anybody.
"""

import copy
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import for_pages, keep, parser, publish_all
from benchmarks.feature_models import FIRST_REFERENCE, MLPS, images_of

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from forgetting.answers import Ways
from forgetting.python import forget
from hidden.heads import SHOTS
from hidden.positions import Places, counts_of, elsewhere, guessed, highest, with_signs, with_training
from measure.probes import accuracy, drawn
from mimu import Mask, seal
from model import HookedModel

WAYS, KAPPA = (Ways.refined, Ways.erase), "2%"
SEED = 0  # of noise, of random places, of the attacker's images
SHORT, ALL = (0, 5, 6, 9), range(10)
BINS = 60  # of a histogram of weights
Row = dict[str, Any]


def zeros_of(model: HookedModel) -> Places:
    """What anybody sees in a file of weights."""
    return {name: value == 0 for name, value in model.named_parameters() if bool((value == 0).any())}


def likely_noise(model: HookedModel, counts: Mapping[str, int]) -> Places:
    """The entries whose values are likelier as noise of the parameter's own scale than among all its entries."""
    scores = {}
    for name, value in model.named_parameters():
        if name in counts:
            seen = value.detach().flatten()
            found = torch.histogram(seen, BINS)
            place = torch.bucketize(seen, found.bin_edges[1:-1].contiguous())
            share = found.hist[place] / len(seen) / (found.bin_edges[1] - found.bin_edges[0])
            scores[name] = (-((seen / seen.std()) ** 2) / 2 - share.log()).view(value.shape)
    return highest(scores, counts)


def sealed_copies(model: HookedModel, mask: Mask) -> dict[str, HookedModel]:
    """The classifier as it is read from its sealed file, by what stands where weights are off."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        parent = Path(folder) / "parent.safetensors"
        save_file(model.state_dict(), parent)
        for fill in ("zero", "noise"):
            seal(parent, mask, Path(folder) / fill, fill=fill, seed=SEED)
            found[fill] = copy.deepcopy(model)
            found[fill].load_state_dict(load_file(Path(folder) / fill))
    return found


def random_places(places: Places) -> Places:
    """As many random entries of each parameter, the mask's among them by chance."""
    generator = torch.Generator().manual_seed(SEED)
    return highest(
        {name: torch.rand(off.shape, generator=generator) for name, off in places.items()}, counts_of(places)
    )


@dataclass(frozen=True)
class Tried:
    """An attack, the model that it made, and the percent of places that it knew."""

    attack: str
    model: HookedModel
    found: float | None = None


def attacks(
    sealed: Mapping[str, HookedModel], never: HookedModel, label: int, images: Tensor, labels: Tensor
) -> list[Tried]:
    """Every attack on both files.

    Args:
        never: a model that never saw the class. images: the attacker's, [S, C, H, W], and labels [S].
    """
    zero, noise = sealed["zero"], sealed["noise"]
    places, mine = zeros_of(zero), labels == label
    counts, of_class = counts_of(places), (images[mine], labels[mine])
    known = {
        "zeros": (zero, places),
        "zeros, random places": (zero, elsewhere(places, SEED)),
        "noise, by gradient": (noise, guessed(noise, counts, *of_class)),
        "noise, by value": (noise, likely_noise(noise, counts)),
        "noise, random places": (noise, random_places(places)),
        "noise, told the places": (noise, places),
        "retrained, random places": (never, random_places(places)),
    }
    tried = [Tried(f"none: {name}", one) for name, one in sealed.items()]
    for name, (model, where) in known.items():
        found = 100 * sum(int((off & where[one]).sum()) for one, off in places.items()) / sum(counts.values())
        tried.append(Tried(f"{name}: signs", with_signs(model, where, *of_class), found))
        tried.append(Tried(f"{name}: trained", with_training(model, where, images, labels), found))
    return tried


def cell(seed: int, label: int) -> list[Row]:
    """All attacks on both masks of one classifier and class: forget and retain score on test images, percent."""
    model, data = MLPS.trained(seed), images_of(label)
    pixels, labels = data.splits["train"].batch(slice(None))
    asked, true = data.splits["test"].batch(slice(None))
    some = drawn(labels, SHOTS, SEED)
    rows = []
    for way in WAYS:
        mask = forget(model, DataLoader(TensorDataset(pixels, labels), 256), [label], way=way, kappa=KAPPA)
        never = MLPS.trained(FIRST_REFERENCE, label)
        tried = attacks(sealed_copies(model, mask), never, label, pixels[some], labels[some])
        for one in (Tried("the parent", model), *tried):
            scores = {
                name: accuracy(one.model, asked[part], true[part])
                for name, part in (("forget", true == label), ("retain", true != label))
            }
            facts = {"way": way.value, "class": label, "seed": seed, "weights": mask.switched_off}
            rows.append(facts | scores | {"attack": one.attack, "found": one.found})
            print(" ".join(f"{x:.2f}" if isinstance(x, float) else str(x) for x in rows[-1].values()), flush=True)
    return rows


def table(rows: Sequence[Row]) -> list[list[str]]:
    """One line for each attack: mean over cells (largest) of the forget score, mean of the retain score, by mask."""
    lines = [["attack", *(f"{way.value}: {what}" for way in WAYS for what in ("places known", "forget", "retain"))]]
    for name in dict.fromkeys(row["attack"] for row in rows):
        line = [name]
        for way in WAYS:
            mine = [row for row in rows if (row["attack"], row["way"]) == (name, way.value)]
            found = [row["found"] for row in mine if row["found"] is not None]
            forget_ = [row["forget"] for row in mine]
            line += [f"{statistics.fmean(found):.1f}" if found else "-"]
            line += [f"{statistics.fmean(forget_):.1f} ({max(forget_):.1f})"]
            line += [f"{statistics.fmean(row['retain'] for row in mine):.1f}"]
        lines.append(line)
    return lines


def main() -> None:
    """Attack, print, keep."""
    asked = parser(__doc__)
    for_pages(asked)
    asked.add_argument("--full", action="store_true", help="ten classes")
    asked.add_argument("--seeds", nargs="+", type=int, default=[2], help="of classifiers")
    asked.add_argument("--classes", nargs="+", type=int, help="each forgotten by itself")
    given = asked.parse_args()
    classes = given.classes or (ALL if given.full else SHORT)
    rows = [row for label in classes for seed in given.seeds for row in cell(seed, label)]
    made = table(rows)
    print("\n".join(" | ".join(line) for line in made))
    n = f"{len(classes)} classes x {len(given.seeds)} classifiers: mean (largest)"
    publish_all(given.docs, {"sealed": (n, made)})
    keep(given.json, {"rows": rows})


if __name__ == "__main__":
    main()
