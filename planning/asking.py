"""From configuration files to a forecast: a run, or all jobs of a sweep on several workers."""

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from core.config import PipelineConfig, UserError, plain
from core.hashes import key_of, load_plugins
from core.observe import log, unheard
from pipeline import Pipeline
from planning.extent import Extent, at_its_place
from planning.forecast import Forecast, Stage, stages
from planning.units import Cost, Probe, Units, taken

MOST = 100_000  # machines, or workers
COST_NOTHING = ("seed", "forget_class", "kappa_list", "topK_list", "output_dir", "tracker", "resume", "reporter")
"""Fields that change none of the units: configurations that differ in these alone are measured once."""


@dataclass(frozen=True)
class Asked:
    """Runs to foresee.

    Args:
        configs: of the runs, in the order in which they are begun.
        machines, workers: how many there are, and how many runs at a time each carries out.
        threads: of torch in each run; None: as a run chooses.
    """

    configs: Sequence[PipelineConfig]
    machines: int = 1
    workers: int = 1
    threads: int | None = None


def check_count(name: str, value: int | None) -> None:
    """See that a number of machines or workers can be meant.

    Raises:
        UserError: it cannot.
    """
    if value is not None and not 1 <= value <= MOST:
        raise UserError(f"--{name} is {value}: give a number from 1 to {MOST:,}")


@dataclass(frozen=True)
class Foreseen:
    """What is said of runs: `forecast` in numbers, `text` for people."""

    forecast: Forecast
    text: str


def foresee(asked: Asked) -> Foreseen:
    """Measure, count and multiply.

    Raises:
        UserError: a configuration cannot be run.
    """
    load = Cost(since_start(), time.process_time())
    known: dict[str, Units] = {}
    jobs: list[list[Stage]] = []
    unforeseen: dict[str, None] = {}
    heads: list[str] = []
    with tempfile.TemporaryDirectory() as store:
        for config in asked.configs:
            load_plugins(config.plugins)
            pipeline = Pipeline(at_its_place(config, Path(store)))
            pipeline.prepare_process()
            extent, read = _counted(pipeline)
            key = _alike(extent.config)
            if key not in known:
                log(f"plan: measuring what pieces cost, configuration {len(known) + 1}")
                known[key] = _measured(extent, load, read, asked.threads)
            jobs.append(stages(extent, known[key]))
            unforeseen |= dict.fromkeys(extent.unforeseen)
            heads.append(_head(extent, asked))
    forecast = Forecast(jobs, asked.machines * asked.workers)
    spent = sum(one.spent.seconds for one in known.values())
    remarks = _remarks(forecast, asked, list(unforeseen), spent)
    return Foreseen(forecast, "\n".join([heads[0], "", forecast.table(), "", *remarks]))


def since_start() -> float:
    """Return the seconds since this process began, where the system says; else those that it worked."""
    try:
        began = int(Path("/proc/self/stat").read_text("utf-8").rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text("utf-8").split()[0])
    except (OSError, ValueError, IndexError):
        return time.process_time()
    return up - began / os.sysconf("SC_CLK_TCK")


def _counted(pipeline: Pipeline) -> tuple[Extent, Cost]:
    found: list[Extent] = []
    cost = taken(lambda: found.append(Extent.of(pipeline.stages.setup)))
    return found[0], cost


def _alike(config: PipelineConfig) -> str:
    return key_of({name: value for name, value in plain(config).items() if name not in COST_NOTHING})


def _measured(extent: Extent, load: Cost, read: Cost, threads: int | None) -> Units:
    if threads:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder, unheard():
        return Probe(extent, Path(folder)).measure(load, read)


def _head(extent: Extent, asked: Asked) -> str:
    config = extent.config
    sizes = ", ".join(f"{len(labels):,} {split}" for split, labels in extent.labels.items())
    what = f"{config.model_architecture.value} on {config.vision_dataset.value}, {extent.setup.shape[0]:,} classes"
    runs = f"; {len(asked.configs)} runs" if len(asked.configs) > 1 else ""
    return f"plan: {what}, images: {sizes}; {extent.setup.device}, {torch.get_num_threads()} threads{runs}"


def _remarks(forecast: Forecast, asked: Asked, unforeseen: Sequence[str], spent: float) -> list[str]:
    said = []
    if len(asked.configs) > 1:
        at_once = f"{asked.machines * asked.workers} at a time ({asked.machines} machines x {asked.workers})"
        each = forecast.total.memory * min(asked.workers, len(asked.configs)) / 1e9
        ends = f"{forecast.seconds:,.0f} s until the last ends (simulated; all machines like this one)"
        said.append(f"{len(asked.configs)} runs, {at_once}: {ends}, {each:.1f} GB on a machine")
    said.append(f"not foreseen: {'; '.join(unforeseen)}")
    said.append(f"measured in {spent:.0f} s on this machine, as busy as it is now; stages that are kept cost nothing")
    return said
