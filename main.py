"""Command line of MIMU.

    uv run main.py                                   the default run: DIGITS, forget class 0
    uv run main.py run --config configs/X.yaml ...   a run; --config repeats, flags win over files
    uv run main.py run --methods all --metrics all   every rival and every metric (docs/methods.md, docs/metrics.md)
    uv run main.py sweep --config configs/X.yaml     many runs, lists over any field (local processes, Slurm, Ray)
    uv run main.py train-gcn --out FILE ...          train the GCN of a configuration into one file, for --gcn-path
    uv run main.py report [--output-dir DIR]         tables and figures again, from the JSON records alone
    uv run main.py dashboard [--output-dir DIR]      training curves in trackio
    uv run main.py download DATASET                  fetch a dataset (nothing else ever downloads)

Exit codes: 0 done, 1 a stage failed (or `kappa: auto` met its target nowhere), 2 wrong usage, configuration or data,
130 interrupted.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro
from dotenv import load_dotenv

from config import PROJECT_ROOT, PipelineConfig, ReporterConfig, SupportedDatasets, Trackers, UserError, load_config

EXAMPLES = {"--config": "configs/default.yaml", "--out": "gcn.safetensors"}
SHORT = {"--methods": "--eval.methods", "--metrics": "--eval.metrics"}
DEFAULT_CONFIG = PROJECT_ROOT / "configs" / "default.yaml"


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


def _trackio_folder(output_dir: Path) -> Path:
    """Where trackio keeps its runs: TRACKIO_DIR if that is set, else below the output folder."""
    return Path(os.environ.setdefault("TRACKIO_DIR", str((output_dir / "observability").resolve())))


def _configured(arguments: list[str], command: str, about: str) -> PipelineConfig:
    """The configuration that files and flags give."""
    paths, rest = _take("--config", arguments)
    paths = paths or [DEFAULT_CONFIG]
    rest = [SHORT.get(word, word) for word in rest]
    about += f" --config FILE (repeatable; default {DEFAULT_CONFIG.name}) sets values, flags win."
    config = tyro.cli(
        PipelineConfig, args=rest, default=load_config(paths), prog=f"main.py {command}", description=about
    )
    _trackio_folder(config.output_dir)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        if not config.train.use_ddp:
            raise UserError("torchrun started this, but train.use_ddp is off: add --train.use-ddp, or use no torchrun")
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            config = replace(config, resume=True)
    return config


def run(arguments: list[str]) -> int:
    """Run the pipeline and print its table, its answer and where everything lies; returns the exit code."""
    config = _configured(arguments, "run", "Run the pipeline.")
    from pipeline import Pipeline

    pipeline = Pipeline(config)
    if pipeline.take_part():
        return 0
    records = pipeline.run()
    pipeline.dismiss()
    return _show(config, records)


def _show(config: PipelineConfig, records: list[dict]) -> int:
    """Print a run's table, answer and places; returns the exit code."""
    from reporter import Reporter, as_text, headline, table

    reporter = Reporter(config.output_dir)
    print(as_text(table(records)))
    if {records[0]["answer"], "default"} <= set(records[0]["labels"]):
        print(headline(records) + "\n")
    print("Test figures; each method's point was chosen on validation images.")
    print(f"JSON   {config.output_dir / 'eval/metrics_and_plots/json'}")
    print(f"plots  {reporter.plots / reporter.run_name(records[0])}")
    if config.tracker is Trackers.trackio:
        print(f"logs   {os.environ['TRACKIO_DIR']} (uv run main.py dashboard)")
    return 0 if all(record["auto"] is None or record["auto"]["achieved"] for record in records) else 1


def train_gcn(arguments: list[str]) -> int:
    """Train (or find) the GCN of a configuration and copy it to one file."""
    targets, rest = _take("--out", arguments)
    config = _configured(rest, "train-gcn", "Train the GCN. --out FILE: where to.")
    if len(targets) != 1:
        raise UserError(f"train-gcn needs one --out FILE, found {len(targets)}: name the .safetensors file to write")
    target = targets[0].expanduser()
    from artifacts import copy_file
    from stages import Stages

    stages = Stages(config)
    if not stages.take_part():
        copy_file(stages.run_gcn_training(config.topK_list[0]), target)
        stages.dismiss()
        print(target)
    return 0


def sweep(arguments: list[str]) -> int:
    """Carry out the jobs of a configuration file's section `sweep` and print their table; 1 if any failed."""
    paths, rest = _take("--config", arguments)
    if not paths or rest:
        what = rest[0] if rest else "no --config FILE"
        raise UserError(f"sweep found {what}: it takes --config FILE alone, see configs/sweep_example.yaml")
    from sweep import load_sweep, run_sweep, table

    settings, base = load_sweep(paths)
    _trackio_folder(base.output_dir)
    ended = run_sweep(settings, base)
    print(table(ended))
    return 1 if any(outcome["status"] == "failed" for _, outcome in ended) else 0


def report(output_dir: Path = Path(), reporter: ReporterConfig = ReporterConfig()) -> None:  # noqa: B008
    """Rebuild every table and figure from the JSON records below a folder."""
    from reporter import Reporter

    for folder in Reporter(output_dir.expanduser(), reporter).plot():
        print(folder)


def dashboard(output_dir: Path = Path()) -> None:
    """Open trackio on the training curves of this project's runs."""
    from observe import TRACKIO_PROJECT

    folder = _trackio_folder(output_dir.expanduser())
    if not folder.is_dir():
        raise UserError(f"there are no training curves in {folder}: make some with `uv run main.py`")
    import trackio

    trackio.show(project=TRACKIO_PROJECT)


def download(dataset: Annotated[SupportedDatasets, tyro.conf.Positional], output_dir: Path = Path()) -> None:
    """Fetch a dataset below datasets/."""
    import utils_data

    print(utils_data.download(dataset, output_dir.expanduser() / "datasets"))


def _parsed(name: str, function: Callable[..., None]) -> Callable[[list[str]], int]:
    """A command whose arguments are its function's parameters."""

    def command(arguments: list[str]) -> int:
        tyro.cli(function, args=arguments, prog=f"main.py {name}")
        return 0

    return command


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": run,
    "sweep": sweep,
    "train-gcn": train_gcn,
    "report": _parsed("report", report),
    "dashboard": _parsed("dashboard", dashboard),
    "download": _parsed("download", download),
}


def main(arguments: list[str]) -> int:
    """Run one command; returns the exit code."""
    load_dotenv(PROJECT_ROOT / ".env")
    name, rest = ("run", arguments) if not arguments or arguments[0].startswith("-") else (arguments[0], arguments[1:])
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
    try:
        if name not in COMMANDS:
            raise UserError(f"there is no command {name!r}: choose from {', '.join(COMMANDS)}")
        return COMMANDS[name](rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: finished stages are kept, the next run goes on from there", file=sys.stderr)
        return 130
    except Exception as error:
        import traceback

        traceback.print_exc()
        print(f"error: a stage failed ({type(error).__name__}: {error}); finished stages are kept", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
