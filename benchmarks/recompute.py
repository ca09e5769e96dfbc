"""Scores of written-out masks with numpy alone: nothing of this project is used.

Masks of benchmarks/unlearning.py, forget and retain score for every kappa:

    uv run benchmarks/unlearning.py --full --masks masks
    uv run benchmarks/recompute.py masks/batch-128_seed-0 [folder of Fashion-MNIST's .gz files]

A mask of `forget`, also one that replaces weights (--depth erase), of a perceptron (linear layers and ReLU):

    uv run benchmarks/recompute.py card MASK PARENT.safetensors IMAGES MEAN STD

IMAGES is a folder of test images, a subfolder for each class, of the size that the perceptron reads; pixels of 0 to 1
less MEAN and over STD, one number for all channels.
"""

import gzip
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

KINDS = {"I32": "<i4", "I64": "<i8", "F64": "<f8", "F32": "<f4"}
Arrays = dict[str, np.ndarray]


# --- files ------------------------------------------------------------------------------------------------


def read_mask(folder: Path) -> tuple[Arrays, Arrays, dict]:
    """A mask's flat positions by parameter, what stands there where weights are replaced, and its config."""
    raw = (folder / "mask.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    config = json.loads(header.pop("__metadata__")["config"])
    found = {n: np.frombuffer(data[slice(*t["data_offsets"])], KINDS[t["dtype"]]) for n, t in header.items()}
    positions = {n: one for n, one in found.items() if not n.startswith(".values.")}
    return positions, {n.removeprefix(".values."): one for n, one in found.items() if n not in positions}, config


def with_mask(weights: Mapping[str, np.ndarray], positions: Arrays, values: Arrays) -> Arrays:
    """A copy of a network's weights with the mask's zeros and values in it."""
    edited = {name: np.array(value, order="C") for name, value in weights.items()}
    for name, flat in positions.items():
        edited[name].flat[flat] = values.get(name, 0)
    return edited


def pictures(folder: Path, mean: float, std: float) -> tuple[np.ndarray, np.ndarray]:
    """Images of a folder of classes as a perceptron reads them [S, C H W], and labels [S] in the order of the names."""
    from PIL import Image

    rows, labels = [], []
    for label, place in enumerate(sorted(one for one in folder.iterdir() if one.is_dir())):
        for path in sorted(place.iterdir()):
            levels = np.asarray(Image.open(path).convert("RGB"), np.float32).transpose(2, 0, 1) / 255
            rows.append((levels.ravel() - np.float32(mean)) / np.float32(std))
            labels.append(label)
    return np.stack(rows), np.array(labels)


# --- networks ---------------------------------------------------------------------------------------------


def through(weights: Mapping[str, np.ndarray], rows: np.ndarray) -> list[np.ndarray]:
    """What every layer of a perceptron reads, [S, n] each, and last its logits [S, C]. Layers in the order of names."""
    names = [name.removesuffix(".weight") for name in sorted(weights) if name.endswith(".weight")]
    found = [rows]
    for place, name in enumerate(names):
        h = found[-1] if place == 0 else np.maximum(found[-1], 0)
        found[-1] = h
        found.append(h @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", np.float32(0)))
    return found


def scores(logits: np.ndarray, labels: np.ndarray, forgotten: Sequence[int]) -> tuple[float, float]:
    """Forget and retain score, percent."""
    right, mine = logits.argmax(1) == labels, np.isin(labels, forgotten)
    return 100 * right[mine].mean(), 100 * right[~mine].mean()


def probe(train: np.ndarray, labels: np.ndarray, asked: np.ndarray, steps: int = 3000) -> np.ndarray:
    """Classes [A] that a linear probe names for features [A, d]: multinomial logistic regression (L2, C = 1), fitted to
    features [S, d] with labels [S], standardised.

    Minimises the sum of cross-entropies and half the squared weights, biases free, by Nesterov's accelerated descent
    with restarts; its step is one over the largest curvature.
    """
    mean, std = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
    x, y = ((one - mean) / np.where(std > 0, std, 1) for one in (train, asked))
    x, y = (np.hstack([one, np.ones((len(one), 1))]) for one in (x, y))
    classes, place = np.unique(labels, return_inverse=True)
    penalty = np.append(np.ones(x.shape[1] - 1), 0)[:, None]
    step = 1 / (np.linalg.norm(x, 2) ** 2 / 2 + 1)
    now = ahead = np.zeros((x.shape[1], len(classes)))
    t = 1.0
    for _ in range(steps):
        logits = x @ ahead
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(x)), place] -= 1
        slope = x.T @ p + penalty * ahead
        if np.abs(slope).max() < 1e-5 * len(x):
            break
        new = ahead - step * slope
        t_new = 1.0 if (slope * (new - now)).sum() > 0 else (1 + np.sqrt(1 + 4 * t * t)) / 2
        now, ahead, t = new, new + (0 if t_new == 1 else (t - 1) / t_new) * (new - now), t_new
    return classes[(y @ ahead).argmax(1)]


# --- the two commands -------------------------------------------------------------------------------------


def of_unlearning(folder: Path, images: Path) -> None:
    """Scores of the masks that benchmarks/unlearning.py wrote, means over the ten classes."""
    scale = json.loads((folder.parent / "normalisation.json").read_text())
    x = np.frombuffer(gzip.decompress((images / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    y = np.frombuffer(gzip.decompress((images / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    rows = (x.reshape(len(y), 784) - scale["mean"]) / scale["std"]
    weights = load_file(folder / "classifier.safetensors")
    for kappa in (64, 128, 200, 256, 400):
        found, off = [], 0
        for c in range(10):
            mask = load_file(folder / f"refined_class-{c}_kappa-{kappa}.safetensors")["mask"]
            edited = weights | {"linears.1.weight": weights["linears.1.weight"] * mask}
            found.append(scores(through(edited, rows)[-1], y, [c]))
            off = int((mask == 0).sum())
        forget, retain = np.mean(found, 0)
        print(f"kappa {kappa}: {off} weights off, forget {forget:.2f}, retain {retain:.1f}")


def of_card(folder: Path, parent: Path, images: Path, mean: float, std: float) -> None:
    """Scores of a mask of `forget` beside those on its card."""
    positions, values, config = read_mask(folder)
    rows, labels = pictures(images, mean, std)
    edited = with_mask(load_file(parent), positions, values)
    found = scores(through(edited, rows)[-1], labels, [one["index"] for one in config["forgotten"]])
    for name, value in zip(("forget", "retain"), found, strict=True):
        print(f"{name}: {value:.4f} % of these images, the card says {config['scores'][name]:.4f} %")


if __name__ == "__main__":
    if sys.argv[1] == "card":
        of_card(Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), float(sys.argv[5]), float(sys.argv[6]))
    else:
        of_unlearning(Path(sys.argv[1]), Path([*sys.argv, "/usr/share/datasets/fashion-mnist"][2]))
