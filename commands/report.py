"""What shows what is here: results (`report`, `leaderboard`), training curves (`dashboard`), `docs`, `datasets`.

`download` and `prepare` bring datasets that are not here yet.
"""

from pathlib import Path
from typing import Annotated

import tyro

from commands.command_line import Environment, Files, show
from core.choices import at_home
from core.config import PROJECT_ROOT, ReporterConfig, SupportedDatasets, UserError
from core.hashes import load_plugins

NAMES = f"One of {', '.join(one.value for one in SupportedDatasets)}; in any case."
Dataset = Annotated[SupportedDatasets, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET", help=NAMES)]
Folders = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
Sides = Annotated[tuple[str, ...], tyro.conf.arg(metavar="A B ...", help_behavior_hint="")]


def report(
    output_dir: Path = Path(),
    compare: Sides = (),
    plugin: Files = (),
    reporter: ReporterConfig = ReporterConfig(),  # noqa: B008
) -> None:
    """Make every table, plot and the HTML page again from the JSON records; or compare runs.

    Args:
        output_dir: Folder that runs wrote to.
        compare: Instead compare runs with the first one named: output folders, ids below output_dir, or FOLDER/ID.
        plugin: Python file of your own that registers a plot (docs/extending.md).
    """
    from reporter import Reporter

    load_plugins(plugin)
    made = Reporter(at_home(output_dir), reporter)
    if compare:
        show(made.compare(compare))
        return
    for folder in made.plot():
        show(folder)
    show(made.page)


def leaderboard(folders: Folders = (Path(),), out: Path | None = None) -> None:
    """Write one page with the methods of many runs, ordered by dataset, model and question.

    Args:
        folders: Folders that runs wrote to.
        out: The page. None: reports/leaderboard.html in the first folder.
    """
    from showing.leaderboard import write_leaderboard

    show(write_leaderboard([at_home(folder) for folder in folders], out and at_home(out)))


def docs(example: Path | None = None, folder: Path = PROJECT_ROOT / "docs", plugin: Files = ()) -> None:
    """Write docs/methods.md and docs/metrics.md anew from what is registered.

    Args:
        example: JSON record of a run, for the pages' example values. None: the committed values stay.
        folder: Where the pages are written.
        plugin: Python file of your own that registers methods or metrics (docs/extending.md).
    """
    from commands.docs import write_docs

    load_plugins(plugin)
    for path in write_docs(example and at_home(example), at_home(folder)):
        show(path)


def dashboard(here: Environment, output_dir: Path = Path()) -> None:
    """Open trackio on the training curves of this project's runs.

    Args:
        output_dir: Folder that runs wrote to.
    """
    from core.observe import TRACKIO_PROJECT

    folder = here.curves(at_home(output_dir))
    if not folder.is_dir():
        raise UserError(f"there are no training curves in {folder}: make some with `uv run main.py`")
    import trackio

    trackio.show(project=TRACKIO_PROJECT)


# --- datasets ---------------------------------------------------------------------------------------------


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
