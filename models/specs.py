"""A classifier that a user brings, by one line: which framework, which architecture, which file.

    torchvision:resnet18@mine.pt                           an architecture of torchvision and a checkpoint of it
    timm:vit_tiny_patch16_224,img_size=64@mine.pt          settings follow the name after commas
    timm:FOLDER, hf:FOLDER                                 folders that timm or save_pretrained wrote
    py:net.py:make_net@mine.pt                             a function of a file of yours, which returns the module

Files are read, never run. Only `py:` runs code: the file that it names.
"""

import ast
import importlib.util
import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.choices import did_you_mean
from core.config import UserError
from models.checkpoints import Ema, Stored, read_checkpoint
from models.class_names import ClassNames, choose_names
from models.frameworks import (
    Built,
    Reading,
    build_timm,
    build_timm_folder,
    build_torchvision,
    build_transformers,
    built,
    head_of,
    made,
)
from models.preprocessing import Given, Preprocessing

KINDS = ("torchvision", "timm", "hf", "py")
FORMS = "torchvision:NAME@FILE, timm:NAME@FILE, timm:FOLDER, hf:FOLDER or py:FILE.py:FUNCTION@FILE"
NOTHING_GIVEN = Given()


@dataclass(frozen=True)
class ModelSpec:
    """Where a classifier comes from.

    Args:
        kind: torchvision, timm, hf or py. name: of the architecture, or of the function; "" for a folder.
        path: the checkpoint, or the folder. settings: further arguments of the architecture's function.
        code: the file with the function; `py` alone.
    """

    kind: str
    name: str
    path: Path
    settings: tuple[tuple[str, Any], ...] = ()
    code: Path | None = None

    def __str__(self) -> str:
        named = ",".join([self.name, *(f"{name}={value}" for name, value in self.settings)])
        place = f"{self.code}:" if self.code else ""
        return f"{self.kind}:{place}{named}@{self.path}" if self.name else f"{self.kind}:{self.path}"


def parse(text: str) -> ModelSpec:
    """One line that names a classifier -> its parts.

    Raises:
        UserError: it has none of the forms, or names a file or folder that is not there.
    """
    kind, _, rest = text.partition(":")
    if kind not in KINDS or not rest:
        raise UserError(f"{text!r} names no model: write {FORMS}")
    if kind == "hf" or (kind == "timm" and Path(rest).is_dir()):
        if not Path(rest).is_dir():
            raise UserError(f"there is no folder {rest}: give one that save_pretrained wrote")
        return ModelSpec(kind, "", Path(rest))
    named, _, file = rest.partition("@")
    code, _, named = named.rpartition(".py:") if kind == "py" else ("", "", named)
    name, *settings = re.split(r",(?![^()\[\]]*[)\]])", named)  # not at the comma of (3, 4)
    if not name or not file or (kind == "py" and not code):
        raise UserError(f"{text!r} is incomplete: write {FORMS}")
    if not Path(file).is_file():
        raise UserError(f"there is no file {file}: check the path behind the @ of {text!r}")
    pairs = tuple(_setting(one, text) for one in settings)
    return ModelSpec(kind, name, Path(file), pairs, Path(f"{code}.py") if code else None)


def _setting(text: str, whole: str) -> tuple[str, Any]:
    """`img_size=64` -> ("img_size", 64); a word that is no Python value is a text."""
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise UserError(f"{text!r} in {whole!r} is no setting: write name=value after the architecture's name")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


# --- what an output says ----------------------------------------------------------------------------------


def logits_of(output: object) -> Tensor:
    """The logits [B, C] in whatever a classifier answers with: the one rule for all.

    A tensor of two axes is taken as it is. Of anything else its `.logits` (or ["logits"]) is taken, of a tuple or list
    its first tensor, of a dict its only tensor of two axes.

    Raises:
        UserError: no or several tensors could be meant.
    """
    if isinstance(output, Tensor):
        if output.dim() == 2:
            return output
        raise UserError(f"the model answers with a tensor {list(output.shape)}: one row of logits a picture is needed")
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return logits_of(named)
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return logits_of(output[0])
    if isinstance(output, Mapping):
        flat = {str(key): value for key, value in output.items() if isinstance(value, Tensor) and value.dim() == 2}
        if len(flat) == 1:
            return next(iter(flat.values()))
        raise UserError(
            f"the model answers with a dict of {', '.join(map(str, output))}: name the tensor of logits 'logits'"
        )
    raise UserError(f"the model answers with a {type(output).__name__}: let it return logits [pictures, classes]")


@dataclass(frozen=True)
class Loaded:
    """A classifier that is ready to be asked, with all that is known of it.

    Args:
        module: in eval mode, on the CPU, in the kind of floats of its checkpoint.
        classes, preprocessing: with their sources.
        head: name in memory of the weight that makes the outputs.
        disk_names: name in memory -> name on disk, for every tensor that stands there as it is. A tensor that is
            missing here is made of several.
        stored: the checkpoint: its container, its other copies (EMA), which shard holds which tensor.
        files: the files that were read, the weights first.
        framework: with its version. notes: what was unwrapped, chosen, converted or assumed, one sentence each.
        probabilities: the module ends in a softmax; `logits` takes the logarithm.
    """

    module: nn.Module
    spec: ModelSpec
    classes: ClassNames
    preprocessing: Preprocessing
    head: str
    disk_names: Mapping[str, str]
    stored: Stored
    files: tuple[Path, ...]
    framework: str
    notes: tuple[str, ...] = ()
    probabilities: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The kind of floats that the module computes with."""
        return self.module.get_parameter(self.head).dtype

    def logits(self, output: object) -> Tensor:
        """The logits [B, C] in an answer of the module; see `logits_of`."""
        found = logits_of(output)
        return found.log() if self.probabilities else found

    def __call__(self, images: Tensor) -> Tensor:
        """Prepared images [B, C, H, W] -> logits [B, classes]."""
        return self.logits(self.module(images.to(self.dtype)))


# --- loading ----------------------------------------------------------------------------------------------


def load(
    spec: ModelSpec | str,
    *,
    classes: Path | None = None,
    folders: Sequence[str] | None = None,
    preprocessing: Given = NOTHING_GIVEN,
    ema: Ema | None = None,
    by_order: bool = False,
) -> Loaded:
    """Load a classifier and ask it once, with noise, whether it answers as a classifier does.

    Args:
        classes: a file of class names, one a line. folders: names of the folders of images, if there are any.
        preprocessing: what a person says of it; the rest is taken from the model's files.
        ema: which of a model and its average over training is meant, where a file holds both.
        by_order: take tensors in their order where their names are altogether different and all shapes agree.

    Raises:
        UserError: the model cannot be loaded, is no classifier of one class a picture, or nothing says how its images
            are prepared.
    """
    spec = parse(spec) if isinstance(spec, str) else spec
    model = _build(spec, Reading(ema, by_order))
    prepared = preprocessing.over(model.preprocessing)
    model, probabilities = _asked(model, prepared)
    names, notes = choose_names(model.outputs, model.names, classes, folders)
    if probabilities:
        notes += ("the model ends in a softmax: logits are the logarithm of its answers",)
    return Loaded(
        *(model.module, spec, names, prepared, model.head, model.found.disk_names, model.stored),
        *((*model.files, *([classes] if classes else [])), model.framework, (*model.notes, *notes), probabilities),
    )


def module_of(spec: ModelSpec | str, ema: Ema | None = None, by_order: bool = False) -> nn.Module:
    """The module of a classifier alone: it is not asked, so that nothing must be known of its images.

    Raises:
        UserError: it cannot be loaded.
    """
    return _build(parse(spec) if isinstance(spec, str) else spec, Reading(ema, by_order)).module


def _build(spec: ModelSpec, reading: Reading) -> Built:
    settings = dict(spec.settings)
    if spec.kind == "torchvision":
        return build_torchvision(spec.name, spec.path, settings, reading)
    if spec.kind == "hf":
        return build_transformers(spec.path, reading)
    if spec.kind == "py":
        assert spec.code is not None
        return build_python(spec.code, spec.name, spec.path, settings, reading)
    return build_timm(spec.name, spec.path, settings, reading) if spec.name else build_timm_folder(spec.path, reading)


def _asked(model: Built, preprocessing: Preprocessing) -> tuple[Built, bool]:
    """Ask the model about noise: (it with the head that makes its answers, whether these are probabilities).

    Raises:
        UserError: it cannot take such images, or answers with something else than one logit a class.
    """
    path, generator = model.stored.path, torch.Generator().manual_seed(0)
    kind = model.module.get_parameter(model.head).dtype
    images = torch.randn(1, *preprocessing.shape, generator=generator).to(kind).requires_grad_()
    try:
        with torch.enable_grad():
            output = model.module(images)
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:
        said, shape = " ".join(str(error).split())[:200], list(preprocessing.shape)
        raise UserError(
            f"{path}: the model does not take images {shape}, as {preprocessing.source} says ({said}): give --size and "
            "--channels as in its training"
        ) from None
    found = logits_of(output)
    probabilities = ends_in_softmax(found, f"{path} is of a model that")
    makers = [
        name
        for name, value in model.module.state_dict().items()
        if value.dim() in (2, 4) and name.endswith("weight") and len(value) == found.shape[1]
    ]
    if not makers:
        raise UserError(f"{path}: the model answers with {found.shape[1]} numbers, which no weight of it makes alone")
    head = model.head if model.head in makers else makers[-1]
    return replace(model, head=head, outputs=found.shape[1]), probabilities


def ends_in_softmax(logits: Tensor, what: str) -> bool:
    """Whether an answer [B, C] that has a graph of gradients was made by a softmax.

    The last operation is read off that graph, since numbers between 0 and 1 may be logits.

    Args:
        what: begins the sentence of a refusal.

    Raises:
        UserError: there is one output, or the last operation is a sigmoid.
    """
    if logits.shape[1] == 1:
        raise UserError(f"{what} has one output: forgetting a class needs two or more")
    last = type(logits.grad_fn).__name__
    if last.startswith("Sigmoid"):
        raise UserError(f"{what} ends in a sigmoid, for several labels a picture: forgetting a class needs one class "
                        "for each picture")  # fmt: skip
    return last.startswith("Softmax")


# --- what it consists of ----------------------------------------------------------------------------------

MASKABLE = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)  # whose matrices connect one layer's neurons to another's


@dataclass(frozen=True)
class LayerRow:
    """One parameter of a model.

    Args:
        name: in memory; a tensor that several modules share has one row.
        on_disk: its name in the checkpoint; None: it is made of several tensors there.
        kind: class of the module that holds it. shape: its lengths; weights: their product.
        aliases: further names of the same memory.
        maskable: whether single weights of it can be switched off: 2 or 4 axes, of a Linear, Conv2d or attention.
    """

    name: str
    on_disk: str | None
    kind: str
    shape: tuple[int, ...]
    weights: int
    aliases: tuple[str, ...]
    maskable: bool


@dataclass(frozen=True)
class Summary:
    """All that `inspect` shows.

    Args:
        layers: one row for each parameter, in the module's order.
        head: the weight that makes the outputs; head_bias: whether each class has a bias, which no mask touches.
        facts: (what, value) in the order in which they are shown.
        notes: as of `Loaded`.
    """

    layers: tuple[LayerRow, ...]
    head: str
    head_bias: bool
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def describe(loaded: Loaded) -> Summary:
    """Layers, head, classes, preprocessing and notes of a loaded classifier; nothing is computed."""
    layers = layer_rows(loaded.module, loaded.disk_names)
    owner = loaded.module.get_submodule(loaded.head.rpartition(".")[0])
    bias = getattr(owner, "bias", None) is not None
    maskable = [row for row in layers if row.maskable]
    facts = (
        ("model", str(loaded.spec)),
        ("framework", loaded.framework),
        ("files", ", ".join(map(str, loaded.files))),
        ("numbers", str(loaded.dtype).removeprefix("torch.")),
        ("parameters", f"{sum(row.weights for row in layers):,}"),
        ("maskable weights", f"{sum(row.weights for row in maskable):,} in {len(maskable)} tensors"),
        ("head", f"{loaded.head}, {'with' if bias else 'without'} a bias for each class"),
        ("outputs", str(len(loaded.classes))),
        ("classes", f"{_few(loaded.classes.names)}; from {loaded.classes.source}"),
        ("preprocessing", loaded.preprocessing.said()),
    )
    return Summary(layers, loaded.head, bias, facts, loaded.notes)


def layer_rows(module: nn.Module, disk_names: Mapping[str, str]) -> tuple[LayerRow, ...]:
    """One row for each parameter of a module, names of the same memory in one row.

    Args:
        disk_names: name in memory -> name on disk.
    """
    together: dict[tuple, list[str]] = defaultdict(list)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, value in parameters.items():
        together[_place(value)].append(name)
    return tuple(_row(module, names, parameters[names[0]], disk_names) for names in together.values())


def _place(value: Tensor) -> tuple:
    """What two names of one tensor have in common."""
    return value.data_ptr(), value.shape, value.stride()


def _row(module: nn.Module, names: list[str], value: Tensor, disk_names: Mapping[str, str]) -> LayerRow:
    owners = [module.get_submodule(name.rpartition(".")[0]) for name in names]
    can = value.dim() in (2, 4) and names[0].endswith("weight") and any(isinstance(one, MASKABLE) for one in owners)
    on_disk = next((disk_names[name] for name in names if name in disk_names), None)
    kind, shape = type(owners[0]).__name__, tuple(value.shape)
    return LayerRow(names[0], on_disk, kind, shape, value.numel(), tuple(names[1:]), can)


def _few(names: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return f"{shown}, ... ({len(names)})" if len(names) > most else shown


# --- a user's own file ------------------------------------------------------------------------------------


def build_python(code: Path, function: str, file: Path, settings: Mapping[str, Any], reading: Reading) -> Built:
    """Run a file of the user's and call one function of it, which returns the module; the checkpoint fills that.

    A parameter `num_classes` without a default gets the rows of the checkpoint's last weight of 2 or 4 axes.

    Raises:
        UserError: the file cannot be run, has no such function, or that returns no module.
    """
    stored = read_checkpoint(file, reading.ema)
    build = _function(code, function)
    given = dict(settings)
    wanted = inspect.signature(build).parameters.get("num_classes")
    if wanted is not None and wanted.default is inspect.Parameter.empty and "num_classes" not in given:
        last = head_of(stored.tensors)
        given |= {"num_classes": stored.tensors[last].shape[0]} if last else {}
    module = made(build, f"py:{code}:{function}", **given)
    if not isinstance(module, nn.Module):
        raise UserError(f"{function} of {code} returns a {type(module).__name__}: let it return the torch.nn.Module")
    note = f"{code} was run: it is code of yours"
    return built(module, stored, reading, f"torch {torch.__version__}", files=(code,), notes=(note,))


def _function(code: Path, function: str) -> Callable[..., nn.Module]:
    if not code.is_file():
        raise UserError(f"there is no file {code}: check the path")
    spec = importlib.util.spec_from_file_location(f"mimu_user_{code.stem}", code)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{code} cannot be run ({type(error).__name__}: {error}): put it right") from error
    found = getattr(module, function, None)
    if not callable(found):
        functions = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UserError(f"{code} has no function {function!r}{did_you_mean(function, functions)}")
    return found
