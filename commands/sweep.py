"""Many runs from one file: lists of values for any field become jobs, carried out by processes here, Slurm or Ray.

    uv run main.py sweep --config configs/sweep_example.yaml

A job is a whole `PipelineConfig`. A stage that several jobs share is made once: the first job takes a lock, the others
wait for its product. Each finished job leaves one JSON file; a second call runs only jobs that are missing or failed.
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
        if "plugins" in self.over:
            raise UserError("sweep.over.plugins: name plugins once, for all jobs, as `plugins: [FILE]` at the margin")
        if self.executor not in EXECUTORS:
            raise UserError(f"sweep.executor is {self.executor}: choose from {', '.join(EXECUTORS)}")
        if not isinstance(self.workers, int) or self.workers < 1:
            raise UserError(f"sweep.workers is {self.workers}: give a number >= 1")


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
        return self.config.output_dir / SWEEPS / f"{self.key[:16]}.json"

    @property
    def label(self) -> str:
        """The job's settings in one line of text."""
        return ", ".join(f"{name} {value}" for name, value in self.settings.items())


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


def _lost(job: Job, error: str) -> dict:
    """Write and return the outcome of a job whose process died before it could."""
    outcome = {"key": job.key, "settings": plain_settings(job), "status": "failed", "records": [], "error": error}
    return _leave(job, outcome | {"seconds": 0.0})


# --- executors: each yields (job, outcome) as jobs end ----------------------------------------------------

Outcomes = Iterator[tuple[Job, dict]]


def _threads(workers: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // workers)


def _pool(jobs: list[Job], workers: int, threads: int) -> Outcomes:
    """Carry out jobs in a pool of processes; jobs that had not ended when a process died are left out."""
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
    """Carry out jobs in a pool of processes on this machine.

    A process that is killed breaks the whole pool. The jobs that were left run again, each in a pool of its own, so
    that only the job that kills its process fails.
    """
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
    """Carry out jobs as a Slurm array, by submitit, at most `workers` at once."""
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
    """Carry out jobs as tasks of Ray, on the cluster that Ray is connected to, or else on this machine."""
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
    """Yield jobs as they end, with the output folder marked as one in which a run works (clean.sh then keeps off)."""
    with running(output_dir):
        yield from EXECUTORS[sweep.executor](jobs, sweep)


def progress_line(done: int, failed: int, left: int, workers: int, seconds: float) -> str:
    """Say how far a sweep is; the estimate assumes that the jobs left take as long as those that have ended."""
    running = min(workers, left)
    ended = done + failed
    rest = f", about {seconds / ended * left:.0f} s to go" if ended and left else ""
    return f"sweep: {done} done, {running} running, {failed} failed, {left - running} left{rest}"


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
    """Return a Markdown table with one row for each job."""
    rows = [[*ended[0][0].settings, "status", "seconds", "records or error"]]
    for job, outcome in ended:
        last = outcome.get("error") or str(len(outcome["records"]))
        values = [str(value) for value in job.settings.values()]
        rows.append([*values, outcome["status"], f"{outcome['seconds']:.1f}", last])
    return as_text(rows).removesuffix("\n")
