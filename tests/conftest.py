"""How the tests are run: on one thread a process, and whole folders of them in several processes."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.observe import be_quiet
from main import set_library_defaults
from training.processes import reuse_freed_memory

HERE = Path(__file__).parent
if sys.dont_write_bytecode:
    # Containers often ask for no bytecode beside the sources. Then each of the hundred processes that tests start would
    # compile torch anew, which takes seconds: here it is compiled once, into a folder that git ignores.
    sys.dont_write_bytecode = False
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = str(HERE.parent / ".pytest_cache" / "bytecode")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Before any test file imports torch. Small matrices lose by threads, sums in another order are others, and what a test
# starts inherits it.
set_library_defaults()
os.environ["OMP_NUM_THREADS"] = "1"
reuse_freed_memory()  # as every command does

MOST_PROCESSES = 4  # each holds torch, and compares small models: more of them cost memory
# Files that take longest, longest first: begun last, one of them would keep a process busy while the others idle.
DEAREST = (
    "training/test_distributed.py",
    "test_cli.py",
    "test_faults.py",
    "commands/test_sweep.py",
    "test_all_datasets.py",
    "unlearn/test_unlearning.py",
    "test_pipeline.py",
    "test_plugins.py",
    "test_interrupt.py",
    "training/test_resume.py",
    "test_readme.py",
    "test_reporter.py",
    "core/test_records.py",
    "graphs/test_whole_models.py",
)


@pytest.hookimpl(tryfirst=True)  # ahead of pytest-xdist, which reads these options in the same hook
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run folders in as many processes as there are cores, a file in one of them; `-n` says otherwise.

    Named files and tests run in this process: there each process would first import torch.
    """
    option = config.option
    told = option.collectonly or option.usepdb or getattr(option, "numprocesses", 0) is not None
    if told or hasattr(config, "workerinput") or not all(map(os.path.isdir, config.args)):
        return
    option.numprocesses = min(MOST_PROCESSES, os.cpu_count() or 1)
    option.dist, option.loadscopereorder = "loadfile", False


@pytest.fixture(autouse=True)
def the_log_is_heard_again() -> Iterator[None]:
    """A command with --quiet silences its process, in which other tests listen."""
    yield
    be_quiet(False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the dearest files first."""
    places = {HERE / name: place for place, name in enumerate(DEAREST)}
    assert all(path.is_file() for path in places), "conftest.py names a file that is not there"
    items.sort(key=lambda item: places.get(item.path, len(places)))
