"""The artefact: which weights of a parent are switched off or replaced, in a small file that names its parent."""

import hashlib
import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.utils import prune

from mimu import applying
from mimu.config import WITH_VALUES, Config, card
from mimu.errors import MaskError
from mimu.files import KINDS, attempt, must_be_ours, new_folder, packed, put, read
from mimu.parent import Fit, Parent, bits_of, describe_parent, plain_name, sha256_of, state_of, unwrap

FILE, CONFIG, CARD = "mask.safetensors", "mask_config.json", "README.md"
KEY, DIGEST = "config", "digest"  # of the file's metadata; of the config in it
VALUES = ".values."  # in front of a parameter's name in the file; no name in torch begins with a dot
SMALL = 2**31  # parameters of up to so many weights have positions of 32 bits


def _kind_of(size: int) -> torch.dtype:
    return torch.int32 if size <= SMALL else torch.int64


def _checked(positions: Mapping[str, Tensor], parent: Parent) -> dict[str, Tensor]:
    """Return positions on the CPU in their proper type, checked against the parent's parameters.

    Raises:
        MaskError: a parameter is not one of the parent's targets, or positions are not integers, not sorted, twice
            there, or outside of the parameter.
    """
    checked = {}
    for name, flat in positions.items():
        if name not in parent.targets:
            raise MaskError(f"the mask has positions in {name}, which its config does not describe: describe it")
        if flat.dim() != 1 or flat.dtype not in (torch.int32, torch.int64):
            raise MaskError(f"positions in {name} are {flat.dtype} {list(flat.shape)}: give int32 or int64 [k]")
        flat, size = flat.detach().cpu(), parent.targets[name].size
        if len(flat) and (int(flat.min()) < 0 or int(flat.max()) >= size):
            raise MaskError(f"positions in {name} are outside of its {size:,} weights: the mask is damaged")
        if bool((flat[1:] <= flat[:-1]).any()):
            raise MaskError(f"positions in {name} are not sorted, or some are there twice: sort them, each once")
        checked[name] = flat.to(_kind_of(size)).contiguous()
    if lacking := sorted(set(parent.targets) - set(checked)):
        raise MaskError(f"the config describes {lacking[0]}, in which the mask has no positions: leave it out")
    if not sum(map(len, checked.values())):
        raise MaskError("the mask switches no weight off: give at least one position")
    return checked


def _checked_values(values: Mapping[str, Tensor], positions: Mapping[str, Tensor], parent: Parent) -> dict[str, Tensor]:
    """Return values on the CPU, checked against positions that are checked; -0.0 becomes 0.0.

    A parameter whose values are all zero is left out, so that equal masks have equal files.

    Raises:
        MaskError: a parameter has no positions, or values are not of its dtype, not one for each position, or not
            finite; or a parameter has a name that the file keeps for values.
    """
    checked = {}
    if values and (strange := next((name for name in positions if name.startswith(VALUES)), None)):
        raise MaskError(f"{strange} is called as values are in the mask's file: rename that parameter")
    for name, new in values.items():
        if name not in positions:
            raise MaskError(f"the mask has values of {name}, in which it has no positions: give both")
        dtype, count = parent.targets[name].dtype, len(positions[name])
        if new.dtype not in KINDS or str(new.dtype) != f"torch.{dtype}" or tuple(new.shape) != (count,):
            raise MaskError(f"values of {name} are {new.dtype} {list(new.shape)}: give {dtype} [{count}]")
        bits, exact = bits_of(new).cpu().clone(), new.detach().cpu().double()
        if not bool(exact.isfinite().all()):
            raise MaskError(f"values of {name} are not all finite: give finite ones")
        bits[exact == 0] = 0
        if bool(bits.any()):
            checked[name] = bits.view(new.dtype)
    return checked


class Mask:
    """Weights of a parent that are switched off or replaced, and what is known of them.

    Args:
        positions: parameter (name in memory) -> sorted flat C-order positions [k], int32 or int64.
        config: as in `mimu.config.Config`, or a table of its fields; its parent describes the same parameters.
        values: parameter -> what is put at its positions [k], in its dtype, 0 where a weight is switched off; the
            parameters that have none get zeros.

    Raises:
        MaskError: positions, values or config are not what they must be.
    """

    def __init__(
        self,
        positions: Mapping[str, Tensor],
        config: Mapping[str, Any] | Config,
        values: Mapping[str, Tensor] | None = None,
    ):
        config = config if isinstance(config, Config) else Config.read(config)
        self.positions = _checked(positions, config.parent)
        self.values = _checked_values(values or {}, self.positions, config.parent)
        if config.version == WITH_VALUES and not self.values:
            raise MaskError(f"the config is of version {WITH_VALUES}, but no weight is replaced: give the values, too")
        self.config = replace(config, version=WITH_VALUES) if self.values else config

    @classmethod
    def from_keep(cls, keep: Mapping[str, Tensor], config: Mapping[str, Any] | Config) -> "Mask":
        """Make a mask from full tensors, parameter -> [*shape], 1 or True = kept, 0 or False = switched off.

        Raises:
            MaskError: as the constructor, or a shape is not the parameter's.
        """
        config = config if isinstance(config, Config) else Config.read(config)
        for name, kept in keep.items():
            if name in config.parent.targets and tuple(kept.shape) != config.parent.targets[name].shape:
                needed = list(config.parent.targets[name].shape)
                raise MaskError(f"the mask of {name} has shape {list(kept.shape)}: give {needed}")
        flat = {name: (kept.reshape(-1) == 0).nonzero().flatten() for name, kept in keep.items()}
        return cls(flat, config)

    @property
    def forgotten(self) -> tuple[str, ...]:
        """Names of the classes that the mask makes the model forget."""
        return tuple(one.name for one in self.config.forgotten)

    @property
    def name(self) -> str:
        """What the mask is called on a model unless it is given a name: its classes, joined by "+"."""
        return "+".join(self.forgotten)

    @cached_property
    def counts(self) -> dict[str, tuple[int, int]]:
        """How many weights of each parameter are (switched off, replaced by a value that is not zero)."""
        new = {name: int(bits_of(value).count_nonzero()) for name, value in self.values.items()}
        return {name: (len(flat) - new.get(name, 0), new.get(name, 0)) for name, flat in self.positions.items()}

    @property
    def switched_off(self) -> int:
        """How many weights the mask switches off: it puts zeros there."""
        return sum(off for off, _ in self.counts.values())

    @property
    def replaced(self) -> int:
        """How many weights the mask replaces by values that are not zero."""
        return sum(new for _, new in self.counts.values())

    @property
    def changed(self) -> int:
        """How many weights the mask changes, by zeros or by values."""
        return sum(map(len, self.positions.values()))

    def summary(self) -> str:
        """Say how many weights of which parameters are changed: `switched off: 9 of a; replaced: 4 of a, 1 of b`."""
        parts = []
        for at, what in enumerate(("switched off", "replaced")):
            where = [f"{count[at]:,} of {name}" for name, count in self.counts.items() if count[at]]
            parts += [f"{what}: {', '.join(where)}"] if where else []
        return "; ".join(parts)

    def keep(self) -> dict[str, Tensor]:
        """Return full tensors, parameter -> [*shape] bool, True = kept as it is in the parent."""
        full = {}
        for name, flat in self.positions.items():
            target = self.config.parent.targets[name]
            kept = torch.ones(target.size, dtype=torch.bool)
            kept[flat.to(torch.int64)] = False
            full[name] = kept.view(target.shape)
        return full

    def __repr__(self) -> str:
        return f"Mask(forgets {self.name!r}; {self.summary()})"

    # --- on a model ---------------------------------------------------------------------------------------

    @cached_property
    def digest(self) -> str:
        """SHA-256 of positions, values and config."""
        known = {"positions": _hashes(self.positions), "config": self.config.plain()}
        return _sha256_of_json(known | {"values": _hashes(self.values)} if self.values else known)

    @cached_property
    def _key(self) -> tuple[str, str]:
        return self.digest, _sha256_of_json(self.config.plain()["parent"])

    def apply(self, model: nn.Module, name: str | None = None, any_parent: bool = False) -> Fit:
        """Switch the mask's weights off, and put its values in their places, in the model itself.

        Args:
            model: the parent, in any wrapper, on any device; other masks may be on.
            name: of the mask on this model; its classes' names if None.
            any_parent: accept a model in which only names and shapes agree.

        Returns:
            How well the model fits the mask; nothing happens if the mask is on already.

        Raises:
            MaskError: the model is not the parent, another mask has the name, or one that is on puts other values in
                the same places; the model is unchanged then.
        """
        name = self.name if name is None else name
        return applying.apply(model, name, self._key, self, any_parent)

    def lift(self, model: nn.Module, name: str | None = None, changed: str = "refuse") -> bool:
        """Put the weights back, bit for bit, save those that another mask still holds.

        Args:
            changed: "refuse", "restore" or "keep" what was written to these weights meanwhile (by training, say).

        Returns:
            Whether the mask was on. To lift a mask twice does nothing.

        Raises:
            MaskError: the weights were written meanwhile, or the name is another mask's, or the weights are zero (or
                the mask's values) though no mask is on, so that the values to put back are not here.
        """
        name = self.name if name is None else name
        applied = applying.ledger_of(model).masks.get(name)
        if applied and applied.digest != self.digest:
            raise MaskError(f"the mask that is on under the name {name!r} is another one: lift it with its own mask")
        if not applied and not applying.ledger_of(model).masks and applying.is_on(model, self):
            found = "what it puts there" if self.values else "zero"
            raise MaskError(
                f"the mask's weights are {found}, but the old ones are not kept here: load the parent again"
            )
        return applying.lift(model, name, changed)

    @contextmanager
    def applied(self, model: nn.Module, name: str | None = None, any_parent: bool = False) -> Generator[Fit]:
        """Apply the mask for the length of the block, however it ends. A mask that was on before stays on.

        Raises:
            MaskError: as `apply` and `lift`.
        """
        name = self.name if name is None else name
        on_before = name in applying.ledger_of(model).masks
        fit = self.apply(model, name, any_parent)
        try:
            yield fit
        finally:
            if not on_before:
                self.lift(model, name)

    def state(self, model: nn.Module, any_parent: bool = False) -> dict[str, Tensor]:
        """Return masked copies of parameters for `torch.func.functional_call(model, mask.state(model), inputs)`.

        The model itself is not touched: for weights that several threads share, or that cannot be written.

        Raises:
            MaskError: the model is not the parent.
        """
        found = applying.find_in(model, self._key[1], self.config, any_parent)
        return applying.masked_state(model, found, self)

    def to_prune(self, model: nn.Module, any_parent: bool = False) -> None:
        """Hand the mask over to `torch.nn.utils.prune`: parameters become pairs `*_orig` and `*_mask` (1 = kept).

        Raises:
            MaskError: the model is not the parent, or the mask replaces weights, which such pairs cannot say.
        """
        if self.values:
            what = f"the mask replaces {self.replaced:,} weights, and torch's pruning can only switch off"
            raise MaskError(f"{what}: apply it, or seal it")
        found = applying.find_in(model, self._key[1], self.config, any_parent)
        for target, kept in self.keep().items():
            owner, _, tensor = found.homes[target].rpartition(".")
            module = _submodule(model, owner)
            prune.custom_from_mask(module, tensor, kept.to(getattr(module, tensor).device))

    def differing(self, model: nn.Module, fit: Fit) -> tuple[int, int]:
        """Count the places in a model that do not hold what the mask puts there.

        Args:
            fit: what `apply` returned: how the model names the parameters.

        Returns:
            How many weights that are switched off are not zero, and how many that are replaced have another value.
        """
        values, off, new = applying.parameters(model), 0, 0
        for name, flat in self.positions.items():
            found = values[fit.names[name]].detach().flatten()[flat.to(torch.int64)].cpu()
            put = self.values.get(name, torch.zeros(len(flat))).to(found.dtype)
            off += int((found != put)[put == 0].sum())
            new += int((found != put)[put != 0].sum())
        return off, new

    # --- on disk ------------------------------------------------------------------------------------------

    def save(self, folder: Path | str) -> None:
        """Write `mask.safetensors`, `mask_config.json` and a card, `README.md`; an older mask there is replaced.

        Raises:
            MaskError: the folder holds other files, or cannot be written.
        """
        plain = self.config.plain() | {DIGEST: self.digest}
        values = {VALUES + name: new for name, new in self.values.items()}
        data = packed(self.positions | values, {KEY: json.dumps(plain, sort_keys=True)})
        with new_folder(Path(folder), ours=(FILE, CONFIG, CARD)) as place:
            put(place / FILE, data)
            put(place / CONFIG, (json.dumps(plain, indent=1, sort_keys=True) + "\n").encode())
            put(place / CARD, card(self.config, self.counts).encode())

    @classmethod
    def load(cls, path: Path | str) -> "Mask":
        """Read a mask from its folder, or from its `mask.safetensors` alone. Nothing in a file is ever run.

        The digest finds damage and careless edits. It is no signature: whoever changes a mask can also change it.

        Raises:
            MaskError: there is no such file, it is damaged or of another kind, or `mask_config.json` says other things.
        """
        path = Path(path)
        file = path / FILE if path.is_dir() else path
        metadata, tensors = _read(file)
        config = _parsed(file, metadata.get(KEY, "null"))
        promised = config.pop(DIGEST, None)
        if path.is_dir() and (path / CONFIG).exists():
            beside = _parsed(path / CONFIG, read(path / CONFIG).decode(errors="replace"))
            if beside.pop(DIGEST, None) != promised or beside != config:
                raise MaskError(f"{path / CONFIG} does not say what {FILE} says: remove one of the two")
        named = [name for name in tensors if name.startswith(VALUES) and config.get("version") == WITH_VALUES]
        values = {name.removeprefix(VALUES): tensors[name] for name in named}
        positions = {name: flat for name, flat in tensors.items() if name not in named}
        mask = cls(positions, config, values)
        for name, flat in positions.items():
            if flat.dtype != mask.positions[name].dtype:
                raise MaskError(f"{file} has {flat.dtype} positions in {name}: give {mask.positions[name].dtype}")
        if promised != mask.digest or _hashes(values) != _hashes(mask.values):
            raise MaskError(f"{file} is damaged (its content is not what its digest says): give a whole one")
        return mask


def check_place(folder: Path | str) -> None:
    """See that a mask could be saved in a folder, before it is made.

    Raises:
        MaskError: something else stands there, or on the way there.
    """
    must_be_ours(Path(folder), (FILE, CONFIG, CARD))
    nearest = next(path for path in Path(folder).absolute().parents if path.exists())
    if not nearest.is_dir():
        raise MaskError(f"{nearest} is a file, in which there is no room for {folder}: choose another place")


def _submodule(model: nn.Module, path: str) -> nn.Module:
    """Return the module of a plain name, at whatever depth wrappers stand."""
    named = {plain_name(unwrap(model), name): unwrap(module) for name, module in unwrap(model).named_modules()}
    return named[path]


def from_prune(model: nn.Module, config: Mapping[str, Any], load: str | None = None) -> Mask:
    """Make a mask from the pairs `*_orig` and `*_mask` that `torch.nn.utils.prune` leaves in a model.

    Args:
        config: fields of `Config` without the parent, which is the model with every `*_orig` in its place.

    Raises:
        MaskError: nothing is pruned.
    """
    state = state_of(unwrap(model))
    pairs = {
        name.removesuffix("_orig"): state[name.removesuffix("_orig") + "_mask"]
        for name in state
        if name.endswith("_orig") and name.removesuffix("_orig") + "_mask" in state
    }
    pruned = {name: keep for name, keep in pairs.items() if bool((keep == 0).any())}
    if not pruned:
        raise MaskError("no weight of the model is pruned by torch.nn.utils.prune: prune one first")
    masks = {f"{name}_mask" for name in pairs}
    whole = {
        name.removesuffix("_orig") if name.removesuffix("_orig") in pairs else name: value
        for name, value in state.items()
        if name not in masks
    }
    parent = describe_parent(whole, pruned, load)
    return Mask.from_keep(pruned, dict(config) | {"parent": parent})


def _hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: sha256_of(value) for name, value in tensors.items()}


def _sha256_of_json(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return (metadata, tensors) of a safetensors file.

    Raises:
        MaskError: there is none, or it is not whole.
    """

    def whole() -> tuple[dict[str, str], dict[str, Tensor]]:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118

    errors = (SafetensorError, ValueError, RuntimeError, LookupError, TypeError, AttributeError)
    return attempt(file, whole, errors)  # ty: ignore[invalid-explicit-return]


def _parsed(path: Path, text: str) -> dict[str, Any]:
    """Parse the one JSON object that a config is.

    Raises:
        MaskError: it is none.
    """
    value = attempt(path, lambda: json.loads(text), (ValueError, RecursionError))
    if not isinstance(value, dict):
        raise MaskError(f"{path} holds no mask config of mimu: give a folder or file that Mask.save wrote")
    return value
