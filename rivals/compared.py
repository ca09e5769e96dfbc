"""Every method that is compared, by name and in the order of the tables: our own, the controls and the rivals."""

from collections.abc import Sequence

from core.config import UserError
from rivals import closed_form, representations, subspaces, trained
from unlearn import methods
from unlearn.masks import Mask
from unlearn.registry import REGISTERED, Context, Point

MODULES = tuple(one.__name__ for one in (methods, closed_form, trained, subspaces, representations))
"""The modules that register methods, which are shown in this order; a module's own stand in the order of its source."""
METHODS = REGISTERED


def _put_in_order() -> None:
    """Order METHODS by module, whichever module a program happened to import first; others' methods come last."""
    for entry in sorted(METHODS.values(), key=lambda one: [*MODULES, one.module].index(one.module)):
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
