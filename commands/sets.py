"""Datasets: which are here (`datasets`), and how the others get here (`download`, `prepare`)."""

from pathlib import Path
from typing import Annotated

import tyro

from commands.command_line import show
from core.choices import at_home
from core.config import SupportedDatasets

NAMES = f"One of {', '.join(one.value for one in SupportedDatasets)}; in any case."
Dataset = Annotated[SupportedDatasets, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET", help=NAMES)]


def datasets(output_dir: Path = Path()) -> None:
    """List the datasets: which are here, where, how many images, and how to get the others.

    Args:
        output_dir: Folder below which datasets/ lies.
    """
    from images.fetch import listing

    show(listing(at_home(output_dir) / "datasets"))


def download(dataset: Dataset, output_dir: Path = Path(), dataset_path: Path | None = None) -> None:
    """Fetch a dataset (nothing else ever downloads).

    Args:
        dataset: Its name.
        output_dir: Folder below which datasets/ lies, for all but trees of image files.
        dataset_path: Where a tree of image files goes, if not to its usual place below ~/Datasets.
    """
    from images import fetch

    show(fetch.download(dataset, at_home(output_dir) / "datasets", dataset_path))


def prepare(dataset: Dataset, output_dir: Path = Path(), dataset_path: Path | None = None) -> None:
    """Unpack the archives of a dataset of image files beside themselves, and index it.

    Args:
        dataset: Its name.
        output_dir: Folder below which datasets/ lies.
        dataset_path: Where the archives lie, if not at the usual place.
    """
    from images import fetch

    show(fetch.prepare(dataset, at_home(output_dir) / "datasets", dataset_path))
