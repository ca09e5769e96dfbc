"""What runs the pipeline: as a whole (`run`), as far as its graph network (`train-gcn`), or many times (`sweep`)."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from commands.command_line import Environment, Files, Settings, show
from core.choices import at_home
from core.config import GIVEN, PipelineConfig, SupportedDatasets, Trackers, UserError
from core.observe import be_quiet, log

if TYPE_CHECKING:  # its module loads numpy, which help pages do not need
    from core.records import Record


def run(here: Environment, settings: Settings, quiet: bool = False, json: bool = False) -> int:
    """Run the pipeline; print its table, its answer, and where everything lies.

    Args:
        quiet: Print nothing about progress on stderr.
        json: Print the results as one JSON object on stdout, instead of the table.
    """
    be_quiet(quiet)
    config = _launched(settings, here)
    curves = here.curves(config.output_dir)
    from core.store import remember, running

    with running(config.output_dir):
        inputs = None if here.torchrun else _inputs(config)
        records = None if inputs is None else _known(config, inputs)
        if records is None:
            from pipeline import Pipeline

            pipeline = Pipeline(config)
            pipeline.prepare_process()
            records = pipeline.with_others(pipeline.run)
            if records is not None and inputs is not None:
                remember(config, pipeline.finished(records, inputs))
    return 0 if records is None else _print(config, records, json, curves)


def train_gcn(
    here: Environment,
    settings: Settings,
    out: Annotated[Files, tyro.conf.arg(help_behavior_hint="(required)")] = (),
    quiet: bool = False,
) -> int:
    """Train (or find) the graph network of a configuration and copy it to a file for --gcn-path.

    Args:
        out: The .safetensors file to write.
        quiet: Print nothing about progress on stderr.
    """
    be_quiet(quiet)
    config = _launched(settings, here)
    here.curves(config.output_dir)
    if len(out) != 1:
        raise UserError(f"train-gcn needs one --out FILE, found {len(out)}: name the .safetensors file to write")
    target = at_home(out[0])
    from core.artifacts import copy_file
    from core.store import running
    from pipeline import Pipeline

    with running(config.output_dir):
        pipeline = Pipeline(config)
        pipeline.prepare_process()
        if made := pipeline.with_others(pipeline.train_gcn):
            copy_file(made, target)
            show(target)
    return 0


def sweep(
    here: Environment, config: Files = (), plugin: Files = (), quiet: bool = False, rest: tuple[str, ...] = ()
) -> int:
    """Carry out many runs, over lists of values for any field: local processes, Slurm or Ray.

    The section `sweep` of a configuration file says which; configs/sweep_example.yaml shows how.

    Args:
        config: YAML file of settings; later files win over earlier ones.
        plugin: Python file of your own that registers a method or another part (docs/extending.md).
        quiet: Print nothing about progress on stderr.
    """
    be_quiet(quiet)
    if rest or not config:
        found = rest[0] if rest else "no --config FILE"
        raise UserError(f"sweep found {found}: it takes --config FILE alone, see configs/sweep_example.yaml")
    from commands.sweep import load_sweep, run_sweep, table

    jobs, base = load_sweep(config)
    base = replace(base, plugins=(*base.plugins, *plugin))
    here.curves(base.output_dir)
    ended = run_sweep(jobs, base)
    show(table(ended))
    return 1 if any(outcome["status"] == "failed" for _, outcome in ended) else 0


def _launched(config: PipelineConfig, here: Environment) -> PipelineConfig:
    """Return the configuration with `resume` on, if torchrun has started this process again after a failure.

    Raises:
        UserError: torchrun started this process, but train.use_ddp is off, so that each process would do a whole run.
    """
    if here.torchrun and not config.train.use_ddp:
        raise UserError("torchrun started this, but train.use_ddp is off: add --train.use-ddp, or use no torchrun")
    return replace(config, resume=True) if here.torchrun and here.restarted else config


# --- a run that changes nothing ---------------------------------------------------------------------------

ACCELERATORS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""What stands there where torch may find a GPU: NVIDIA's driver, that of Windows' Linux, AMD's."""


def _inputs(config: PipelineConfig) -> dict[str, str] | None:
    """Hash what a run reads from outside its output folder, by name.

    Returns:
        None if torch has to be asked, so that the run cannot be known again before torch is imported: which device
        `auto` is, what the files of a dataset other than DIGITS hold, or which other classifiers a graph network
        learns on.
    """
    gpu = config.device != "cpu" and any(Path(place).exists() for place in ACCELERATORS)
    if gpu or config.vision_dataset is not SupportedDatasets.DIGITS:
        return None
    if config.gcn.train_seeds or config.gcn.train_batch_sizes:
        return None
    from core.hashes import sha256_file
    from core.store import sha256_folder
    from images.specs import digits_file

    given = {name: path for name in GIVEN if (path := getattr(config, name))}
    try:
        found = {name: (sha256_folder if path.is_dir() else sha256_file)(path) for name, path in given.items()}
    except OSError:
        return None  # the run says what is wrong with it
    return found | {"images": sha256_file(digits_file())}


def _known(config: PipelineConfig, inputs: dict[str, str]) -> list["Record"] | None:
    """Find the records of the same run, carried out before, and bring the report up to date; None: it must be run.

    No torch here: most of the seconds of a run that changes nothing would be its import.
    """
    from core.records import read_record
    from core.store import recall
    from reporter import Reporter

    if (found := recall(config, inputs)) is None:
        return None
    for line in found.said:
        log(line)
    for name in found.stages:
        log(f"{Path(name).name.rpartition('-')[0]}: unchanged, using {config.output_dir / name}")
    records = [read_record(config.output_dir, config.output_dir / name) for name in found.record_sha256]
    Reporter(config.output_dir, config.reporter).plot(records)
    return records


# --- what a run prints ------------------------------------------------------------------------------------


def _print(config: PipelineConfig, records: list["Record"], as_json: bool, curves: Path) -> int:
    """Print a run's table, answer and paths; return the exit code, which is 1 if `kappa: auto` found no kappa."""
    code = 0 if all(record["auto"] is None or record["auto"]["achieved"] for record in records) else 1
    places = _places(config, records)
    if as_json:
        print(_for_programs(records, code, places))
        return code
    from core.records import RECORDS
    from reporting.tables import headline, is_answered, remarks
    from reporting.terminal import terminal_table

    show(terminal_table(records, shutil.get_terminal_size((100, 24)).columns))
    if is_answered(records):
        show(headline(records) + "\n")
    show("\n".join([*remarks(records), ""]))
    show("Test values; each method's point was chosen on validation images.")
    if mask := places.get("mask"):
        layers = records[0]["mask_layer"][0] if len(records[0]["mask_layer"]) == 1 else records[0]["mask_layer"]
        show(f"mask   {mask}")
        show(f"       with masked(classifier.weights({layers}), Mask.load(path)): ...  # unlearn/masks.py")
    show(f"JSON   {config.output_dir / RECORDS}")
    show(f"plots  {places['plots']}")
    show(f"page   {places['page']}")
    if config.tracker is Trackers.trackio:
        show(f"logs   {curves} (uv run main.py dashboard)")
    return code


def _places(config: PipelineConfig, records: list["Record"]) -> dict[str, str]:
    """Name the folders and files of a run: output, plots, page, and the mask of the chosen point if there is one."""
    from reporter import Reporter
    from reporting.tables import answer_of

    reporter, chosen = Reporter(config.output_dir), answer_of(records)
    places = {"output": config.output_dir, "plots": reporter.plots / reporter.run_name(records[0])}
    if chosen:
        places["mask"] = config.output_dir / chosen["mask_path"]
    return {name: str(path) for name, path in (places | {"page": reporter.page}).items()}


def _for_programs(records: list["Record"], code: int, places: dict[str, str]) -> str:
    """Write a run's results as JSON: exit code, answer, remarks, one object for each method, paths of all records."""
    import json

    from core.records import record_path
    from reporting.tables import as_json, headline, is_answered, remarks

    said = {"exit": code, "headline": headline(records) if is_answered(records) else None, "remarks": remarks(records)}
    files = [str(record_path(Path(places["output"]), record)) for record in records]
    return json.dumps(said | {"methods": as_json(records), "records": files, **places}, indent=1)
