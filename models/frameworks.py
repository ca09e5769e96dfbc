"""Building a classifier from what its framework wrote: one function for each of torchvision, timm, transformers, files.

Weights always come through `models.checkpoints`, which runs no code; so do the names and shapes of a model that do not
fit. Frameworks give the architecture, the names of the classes and the preprocessing. timm and transformers are
optional and imported only when a model of theirs is asked for. Code of the user's own runs for `py:` alone.
"""

import re
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm

from core.artifacts import read_json
from core.choices import did_you_mean
from core.config import UserError
from core.hashes import sha256_file
from models.checkpoints import FLOAT_PARENT, Ema, Matched, Stored, checked, matched, read_checkpoint, read_folder
from models.class_names import ClassNames
from models.preprocessing import PREPROCESSOR, Preprocessing, from_torchvision, of_timm, of_transformers

ADVICE = "name the architecture that the checkpoint is of"
COMPUTABLE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # kinds of numbers that models run in
DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.")  # names in torchvision's own old files
PLACEHOLDER = re.compile(r"LABEL_\d+")  # what transformers call classes that nobody named


@dataclass(frozen=True)
class Reading:
    """How a checkpoint is read. ema: which of a model and its average; by_order: tensors in order, whatever names."""

    ema: Ema | None = None
    by_order: bool = False


@dataclass(frozen=True)
class Built:
    """A filled module and what its framework says of it.

    Args:
        head: name of the weight that makes the outputs; outputs: their number.
        names, preprocessing: as the framework or its files say; None: they say nothing.
        code: files of the user's that were run.
    """

    module: nn.Module
    stored: Stored
    found: Matched
    head: str
    outputs: int
    framework: str
    names: ClassNames | None = None
    preprocessing: Preprocessing | None = None
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


# --- what all share ---------------------------------------------------------------------------------------


@contextmanager
def _aside() -> Generator[None]:
    """Build inside: random weights, which are replaced, take nothing from the process's random numbers."""
    with torch.random.fork_rng(devices=[]):
        yield


def _import(name: str, extra: str) -> Any:
    """An optional library, imported now; that it is missing is said in one sentence."""
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"this model needs {name}, which cannot be imported ({error}): uv sync --extra {extra}"
        ) from None


def head_of(state: Mapping[str, Tensor]) -> str | None:
    """The last weight with rows and columns, by the order of a module's state: what makes the outputs."""
    names = [name for name, value in state.items() if value.dim() in (2, 4) and name.endswith("weight")]
    return names[-1] if names else None


def rows_on_disk(stored: Stored, state: Mapping[str, Tensor], head: str) -> int | None:
    """How many outputs a checkpoint has, from its tensor of the head's name, whatever a wrapper put before it."""
    ends = (f".{head}", f".{head}_v", f".{head}_orig")
    found = [name for name, t in stored.tensors.items() if f".{name}".endswith(ends) and t.dim() in (2, 4)]
    if found:
        return stored.tensors[min(found, key=len)].shape[0]
    if len(stored.tensors) == len(state):  # other names: by its place
        return list(stored.tensors.values())[list(state).index(head)].shape[0]
    return None


def fill(
    module: nn.Module, stored: Stored, reading: Reading, rename: Callable[[str], str] = str
) -> tuple[Matched, tuple[str, ...]]:
    """Put a checkpoint's tensors into a module, in their own kind of floats; notes say which where it is not float32.

    A model whose floats are of several kinds runs in float32, to which the others are converted.
    """
    needed = module.state_dict()
    found = matched(stored, needed, ADVICE, reading.ema, reading.by_order, rename)
    kind, notes = kind_of(found.tensors)
    module.to(kind)
    state = module.state_dict()
    for name, value in checked(found.tensors, state, stored.path, ADVICE).items():
        state[name].copy_(value)  # not load_state_dict: some modules rename or refuse there by the version of a file
    return found, notes


def kind_of(tensors: Mapping[str, Tensor]) -> tuple[torch.dtype, tuple[str, ...]]:
    """The one kind of floats that a model is to run in."""
    kinds = {value.dtype for value in tensors.values() if value.is_floating_point()}
    said = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
    if len(kinds) == 1 and (only := next(iter(kinds))) in COMPUTABLE:
        return only, (() if only is torch.float32 else (f"runs in {said}, as it is on disk",))
    return torch.float32, ((f"{said} on disk, runs in float32: a mask's parent is what is on disk",) if kinds else ())


def without_reparametrisations(module: nn.Module) -> tuple[str, ...]:
    """Make plain weights of those that a module recomputes from parts, which would undo a mask; names of these."""
    names = []
    for name, part in module.named_modules():
        if parametrize.is_parametrized(part):
            for weight in list(part.parametrizations):
                parametrize.remove_parametrizations(part, weight, leave_parametrized=True)
                names.append(f"{name}.{weight}")
        for undo in (remove_weight_norm, remove_spectral_norm):
            with suppress(ValueError):  # there is none
                undo(part)
                names.append(f"{name}.weight")
    return tuple(names)


def built(
    module: nn.Module, stored: Stored, reading: Reading, framework: str, rename: Callable[[str], str] = str, **more: Any
) -> Built:
    """Fill a module and find its head.

    Raises:
        UserError: the checkpoint does not fit, or no weight can be the head.
    """
    found, notes = fill(module, stored, reading, rename)
    folded = without_reparametrisations(module)
    if folded:
        notes += (f"weights that the model computed from parts are plain now: {', '.join(folded)}",)
    state = module.state_dict()
    head = more.pop("head", None) or head_of(state)
    if head is None:
        raise UserError(f"{stored.path} is of a model without a weight of 2 or 4 axes, which has no classes")
    notes = (*found.notes, *notes, *more.pop("notes", ()))
    files = (*stored.files, *more.pop("files", ()))
    return Built(module.eval(), stored, found, head, state[head].shape[0], framework, files=files, notes=notes, **more)


def made(build: Callable[..., nn.Module], what: str, **settings: Any) -> nn.Module:
    """What a framework's function builds, its complaints about settings as one sentence."""
    try:
        with _aside():
            return build(**settings)
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError, AttributeError) as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        given = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        raise UserError(f"{what} cannot be built with {given} ({said}): change what follows its name") from None


# --- torchvision ------------------------------------------------------------------------------------------


def build_torchvision(name: str, file: Path, settings: Mapping[str, Any], reading: Reading) -> Built:
    """A classifier of torchvision, with as many outputs as the checkpoint has."""
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise UserError(f"torchvision has no classifier {name!r}{did_you_mean(name, known)}")
    builder = torchvision.models.get_model_builder(name)
    given: dict[str, Any] = {"weights": None, **settings}
    if name in ("googlenet", "inception_v3"):
        given = {"init_weights": False, **given}
    stored = read_checkpoint(file, reading.ema)
    try:
        with torch.device("meta"):
            state = builder(**given).state_dict()
    except (RuntimeError, NotImplementedError, TypeError, ValueError):  # it computes with weights
        state = made(builder, f"torchvision:{name}", **given).state_dict()
    head = str(head_of(state))
    rows = rows_on_disk(stored, state, head)
    module = made(builder, f"torchvision:{name}", **given, **({"num_classes": rows} if rows else {}))
    rename = (lambda old: DENSENET.sub(r"\1\2.", old)) if name.startswith("densenet") else str
    names, preprocessing, notes = _of_torchvision_weights(name, file, rows, dict(settings))
    return built(
        *(module, stored, reading, f"torchvision {torchvision.__version__}", rename),
        head=head,
        names=names,
        preprocessing=preprocessing,
        notes=notes,
    )


def _of_torchvision_weights(
    name: str, file: Path, rows: int | None, settings: Mapping[str, Any]
) -> tuple[ClassNames | None, Preprocessing | None, tuple[str, ...]]:
    """Classes and preprocessing of the published weights that a file is, known by the hash in their name.

    Another file with 1,000 outputs gets the preprocessing of the architecture's first weights, which is noted.
    """
    entries = list(torchvision.models.get_model_weights(name))
    digest = sha256_file(file)[:8]
    same = [entry for entry in entries if entry.url.rpartition("-")[2].partition(".")[0] == digest]
    if same:
        categories = same[0].meta["categories"]
        preprocessing = from_torchvision(
            same[0].transforms(), f"torchvision's {same[0]}, which the file is by its hash"
        )
        return ClassNames(tuple(categories), f"torchvision's {same[0]}"), preprocessing, ()
    if rows == 1000 and not settings:
        source = f"torchvision's {entries[0]}, taken because the model has 1,000 outputs"
        return None, from_torchvision(entries[0].transforms(), source), (f"preprocessing is assumed: {source}",)
    return None, None, ()


# --- timm -------------------------------------------------------------------------------------------------


def build_timm(name: str, file: Path, settings: Mapping[str, Any], reading: Reading) -> Built:
    """A classifier of timm from a checkpoint file, with as many outputs as that has."""
    return _filled_timm(name, read_checkpoint(file, reading.ema), dict(settings), reading, {})


def _config(folder: Path, writer: str) -> tuple[Path, dict]:
    """A folder's config.json, and what it says.

    Raises:
        UserError: there is none.
        DamagedError: it is no JSON object.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} has no config.json: give a folder that {writer} wrote")
    return file, read_json(file, foreign=True)


def build_timm_folder(folder: Path, reading: Reading) -> Built:
    """A folder that timm wrote for a hub: config.json beside the weights.

    Raises:
        UserError: config.json names no architecture, or as for files.
    """
    file, config = _config(folder, "timm")
    name = config.get("architecture")
    if not isinstance(name, str):
        raise UserError(f"{file} names no architecture of timm: a folder of transformers is given as hf:{folder}")
    said = {key: config[key] for key in ("global_pool",) if config.get(key)}
    settings = {**said, **(config.get("model_args") or {})}
    model = _filled_timm(name, read_folder(folder, reading.ema), settings, reading, config)
    return replace(model, files=(*model.files, file))


def _filled_timm(name: str, stored: Stored, settings: dict[str, Any], reading: Reading, config: Mapping) -> Built:
    """timm's model with a checkpoint's outputs and channels, filled.

    Args:
        config: what config.json of a folder says beside the architecture; a file has none.
    """
    timm = _import("timm", "timm")
    if not timm.is_model(name.partition(".")[0]):
        raise UserError(f"timm has no model {name!r}{did_you_mean(name, timm.list_models())}")
    own = {"pretrained_cfg": config["pretrained_cfg"]} if config.get("pretrained_cfg") else {}

    def build(**more: Any) -> nn.Module:
        return made(timm.create_model, f"timm:{name}", model_name=name, **own, **settings, **more)

    module = build()
    about: Any = module.pretrained_cfg
    state, heads = module.state_dict(), about.get("classifier") or ()
    heads = [f"{one}.weight" for one in ([heads] if isinstance(heads, str) else heads)]
    head = next((one for one in heads if one in state), head_of(state))
    more: dict[str, Any] = {}
    if head and (rows := rows_on_disk(stored, state, head)) and rows != state[head].shape[0]:
        more["num_classes"] = rows
    first = next((f"{one}.weight" for one in [about.get("first_conv")] if isinstance(one, str)), "")
    places = [old for old in stored.tensors if f".{old}".endswith(f".{first}")] if first in state else []
    columns = stored.tensors[min(places, key=len)].shape[1] if places else None
    if columns and columns != state[first].shape[1] and "in_chans" not in settings:
        more["in_chans"] = columns
    module = build(**more) if more else module
    preprocessing, notes = of_timm(timm, module, {**settings, **more}, config)
    if len(heads) > 1:
        notes += (f"the model has {len(heads)} heads, whose answers it averages: {', '.join(heads)}",)
    return built(
        *(module, stored, reading, f"timm {timm.__version__}"),
        head=head,
        names=_timm_names(config),
        preprocessing=preprocessing,
        notes=notes,
    )


def _timm_names(config: Mapping) -> ClassNames | None:
    """The class names that a folder's config.json has."""
    about = {**(config.get("pretrained_cfg") or {}), **config}
    labels = about.get("label_names")
    if not labels:
        return None
    said = about.get("label_descriptions") or {}
    labels = [said.get(label, label) for label in labels] if isinstance(said, dict) else labels
    return ClassNames(tuple(map(str, labels)), "timm's label_names in config.json")


# --- transformers -----------------------------------------------------------------------------------------


def build_transformers(folder: Path, reading: Reading) -> Built:
    """A folder that `save_pretrained` wrote of a classifier; nothing is fetched, and no code in it is run.

    Raises:
        UserError: it is no classifier of one label a picture, is quantised, needs code, or its weights do not fit.
    """
    transformers = _import("transformers", "hf")
    file, raw = _config(folder, "save_pretrained")
    _refuse_config(raw, file)
    stored = read_folder(folder, reading.ema)
    with _quiet(transformers):
        with _told(f"transformers does not understand {file}", "put it right, or install the version that wrote it"):
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        module, found, notes = _filled_transformers(transformers, config, stored)
        preprocessing = of_transformers(transformers, folder)
    head = str(head_of(module.state_dict()))
    known = {int(place): str(name) for place, name in (config.id2label or {}).items()}
    names = tuple(known[place] for place in sorted(known))
    own = None if all(map(PLACEHOLDER.fullmatch, names)) else ClassNames(names, f"id2label in {file}")
    beside = [one for one in (file, folder / PREPROCESSOR) if one.is_file()]
    return Built(
        *(module.eval(), stored, found, head, config.num_labels, f"transformers {transformers.__version__}"),
        *(own, preprocessing, (*stored.files, *beside), (*found.notes, *notes)),
    )


@contextmanager
def _told(what: str, how: str) -> Generator[None]:
    """Say in one sentence that a library does not take what it is given.

    Raises:
        UserError: it does not.
    """
    try:
        yield
    except Exception as error:  # of several libraries, all of which mean: not understood
        raise UserError(f"{what} ({' '.join(str(error).split())[:160]}): {how}") from None


def _refuse_config(raw: Mapping, file: Path) -> None:
    """Refuse what is no classifier of one label a picture, before anything of it is built."""
    kind = raw.get("problem_type")
    if kind in ("multi_label_classification", "regression"):
        raise UserError(f"{file} is of a model for {kind}: forgetting a class needs one class for each picture")
    if raw.get("quantization_config"):
        raise UserError(f"{file} is of a quantised model: {FLOAT_PARENT}")
    if raw.get("auto_map"):
        raise UserError(f"{file} is of a model with code of its own, which is not run: build it in a py: file")
    if not raw.get("model_type"):
        raise UserError(f"{file} names no model_type of transformers: a folder of timm is given as timm:{file.parent}")


@contextmanager
def _quiet(transformers: Any) -> Generator[None]:
    """Without the library's bars and reports: what they say, the errors here say."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _filled_transformers(transformers: Any, config: Any, stored: Stored) -> tuple[nn.Module, Matched, tuple[str, ...]]:
    """The library's own loading of our tensors, and which of them became which.

    The library renames tensors when it loads (version 5: `encoder.layer.0.attention.attention.query` on disk is
    `layers.0.attention.q_proj` in memory) by rules of its own. They are read off exactly: one more model is loaded
    from tensors that hold nothing but their number, and where a number arrives, that tensor goes.
    """
    what = f"no image classifier of transformers can be built for {stored.path}"
    with _told(what, "give a folder of one, with the config.json that belongs to it"), _aside(), torch.device("meta"):
        shell = type(transformers.AutoModelForImageClassification.from_config(config))
    kind, notes = kind_of(stored.tensors)

    def load(tensors: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
        with _aside():
            given = {"config": config, "state_dict": tensors, "dtype": dtype, "ignore_mismatched_sizes": True}
            module, found = shell.from_pretrained(None, **given, output_loading_info=True)
        _refuse_misfits(found, stored.path)
        return module

    checked(stored.tensors, stored.tensors, stored.path, ADVICE)
    order = list(stored.tensors)
    numbers = {old: torch.full((), float(place)).expand(stored.tensors[old].shape) for place, old in enumerate(order)}
    arrived = {name: t.unique() for name, t in load(numbers, torch.float32).state_dict().items()}
    module = load(dict(stored.tensors), kind)
    state, disk_names = module.state_dict(), {}
    for name, places in arrived.items():
        old = order[int(places)] if places.numel() == 1 and int(places) in range(len(order)) else None
        if old and _equal(state[name], stored.tensors[old]):
            disk_names[name] = old
    other = [name for name in state if name not in disk_names]
    if other:
        notes += (f"{len(other)} tensors are made of several on disk, e.g. {other[0]}",)
    moved = [name for name, old in disk_names.items() if name != old]
    if moved:
        example = f"{disk_names[moved[0]]} for {moved[0]}"
        notes += (f"{len(moved)} of {len(disk_names)} tensors have other names on disk, e.g. {example}",)
    return module, Matched(state, disk_names, stored.notes), notes


def _equal(here: Tensor, there: Tensor) -> bool:
    return here.shape == there.shape and torch.equal(here, there.to(here.dtype))


def _refuse_misfits(found: Mapping, path: Path) -> None:
    """Refuse what the library passes over: a missing tensor stays random, an unexpected one is dropped."""
    said = []
    for key, what in (
        ("missing_keys", "missing"),
        ("unexpected_keys", "unexpected"),
        ("mismatched_keys", "of other shapes"),
    ):
        names = sorted(str(one[0]) if isinstance(one, tuple) else str(one) for one in found[key])
        if names:
            said.append(f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})")
    if said or found["error_msgs"]:
        raise UserError(f"{path} does not fit its config.json: {' and '.join(said) or found['error_msgs'][0]} tensors")
