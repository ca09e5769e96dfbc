"""Command line of MIMU.

    uv run main.py                                   the default run: DIGITS, forget class 0
    uv run main.py run --config configs/X.yaml ...   a run; --config repeats, flags win over files
    uv run main.py run --quiet --json ...            not a word on stderr; stdout is one JSON object
    uv run main.py run --methods all --metrics all   every rival and every metric (docs/methods.md, docs/metrics.md)
    uv run main.py sweep --config configs/X.yaml     many runs, lists over any field (local processes, Slurm, Ray)
    uv run main.py train-gcn --out FILE ...          train the GCN of a configuration into one file, for --gcn-path
    uv run main.py report [--output-dir DIR]         tables, figures and page again, from the JSON records alone
    uv run main.py report --compare A B ...          which of two or more runs (or output folders) is better on what
    uv run main.py docs [--example RECORD.json]      docs/methods.md and docs/metrics.md, from the registries
    uv run main.py dashboard [--output-dir DIR]      training curves in trackio
    uv run main.py datasets                          which datasets are here, and how to get the others
    uv run main.py download DATASET                  fetch a dataset (nothing else ever downloads)
    uv run main.py prepare DATASET                   unpack the archives of IMAGENET_SMALL and the like

Exit codes: 0 done, 1 a stage failed (or `kappa: auto` met its target nowhere), 2 wrong usage, configuration or data,
130 interrupted, 141 nobody reads what it says (a closed pipe).
"""

import errno
import io
import json
import os
import select
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TextIO

import tyro
import tyro.constructors
from dotenv import load_dotenv

from core.choices import Choice, MachineError, at_home, bare, fit, hints
from core.config import PROJECT_ROOT, PipelineConfig, ReporterConfig, SupportedDatasets, Trackers, UserError
from core.observe import be_quiet, visible
from core.yaml_files import load_config

EXAMPLES = {"--config": "configs/default.yaml", "--out": "gcn.safetensors"}
SHORT = {
    "--methods": "--eval.methods",
    "--metrics": "--eval.metrics",
    "--skip-bad-images": "--data.skip-bad-images",
}
SPIN_COUNT = "30000"
"""How often a thread of GNU OpenMP looks for new work before it sleeps: 0.3 ms. The library's own 300,000 are a whole
time slice, which a thread that waits takes from the one it waits for as soon as other processes are busy. Fewer cost
speed on an idle machine, where waking a thread takes longer than the next piece of work is away."""
DEFAULT_CONFIG = PROJECT_ROOT / "configs" / "default.yaml"


def set_library_defaults() -> None:
    """Set what native libraries read from the environment when torch loads them, unless the user has set it.

    Call it before torch is imported. Processes that are started from here inherit it.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, sums on a GPU differ from run to run
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def _say(text: object, file: TextIO | None = None) -> None:
    """Print for people: nothing in a name is obeyed by the terminal."""
    print(visible(str(text), keep="\n"), file=file)


def _take(flag: str, arguments: list[str]) -> tuple[list[Path], list[str]]:
    """Part `<flag> FILE` and `<flag>=FILE`, as often as they come, from the other arguments."""
    paths, rest = [], []
    words = iter(arguments)
    for word in words:
        if word == flag:
            value = next(words, None)
            if value is None or value.startswith("--"):
                raise UserError(f"{flag} names no file: give one, e.g. {flag} {EXAMPLES[flag]}")
            paths.append(Path(value))
        elif word.startswith(f"{flag}="):
            paths.append(Path(word.removeprefix(f"{flag}=")))
        else:
            rest.append(word)
    return paths, rest


def _quiet(arguments: list[str]) -> list[str]:
    """Part `--quiet` from the other arguments, and be it."""
    quiet, rest = _switch("--quiet", arguments)
    be_quiet(quiet)
    return rest


def _switch(flag: str, arguments: list[str]) -> tuple[bool, list[str]]:
    """Part a flag without a value from the other arguments."""
    return flag in arguments, [word for word in arguments if word != flag]


def _fields(kind: Any = PipelineConfig, prefix: str = "--") -> dict[str, Any]:
    """Flag -> type of every field."""
    found: dict[str, Any] = {}
    for name, hint in hints(kind).items():
        flag = prefix + name.replace("_", "-")
        found |= _fields(bare(hint), f"{flag}.") if is_dataclass(bare(hint)) else {flag: hint}
    return found


def _spelled(arguments: list[str]) -> list[str]:
    """The arguments with short forms written out, and `--switch=true` as `--switch` (`=false` as `--no-switch`)."""
    switches = {"--quiet", "--json", *(flag for flag, hint in _fields().items() if hint is bool)}
    words = []
    for word in arguments:
        flag, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
        flag = SHORT.get(flag.replace("_", "-"), flag.replace("_", "-")) if word.startswith("--") else word
        if equals and flag in switches:
            section, dot, name = flag.removeprefix("--").rpartition(".")
            on = fit(value, bool, flag)
            words += [flag] if on else [f"--{section}{dot}no-{name}"] if flag not in ("--quiet", "--json") else []
        else:
            words.append(flag + equals + value)
    return words


def _any_case(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """How the command line takes a closed choice: its name in any case."""
    kind: Any = info.type
    if not (isinstance(kind, type) and issubclass(kind, Choice)):
        return None

    def choice(words: list[str]) -> Choice:
        return fit(words[0], kind, "it")

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(one.value for one in kind)}}}",
        instance_from_str=choice,
        is_instance=lambda value: isinstance(value, kind),
        str_from_instance=lambda value: [value.value],
    )


def _parse(kind: Any, arguments: list[str], **how: Any) -> Any:
    """tyro's command line of a dataclass or function."""
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_any_case)
    return tyro.cli(kind, args=arguments, registry=registry, **how)


def _trackio_folder(output_dir: Path) -> Path:
    """Where trackio keeps its runs: TRACKIO_DIR if that is set, else below the output folder."""
    return Path(os.environ.setdefault("TRACKIO_DIR", str((output_dir / "observability").resolve())))


def _configured(arguments: list[str], command: str, about: str) -> PipelineConfig:
    """The configuration that files and flags give."""
    paths, rest = _take("--config", arguments)
    paths = paths or [DEFAULT_CONFIG]
    about += f" --config FILE (repeatable; default {DEFAULT_CONFIG.name}) sets values, flags win."
    config = _parse(PipelineConfig, rest, default=load_config(paths), prog=f"main.py {command}", description=about)
    _trackio_folder(config.output_dir)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        if not config.train.use_ddp:
            raise UserError("torchrun started this, but train.use_ddp is off: add --train.use-ddp, or use no torchrun")
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            config = replace(config, resume=True)
    return config


def _as_json(records: list[dict], code: int, places: dict[str, str]) -> str:
    """What a run says, for programs: the table as objects, the answer, remarks, every record's id and place."""
    from core.records import record_path
    from reporting.tables import as_json, headline, is_answered, remarks

    said = {"exit": code, "headline": headline(records) if is_answered(records) else None, "remarks": remarks(records)}
    files = [str(record_path(Path(places["output"]), record)) for record in records]
    return json.dumps(said | {"methods": as_json(records), "records": files, **places}, indent=1)


def run(arguments: list[str]) -> int:
    """Run the pipeline and print its table, its answer and where everything lies; returns the exit code."""
    for_programs, arguments = _switch("--json", _quiet(arguments))
    flags = " --quiet: no progress on stderr. --json: the results as one JSON object on stdout."
    config = _configured(arguments, "run", "Run the pipeline." + flags)
    from core.store import running
    from pipeline import Pipeline

    with running(config.output_dir):
        pipeline = Pipeline(config)
        if pipeline.stages.take_part():
            return 0
        records = pipeline.run()
        pipeline.stages.dismiss()
    return _show(config, records, for_programs)


def _places(config: PipelineConfig, records: list[dict]) -> dict[str, str]:
    """Where what a run leaves lies; the mask is that of its answer."""
    from reporter import Reporter
    from reporting.tables import answer_of

    reporter, chosen = Reporter(config.output_dir), answer_of(records)
    places = {"output": config.output_dir, "plots": reporter.plots / reporter.run_name(records[0])}
    if chosen:
        places["mask"] = config.output_dir / chosen["mask_path"]
    return {name: str(path) for name, path in (places | {"page": reporter.page}).items()}


def _show(config: PipelineConfig, records: list[dict], for_programs: bool) -> int:
    """Print a run's table, answer and places; returns the exit code."""
    from core.records import RECORDS
    from reporting.tables import headline, is_answered, remarks
    from reporting.terminal import terminal_table

    code = 0 if all(record["auto"] is None or record["auto"]["achieved"] for record in records) else 1
    places = _places(config, records)
    if for_programs:
        print(_as_json(records, code, places))
        return code
    _say(terminal_table(records, shutil.get_terminal_size((100, 24)).columns))
    if is_answered(records):
        _say(headline(records) + "\n")
    _say("\n".join([*remarks(records), ""]))
    _say("Test figures; each method's point was chosen on validation images.")
    if mask := places.get("mask"):
        layers = records[0]["mask_layer"][0] if len(records[0]["mask_layer"]) == 1 else records[0]["mask_layer"]
        _say(f"mask   {mask}")
        _say(f"       with masked(classifier.weights({layers}), Mask.load(path)): ...  # unlearn/masks.py")
    _say(f"JSON   {config.output_dir / RECORDS}")
    _say(f"plots  {places['plots']}")
    _say(f"page   {places['page']}")
    if config.tracker is Trackers.trackio:
        _say(f"logs   {os.environ['TRACKIO_DIR']} (uv run main.py dashboard)")
    return code


def train_gcn(arguments: list[str]) -> int:
    """Train (or find) the GCN of a configuration and copy it to one file."""
    targets, rest = _take("--out", _quiet(arguments))
    config = _configured(rest, "train-gcn", "Train the GCN. --out FILE: where to.")
    if len(targets) != 1:
        raise UserError(f"train-gcn needs one --out FILE, found {len(targets)}: name the .safetensors file to write")
    target = at_home(targets[0])
    from core.artifacts import copy_file
    from core.store import running
    from stages.chain import Stages
    from stages.preflight import say

    with running(config.output_dir):
        stages = Stages(config)
        if not stages.take_part():
            say(stages, measures=False)
            copy_file(stages.run_gcn_training(config.topK_list[0]), target)
            stages.dismiss()
            _say(target)
    return 0


def _sweep_flags(
    config: tyro.conf.UseAppendAction[tuple[Path, ...]], quiet: tyro.conf.FlagCreatePairsOff[bool] = False
) -> None:
    """Carry out the jobs of a configuration's section `sweep`, see configs/sweep_example.yaml.

    Args:
        config: a YAML file; repeat the flag for several, later files win.
        quiet: no progress on stderr.
    """


def sweep(arguments: list[str]) -> int:
    """Carry out the jobs of a configuration file's section `sweep` and print their table; 1 if any failed."""
    paths, rest = _take("--config", _quiet(arguments))
    if {"-h", "--help"} & {*rest}:
        _parse(_sweep_flags, ["--help"], prog="main.py sweep")
    if not paths or rest:
        what = rest[0] if rest else "no --config FILE"
        raise UserError(f"sweep found {what}: it takes --config FILE alone, see configs/sweep_example.yaml")
    from commands.sweep import load_sweep, run_sweep, table

    settings, base = load_sweep(paths)
    _trackio_folder(base.output_dir)
    ended = run_sweep(settings, base)
    _say(table(ended))
    return 1 if any(outcome["status"] == "failed" for _, outcome in ended) else 0


def report(
    output_dir: Path = Path(),
    compare: tuple[str, ...] = (),
    reporter: ReporterConfig = ReporterConfig(),  # noqa: B008
) -> None:
    """Rebuild every table, figure and the HTML page from the JSON records below a folder.

    Args:
        compare: instead hold runs against the first one named: output folders, ids below output_dir, or FOLDER/ID.
    """
    from reporter import Reporter

    made = Reporter(at_home(output_dir), reporter)
    if compare:
        _say(made.compare(compare))
        return
    for folder in made.plot():
        _say(folder)
    _say(made.page)


def docs(example: Path | None = None, folder: Path = PROJECT_ROOT / "docs") -> None:
    """Write methods.md and metrics.md anew, from what is registered; --example: a record to take values from."""
    from commands.docs import write_docs

    for path in write_docs(example and at_home(example), at_home(folder)):
        _say(path)


def dashboard(output_dir: Path = Path()) -> None:
    """Open trackio on the training curves of this project's runs."""
    from core.observe import TRACKIO_PROJECT

    folder = _trackio_folder(at_home(output_dir))
    if not folder.is_dir():
        raise UserError(f"there are no training curves in {folder}: make some with `uv run main.py`")
    import trackio

    trackio.show(project=TRACKIO_PROJECT)


def datasets(output_dir: Path = Path()) -> None:
    """List the datasets: which are here, where, how many images, and the command that gets the missing ones."""
    from images.fetch import listing

    _say(listing(at_home(output_dir) / "datasets"))


Dataset = Annotated[SupportedDatasets, tyro.conf.Positional]


def download(dataset: Dataset, output_dir: Path = Path(), dataset_path: Path | None = None) -> None:
    """Fetch a dataset below datasets/; a tree of image files to its place below ~/Datasets (or --dataset-path)."""
    from images import fetch as downloads

    _say(downloads.download(dataset, at_home(output_dir) / "datasets", dataset_path))


def prepare(dataset: Dataset, output_dir: Path = Path(), dataset_path: Path | None = None) -> None:
    """Unpack the archives of a dataset of image files beside themselves, and index it."""
    from images import fetch as downloads

    _say(downloads.prepare(dataset, at_home(output_dir) / "datasets", dataset_path))


def _parsed(name: str, function: Callable[..., None]) -> Callable[[list[str]], int]:
    """A command whose arguments are its function's parameters."""

    def command(arguments: list[str]) -> int:
        _parse(function, arguments, prog=f"main.py {name}")
        return 0

    return command


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": run,
    "sweep": sweep,
    "train-gcn": train_gcn,
    "report": _parsed("report", report),
    "docs": _parsed("docs", docs),
    "dashboard": _parsed("dashboard", dashboard),
    "datasets": _parsed("datasets", datasets),
    "download": _parsed("download", download),
    "prepare": _parsed("prepare", prepare),
}


def _usable_streams() -> None:
    """Let a stream that is closed lead nowhere, and one that cannot show a character show its number."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            _lead_nowhere(number)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
        elif number and isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _lead_nowhere(number: int) -> None:
    """Let a file descriptor write to, and read from, nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)


def _nobody_reads() -> bool:
    """Whether a pipe that this process writes its words to was closed at the other end; then nothing more is said."""
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
        _say(f"error: {error}", file=sys.stderr)
        return 2
    except MachineError as error:
        _say(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        _say("interrupted: finished stages are kept, the next run goes on from there", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            _say("error: no space for what the command prints: let it print elsewhere", file=sys.stderr)
            _lead_nowhere(1)
            return 1
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 128 + signal.SIGPIPE
        if isinstance(error, OSError) and (said := _of_the_machine(error)):
            _say(f"error: {said}", file=sys.stderr)
            return 1 if isinstance(said, MachineError) else 2
        import traceback

        traceback.print_exc()
        _say(f"error: a stage failed ({type(error).__name__}: {error}); finished stages are kept", file=sys.stderr)
        return 1


def _of_the_machine(error: OSError) -> Exception | None:
    """An error of the disk or of a limit of the system, as one sentence, wherever it came up; None for any other."""
    from core.artifacts import ADVICE, trouble

    known = isinstance(error.filename, str) and error.errno in ADVICE
    return trouble(Path(error.filename), error, "use") if known else None


def _command(arguments: list[str]) -> int:
    """Run the command that the arguments begin with."""
    name, rest = ("run", arguments) if not arguments or arguments[0].startswith("-") else (arguments[0], arguments[1:])
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
    if name not in COMMANDS:
        raise UserError(f"there is no command {name!r}: choose from {', '.join(COMMANDS)}")
    return COMMANDS[name](_spelled(rest))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
