"""Run what lies ahead of some weights once: a forward pass of any module, resumed where those weights come in.

While a mask is sought, only the target weights change. Everything that has finished when the first module that uses one
of them starts gives the same outputs in every later pass. These outputs are stored, one row of numbers per image, and a
later pass hands them out instead of running the modules; the Python code between modules runs again, on the stored
outputs. No architecture is known here: modules are found by running the model, and the answer is checked against the
full forward pass, bit for bit.
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

Call = tuple[tuple[str, int], ...]
"""One call of a module: its path from the model's own forward pass, (module name, how often this caller called it
before) at each level. Counting per caller keeps a call's name the same when the calls around it are skipped."""
LayerWeights = Mapping[str, Tensor]
"""Parameter name -> the tensor that stands in for it."""
PROBE = 4  # images, at most, that a model is looked at with; two batch sizes tell what belongs to an image


class NotResumable(Exception):
    """The forward pass of this model cannot be resumed: it runs as a whole each time."""


# --- looking at a forward pass -----------------------------------------------------------------------------


@dataclass
class _Frame:
    """A call in progress, and how often it has called each module."""

    call: Call = ()
    counts: Counter = field(default_factory=Counter)


@contextmanager
def _wrapped(modules: Mapping[str, nn.Module], around: Callable[[Call, Callable, tuple, dict], Any]) -> Generator[None]:
    """Let `around(call, forward, arguments, keywords)` stand in for the forward of some modules within the block.

    An attribute of the instance hides the class's method, and removing it brings that back, so that the model is as
    before whatever happens inside; a forward that was an instance's own already is put back.
    """
    stack, own = [_Frame()], {name: vars(module).get("forward") for name, module in modules.items()}

    def wrapper(name: str, forward: Callable) -> Callable:
        def call(*arguments: Any, **keywords: Any) -> Any:
            frame = stack[-1]
            this = (*frame.call, (name, frame.counts[name]))
            frame.counts[name] += 1
            stack.append(_Frame(this))
            try:
                return around(this, forward, arguments, keywords)
            finally:
                stack.pop()

        return call

    try:
        for name, module in modules.items():
            module.forward = wrapper(name, module.forward)
        yield
    finally:
        for name, module in modules.items():
            vars(module).pop("forward", None)
            if (forward := own[name]) is not None:
                module.forward = forward


@dataclass
class Recording:
    """One forward pass: the calls in the order in which they started, those that had ended before each, and outputs."""

    started: list[Call] = field(default_factory=list)
    ended: list[Call] = field(default_factory=list)
    ended_before: dict[Call, int] = field(default_factory=dict)
    """How many calls had ended when this one started."""
    outputs: dict[Call, Any] = field(default_factory=dict)
    result: Any = None


def record(model: nn.Module, images: Tensor, keep: Iterable[Call] = (), stop: Call | None = None) -> Recording:
    """Run a model, and note every call of a module inside.

    Args:
        model: in eval mode.
        images: [B, C, H, W].
        keep: calls whose outputs are copied as soon as they end: a later operation may work in place on them.
        stop: the pass ends where this call starts; then there is no result.
    """
    made, wanted = Recording(), set(keep)

    def around(call: Call, forward: Callable, arguments: tuple, keywords: dict) -> Any:
        if call == stop:
            raise _Stopped
        made.ended_before[call] = len(made.ended)
        made.started.append(call)
        output = forward(*arguments, **keywords)
        made.ended.append(call)
        if call in wanted:
            made.outputs[call] = pytree.tree_map_only(Tensor, lambda value: value.detach().clone(), output)
        return output

    inside = {name: module for name, module in model.named_modules() if name}
    with _wrapped(inside, around), suppress(_Stopped):
        made.result = model(images)
    return made


class _Stopped(Exception):
    """The forward pass has reached the call where it was to end."""


def users_of(model: nn.Module, names: Sequence[str]) -> set[str]:
    """Names of the modules that own some parameters, under every name that these tensors have (tied weights)."""
    places = {id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False) if name in set(names)}
    return {
        name for name, module in model.named_modules() for own in module.parameters(recurse=False) if id(own) in places
    }


def first_use(recording: Recording, owners: Iterable[str]) -> Call:
    """Return the first call that may read a parameter of one of these modules.

    A module whose weight its parent uses by itself (attention's projections) is never called: then the nearest module
    around it that is called counts.

    Raises:
        NotResumable: no module around a parameter is ever called.
    """
    called = {call[-1][0] for call in recording.started}
    around = set()
    for owner in owners:
        name = owner
        while name and name not in called:
            name = name.rpartition(".")[0]
        if not name:
            raise NotResumable(f"no module that holds {owner or 'the weight'} is called by itself")
        around.add(name)
    return next(call for call in recording.started if call[-1][0] in around)


# --- what is stored -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """One stored tensor: `shape` of one image's rows [k, ...], of which there are k in dimension 0 per image."""

    call: Call
    """() stands for the images themselves, which code between modules may read."""
    leaf: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool

    @property
    def size(self) -> int:
        """Numbers per image."""
        return torch.Size(self.shape).numel()

    def pack(self, value: Tensor) -> Tensor:
        """[B * k, ...] -> [B, size]."""
        return value.reshape(-1, self.size)

    def unpack(self, rows: Tensor) -> Tensor:
        """[B, size] -> [B * k, ...], a tensor of its own: code between modules may work in place on it."""
        value = rows.reshape(len(rows) * self.shape[0], *self.shape[1:]).to(self.dtype)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return value.clone(memory_format=layout)


class Prefix:
    """How the forward pass of one model is resumed at one set of weights.

    Args:
        model: in eval mode, on the device where it will be used.
        targets: parameter names.
        images: a few real ones, [B, C, H, W]; at least two.
        logits: the model's output -> logits [B, C].

    Raises:
        NotResumable: the answer from stored outputs is not the full forward pass's, bit for bit.
    """

    def __init__(self, model: nn.Module, targets: Sequence[str], images: Tensor, logits: Callable[[Any], Tensor]):
        self.targets, self.logits = tuple(targets), logits
        images = images[:PROBE]
        if len(images) < 2:
            raise NotResumable("two images at least are needed to look at the model")
        recording = record(model, images)
        self.start = first_use(recording, users_of(model, targets))
        """The call that uses a target weight first."""
        finished = set(recording.ended[: recording.ended_before[self.start]])
        self.stored = tuple(call for call in recording.ended if call in finished and call[:-1] not in finished)
        """Calls that are not run again: each has ended, and what called it has not."""
        self.image_shape = tuple(images.shape[1:])
        self._plan(model, images)
        self.thin = True
        """Whether outputs that nothing depends on are one zero, expanded: written zeros took a quarter of a pass."""
        try:
            self._check(model, images)
        except RuntimeError:  # code between the modules writes to such an output in place, or views it
            self.thin = False
            self._check(model, images)

    @property
    def size(self) -> int:
        """Numbers stored per image."""
        return sum(part.size for part in self.parts)

    def _plan(self, model: nn.Module, images: Tensor) -> None:
        """Find which stored outputs the logits depend on, and which of their dimensions are the images'."""
        whole, fewer = (self._leaves(model, part, self.stored) for part in (images, images[:-1]))
        self.trees = {call: tree for call, (_, tree) in whole.items()}
        self.constants: dict[tuple[Call, int], Any] = {}
        needed = self._needed(model, images, {call: leaves for call, (leaves, _) in whole.items()})
        self.parts: tuple[_Part, ...] = ()
        for call, (leaves, _) in whole.items():
            for place, value in enumerate(leaves):
                other = fewer[call][0][place]
                if not isinstance(value, Tensor):
                    self.constants[call, place] = value
                elif (call, place) in needed:
                    self._add(call, place, value, other, len(images))
                else:
                    self.constants[call, place] = _Absent(value, len(images))

    def _add(self, call: Call, place: int, value: Tensor, other: Tensor, count: int) -> None:
        rows = value.shape[0] // count if value.dim() else 0
        if rows and value.shape[0] == rows * count and other.shape == (rows * (count - 1), *value.shape[1:]):
            last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
            part = _Part(call, place, (rows, *value.shape[1:]), value.dtype, last and not value.is_contiguous())
            self.parts = (*self.parts, part)
        elif value.shape == other.shape and torch.equal(value, other):
            self.constants[call, place] = value
        else:
            raise NotResumable(f"{call[-1][0] if call else 'the input'} gives {list(value.shape)} for {count} images")

    def _leaves(self, model: nn.Module, images: Tensor, calls: Iterable[Call]) -> dict[Call, tuple[list, Any]]:
        """Leaves and structure of what these of the stored calls return; () has the images."""
        outputs = record(model, images, keep=calls, stop=self.start).outputs
        return {(): ([images], None)} | {call: pytree.tree_flatten(value) for call, value in outputs.items()}

    def _needed(self, model: nn.Module, images: Tensor, leaves: Mapping[Call, list]) -> set[tuple[Call, int]]:
        """The leaves that the logits depend on, by autograd: it follows values through any code between modules."""
        sources = {
            (call, place): value.detach().clone().requires_grad_()
            for call, values in leaves.items()
            for place, value in enumerate(values)
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        with torch.enable_grad():
            given = {
                call: [
                    sources[call, place].clone() if (call, place) in sources else value
                    for place, value in enumerate(values)
                ]
                for call, values in leaves.items()
            }
            output = self._run(model, given, {})
            gradients = torch.autograd.grad(output.float().sum(), list(sources.values()), allow_unused=True)
        return {key for key, gradient in zip(sources, gradients, strict=True) if gradient is not None}

    def _check(self, model: nn.Module, images: Tensor) -> None:
        """Check that the resumed pass equals the full one bit for bit, with the weights as they are and with others.

        Only other weights show a use of a target that came before the cut.
        """
        generator = torch.Generator().manual_seed(0)
        weights = {name: model.get_parameter(name).detach() for name in self.targets}
        halved = {
            name: value * (torch.rand(value.shape, generator=generator) < 0.5).to(value.device)
            for name, value in weights.items()
        }
        with torch.no_grad():
            rows = self.before(model, images)
            for instead in ({}, halved):
                full = self.logits(functional_call(model, dict(instead), (images,)) if instead else model(images))
                if not torch.equal(full, self.after(model, rows, instead)):
                    raise NotResumable("the pass from stored outputs gives other logits than the full pass")

    # --- using it ---

    def before(self, model: nn.Module, images: Tensor) -> Tensor:
        """Run the model up to the first use of a target weight. [B, C, H, W] -> what is stored, [B, size]."""
        read = {part.call for part in self.parts}  # copies of all outputs took a quarter of a forward pass
        leaves = self._leaves(model, images, read)
        rows = [part.pack(leaves[part.call][0][part.leaf]) for part in self.parts]
        kind = torch.float32
        for row in rows:
            kind = torch.promote_types(kind, row.dtype)  # float32 holds every bfloat16 and float16 exactly
        return torch.cat([row.to(kind) for row in rows], 1)

    def after(self, model: nn.Module, rows: Tensor, weights: LayerWeights) -> Tensor:
        """Resume the pass from rows [B, size], some weights replaced; differentiable in these. -> logits [B, C]."""
        values = rows.split([part.size for part in self.parts], 1)
        given: dict[Call, list] = {(): [rows.new_zeros(1).expand(len(rows), *self.image_shape)]}
        given |= {call: [None] * tree.num_leaves for call, tree in self.trees.items() if call}
        for (call, place), constant in self.constants.items():
            given[call][place] = constant.of(len(rows), self.thin) if isinstance(constant, _Absent) else constant
        for part, value in zip(self.parts, values, strict=True):
            given[part.call][part.leaf] = part.unpack(value)
        return self._run(model, given, weights)

    def _run(self, model: nn.Module, given: Mapping[Call, list], weights: LayerWeights) -> Tensor:
        """The forward pass with the stored calls answered from `given`."""
        skipped = set(self.stored)

        def around(call: Call, forward: Callable, arguments: tuple, keywords: dict) -> Any:
            if call in skipped:
                return pytree.tree_unflatten(given[call], self.trees[call])
            return forward(*arguments, **keywords)

        passed = {name for call in self.stored for name, _ in call}
        with _wrapped({name: model.get_submodule(name) for name in passed}, around):
            (images,) = given[()]
            output = functional_call(model, dict(weights), (images,)) if weights else model(images)
        return self.logits(output)

    def holds(self, model: nn.Module) -> Callable[[str], bool]:
        """Whether a parameter or buffer has a part in what is stored, by name."""
        inside = {name for call in self.stored for name, _ in call[-1:]}
        used = {
            f"{prefix}{name}"
            for owner in inside
            for prefix, module in [(f"{owner}.", model.get_submodule(owner))]
            for name in module.state_dict()
        }
        return used.__contains__


@dataclass(frozen=True)
class _Absent:
    """A stored output on which no logit depends: its shape and kind are handed out, its values are zeros."""

    value: Tensor
    count: int

    def of(self, count: int, thin: bool) -> Tensor:
        """Zeros for a batch of this many images; thin: all of them are one in memory, which cannot be written to."""
        shape = list(self.value.shape)
        if shape and shape[0] % self.count == 0:
            shape[0] = shape[0] // self.count * count
        return self.value.new_zeros(()).expand(shape) if thin else self.value.new_zeros(shape)
