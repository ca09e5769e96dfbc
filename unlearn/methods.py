"""Every method that is compared: the modules that register methods are listed here and nowhere else."""

from collections.abc import Sequence

from core.config import UserError
from unlearn import closed_form, ours, trained
from unlearn.masks import Mask
from unlearn.registry import REGISTERED, Context, Point

MODULES = (ours, closed_form, trained)
"""In this order their methods are shown; a module's own stand in the order of its source."""
METHODS = REGISTERED


def _put_in_order() -> None:
    """Order METHODS by module, whichever module a program happened to import first; others' methods come last."""
    names = [module.__name__ for module in MODULES]
    for entry in sorted(METHODS.values(), key=lambda one: [*names, one.module].index(one.module)):
        METHODS[entry.name] = METHODS.pop(entry.name)


_put_in_order()


def chosen_methods(names: Sequence[str]) -> tuple[str, ...]:
    """The methods named; "all" names every one.

    Raises:
        UserError: a name is not registered.
    """
    unknown = [name for name in names if name not in METHODS and name != "all"]
    if unknown:
        raise UserError(f"there is no method {unknown[0]!r}: choose from all, {', '.join(METHODS)}")
    return tuple(METHODS) if "all" in names else tuple(names)


def mask_of(name: str, context: Context, point: Point) -> Mask:
    """Return the mask of the mask method `name` at a point, made once; as `Method.mask_at`."""
    return METHODS[name].mask_at(context, point)
