"""What `measure.verdicts.word` asks of a model: how far its features are from retraining's, and how far those reach."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from hidden.layers import PerStage, binary_aucs, differences, neighbour_recalls, probe_recalls
from hidden.outputs import forget_auroc
from hidden.retraining import fresh_head_10, relearn_area_10
from measure.metrics import Compute, Evidence, Undefined
from measure.verdicts import LEAST_BAND, Band


def single(of: Compute) -> PerStage:
    """A metric as if there were one stage."""

    def value(e: Evidence) -> tuple[float, ...]:
        return (e.needed(of),)

    return value


FEW = 2  # images of the classes to forget: what so many say is no finding
LOOKS: dict[str, PerStage] = {
    "probe_layers_gap": probe_recalls,
    "auc_layers_gap": binary_aucs,
    "knn_layers_gap": neighbour_recalls,
    "forget_auroc": single(forget_auroc),
    "fresh_head_10": single(fresh_head_10),
    "relearn_area_10": single(relearn_area_10),
}
"""By the name of the metric that must have been measured."""


def width(retrained: Sequence[Evidence], of: PerStage) -> float:
    """How far one of several retrained models is, at most, from the mean of the others, over stages.

    Raises:
        Undefined: one has no such value, or there are fewer than two.
    """
    widths = []
    for place, one in enumerate(retrained):
        others = (*retrained[:place], *retrained[place + 1 :])
        widths += map(abs, differences(replace(one, retrained=others), of))
    return max(widths)


def bands(e: Evidence, values: Mapping[str, float | None], retrained: Sequence[Evidence]) -> dict[str, Band]:
    """Where a model lies beside retrained ones, and how far these are apart, for each of LOOKS; where all are known.

    Args:
        values: of the model's metrics; what was not measured is not measured here.
        retrained: at least two; with fewer nobody knows how far they are apart.
    """
    measured = all(values.get(name) is not None for name in LOOKS)
    if not measured or len(retrained) < 2 or not e.retrained:
        return {}
    found, few = {}, 100 * FEW / len(e.outputs(e.split, True).labels)
    try:
        for name, of in LOOKS.items():
            gaps, apart = differences(e, of), width(retrained, of)
            found[name] = Band(min(gaps), max(gaps), max(apart, LEAST_BAND[name], few))
    except Undefined:
        return {}
    return found
