"""Train in several processes: start them or join torchrun's, share batches, sum and average.

Existing engines only: torch elastic starts and watches the processes, gloo (CPU) or nccl (GPU) joins them.
The plain and the parallel training are one loop: a `Group` of one process does nothing in every operation.
"""

import json
import logging
import math
import multiprocessing
import os
import signal
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, record
from torch.distributed.elastic.utils import get_env_variable_or_raise
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Sampler

from core.choices import Diverged, MachineError, UserError
from core.hashes import check_same_code, load_plugins, loaded_plugins, whole_code
from core.observe import be_quiet, is_quiet, log
from training.processes import end_with_parent, reuse_freed_memory
from training.threads import choose_threads

PRELOAD = [
    "training.fork_server",
    "numpy",
    "torch",
    "torch._dynamo",
    "torch.nn.parallel",
    "torch.distributed",
    "torch.utils.data",
]
GRACE = 5.0  # seconds that a worker with a lost peer waits, so that the peer's own failure is the one that is reported
NO_FORKSERVER = 255  # what multiprocessing tells of a worker when the fork server, which knew its exit code, is gone
JOIN_SECONDS = 60  # for all processes to find each other


class Slices(Sampler):
    """Every `world`-th index of each global batch, from `rank` on; exact, where DistributedSampler repeats images.

    A batch smaller than `world` leaves some ranks without an image. With `keep_empty` they get one all the same, to
    which the caller gives no weight: every rank must take every step.
    """

    def __init__(self, batches: Any, rank: int, world: int, keep_empty: bool):
        self.batches, self.rank, self.world, self.keep_empty = batches, rank, world, keep_empty

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            own = batch[self.rank :: self.world]
            if own or self.keep_empty:
                yield own or batch[:1]


@dataclass(frozen=True)
class Group:
    """The processes of one training, and this one's place among them; alone, nothing is exchanged."""

    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that tracks, prints and writes."""
        return self.rank == 0

    def shard(self, loader: DataLoader, keep_empty: bool = True) -> DataLoader:
        """Return a loader of this process's slices of the same global batches, in the same order."""
        if self.world == 1:
            return loader
        slices = Slices(loader.batch_sampler, self.rank, self.world, keep_empty)
        return DataLoader(
            loader.dataset,
            batch_sampler=slices,
            generator=loader.generator,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
        )

    def share(self, size: int) -> int:
        """Return how many images of a global batch of `size` are this process's."""
        return len(range(self.rank, size, self.world))

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model with its gradients averaged over all processes; they start from rank 0's weights."""
        if self.world == 1:
            return model
        with warnings.catch_warnings():  # the newer name of this argument is unknown to older versions
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def average_buffers(self, model: nn.Module) -> None:
        """Let all processes have the mean of their running statistics (BatchNorm's)."""
        if self.world > 1:
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.sum(buffer.detach().clone()) / self.world)

    def barrier(self) -> None:
        """Wait for all processes."""
        self.sum(torch.zeros(1, device="cuda" if self.world > 1 and dist.get_backend() == "nccl" else "cpu"))


ALONE = Group()


# --- joining ----------------------------------------------------------------------------------------------


def by_torchrun() -> bool:
    """Return whether torchrun started this process, so that none must be started from here."""
    return dist.is_torchelastic_launched()


def _attempt() -> int:
    """Return how often torchrun has restarted its processes; its store still holds the earlier addresses."""
    return int(get_env_variable_or_raise("TORCHELASTIC_RESTART_COUNT")) if by_torchrun() else 0


@dataclass
class Meeting:
    """This process's group, and the store through which rank 0 says what is next."""

    group: Group
    store: dist.Store
    jobs: int = 0

    def announce(self, job: dict | None) -> None:
        """Rank 0: tell all others what to take part in next (None: nothing more)."""
        self.store.set(f"job-{self.jobs}", json.dumps(job))
        self.jobs += 1

    def next_job(self) -> dict | None:
        """All other ranks: wait, as long as it takes, for the job that rank 0 announces."""
        while True:
            try:
                self.store.wait([f"job-{self.jobs}"], timedelta(seconds=JOIN_SECONDS))
            except dist.DistNetworkError:
                raise
            except dist.DistStoreError:  # nothing yet
                continue
            self.jobs += 1
            return json.loads(self.store.get(f"job-{self.jobs - 1}"))


def meet(device: torch.device, seconds: float, join_seconds: float = JOIN_SECONDS) -> Meeting:
    """Meet the other processes at the address in the environment.

    Args:
        seconds: how long one exchange between them may take before it counts as failed.
        join_seconds: how long to wait for all of them.

    Raises:
        UserError: they are not found in time, or the network interface is not there.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=join_seconds)))
        store.set_timeout(timedelta(seconds=join_seconds))
        limit = timedelta(seconds=seconds)
        store = dist.PrefixStore(f"attempt-{_attempt()}", store)
        own = dist.PrefixStore("group", store)
        dist.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=limit)
        group = Group(rank, world)
        group.barrier()  # connect now, not in the first step
    except (RuntimeError, ValueError) as error:  # torch.distributed's own errors are RuntimeErrors
        what = " ".join(str(error).split())[:300]
        raise UserError(
            f"the processes of train.use_ddp do not find each other ({what}): check the master's address and port, and "
            "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME if they are set"
        ) from None
    return Meeting(group, store)


@lru_cache
def torchrun_meeting(device: torch.device, seconds: float) -> Meeting:
    """Call `meet` once in the life of a process that torchrun started."""
    return meet(device, seconds)


def leave_group() -> None:
    """Leave the group of processes, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    """Return the device that a configuration names.

    Raises:
        UserError: it is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device is {name}, but {torch.cuda.device_count()} CUDA devices are here: use --device auto")
    return device


def make_repeatable(device: torch.device) -> None:
    """Ask for algorithms that give the same result each time, process-wide, where PyTorch has them.

    On a CPU all that is used here gives it anyway, so that nothing is set: its results stay what they were. On a GPU
    an operation without such an algorithm warns. cuBLAS needs CUBLAS_WORKSPACE_CONFIG besides, which `main` sets.
    There float32 is float32 as well: cuDNN would round the factors of convolutions to TF32's 10 bits, and masks rest on
    small differences of gradients. `train.bf16` is for who wants speed instead.
    """
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        torch.use_deterministic_algorithms(True, warn_only=True)
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 - a property of the module


def prepare_process(device: torch.device, multiplications: float = math.inf) -> None:
    """Set what holds for a whole process that trains and measures on a device: for programs, never in a constructor.

    Freed memory is kept for the next tensors, a small network on a CPU takes one thread, and a GPU takes algorithms
    that repeat. With one thread, sums are added up in another order than with several.

    Args:
        multiplications: of the network's forward pass, for one batch.
    """
    reuse_freed_memory()
    choose_threads(device, multiplications)
    make_repeatable(device)


def repeatability(device: torch.device) -> str:
    """Return what a second run on this device can be expected to give, for records."""
    if device.type == "cuda":
        which = "deterministic" if torch.are_deterministic_algorithms_enabled() else "the fastest"
        name = torch.cuda.get_device_name(device)
        return f"{name}, {which} algorithms where PyTorch has them: not tested, last digits may differ"
    threads = torch.get_num_threads()
    return f"the same to the bit on this processor with {threads} thread{'s' if threads > 1 else ''}"


def local_device(device: torch.device) -> torch.device:
    """Return this process's device: the GPU of its local rank.

    Raises:
        UserError: there are fewer GPUs than processes.
    """
    if device.type != "cuda":
        return device
    place = dist.get_node_local_rank(0)
    if place >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} GPUs are here for {place + 1} or more processes"
        raise UserError(f"{found}: lower train.num_workers (or torchrun's --nproc-per-node)")
    torch.cuda.set_device(place)
    return torch.device("cuda", place)


# --- starting ---------------------------------------------------------------------------------------------


def _lost_a_peer(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error)


class Plugins:
    """Plugins that a started process imports as soon as it reads this, before the classifier that they may define."""

    def __init__(self, paths: tuple[Path, ...]):
        load_plugins(paths)
        self._paths = paths

    def __reduce__(self) -> tuple[Any, ...]:
        return Plugins, (self._paths,)


@record
def _worker(
    _: "Plugins",
    function: Callable[..., dict],
    code: str,
    device: torch.device,
    threads: int,
    quiet: bool,
    seconds: float,
    *given: Any,
) -> dict:
    """Run in each started process: check that the code is the launcher's, join the group, work, leave.

    The plugins come first, because the arguments are read in order, and later ones may need them.
    """
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches the whole terminal: go without a traceback
    torch.set_num_threads(threads)
    be_quiet(quiet)
    check_same_code(code, loaded_plugins())
    try:
        own = local_device(device)
        prepare_process(own)
        return function(meet(own, seconds).group, own, *given)
    except RuntimeError as error:
        if _lost_a_peer(error):
            time.sleep(GRACE)
        raise
    finally:
        leave_group()


@contextmanager
def _handlers_kept() -> Generator[None]:
    """Restore, after the block, the signal handlers that torch elastic replaces."""
    try:
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


@contextmanager
def _quiet() -> Generator[None]:
    """Silence torch elastic's own log, so that a failure is reported once, in one line."""
    loggers = [logging.getLogger(name) for name in ("torch.distributed.elastic", "torch.multiprocessing")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _launch_once(function: Callable[..., dict], worker: tuple, workers: int) -> dict:
    """Start the processes, wait for them, return rank 0's result."""
    with tempfile.TemporaryDirectory(prefix="mimu-ddp-") as logs, _handlers_kept(), _quiet():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=workers,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            run_id=str(uuid.uuid4()),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            rdzv_configs={"timeout": JOIN_SECONDS},
            local_addr="localhost",
            max_restarts=0,
            monitor_interval=0.1,
            start_method="forkserver",
            signals_to_handle="SIGTERM,SIGINT,SIGHUP",
        )
        multiprocessing.set_forkserver_preload(PRELOAD)
        plugins = loaded_plugins()
        return elastic_launch(config, _worker)(Plugins(plugins), function, whole_code(plugins), *worker)[0]


def launch(
    function: Callable[..., dict],
    given: tuple,
    *,
    workers: int,
    device: torch.device,
    seconds: float,
    restarts: int,
    threads: int | None = None,
) -> dict:
    """Run `function(group, device, *given)` in `workers` new processes of this machine.

    Processes that were killed are started again, all of them, up to `restarts` times: `function` goes on from what it
    wrote. An exception in one of them is not tried again.

    Args:
        function: of a module, not of a class or a function. It may not ignore the end of this process: see
            `processes`.
        seconds: how long one exchange may take before it counts as failed.
        threads: of each process; by default this process's, shared out.

    Returns:
        What rank 0 returned.

    Raises:
        UserError: as a worker raised it. RuntimeError: any other failure, in one line.
        KeyboardInterrupt, SystemExit: this process got SIGINT or SIGTERM; no worker is left.
    """
    threads = threads or max(1, torch.get_num_threads() // workers)
    for tries_left in range(restarts, -1, -1):
        try:
            return _launch_once(function, (device, threads, is_quiet(), seconds, *given), workers)
        except SignalException as error:
            if error.sigval is signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + error.sigval) from None
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode == -signal.SIGINT:
                raise KeyboardInterrupt from None
            alone = failure.exitcode == NO_FORKSERVER
            who = "the process that starts the workers" if alone else f"worker {rank} of {workers}"
            why = "killed, or out of memory" if alone else failure.signal_name()
            if not (alone or failure.exitcode < 0) or not tries_left:
                raise RuntimeError(f"{who} died ({why})") if alone else _one_line(rank, failure) from None
            log(f"{who} died ({why}): all start again from the last state")
        except (EOFError, ConnectionError) as error:  # the fork server died while it was asked for a worker
            if not tries_left:
                raise RuntimeError(f"the process that starts the workers died ({_short(error)})") from None
            log(f"the process that starts the workers died ({_short(error)}): all start again from the last state")
    raise AssertionError


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__} {error}".split())


def _one_line(rank: int, failure: ProcessFailure) -> Exception:
    """Return a worker's failure as an exception of this process."""
    told: Any = failure.message  # text, or a mapping that holds it
    text = " ".join(str(told["message"] if isinstance(told, dict) else told).split())
    kind, _, rest = text.partition(": ")
    said = {error.__name__: error for error in (UserError, Diverged, MachineError)}
    return said[kind](rest) if kind in said else RuntimeError(f"worker {rank} failed: {text}")


def check_shared_memory(sets: Any) -> None:
    """See that the images of some sets fit into shared memory, through which workers read them without a copy.

    Raises:
        UserError: they do not; writing there would end this process with a bus error.
    """
    tensors = [value for part in sets for value in vars(part).values() if isinstance(value, Tensor)]
    needed = sum(tensor.nbytes for tensor in tensors if not tensor.is_shared())
    place = os.statvfs("/dev/shm")
    free = place.f_bavail * place.f_frsize
    if needed > free:
        raise UserError(
            f"the images take {math.ceil(needed / 2**20)} MB of shared memory, /dev/shm has {free // 2**20} MB free: "
            "enlarge it (docker run --shm-size), or train without train.use_ddp"
        )
