"""Datasets: which are here (`datasets`), and how the others get here (`download`, `prepare`)."""

from pathlib import Path
from typing import Annotated

import tyro

from commands.command_line import Files, show
from core.choices import at_home
from core.config import SupportedDatasets
from core.hashes import load_plugins

NAMES = f"One of {', '.join(one.value for one in SupportedDatasets)}; in any case."
Dataset = Annotated[SupportedDatasets, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET", help=NAMES)]


def datasets(output_dir: Path = Path(), plugin: Files = ()) -> None:
    """List the datasets: which are here, where, how many images, and how to get the others.

    Args:
        output_dir: Folder below which datasets/ lies.
        plugin: Python file of your own that registers a dataset (docs/extending.md).
    """
    from images.fetch import listing

    load_plugins(plugin)
    show(listing(at_home(output_dir) / "datasets"))


def download(dataset: Dataset, output_dir: Path = Path(), dataset_path: Path | None = None, plugin: Files = ()) -> None:
    """Fetch a dataset (nothing else ever downloads).

    Args:
        dataset: Its name.
        output_dir: Folder below which datasets/ lies, for all but trees of image files.
        dataset_path: Where a tree of image files goes, if not to its usual place below ~/Datasets.
        plugin: Python file of your own that registers a dataset (docs/extending.md).
    """
    from images import fetch

    load_plugins(plugin)
    show(fetch.download(dataset, at_home(output_dir) / "datasets", dataset_path))


def prepare(dataset: Dataset, output_dir: Path = Path(), dataset_path: Path | None = None, plugin: Files = ()) -> None:
    """Unpack the archives of a dataset of image files beside themselves, and index it.

    Args:
        dataset: Its name.
        output_dir: Folder below which datasets/ lies.
        dataset_path: Where the archives lie, if not at the usual place.
        plugin: Python file of your own that registers a dataset (docs/extending.md).
    """
    from images import fetch

    load_plugins(plugin)
    show(fetch.prepare(dataset, at_home(output_dir) / "datasets", dataset_path))
