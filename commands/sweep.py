"""Many runs from one file: lists over any field become jobs, which an existing engine carries out.

    uv run main.py sweep --config configs/sweep_example.yaml

A job is a whole `PipelineConfig`. Stages that jobs share are made once, under a lock, by whoever comes first. Each
finished job leaves one JSON file; a second call does only what is missing or failed.
"""

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from core.artifacts import DamagedError, read_json, told, write_json
from core.choices import MachineError, did_you_mean
from core.config import GIVEN, PROJECT_ROOT, PipelineConfig, UserError, plain
from core.hashes import check_same_code, key_of, sha256_file, versions, whole_code
from core.observe import log
from core.records import read_whole
from core.store import running, sha256_folder
from core.yaml_files import load_config, read_words, resolved, typed
from reporting.write import as_text
from training.processes import end_with_parent

SECTION = "sweep"
SWEEPS = Path("eval/sweeps")
SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True)
class SweepConfig:
    """How jobs are made and carried out: the section `sweep` of a configuration file."""

    over: dict[str, list]
    """Field (dotted, as on the command line) -> its values; jobs are all combinations."""
    executor: str = "local"
    """local (processes of this machine), slurm (submitit) or ray."""
    workers: int = 2
    """Jobs at the same time; local and ray share this machine's cores out among them."""
    slurm: dict[str, Any] = field(default_factory=dict)
    """Parameters of submitit's executor, e.g. slurm_partition, timeout_min; cluster: local tries it without Slurm."""

    def __post_init__(self) -> None:
        if not isinstance(self.over, dict) or not self.over:
            raise UserError("sweep.over names no field: give at least one with a list of values, e.g. seed: [0, 1]")
        bad = [name for name, values in self.over.items() if not isinstance(values, list) or not values]
        if bad:
            raise UserError(f"sweep.over.{bad[0]} is no list of values: write it as [value, value]")
        if self.executor not in EXECUTORS:
            raise UserError(f"sweep.executor is {self.executor}: choose from {', '.join(EXECUTORS)}")
        if not isinstance(self.workers, int) or self.workers < 1:
            raise UserError(f"sweep.workers is {self.workers}: give a number >= 1")


@dataclass(frozen=True)
class Job:
    """One run of a sweep: what is special about it, its configuration, and the file that says how it ended."""

    settings: dict[str, Any]
    config: PipelineConfig
    key: str
    code: str
    speaks: bool = False
    """Whether it says what it understood: one of a sweep does, as all start from one file."""

    @property
    def path(self) -> Path:
        return self.config.output_dir / SWEEPS / f"{self.key[:16]}.json"

    @property
    def label(self) -> str:
        """Its settings, for people."""
        return ", ".join(f"{name} {value}" for name, value in self.settings.items())


# --- jobs -------------------------------------------------------------------------------------------------


def _typed(config: PipelineConfig, settings: dict[str, Any]) -> PipelineConfig:
    """The configuration with some fields replaced; values are checked as those of a file are."""
    for name, value in settings.items():
        nested: Any = value
        for part in reversed(name.split(".")):
            nested = {part: nested}
        if isinstance(value, dict):
            raise UserError(f"sweep.over.{name} holds {value}, fields of a section: name each field by itself")
        config = _changed(config, typed(nested, lambda _, text: UserError(f"sweep.over: {text}")))
    return config


def _changed(config: Any, values: dict[str, Any]) -> Any:
    """A frozen configuration with some fields replaced, those of its sections too."""
    inner = {
        name: _changed(getattr(config, name), value) if isinstance(value, dict) else value
        for name, value in values.items()
    }
    return replace(config, **inner)


def load_sweep(paths: Sequence[Path]) -> tuple[SweepConfig, PipelineConfig]:
    """The section `sweep` (the last file's that has one) and the configuration that all jobs start from.

    Raises:
        UserError: as `load_config`, or there is no such section, or it does not fit.
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
    """What lies behind the paths of a configuration, by hash: a job is the same only if nothing there has changed.

    What cannot be read is told by the error; the job that meets it says it as its own.
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
    """All combinations, in the order written, each once.

    Raises:
        UserError: a field or a value does not exist.
    """
    # Every source file counts: a job is skipped only if nothing that could move its numbers has changed.
    code = whole_code()
    jobs: dict[str, Job] = {}
    known: dict[str, dict] = {}  # jobs of a sweep share their images and files, mostly
    for values in product(*sweep.over.values()):
        settings = dict(zip(sweep.over, values, strict=True))
        config = _typed(base, settings)
        what = plain(replace(config, output_dir=Path(), resume=False))
        places = key_of({name: what[name] for name in ("vision_dataset", "dataset_path", "data", *GIVEN)})
        known[places] = known.get(places) or contents(config)
        key = key_of({"config": what, "contents": known[places], "code": code, "versions": versions()})
        jobs.setdefault(key, Job(resolved(settings, exactly=True), config, key, code))
    return list(jobs.values())


def finished(job: Job) -> dict | None:
    """What a job left, if it was done and its records are still there."""
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
    """Carry a job out, in whatever process; returns, and leaves, its outcome. No exception leaves it."""
    import torch

    from core.records import record_path
    from pipeline import Pipeline

    if threads:
        torch.set_num_threads(threads)
    begun = time.time()
    outcome: dict[str, Any] = {"key": job.key, "settings": plain_settings(job), "status": "failed", "records": []}
    try:
        check_same_code(job.code)
        with running(job.config.output_dir):
            pipeline = Pipeline(job.config)
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
    """A job's settings as JSON types."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in job.settings.items()}


def _leave(job: Job, outcome: dict) -> dict:
    write_json(job.path, outcome)
    return outcome


def _lost(job: Job, error: str) -> dict:
    """The outcome of a job whose process could not tell."""
    outcome = {"key": job.key, "settings": plain_settings(job), "status": "failed", "records": [], "error": error}
    return _leave(job, outcome | {"seconds": 0.0})


# --- executors: each yields (job, outcome) as jobs end ----------------------------------------------------

Outcomes = Iterator[tuple[Job, dict]]


def _threads(workers: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // workers)


def _pool(jobs: list[Job], workers: int, threads: int) -> Outcomes:
    """Jobs in a pool of processes; those whose pool broke are left out."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.fork_server", "torch"])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent)
    try:
        futures = {pool.submit(run_job, job, threads): job for job in jobs}
        for future in as_completed(futures):
            if not isinstance(future.exception(), BrokenProcessPool):
                yield futures[future], future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def local(jobs: list[Job], sweep: SweepConfig) -> Outcomes:
    """A pool of processes. One that is killed breaks its pool: what it had left runs again, one job a pool."""
    workers = min(sweep.workers, len(jobs))
    done = set()
    for job, outcome in _pool(jobs, workers, _threads(workers)):
        done.add(job.key)
        yield job, outcome
    for job in jobs:
        if job.key not in done:
            ended = list(_pool([job], 1, _threads(1)))
            yield ended[0] if ended else (job, _lost(job, "its process died (killed, or out of memory)"))


def _import(name: str, extra: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise UserError(f"sweep.executor needs {name}, which is not here: uv sync --extra {extra}") from None


def slurm(jobs: list[Job], sweep: SweepConfig) -> Outcomes:
    """A Slurm array by submitit, at most `workers` jobs at once."""
    submitit = _import("submitit", "slurm")
    if Path.cwd() != PROJECT_ROOT:
        raise UserError(f"jobs of Slurm start where they were sent from: call this in {PROJECT_ROOT}")
    parameters = dict(sweep.slurm)
    cluster = parameters.pop("cluster", "slurm")
    try:
        folder = jobs[0].config.output_dir / SWEEPS / "slurm"
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        limit = {"slurm_array_parallelism": sweep.workers} if cluster == "slurm" else {}
        executor.update_parameters(name="mimu", **limit, **parameters)
        handed = executor.map_array(run_job, jobs)
    except (RuntimeError, ValueError, NameError, TypeError, submitit.core.utils.FailedSubmissionError) as error:
        raise UserError(f"Slurm does not take the jobs ({' '.join(str(error).split())}): see sweep.slurm") from None
    waiting = dict(zip(handed, jobs, strict=True))
    while waiting:
        for task in [task for task in waiting if task.done()]:
            job, error = waiting.pop(task), task.exception()
            yield job, (task.result() if error is None else _lost(job, " ".join(str(error).split())[-300:]))
        time.sleep(0.2)


def ray(jobs: list[Job], sweep: SweepConfig) -> Outcomes:
    """Tasks of Ray: of the cluster it is told of, or of one that it starts on this machine."""
    engine = _import("ray", "ray")
    workers = min(sweep.workers, len(jobs))
    engine.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        task = engine.remote(num_cpus=1, max_retries=0)(run_job)
        waiting = {task.remote(job, _threads(workers)): job for job in jobs}
        while waiting:
            (ended, *_), _ = engine.wait(list(waiting), num_returns=1)
            job = waiting.pop(ended)
            try:
                outcome = engine.get(ended)
            except engine.exceptions.RayError as error:
                outcome = _lost(job, " ".join(str(error).split())[:300])
            yield job, outcome
    finally:
        engine.shutdown()


EXECUTORS = {"local": local, "slurm": slurm, "ray": ray}


# --- the whole --------------------------------------------------------------------------------------------


def _carried_out(jobs: list[Job], sweep: SweepConfig, output_dir: Path) -> Outcomes:
    """Jobs as they end; the output folder is marked as one in which a run works."""
    with running(output_dir):
        yield from EXECUTORS[sweep.executor](jobs, sweep)


def progress_line(done: int, failed: int, left: int, workers: int, seconds: float) -> str:
    """Where a sweep stands; the estimate takes the rest to go as fast as what has ended."""
    running = min(workers, left)
    ended = done + failed
    rest = f", about {seconds / ended * left:.0f} s to go" if ended and left else ""
    return f"sweep: {done} done, {running} running, {failed} failed, {left - running} left{rest}"


def run_sweep(sweep: SweepConfig, base: PipelineConfig) -> list[tuple[Job, dict]]:
    """Carry out what is missing; returns every job with its outcome, in order.

    Raises:
        UserError: the sweep cannot be run as it is written.
    """
    jobs = expand(sweep, base)
    outcomes = {job.key: outcome for job in jobs if (outcome := finished(job))}
    todo = [job for job in jobs if job.key not in outcomes]
    todo = [replace(job, speaks=job is todo[0]) for job in todo]
    log(f"sweep: {len(jobs)} jobs, {len(outcomes)} of them are there already")
    begun, said, done, failed = time.monotonic(), -SECONDS_BETWEEN_LINES, 0, 0
    for job, outcome in _carried_out(todo, sweep, base.output_dir) if todo else ():
        outcomes[job.key] = outcome
        failed, done = failed + (outcome["status"] == "failed"), done + (outcome["status"] == "done")
        left = len(todo) - done - failed
        if outcome["status"] == "failed":
            log(f"sweep: failed: {job.label}: {outcome['error']}")
        if time.monotonic() - said > SECONDS_BETWEEN_LINES or not left:
            said = time.monotonic()
            log(progress_line(done, failed, left, sweep.workers, said - begun))
    return [(job, outcomes[job.key]) for job in jobs]


def table(ended: list[tuple[Job, dict]]) -> str:
    """One row a job, Markdown."""
    rows = [[*ended[0][0].settings, "status", "seconds", "records or error"]]
    for job, outcome in ended:
        last = outcome.get("error") or str(len(outcome["records"]))
        values = [str(value) for value in job.settings.values()]
        rows.append([*values, outcome["status"], f"{outcome['seconds']:.1f}", last])
    return as_text(rows).removesuffix("\n")
