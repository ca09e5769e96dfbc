"""What a loaded classifier consists of, as rows: layers by both their names, head, classes and preprocessing."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from models.specs import Loaded

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
    can = value.dim() in (2, 4) and value.is_floating_point() and any(isinstance(one, MASKABLE) for one in owners)
    on_disk = next((disk_names[name] for name in names if name in disk_names), None)
    kind, shape = type(owners[0]).__name__, tuple(value.shape)
    return LayerRow(names[0], on_disk, kind, shape, value.numel(), tuple(names[1:]), can)


def _few(names: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return f"{shown}, ... ({len(names)})" if len(names) > most else shown
