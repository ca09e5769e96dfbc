"""Many runs from one file: lists of values for any field become jobs, carried out by processes here, Slurm or Ray.

    uv run main.py sweep --config configs/sweep_example.yaml

A job is a whole `PipelineConfig`. A stage that several jobs share is made once: the first job takes a lock, the others
wait for its product. Each finished job leaves one JSON file; a second call runs only jobs that are missing or failed.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from core.artifacts import DamagedError, read_json, told, write_json
from core.choices import MachineError, did_you_mean
from core.config import GIVEN, PipelineConfig, UserError, plain
from core.hashes import check_same_code, key_of, sha256_file, versions, whole_code
from core.observe import log
from core.records import read_record, read_whole
from core.store import running, sha256_folder
from core.yaml_files import load_config, read_words, resolved, typed
from reporting.families import families, runs_of, told_apart
from reporting.tables import caption
from reporting.write import as_text
from showing.terminal import scores_table
from training.engines import Engine, carry_out, threads_of

SECTION = "sweep"
SWEEPS = Path("eval/sweeps")


@dataclass(frozen=True)
class SweepConfig(Engine):
    """How jobs are made and carried out: the section `sweep` of a configuration file."""

    over: dict[str, list]
    """Field (dotted, as on the command line) -> its values; jobs are all combinations."""

    def __post_init__(self) -> None:
        if not isinstance(self.over, dict) or not self.over:
            raise UserError("sweep.over names no field: give at least one with a list of values, e.g. seed: [0, 1]")
        bad = [name for name, values in self.over.items() if not isinstance(values, list) or not values]
        if bad:
            raise UserError(f"sweep.over.{bad[0]} is no list of values: write it as [value, value]")
        if "plugins" in self.over:
            raise UserError("sweep.over.plugins: name plugins once, for all jobs, as `plugins: [FILE]` at the margin")
        self.check("sweep.{}")


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Args:
        settings: the fields that the sweep varies (dotted), with this job's values.
        config: the whole configuration of the run.
        key: hash of the configuration, the files that it names, the source code and the versions of packages.
        code: hash of the source code, which a worker process compares with its own.
        speaks: whether the job logs what the run understood; one job of a sweep does, as all start from one file.
    """

    settings: dict[str, Any]
    config: PipelineConfig
    key: str
    code: str
    speaks: bool = False

    @property
    def path(self) -> Path:
        """The JSON file that says how the job ended."""
        return self.folder / f"{self.key[:16]}.json"

    @property
    def folder(self) -> Path:
        """The folder of all such files; engines keep their own there, too."""
        return self.config.output_dir / SWEEPS

    @property
    def label(self) -> str:
        """The job's settings in one line of text."""
        return ", ".join(f"{name} {value}" for name, value in self.settings.items())

    def run(self, threads: int | None = None) -> dict:
        """As `run_job`."""
        return run_job(self, threads)

    def lost(self, error: str) -> dict:
        """Write and return the outcome of a job whose process died before it could."""
        outcome = {"key": self.key, "settings": plain_settings(self), "status": "failed", "records": [], "error": error}
        return _leave(self, outcome | {"seconds": 0.0})


# --- jobs -------------------------------------------------------------------------------------------------


def _typed(config: PipelineConfig, settings: dict[str, Any]) -> PipelineConfig:
    """Return the configuration with some fields (dotted names) replaced; values are checked like those of a file."""
    for name, value in settings.items():
        nested: Any = value
        for part in reversed(name.split(".")):
            nested = {part: nested}
        if isinstance(value, dict):
            raise UserError(f"sweep.over.{name} holds {value}, fields of a section: name each field by itself")
        config = _changed(config, typed(nested, lambda _, text: UserError(f"sweep.over: {text}")))
    return config


def _changed(config: Any, values: dict[str, Any]) -> Any:
    """Return a frozen configuration with some fields replaced; a mapping replaces fields of a section."""
    inner = {
        name: _changed(getattr(config, name), value) if isinstance(value, dict) else value
        for name, value in values.items()
    }
    return replace(config, **inner)


def load_sweep(paths: Sequence[Path]) -> tuple[SweepConfig, PipelineConfig]:
    """Read configuration files; return their section `sweep`, and the configuration that all jobs start from.

    Args:
        paths: YAML files; later files win. If several have a section `sweep`, that of the last counts.

    Raises:
        UserError: as `load_config`, or no file has a section `sweep`, or a field of the section is wrong.
    """
    base = load_config(paths, aside=(SECTION,))
    said = [words for words in map(read_words, paths) if SECTION in words.values]
    section = (said[-1].values[SECTION] or {}) if said else None
    if not isinstance(section, dict):
        raise UserError("no file has a section `sweep` of fields: see configs/sweep_example.yaml")
    known = [item.name for item in fields(SweepConfig)]
    for name in section:
        if name not in known:
            raise said[-1].wrong(f"{SECTION}.{name}", f"sweep has no field {name!r}{did_you_mean(name, known)}")
    over = section.get("over") or {}
    return SweepConfig(**(resolved(section) | {"over": over})), base


def contents(config: PipelineConfig) -> dict:
    """Hash the images and files that a configuration names, so that a job counts as done only for the same contents.

    Where a file cannot be read, the error's text stands in place of the hash; the job then fails with that error.

    Returns:
        "images" and each field of `GIVEN` -> a hash, a text of an error, or None where no file is named.
    """
    found: dict[str, object] = {"images": _images(config)}
    for name in GIVEN:
        path = getattr(config, name)
        try:
            with told(path, "read"):
                found[name] = path and (sha256_folder(path) if path.is_dir() else sha256_file(path))
        except (UserError, MachineError) as error:
            found[name] = str(error)
    return found


def _images(config: PipelineConfig) -> str:
    from utils_data import get_unlearning_dataset

    place = config.output_dir / "datasets"
    how: dict[str, Any] = {"dataset_path": config.dataset_path, "datasets_dir": place, "data": config.data}
    try:
        return get_unlearning_dataset(config.vision_dataset, config.train.batch_size, **how).fingerprint()
    except (UserError, MachineError) as error:
        return str(error)


def expand(sweep: SweepConfig, base: PipelineConfig) -> list[Job]:
    """Make a job of each combination of the listed values, in the order written, each once.

    Raises:
        UserError: a field does not exist, or a value does not fit its field.
    """
    # Every source file counts: a job is skipped only if no file that could change its values has changed.
    code = whole_code(base.plugins)
    jobs: dict[str, Job] = {}
    known: dict[str, dict] = {}  # hashes by what is named: most jobs of a sweep name the same images and files
    for settings, config in combinations(sweep, base):
        what = plain(replace(config, output_dir=Path(), resume=False))
        places = key_of({name: what[name] for name in ("vision_dataset", "dataset_path", "data", *GIVEN)})
        known[places] = known.get(places) or contents(config)
        key = key_of({"config": what, "contents": known[places], "code": code, "versions": versions()})
        jobs.setdefault(key, Job(resolved(settings, exactly=True), config, key, code))
    return list(jobs.values())


def planned(
    paths: Sequence[Path], plugins: Sequence[Path], machines: int | None, workers: int | None
) -> tuple[list[PipelineConfig], int, int, int | None]:
    """Return the runs that files ask for, machines, workers on each, and the threads of a job (None: its own choice).

    Raises:
        UserError: machines or workers are named, but no file has a section `sweep`; or as `load_sweep`.
    """
    if not any(SECTION in read_words(path).values for path in paths):
        for name, value in (("machines", machines), ("workers", workers)):
            if value not in (None, 1):
                raise UserError(f"--{name} is {value}, but no file has a section `sweep`: a run is foreseen on one")
        base = load_config(paths)
        return [replace(base, plugins=(*base.plugins, *plugins))], 1, 1, None
    sweep, base = load_sweep(paths)
    base = replace(base, plugins=(*base.plugins, *plugins))
    each = workers or sweep.workers
    configs = [config for _, config in combinations(sweep, base)]
    return configs, machines or 1, each, threads_of(each) if sweep.executor == "local" else None


def combinations(sweep: SweepConfig, base: PipelineConfig) -> Iterator[tuple[dict[str, Any], PipelineConfig]]:
    """Yield each combination of the listed values, in the order written, with the configuration that it makes."""
    for values in product(*sweep.over.values()):
        settings = dict(zip(sweep.over, values, strict=True))
        yield settings, _typed(base, settings)


def finished(job: Job) -> dict | None:
    """Return the outcome that a job left, if it ended well and its records are still whole; else None."""
    if not job.path.exists():
        return None
    try:
        outcome = read_json(job.path)
        if outcome.get("key") != job.key or outcome.get("status") != "done":
            return None
        for path in outcome["records"]:
            if read_whole(job.config.output_dir, job.config.output_dir / path) is None:
                return None
    except DamagedError as error:
        log(f"sweep: {error.found}, so that the job is done again")
        return None
    return outcome


def run_job(job: Job, threads: int | None = None) -> dict:
    """Carry out a job in this process; write its outcome to the job's file and return it. Exceptions become outcomes.

    Args:
        threads: of torch; None leaves torch's own number.
    """
    import torch

    from core.records import record_path
    from pipeline import Pipeline

    if threads:
        torch.set_num_threads(threads)
    begun = time.time()
    outcome: dict[str, Any] = {"key": job.key, "settings": plain_settings(job), "status": "failed", "records": []}
    try:
        check_same_code(job.code, job.config.plugins)
        with running(job.config.output_dir):
            pipeline = Pipeline(job.config)
            pipeline.prepare_process()
            if job.speaks:
                pipeline.preflight()
            records = pipeline.eval()
        root = job.config.output_dir
        outcome["records"] = [str(record_path(root, record).relative_to(root)) for record in records]
        outcome["status"] = "done"
    except Exception as error:
        outcome["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return _leave(job, outcome | {"seconds": time.time() - begun})


def plain_settings(job: Job) -> dict[str, Any]:
    """Return a job's settings as JSON types."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in job.settings.items()}


def _leave(job: Job, outcome: dict) -> dict:
    """Write an outcome to the job's file; return it."""
    write_json(job.path, outcome)
    return outcome


# --- the whole --------------------------------------------------------------------------------------------


def run_sweep(sweep: SweepConfig, base: PipelineConfig) -> list[tuple[Job, dict]]:
    """Carry out the jobs that are missing or failed; return every job with its outcome, in order.

    Raises:
        UserError: a field or a value does not fit, or the engine is not installed or refuses the jobs.
    """
    jobs = expand(sweep, base)
    outcomes = {job.key: outcome for job in jobs if (outcome := finished(job))}
    todo = [job for job in jobs if job.key not in outcomes]
    todo = [replace(job, speaks=job is todo[0]) for job in todo]
    log(f"sweep: {len(jobs)} jobs, {len(outcomes)} of them are there already")
    if todo:
        with running(base.output_dir):  # clean.sh then keeps off
            outcomes |= {job.key: outcome for job, outcome in carry_out(todo, sweep, "sweep")}
    return [(job, outcomes[job.key]) for job in jobs]


def table(ended: list[tuple[Job, dict]]) -> str:
    """Return a Markdown table with one row for each job."""
    rows = [[*ended[0][0].settings, "status", "seconds", "records or error"]]
    for job, outcome in ended:
        last = outcome.get("error") or str(len(outcome["records"]))
        values = [str(value) for value in job.settings.values()]
        rows.append([*values, outcome["status"], f"{outcome['seconds']:.1f}", last])
    return as_text(rows).removesuffix("\n")


def scores(ended: list[tuple[Job, dict]], width: int) -> list[str]:
    """Return the scores of the jobs that are done: for each family of runs what it is of, and a table for a terminal.

    Args:
        width: columns of the terminal.
    """
    done = [(job.config.output_dir, path) for job, outcome in ended for path in outcome["records"]]
    groups = families(runs_of(read_record(root, root / path) for root, path in dict.fromkeys(done)))
    return [
        f"{caption(*runs, apart=apart)}\n\n{scores_table(runs, width)}"
        for runs, apart in zip(groups, told_apart(groups), strict=True)
    ]
