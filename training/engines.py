"""Many tasks at once, carried out by processes here, by Slurm or by Ray; each ends in an outcome of plain values."""

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from core.config import PROJECT_ROOT, UserError
from core.observe import log, seconds_left
from training.processes import end_with_parent

SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What carries tasks out."""

    executor: str = "local"
    """local (processes of this machine), slurm (submitit) or ray."""
    workers: int = 2
    """Jobs at the same time; local and ray share this machine's cores out among them."""
    slurm: dict[str, Any] = field(default_factory=dict)
    """Parameters of submitit's executor, e.g. slurm_partition, timeout_min; cluster: local tries it without Slurm."""

    def check(self, named: str) -> None:
        """See that the engine is one that there is.

        Args:
            named: how a field is written, e.g. "sweep.{}".

        Raises:
            UserError: it is not.
        """
        if self.executor not in EXECUTORS:
            raise UserError(f"{named.format('executor')} is {self.executor}: choose from {', '.join(EXECUTORS)}")
        if not isinstance(self.workers, int) or self.workers < 1:
            raise UserError(f"{named.format('workers')} is {self.workers}: give a number >= 1")


class Task(Protocol):
    """What an engine carries out; it is pickled to get there."""

    @property
    def label(self) -> str:
        """The task in a few words."""
        ...

    @property
    def folder(self) -> Path:
        """Where an engine may keep files of its own."""
        ...

    def run(self, threads: int | None = None) -> dict:
        """Carry the task out in this process; return its outcome, `status` "done" or "failed" (then with `error`).

        Args:
            threads: of torch; None leaves torch's own number.
        """
        ...

    def lost(self, error: str) -> dict:
        """Return the outcome of a task whose process died before it could."""
        ...


T = TypeVar("T", bound=Task)


def carry_out(tasks: Sequence[T], engine: Engine, word: str) -> Iterator[tuple[T, dict]]:
    """Yield each task with its outcome as it ends; failures and progress are logged, behind `word`."""
    said, done, failed, ends = -SECONDS_BETWEEN_LINES, 0, 0, [time.monotonic()]
    for task, outcome in EXECUTORS[engine.executor](tasks, engine) if tasks else ():
        failed, done = failed + (outcome["status"] == "failed"), done + (outcome["status"] == "done")
        left = len(tasks) - done - failed
        ends.append(time.monotonic())
        if outcome["status"] == "failed":
            log(f"{word}: failed: {task.label}: {outcome['error']}")
        if time.monotonic() - said > SECONDS_BETWEEN_LINES or not left:
            said = time.monotonic()
            log(f"{word}: {progress_line(done, failed, left, engine.workers, ends)}")
        yield task, outcome


def progress_line(done: int, failed: int, left: int, workers: int, ends: Sequence[float]) -> str:
    """Say how far tasks are, and how long those left will take.

    Tasks that run at the same time are a round. The first round makes what all tasks share, so that it is no measure of
    the others as soon as a second one has ended.

    Args:
        ends: when the work began and when each task ended, in seconds of any clock.
    """
    running, ended = min(workers, left), done + failed
    before = workers if ended >= 2 * workers else 0
    each = (ends[ended] - ends[before]) / (ended - before) if ended else 0.0
    rest = f", about {seconds_left(each * left)}" if ended and left else ""
    return f"{done} done, {running} running, {failed} failed, {left - running} waiting{rest}"


# --- executors: each yields (task, outcome) as tasks end --------------------------------------------------


def _run(task: Task, threads: int | None = None) -> dict:
    return task.run(threads)


def threads_of(workers: int) -> int:
    """Return how many threads each of so many processes on this machine gets."""
    return max(1, len(os.sched_getaffinity(0)) // workers)


def _pool(tasks: Sequence[T], workers: int, threads: int) -> Iterator[tuple[T, dict]]:
    """Carry out tasks in a pool of processes; tasks that had not ended when a process died are left out."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.fork_server", "torch"])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent)
    try:
        futures = {pool.submit(_run, task, threads): task for task in tasks}
        for future in as_completed(futures):
            if not isinstance(future.exception(), BrokenProcessPool):
                yield futures[future], future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def local(tasks: Sequence[T], engine: Engine) -> Iterator[tuple[T, dict]]:
    """Carry out tasks in a pool of processes on this machine.

    A process that is killed breaks the whole pool. The tasks that were left run again, each in a pool of its own, so
    that only the task that kills its process fails.
    """
    workers = min(engine.workers, len(tasks))
    done = set()
    for task, outcome in _pool(tasks, workers, threads_of(workers)):
        done.add(id(task))
        yield task, outcome
    for task in tasks:
        if id(task) not in done:
            ended = list(_pool([task], 1, threads_of(1)))
            yield ended[0] if ended else (task, task.lost("its process died (killed, or out of memory)"))


def _import(name: str, extra: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise UserError(f"this engine needs {name}, which is not here: uv sync --extra {extra}") from None


def slurm(tasks: Sequence[T], engine: Engine) -> Iterator[tuple[T, dict]]:
    """Carry out tasks as a Slurm array, by submitit, at most `workers` at once."""
    submitit = _import("submitit", "slurm")
    if Path.cwd() != PROJECT_ROOT:
        raise UserError(f"jobs of Slurm start where they were sent from: call this in {PROJECT_ROOT}")
    parameters = dict(engine.slurm)
    cluster = parameters.pop("cluster", "slurm")
    try:
        executor = submitit.AutoExecutor(folder=tasks[0].folder / "slurm", cluster=cluster)
        limit = {"slurm_array_parallelism": engine.workers} if cluster == "slurm" else {}
        executor.update_parameters(name="mimu", **limit, **parameters)
        handed = executor.map_array(_run, tasks)
    except (RuntimeError, ValueError, NameError, TypeError, submitit.core.utils.FailedSubmissionError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"Slurm does not take the jobs ({said}): see its parameters (sweep.slurm, --slurm)") from None
    waiting = dict(zip(handed, tasks, strict=True))
    while waiting:
        for sent in [sent for sent in waiting if sent.done()]:
            task, error = waiting.pop(sent), sent.exception()
            yield task, (sent.result() if error is None else task.lost(" ".join(str(error).split())[-300:]))
        time.sleep(0.2)


def ray(tasks: Sequence[T], engine: Engine) -> Iterator[tuple[T, dict]]:
    """Carry out tasks of Ray, on the cluster that Ray is connected to, or else on this machine."""
    found = _import("ray", "ray")
    workers = min(engine.workers, len(tasks))
    found.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        remote = found.remote(num_cpus=1, max_retries=0)(_run)
        waiting = {remote.remote(task, threads_of(workers)): task for task in tasks}
        while waiting:
            (ended, *_), _ = found.wait(list(waiting), num_returns=1)
            task = waiting.pop(ended)
            try:
                outcome = found.get(ended)
            except found.exceptions.RayError as error:
                outcome = task.lost(" ".join(str(error).split())[:300])
            yield task, outcome
    finally:
        found.shutdown()


EXECUTORS = {"local": local, "slurm": slurm, "ray": ray}
