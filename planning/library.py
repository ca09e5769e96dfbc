"""Foresee a library: one mask for every class of a user's classifier, by one process or by several."""

import copy
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from core.observe import log, unheard
from forgetting.answers import Answering
from forgetting.opening import Opened
from forgetting.pictures import Batch, Folder
from forgetting.samples import MOST_BYTES, Parts, Samples, in_parts
from model import inspecting
from models.foreign import ForeignClassifier
from planning.asking import since_start
from planning.forecast import Forecast, Stage
from planning.units import Cost, peak_bytes, taken

READ, WARM = 256, 8  # images that are decoded and passed: measured, and before that
MADE = 3  # masks that are made


@dataclass(frozen=True)
class Asked:
    """A library to foresee.

    Args:
        opened: the model and its images. layers: to mask, by name. held: the classes that have images.
        make: makes the mask of a class and says how many bytes it left.
        workers: processes, each of which reads all images. threads: of torch in each; None: as it is.
        read, tried: how many images are read and masks are made to measure.
    """

    opened: Opened
    layers: Sequence[str]
    held: Sequence[int]
    make: Callable[[Answering, int], int]
    workers: int = 1
    threads: int | None = None
    read: int = READ
    tried: int = MADE


@dataclass(frozen=True)
class Pieces:
    """What a library's pieces cost.

    Args:
        load: a process until it reads. read: an image, decoded and passed. check: of the untouched model. first,
            further: a mask. peak: bytes of this process at most, by stage. row: bytes that an image leaves in memory.
            left: bytes that a mask leaves on the disk.
    """

    load: Cost
    read: Cost
    check: Cost
    first: Cost
    further: Cost
    peak: Mapping[str, int]
    row: int
    left: float

    def jobs(self, images: int, classes: int, workers: int) -> list[list[Stage]]:
        """Return the stages of each worker: all read every image, and make every so-many-th mask."""
        held = images * self.row
        twice = 2 * held if held <= MOST_BYTES else held  # batches are joined; a file is mapped
        found = []
        for worker in range(min(workers, classes)):
            count = len(range(worker, classes, workers))
            made, peak = self.first + self.further * (count - 1), self.peak
            found.append([
                Stage("start", "imports, the model, names of images", self.load, peak["start"], 0),
                Stage("images", f"{images:,} read and passed", self.read * images, peak["images"] + twice, 0),
                Stage("check", "the untouched model", self.check, peak["images"] + held, 0),
                Stage("masks", f"{count} masks of {classes} classes", made, peak["masks"] + held,
                      round(self.left * count)),
            ])  # fmt: skip
        return found


def foresee_library(asked: Asked) -> Forecast:
    """Measure pieces, and multiply.

    Raises:
        UserError: as `measured`.
    """
    jobs = measured(asked).jobs(len(asked.opened.images), len(asked.held), asked.workers)
    return Forecast(jobs, len(jobs))


def measured(asked: Asked) -> Pieces:
    """Read a few images, and make a few masks in their place among all.

    Raises:
        UserError: the images cannot be read, or no mask can be made of them.
    """
    if asked.threads:
        torch.set_num_threads(asked.threads)
    opened, whole = asked.opened, len(asked.opened.images)
    model = opened.classifier(asked.layers)
    chosen = spaced(asked.held, max(1, min(asked.tried, len(asked.held) // 2)))
    folder = some_of(opened.images, chosen, asked.read)
    log(f"plan: reading {len(folder)} of {whole:,} images, making {len(chosen)} of {len(asked.held):,} masks")
    with unheard(), inspecting(model):
        _read(model, some_of(opened.images, chosen, WARM))
        load, peak = Cost(since_start(), time.process_time()), {"start": peak_bytes()}
        found = list[tuple[Tensor, Tensor]]()
        read = taken(lambda: found.append(_read(model, folder))) * (1 / len(folder))
        peak["images"] = peak_bytes()
        rows, labels = found[0]
        answering = Answering(model, repeated(opened.images, rows, labels, chosen, len(opened.loaded.classes)))
        judged = [answering.parts.val, answering.parts.test]
        check = taken(lambda: [answering.predictions(part) for part in judged])
        left = list[int]()
        costs = [taken(lambda label=label: left.append(asked.make(answering, label))) for label in chosen]
    peak["masks"] = peak_bytes()
    further = sum(costs[1:], Cost()) * (1 / (len(costs) - 1)) if costs[1:] else costs[0]
    return Pieces(load, read, check, costs[0], further, peak, rows[:1].nbytes, sum(left) / len(left))


def spaced(labels: Sequence[int], count: int) -> list[int]:
    """Take so many of the labels, evenly spaced."""
    return [labels[place] for place in np.linspace(0, len(labels) - 1, count).astype(int).tolist()]


def some_of(folder: Folder, chosen: Sequence[int], count: int) -> Folder:
    """Return a folder of so many images at most: half of them of the chosen classes, of each alike."""
    labels, some = folder.listed()[0].numpy(), copy.copy(folder)
    each = max(1, count // (2 * len(chosen)))
    own = [folder.rows[labels == label][:each] for label in chosen]
    others = folder.rows[~np.isin(labels, chosen)]
    some.rows = np.concatenate([*own, others[: max(1, count - sum(map(len, own)))]])
    return some


def _read(model: ForeignClassifier, folder: Folder) -> tuple[Tensor, Tensor]:
    """Decode images and pass them; return their rows [S, numbers] and their labels [S]."""
    with torch.no_grad():
        found = [(model.prefix(batch.images), batch.labels) for batch in folder]
    rows, labels = zip(*found, strict=True)
    return torch.cat(rows), torch.cat(labels)


def repeated(folder: Folder, rows: Tensor, labels: Tensor, chosen: Sequence[int], outputs: int) -> Parts:
    """Part all images as a library does, with the rows of those that were read in place of all.

    An image of a class in `chosen` has the row of such an image, every other one that of another image, whose label
    it takes: as many rows are sought and judged with as in the library, and the model knows them as well.
    """
    true, keys, splits = folder.listed()
    listed = [Batch(true[:0], true, keys, splits)]
    parts = in_parts(rows[:1].expand(len(true), -1), listed, outputs, hashlib.sha256().hexdigest())
    places = torch.empty_like(true)
    own, known = (torch.where(torch.isin(one, torch.tensor(chosen)), one, -1) for one in (true, labels))
    for label in (*chosen, -1):
        wanted, there = own == label, (known == label).nonzero().flatten()
        places[wanted] = there[torch.arange(int(wanted.sum())) % len(there)]

    def drawn(part: Samples) -> Samples:
        return Samples(rows, places[part.places], labels[places[part.places]])

    return replace(parts, train=drawn(parts.train), val=drawn(parts.val), test=drawn(parts.test))


def said(asked: Asked, forecast: Forecast) -> str:
    """Write a forecast for people."""
    name, images, threads = type(asked.opened.loaded.module).__name__, len(asked.opened.images), torch.get_num_threads()
    head = f"plan: {name}, {images:,} images of {len(asked.held):,} classes; {threads} threads"
    lines = [head, "", forecast.table(), ""]
    if forecast.workers > 1:
        ends = f"{forecast.seconds:,.0f} s until the last ends (simulated; all machines like this one, now)"
        lines.append(f"{forecast.workers} processes at a time: {ends}, {forecast.total.memory / 1e9:.1f} GB each")
    lines.append("masks that are there already cost less; with kappa auto, classes differ in how many sizes are tried")
    return "\n".join(lines)
