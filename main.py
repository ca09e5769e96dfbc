"""Command line of MIMU: `uv run main.py COMMAND [flags]`; without a command it runs the pipeline.

    uv run main.py                                   the default run: DIGITS, forget class 0
    uv run main.py run --config configs/X.yaml ...   a run; --config repeats, flags win over files
    uv run main.py run --methods all --metrics all   every rival and every metric (docs/methods.md, docs/metrics.md)
    uv run main.py run --quiet --json                nothing on stderr, one JSON object on stdout
    uv run main.py report --compare A B ...          which of two or more runs (or output folders) is better on what

Exit codes: 0 done, 1 a stage failed (or `kappa: auto` met its target nowhere), 2 wrong usage, configuration or data,
130 interrupted, 141 nobody reads what it says (a closed pipe).
"""

import errno
import io
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from dotenv import load_dotenv

from commands import forget, inspect, library, masks, report, run
from commands.command_line import Environment, call, show
from core.choices import MachineError
from core.config import PROJECT_ROOT, UserError

COMMANDS: dict[str, Callable[..., int | None]] = {
    "run": run.run,
    "sweep": run.sweep,
    "plan": run.plan,
    "train-gcn": run.train_gcn,
    "demo": run.demo,
    "report": report.report,
    "leaderboard": report.leaderboard,
    "docs": report.docs,
    "dashboard": report.dashboard,
    "datasets": report.datasets,
    "download": report.download,
    "prepare": report.prepare,
    "inspect": inspect.inspect,
    "forget": forget.forget,
    "library": library.library,
    "verify": masks.verify,
    "certificate": masks.certificate,
    "seal": masks.seal,
    "restore": masks.restore,
    "compose": masks.compose,
}
"""Name -> function. A new command is one line here and a function in `commands/`, whose parameters are its flags."""
SPIN_COUNT = "30000"
"""How often a thread of GNU OpenMP looks for new work before it sleeps: 0.3 ms. The library's own 300,000 are a whole
time slice, which a thread that waits takes from the one it waits for as soon as other processes are busy. Fewer cost
speed on an idle machine, where waking a thread takes longer than the next piece of work is away."""


def set_library_defaults() -> None:
    """Set what native libraries read from the environment when they are loaded, unless the user has set it.

    Call it before numpy and torch are imported. Processes that are started from here inherit it.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, sums on a GPU differ from run to run
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    if "OMP_NUM_THREADS" not in os.environ:
        # What numpy and scipy compute here is small (probes, intervals). On a busy machine threads would take turns.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def _trackio_folder(output_dir: Path) -> Path:
    """Return the folder of trackio's runs: TRACKIO_DIR if it is set, else a folder below the output folder.

    TRACKIO_DIR then names it, for this process and those that it starts; trackio reads it when it is imported.
    """
    return Path(os.environ.setdefault("TRACKIO_DIR", str((output_dir / "observability").resolve())))


def _environment() -> Environment:
    """Read from the environment what commands need to know."""
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    return Environment(_trackio_folder, torchrun, restarted=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0")


def _usable_streams() -> None:
    """Open /dev/null for each closed stream, and let a stream write the number of a character that it cannot show."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            _lead_nowhere(number)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
        elif number and isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _lead_nowhere(number: int) -> None:
    """Let a file descriptor read from and write to /dev/null."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)


def _nobody_reads() -> bool:
    """Tell whether the reader of stdout or stderr has closed its end of a pipe; both then lead to /dev/null."""
    for number in (1, 2):
        watch = select.poll()
        watch.register(number, 0)
        if any(event & select.POLLERR for _, event in watch.poll(0)):
            _lead_nowhere(1)
            _lead_nowhere(2)
            return True
    return False


def main(arguments: list[str]) -> int:
    """Run one command; returns the exit code."""
    _usable_streams()
    load_dotenv(PROJECT_ROOT / ".env")
    set_library_defaults()
    try:
        try:
            return _command(arguments)
        finally:
            sys.stdout.flush()
    except UserError as error:
        show(f"error: {error}", file=sys.stderr)
        return 2
    except MachineError as error:
        show(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        show("interrupted: finished stages are kept, the next run goes on from there", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            show("error: no space for what the command prints: let it print elsewhere", file=sys.stderr)
            _lead_nowhere(1)
            return 1
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 128 + signal.SIGPIPE
        if isinstance(error, OSError) and (said := _of_the_machine(error)):
            show(f"error: {said}", file=sys.stderr)
            return 1 if isinstance(said, MachineError) else 2
        import traceback

        traceback.print_exc()
        show(f"error: a stage failed ({type(error).__name__}: {error}); finished stages are kept", file=sys.stderr)
        return 1


def _of_the_machine(error: OSError) -> Exception | None:
    """Turn an error of the disk, or of a limit of the system, into one sentence; return None for any other error."""
    from core.artifacts import ADVICE, trouble

    known = isinstance(error.filename, str) and error.errno in ADVICE
    return trouble(Path(error.filename), error, "use") if known else None


def _command(arguments: list[str]) -> int:
    """Carry out the command that the arguments begin with; returns its exit code."""
    name, words = ("run", arguments) if not arguments or arguments[0].startswith("-") else (arguments[0], arguments[1:])
    if arguments[:1] in (["-h"], ["--help"]):
        print(_overview())
    if name not in COMMANDS:
        raise UserError(f"there is no command {name!r}: choose from {', '.join(COMMANDS)}")
    return call(COMMANDS[name], words, name, _environment())


def _overview() -> str:
    """Describe the program, and every command by the first line of its docstring."""
    summaries = {name: (command.__doc__ or "").partition("\n")[0] for name, command in COMMANDS.items()}
    lines = [f"    uv run main.py {name:<{max(map(len, summaries))}} {summary}" for name, summary in summaries.items()]
    head = "Commands, each with a --help of its own (that of `run` follows here):"
    return "\n".join([__doc__ or "", head, "", *lines, ""])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
