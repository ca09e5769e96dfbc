"""The smallest plugin: a figure that is never drawn."""

from collections.abc import Sequence

from reporting.families import Run
from reporting.panels import Panel, figure


@figure("never_drawn")
def never_drawn(runs: Sequence[Run]) -> list[Panel]:
    """Nothing, so that no run looks different with it."""
    return []
