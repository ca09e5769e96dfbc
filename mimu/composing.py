"""One mask from several of the same parent."""

from dataclasses import replace

import torch
from torch import Tensor

from mimu.config import TOOL, Config, Forgotten, Parent, Target
from mimu.errors import MaskError
from mimu.mask import Mask
from mimu.parent import edit_of, join


def _same_parent(masks: tuple[Mask, ...]) -> Parent:
    """Return the parent of all masks, with the targets of each.

    Raises:
        MaskError: two masks have different parents.
    """
    parents = [mask.config.parent for mask in masks]
    first, targets = parents[0], dict[str, Target]()
    for mask, parent in zip(masks, parents, strict=True):
        if parent.state_sha256 != first.state_sha256:
            known = f"{first.state_sha256[:12]} and {parent.state_sha256[:12]}"
            raise MaskError(
                f"{masks[0].name!r} and {mask.name!r} have different parents ({known}): compose masks of one"
            )
        for name, target in parent.targets.items():
            if targets.setdefault(name, target).sha256 != target.sha256:
                raise MaskError(f"masks of one parent have different values of {name}: one of them is damaged")
    return replace(first, targets=targets)


def _joined(masks: tuple[Mask, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Return (positions of all masks together, their values, how many positions are in more than one mask).

    Raises:
        MaskError: two masks put different values in the same places.
    """
    together: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    shared = 0
    for name in dict.fromkeys(name for mask in masks for name in mask.positions):
        some = [mask for mask in masks if name in mask.positions]
        together[name], counts = torch.cat([mask.positions[name] for mask in some]).unique(return_counts=True)
        shared += int((counts > 1).sum())
        if dtype := next((mask.values[name].dtype for mask in some if name in mask.values), None):
            edits = [edit_of(name, mask.positions[name], mask.values.get(name), dtype) for mask in some]
            values[name] = join(name, edits, "compose masks that agree there").bits.view(dtype)
    return together, values, shared


def compose(*masks: Mask) -> Mask:
    """Join masks of one parent: what any of them switches off or replaces is so, and all their classes are forgotten.

    The scores of the parts stay with the parts (in `config.composition`), because nothing was measured with all
    of them on; `shared` there says how many weights are in more than one.

    Raises:
        MaskError: no mask is given, or two have different parents, or put different values in the same places.
    """
    if not masks:
        raise MaskError("no mask to compose: give at least one")
    parent, (positions, values, shared) = _same_parent(masks), _joined(masks)
    forgotten: dict[int, Forgotten] = {}
    for one in (one for mask in masks for one in mask.config.forgotten):
        known = forgotten.setdefault(one.index, one).name
        if known != one.name:
            raise MaskError(f"class {one.index} is {known!r} in one mask and {one.name!r} in another")
    parts = [
        {"forgotten": list(mask.forgotten), "digest": mask.digest, "weights": mask.changed}
        | {"scores": dict(mask.config.scores) if mask.config.scores else None, "method": mask.config.method}
        for mask in masks
    ]
    preprocessing = masks[0].config.preprocessing
    if any(mask.config.preprocessing != preprocessing for mask in masks):
        preprocessing = None
    methods = {mask.config.method for mask in masks}
    config = Config(
        forgotten=tuple(forgotten[index] for index in sorted(forgotten)),
        parent=parent,
        preprocessing=preprocessing,
        method=methods.pop() if len(methods) == 1 else None,
        tool=TOOL,
        composition={"parts": parts, "shared": shared},
    )
    return Mask(positions, config, values)
