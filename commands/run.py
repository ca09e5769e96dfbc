"""What runs the pipeline: as a whole (`run`), as far as its graph network (`train-gcn`), many times (`sweep`), or live
(`demo`); and what says beforehand what that would take (`plan`).
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import tyro

from commands.command_line import DEFAULT_CONFIG, Environment, Files, Settings, show
from core.choices import at_home
from core.config import GIVEN, PipelineConfig, SupportedDatasets, Trackers, UserError
from core.observe import be_quiet, log, working

if TYPE_CHECKING:  # its module loads numpy, which help pages do not need
    from reporting.families import Run


def run(
    here: Environment, settings: Settings, seeds: tuple[int, ...] = (), quiet: bool = False, json: bool = False
) -> int:
    """Run the pipeline; print its table, its answer, and where everything lies.

    Args:
        seeds: Run it once for each of these seeds instead of --seed, and end in mean and interval over them.
        quiet: Print nothing about progress on stderr.
        json: Print the results as one JSON object on stdout, instead of the table.
    """
    be_quiet(quiet)
    config = _launched(settings, here)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds is {list(seeds)}: name each seed once")
    if seeds and here.torchrun:
        raise UserError("torchrun starts one run: give --seed, or leave torchrun out for --seeds")
    if seeds and config.seed not in (PipelineConfig().seed, *seeds):
        log(f"no effect: seed {config.seed} (--seeds says which)")
    configs = [replace(config, seed=seed) for seed in seeds] or [config]
    curves = here.curves(config.output_dir)
    from core.store import running
    from reporter import Reporter

    runs = []
    with running(config.output_dir):
        for one in configs:
            records = _measured(one, here)
            if records is None:  # a helper of torchrun's first process, which says everything
                return 0
            runs.append(records)
        Reporter(config.output_dir, config.reporter).plot([record for run in runs for record in run])
    return _print(config, runs, json, curves)


def _measured(config: PipelineConfig, here: Environment) -> Optional["Run"]:
    """Find the records of the same run, carried out before, or carry it out; None: in a helper of torchrun's."""
    inputs = None if here.torchrun else _inputs(config)
    if inputs is not None and (known := _known(config, inputs)):
        return known
    from core.store import remember

    with working("loading torch"):
        from pipeline import Pipeline

    pipeline = Pipeline(config)
    pipeline.prepare_process()
    records = pipeline.with_others(pipeline.measure)
    if records is not None and inputs is not None:
        remember(config, pipeline.finished(records, inputs))
    return records


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

    with working("loading torch"):
        from pipeline import Pipeline

    with running(config.output_dir):
        pipeline = Pipeline(config)
        pipeline.prepare_process()
        if made := pipeline.with_others(pipeline.train_gcn):
            copy_file(made, target)
            show(target)
    return 0


def demo(here: Environment, settings: Settings, port: int = 8765, quiet: bool = False) -> None:
    """Open a local page: pick a class and a budget, see what the mask does, lift it again.

    Args:
        port: On 127.0.0.1, which no other machine reaches. 0: any that is free.
        quiet: Print nothing about progress on stderr.
    """
    be_quiet(quiet)
    config = _launched(settings, here)
    from core.store import running
    from showing.answers import Answers
    from showing.server import Server

    answers = Answers(config)
    with Server(port, answers) as server, running(config.output_dir):
        answers.pipeline.prepare_process()
        server.prepare()
        print(f"open {server.address} in a browser; Ctrl+C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            log("demo: ended")


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
    from commands.sweep import load_sweep, run_sweep, scores, table

    jobs, base = load_sweep(config)
    base = replace(base, plugins=(*base.plugins, *plugin))
    here.curves(base.output_dir)
    ended = run_sweep(jobs, base)
    show(table(ended))
    for text in scores(ended, _columns()):
        show(f"\n{text}".removesuffix("\n"))
    return 1 if any(outcome["status"] == "failed" for _, outcome in ended) else 0


def plan(
    config: Files = (),
    machines: int | None = None,
    workers: int | None = None,
    plugin: Files = (),
    quiet: bool = False,
    rest: tuple[str, ...] = (),
) -> None:
    """Foresee seconds, memory and disk of a run or sweep, from steps measured here.

    Args:
        config: YAML file of settings, with or without a section `sweep`; later files win over earlier ones.
        machines: Machines like this one that carry out a sweep. None: one.
        workers: Jobs of a sweep at a time on each machine. None: what the section `sweep` says.
        plugin: Python file of your own that registers a method or another part (docs/extending.md).
        quiet: Print nothing about progress on stderr.
    """
    be_quiet(quiet)
    if rest:
        raise UserError(f"plan found {rest[0]}: it takes --config FILE, --machines and --workers, see docs/usage.md")
    from planning.asking import Asked, check_count, foresee

    check_count("machines", machines)
    check_count("workers", workers)
    from commands.sweep import planned

    asked = Asked(*planned(config or (DEFAULT_CONFIG,), plugin, machines, workers))
    show(foresee(asked).text)


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
    if not all(path.is_file() for path in config.plugins):
        return None  # the run says what is wrong with them
    from core.hashes import sha256_file
    from core.store import sha256_folder
    from images.specs import digits_file

    given = {name: path for name in GIVEN if (path := getattr(config, name))}
    try:
        found = {name: (sha256_folder if path.is_dir() else sha256_file)(path) for name, path in given.items()}
    except OSError:
        return None  # the run says what is wrong with it
    return found | {"images": sha256_file(digits_file())}


def _known(config: PipelineConfig, inputs: dict[str, str]) -> Optional["Run"]:
    """Find the records of the same run, carried out before; None: it must be carried out.

    No torch here: most of the seconds of a run that changes nothing would be its import.
    """
    from core.records import read_record
    from core.store import recall

    if (found := recall(config, inputs)) is None:
        return None
    for line in found.said:
        log(line)
    for name in found.stages:
        log(f"{Path(name).name.rpartition('-')[0]}: unchanged, using {config.output_dir / name}")
    return [read_record(config.output_dir, config.output_dir / name) for name in found.record_sha256]


# --- what a run prints ------------------------------------------------------------------------------------


def _columns() -> int:
    """Return how many columns the terminal has."""
    return shutil.get_terminal_size((100, 24)).columns


def _print(config: PipelineConfig, runs: list["Run"], as_json: bool, curves: Path) -> int:
    """Print the tables, answers and paths of runs of one configuration and several seeds, or of a single run.

    Returns:
        The exit code: 1 if `kappa: auto` found no kappa in one of them.
    """
    met = (record["auto"] is None or record["auto"]["achieved"] for run in runs for record in run)
    code = 0 if all(met) else 1
    if as_json:
        print(_for_programs(config, runs, code))
        return code
    from core.records import RECORDS
    from reporter import Reporter
    from reporting.sentences import headline, is_answered, remarks, warnings
    from reporting.tables import caption
    from showing.terminal import scores_table, terminal_table

    one = runs[0] if len(runs) == 1 else None
    show(terminal_table(one, _columns()) if one else f"{caption(*runs)}\n\n{scores_table(runs, _columns())}")
    for run in runs:
        said = [headline(run), ""] if is_answered(run) else []
        said += [*warnings(run), *(remarks(run) if one else [])]
        show("\n".join(said if one else [f"seed {run[0]['seed']}: {text}" for text in said if text]))
    show("\nTest values; each method's point was chosen on validation images.")
    layers, places = runs[0][0]["mask_layer"], [_places(config, run) for run in runs]
    layers = layers[0] if len(layers) == 1 else layers
    masks = [place["mask"] for place in places if "mask" in place]
    for mask in masks:
        show(f"mask   {mask}")
    if masks:
        show(f"       with masked(classifier.weights({layers}), Mask.load(path)): ...  # unlearn/masks.py")
    show(f"JSON   {config.output_dir / RECORDS}")
    drawn = Path(places[0]["plots"])
    show(f"plots  {drawn if one else drawn.with_name(Reporter.family_name(runs))}")
    show(f"page   {places[0]['page']}")
    if config.tracker is Trackers.trackio:
        show(f"logs   {curves} (uv run main.py dashboard)")
    return code


def _places(config: PipelineConfig, records: "Run") -> dict[str, str]:
    """Name the folders and files of a run: output, plots, page, and the mask of the chosen point if there is one."""
    from reporter import Reporter
    from reporting.sentences import answer_of

    reporter, chosen = Reporter(config.output_dir), answer_of(records)
    places = {"output": config.output_dir, "plots": reporter.plots / reporter.run_name(records[0])}
    if chosen:
        places["mask"] = config.output_dir / chosen["mask_path"]
    return {name: str(path) for name, path in (places | {"page": reporter.page}).items()}


def _for_programs(config: PipelineConfig, runs: list["Run"], code: int) -> str:
    """Write results as JSON: of a run its exit code, answer, remarks, an object for each method, and paths; of several
    seeds a list of these, and for each method and metric the mean over the seeds with its 95 % interval.
    """
    import json

    from reporting.tables import over_seeds_as_json

    found = [_one_for_programs(config, run) for run in runs]
    if len(runs) == 1:
        return json.dumps({"exit": code, **found[0]}, indent=1)
    return json.dumps({"exit": code, "runs": found, "over_seeds": over_seeds_as_json(runs)}, indent=1)


def _one_for_programs(config: PipelineConfig, records: "Run") -> dict[str, object]:
    from core.records import record_path
    from reporting.sentences import headline, is_answered, remarks, warnings
    from reporting.tables import as_json

    places = _places(config, records)
    answer = headline(records) if is_answered(records) else None
    said = {"seed": records[0]["seed"], "headline": answer, "remarks": [*warnings(records), *remarks(records)]}
    files = [str(record_path(config.output_dir, record)) for record in records]
    return said | {"methods": as_json(records), "records": files, **places}
