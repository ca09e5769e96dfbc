"""What shows results that are there: tables, plots and page (`report`), training curves (`dashboard`), `docs`."""

from pathlib import Path
from typing import Annotated

import tyro

from commands.command_line import Environment, Files, show
from core.choices import at_home
from core.config import PROJECT_ROOT, ReporterConfig, UserError
from core.hashes import load_plugins

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
