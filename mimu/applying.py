"""Switching weights off in a model, or replacing them, and back again: in place, by bits, several masks at a time.

Of what a mask changes only the old values and the new ones are kept, in a ledger in the model's `__dict__`: the model
has no hook, no wrapper and no new key, and `state_dict()` holds plain numbers. A deep copy takes its ledger along and
can be lifted. A pickle does not: whoever gets a pickled masked model gets no removed value with it.
"""

import warnings
import weakref
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mimu.config import Config
from mimu.errors import MaskError, ParentWarning
from mimu.parent import (
    Edit,
    Fit,
    bits_of,
    check_model,
    checksum,
    edit_of,
    is_plain,
    join,
    parameters,
    read_bits,
    state_of,
    tell,
    unwrap,
    write_bits,
)

LEDGER = "_mimu_ledger"


class Changes(Protocol):
    """What a mask changes. parameter -> positions [k], and -> values [k] of those that do not get zeros."""

    config: Config
    positions: dict[str, Tensor]
    values: dict[str, Tensor]


def writes(model: nn.Module) -> dict[int, int | None]:
    """Return torch's counts of in-place writes by the addresses of all parameters and buffers."""
    # One walk over the modules: `parameters()` and `buffers()` walk one each, and build every name on the way.
    tables = (table for module in model.modules() for table in (module._parameters, module._buffers))
    tensors = (value for table in tables for value in table.values() if value is not None)
    return {value.data_ptr(): _version(value) for value in tensors}


def _version(value: Tensor) -> int | None:
    """Torch's count of in-place writes; tensors made under inference_mode have none."""
    return None if value.is_inference() else value._version


# --- what is held -----------------------------------------------------------------------------------------


@dataclass
class Held:
    """The places of one parameter in which some mask holds a zero or a value of its own.

    Args:
        places: flat, sorted [h]. bits: the removed values [h]. new: the bits that stand there [h]; masks that share
            a place agree on it. count: how many masks hold each [h].
        whole: checksum of the unmasked parameter. dtype: its type.
    """

    places: Tensor
    bits: Tensor
    new: Tensor
    count: Tensor
    whole: int
    dtype: torch.dtype

    @classmethod
    def nothing(cls, value: Tensor) -> "Held":
        """Begin with a parameter in which nothing is switched off yet."""
        none = torch.zeros(0, dtype=torch.int64)
        bits = read_bits(value, none)
        return cls(none, bits, bits.cpu(), none.clone(), checksum(value), value.dtype)

    def check(self, name: str, value: Tensor, edit: Edit) -> None:
        """See that one more mask agrees with those that hold places already.

        Raises:
            MaskError: it puts other values in some of them.
        """
        if len(self.places):
            join(name, [Edit(self.places, self._as(value, self.new)), edit], "lift the mask that is on first")

    def hold(self, value: Tensor, edit: Edit) -> None:
        """Write what one more mask puts in its places."""
        if value.dtype != self.dtype:
            self._follow(value)
        fresh = ~torch.isin(edit.places, self.places)
        places, new = edit.places[fresh], edit.bits[fresh]
        old = read_bits(value, places)
        write_bits(value, places, new)
        merged, order = torch.cat([self.places, places]).sort()
        self.bits = torch.cat([self.bits.to(old.device), old])[order.to(old.device)]
        self.new = torch.cat([self.new, new])[order]
        self.count = torch.cat([self.count, torch.zeros_like(places)])[order]
        self.places = merged
        self.count[torch.searchsorted(self.places, edit.places)] += 1

    def _follow(self, value: Tensor) -> None:
        """Take the parameter's present dtype: bits of two dtypes cannot stand in one table."""
        self.whole = checksum(self.original(value))
        self.bits, self.new, self.dtype = self._as(value, self.bits), self._as(value, self.new), value.dtype

    def release(self, value: Tensor, places: Tensor, keep: bool) -> None:
        """Give places up for one mask, and put back what no mask holds any longer.

        Args:
            keep: leave alone what somebody else wrote.
        """
        self.count[torch.searchsorted(self.places, places)] -= 1
        gone = self.count == 0
        free, old = self.places[gone], self.bits[gone.to(self.bits.device)]
        if keep:
            still = self._stands(value, free)
            free, old = free[still], old[still.to(old.device)]
        write_bits(value, free, self._as(value, old))
        self.places, self.new, self.count = self.places[~gone], self.new[~gone], self.count[~gone]
        self.bits = self.bits[(~gone).to(self.bits.device)]

    def _stands(self, value: Tensor, places: Tensor) -> Tensor:
        """Tell for held places [k] whether they hold what the masks put there. Bool [k]."""
        new = self._as(value, self.new[torch.searchsorted(self.places, places)])
        return read_bits(value, places).cpu() == new

    def changed(self, value: Tensor, places: Tensor) -> int:
        """Count places that no longer hold what the masks put there, and so were written by somebody else."""
        return int((~self._stands(value, places)).sum())

    def _as(self, value: Tensor, bits: Tensor) -> Tensor:
        """Return bits of the parameter's present dtype, which `model.half()` may have changed."""
        if value.dtype == self.dtype:
            return bits
        return bits_of(bits.view(self.dtype).to(value.dtype))

    def original(self, value: Tensor) -> Tensor:
        """Return the parameter as it is without any mask: itself, or a copy."""
        if not len(self.places):
            return value.detach()
        whole = value.detach().clone()
        write_bits(whole, self.places, self._as(value, self.bits))
        return whole

    def is_whole(self, value: Tensor) -> bool:
        """Whether the parameter, without any mask, is what it was before the first one."""
        return value.dtype != self.dtype or checksum(self.original(value)) == self.whole


@dataclass(frozen=True)
class Applied:
    """One mask on a model: places by the parameter's plain name in the model."""

    digest: str
    config: Config
    fit: Fit
    places: dict[str, Tensor]


@dataclass
class Ledger:
    """All masks on a model by name, and what they hold by parameter."""

    masks: dict[str, Applied] = field(default_factory=dict)
    held: dict[str, Held] = field(default_factory=dict)

    def __reduce__(self) -> Any:
        """Pickle as an empty table: the removed values do not leave with the model."""
        return (dict, ())

    def __deepcopy__(self, memo: dict) -> "Ledger":
        # Of the tensors in it only the counts are ever written in place; the others are replaced.
        return Ledger(
            dict(self.masks), {name: replace(one, count=one.count.clone()) for name, one in self.held.items()}
        )


def ledger_of(model: nn.Module) -> Ledger:
    """Return a model's ledger, an empty one if no mask is on."""
    found = unwrap(model).__dict__.get(LEDGER)
    return found if isinstance(found, Ledger) else Ledger()


def _store(model: nn.Module, ledger: Ledger) -> None:
    """Leave the ledger with the model; without masks the model keeps no trace."""
    attributes = unwrap(model).__dict__
    if ledger.masks:
        attributes[LEDGER] = ledger
    else:
        attributes.pop(LEDGER, None)


# --- which parent it is -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """How a model fits a mask, and target -> its parameter here, by the first of its names if it is tied."""

    fit: Fit
    homes: dict[str, str]


@dataclass
class _Verified:
    """A model found to fit: the counts of writes to its tensors then, and checksums of the targets."""

    found: "Found"
    writes: dict[int, int | None]
    sums: dict[str, int]


# Hashing a whole model takes as long as reading it, so what was found is kept while torch's counts of writes and the
# checksums of targets say that nothing changed since. Weak: it goes with the model.
_VERIFIED: "weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, bool], _Verified]]" = weakref.WeakKeyDictionary()


def _names(values: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the first of the names of each tensor by every name: tied weights are one."""
    first: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    return {
        name: first.setdefault((value.data_ptr(), value.shape, value.stride()), name) for name, value in values.items()
    }


def _originals(model: nn.Module, ledger: Ledger) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the unmasked (parameters, state) by plain name; what masks hold is restored in a copy."""
    found = parameters(model).items()
    values: dict[str, Tensor] = {name: value.detach() if is_plain(value) else value for name, value in found}
    if not ledger.held:
        return values, state_of(model)
    first = _names(values)
    whole = {name: held.original(values[name]) for name, held in ledger.held.items()}
    values = {name: whole.get(first[name], value) for name, value in values.items()}
    return values, {name: values.get(name, value) for name, value in state_of(model).items()}


def find_in(model: nn.Module, key: str, config: Config, any_parent: bool) -> Found:
    """Check that a model, without the masks on it, is a mask's parent, and find its targets.

    Args:
        key: of the parent, for what was found before.

    Raises:
        MaskError: as `check_model`, or a parameter's values cannot be written in place.
    """
    ledger, root = ledger_of(model), unwrap(model)
    known, now = _VERIFIED.setdefault(root, {}), writes(root)
    if (last := known.get((key, any_parent))) and last.writes == now and _sums(root, ledger, last.sums) == last.sums:
        return last.found
    values, state = _originals(root, ledger)
    fit = check_model(root, config.parent, values, state, any_parent)
    first = _names(parameters(root))
    found = Found(fit, {target: first[name] for target, name in fit.names.items()})
    if None not in now.values():
        known[key, any_parent] = _Verified(found, now, _sums(root, ledger, found.homes.values()))
    return found


def _sums(model: nn.Module, ledger: Ledger, names: Iterable[str]) -> dict[str, int]:
    """Return checksums of parameters without the masks on them."""
    values = {name: _parameter(model, name) for name in names}
    return {name: checksum(_original(ledger, name, value)) for name, value in values.items()}


def _original(ledger: Ledger, name: str, value: Tensor) -> Tensor:
    return ledger.held[name].original(value) if name in ledger.held else value


def _parameter(model: nn.Module, name: str) -> Tensor:
    """Return the parameter of a plain name; at once where no wrapper stands on the way."""
    try:
        return unwrap(model).get_parameter(name)
    except AttributeError:
        return parameters(model)[name]


@contextmanager
def _writing(model: nn.Module, values: Iterable[Tensor]) -> Generator[None]:
    """For the length of the block, take this package's own writes to some tensors out of torch's counts."""
    tensors = list(values)
    before = {value.data_ptr(): _version(value) for value in tensors}
    try:
        yield
    finally:
        for found in _VERIFIED.get(unwrap(model), {}).values():
            for value in tensors:
                address = value.data_ptr()
                if found.writes.get(address) == before[address]:
                    found.writes[address] = _version(value)


# --- the verbs --------------------------------------------------------------------------------------------


def _edits(found: Found, values: Mapping[str, Tensor], mask: Changes) -> dict[str, Edit]:
    """Return what a mask writes by the model's own parameters; those of tied parameters become one.

    Raises:
        MaskError: a value is too large for the model's dtype, or tied parameters would get two in one place.
    """
    edits: dict[str, list[Edit]] = {}
    for target, flat in mask.positions.items():
        name = found.homes[target]
        if len(flat):
            edit = edit_of(name, flat, mask.values.get(target), values[name].dtype)
            edits.setdefault(name, []).append(edit)
    advice = "the mask names these tied weights twice, let it put the same values there"
    return {name: some[0] if len(some) == 1 else join(name, some, advice) for name, some in edits.items()}


def _check_writable(name: str, value: Tensor) -> None:
    """See that a parameter's values can be written in place.

    Raises:
        MaskError: they cannot.
    """
    repeated = any(step == 0 and size > 1 for step, size in zip(value.stride(), value.shape, strict=True))
    if repeated or not is_plain(value):
        raise MaskError(f"{name} cannot be written in place: use mask.state(model)")


def apply(model: nn.Module, name: str, key: tuple[str, str], mask: Changes, any_parent: bool) -> Fit:
    """Write a mask's zeros and values.

    Args:
        name: of the mask on this model. key: digests of the mask and of its parent.
        any_parent: accept a model in which only names and shapes agree.

    Returns:
        How well the model fits. Nothing happens if the very mask is on under this name.

    Raises:
        MaskError: another mask has the name or puts other values in the same places, or the model is not the parent;
            nothing was changed then.
    """
    ledger = ledger_of(model)
    if known := ledger.masks.get(name):
        if known.digest == key[0]:
            return known.fit
        raise MaskError(f"another mask is on under the name {name!r}: lift that one, or say apply(model, name=...)")
    found = find_in(model, key[1], mask.config, any_parent)
    values = {home: _parameter(model, home) for home in found.homes.values()}
    edits, held = _edits(found, values, mask), dict[str, Held]()
    for parameter, edit in edits.items():
        _check_writable(parameter, values[parameter])
        held[parameter] = ledger.held.get(parameter) or Held.nothing(values[parameter])
        held[parameter].check(parameter, values[parameter], edit)
    tell(unwrap(model), found.fit)
    done: dict[str, Tensor] = {}
    with _writing(model, values.values()):
        try:
            for parameter, edit in edits.items():
                held[parameter].hold(values[parameter], edit)
                ledger.held[parameter] = held[parameter]
                done[parameter] = edit.places
        except BaseException:
            _release(ledger, values, done, keep=False)
            raise
    ledger.masks[name] = Applied(key[0], mask.config, found.fit, done)
    _store(model, ledger)
    return found.fit


def _release(ledger: Ledger, values: Mapping[str, Tensor], places: Mapping[str, Tensor], keep: bool) -> list[str]:
    """Give places up; return the parameters that are then not what they were before the first mask."""
    other = []
    for parameter, flat in places.items():
        held = ledger.held[parameter]
        held.release(values[parameter], flat, keep)
        if not held.is_whole(values[parameter]):
            other.append(parameter)
        if not len(held.places):
            del ledger.held[parameter]
    return other


CHANGED = ("refuse", "restore", "keep")


def lift(model: nn.Module, name: str, changed: str = "refuse") -> bool:
    """Put a mask's weights back, save those that another mask still holds.

    Args:
        changed: what to do with weights that were written while the mask held them (a training step, or
            load_state_dict): "refuse", "restore" the values from before, or "keep" the new ones.

    Returns:
        Whether a mask of this name was on.

    Raises:
        MaskError: such weights were written, and `changed` is "refuse"; nothing was changed then.
    """
    if changed not in CHANGED:
        raise MaskError(f"changed is {changed!r}: choose from {', '.join(CHANGED)}")
    ledger = ledger_of(model)
    applied = ledger.masks.get(name)
    if applied is None:
        return False
    values = {parameter: _parameter(model, parameter) for parameter in applied.places}
    counts = {p: ledger.held[p].changed(values[p], flat) for p, flat in applied.places.items()}
    if changed == "refuse" and (total := sum(counts.values())):
        where = ", ".join(parameter for parameter, count in counts.items() if count)
        what = f"{total:,} weights of {where} were written while the mask {name!r} held them"
        raise MaskError(f"{what}: lift(model, changed='restore') puts the old values back, changed='keep' does not")
    with _writing(model, values.values()):
        other = _release(ledger, values, applied.places, keep=changed == "keep")
    del ledger.masks[name]
    _store(model, ledger)
    if other:
        what = f"{', '.join(other)} changed outside of the mask while it was on: lifted, but this is not the parent"
        warnings.warn(what, ParentWarning, stacklevel=3)
    return True


@dataclass(frozen=True)
class Standing:
    """One mask on a model, as `status` tells.

    Args:
        weights: how many the mask switches off or replaces, by parameter. shared: how many of them another mask holds,
            too.
        fit: how well the model fitted when the mask was applied.
    """

    name: str
    forgotten: tuple[str, ...]
    weights: dict[str, int]
    shared: int
    fit: Fit


def status(model: nn.Module) -> list[Standing]:
    """Tell which masks are on a model, in the order in which they were applied."""
    ledger, found = ledger_of(model), []
    for name, mask in ledger.masks.items():
        shared = 0
        for parameter, flat in mask.places.items():
            held = ledger.held[parameter]
            shared += int((held.count[torch.searchsorted(held.places, flat)] > 1).sum())
        weights = {parameter: len(flat) for parameter, flat in mask.places.items()}
        forgotten = tuple(one.name for one in mask.config.forgotten)
        found.append(Standing(name, forgotten, weights, shared, mask.fit))
    return found


def masked_state(model: nn.Module, found: Found, mask: Changes) -> dict[str, Tensor]:
    """Return copies of the masked parameters under the model's own names, for `torch.func.functional_call`.

    Raises:
        MaskError: as `_edits`, or a mask that is on the model puts other values in the same places.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    plain, values, ledger = dict(zip(parameters(model), own, strict=True)), parameters(model), ledger_of(model)
    edits = _edits(found, values, mask)
    copies = {home: values[home].detach().clone() for home in found.homes.values()}
    for name, edit in edits.items():
        if name in ledger.held:
            ledger.held[name].check(name, values[name], edit)
        write_bits(copies[name], edit.places, edit.bits)
    return {plain[name]: value for name, value in copies.items()}


def is_on(model: nn.Module, mask: Changes) -> bool:
    """Whether all positions hold what a mask puts there, in parameters of the same names."""
    values = parameters(model)
    some = {name: flat for name, flat in mask.positions.items() if len(flat)}
    if not all(name in values and int(flat.max()) < values[name].numel() for name, flat in some.items()):
        return False
    try:
        edits = {name: edit_of(name, flat, mask.values.get(name), values[name].dtype) for name, flat in some.items()}
    except MaskError:  # too large for the model's dtype, and so not there
        return False
    return all(torch.equal(read_bits(values[name], edit.places).cpu(), edit.bits) for name, edit in edits.items())
