"""How far models are from retrained ones and these from one another, by hand; and in an evaluation of small models."""

from dataclasses import replace

import pytest
import torch

from hidden.layers import binary_aucs, neighbour_recalls, probe_recalls
from hidden.outputs import forget_auroc
from hidden.retraining import fresh_head_10, relearn_area_10
from hidden.words import LOOKS, bands, width
from measure.metrics import METRICS, Evidence, Outputs
from measure.verdicts import LEAST_BAND, Band
from tests.helpers.common import evidence


def knowing(probe: tuple[float, float], one: float, images: int = 1000) -> Evidence:
    """Evidence of which everything was measured: probe recalls at two stages, and one number for all else."""
    staged = {probe_recalls: probe, binary_aucs: (one, one), neighbour_recalls: (one, one)}
    outputs = tuple(Outputs(torch.zeros(images, 2), torch.zeros(images, dtype=torch.long)) for _ in range(2))
    return evidence(_values=staged | {forget_auroc: one, fresh_head_10: one, relearn_area_10: one}, test=outputs)


GOLD = (knowing((50.0, 40.0), 60.0), knowing((54.0, 41.0), 60.5), knowing((52.0, 48.0), 60.0))
MEASURED = dict.fromkeys(LOOKS, 0.0)


def test_looks_are_metrics_with_a_band():
    assert set(LOOKS) == set(LEAST_BAND) <= set(METRICS)


def test_width_is_the_farthest_from_the_others():
    """Stage 1: 50 from 53, 54 from 51, 52 from 52. Stage 2: 40 from 44.5, 41 from 44, 48 from 40.5: 7.5 points."""
    assert width(GOLD, probe_recalls) == 7.5
    assert width(GOLD[:2], probe_recalls) == 4
    assert width(GOLD, neighbour_recalls) == pytest.approx(0.5)


def test_bands_by_hand():
    """The means are 52 and 43 at the two stages, and 60 1/6 of all else, where the least width is the wider one."""
    e = replace(knowing((55.0, 41.0), 70.0), retrained=GOLD)
    found = bands(e, MEASURED, GOLD)
    assert found["probe_layers_gap"] == Band(-2, 3, 7.5)
    for name, least in LEAST_BAND.items():
        if name != "probe_layers_gap":
            assert found[name].width == least
            assert found[name].low == found[name].high == pytest.approx(70 - (60 + 60.5 + 60) / 3)
    assert list(found) == list(LOOKS)


def test_what_two_images_make_is_within_every_band():
    """Of 37 images they are 5.4 points, of 1,000 less than any least band."""
    found = bands(replace(knowing((55.0, 41.0), 70.0, 37), retrained=GOLD), MEASURED, GOLD)
    assert found["probe_layers_gap"].width == 7.5
    assert {found[name].width for name in LEAST_BAND if name != "probe_layers_gap"} == {200 / 37}


def test_nothing_is_said_where_something_is_not_known():
    e = replace(knowing((55.0, 41.0), 70.0), retrained=GOLD)
    assert bands(e, {name: 0.0 for name in LOOKS if name != "fresh_head_10"}, GOLD) == {}
    assert bands(e, MEASURED | {"forget_auroc": None}, GOLD) == {}
    assert bands(e, MEASURED, GOLD[:1]) == {}
    assert bands(replace(e, retrained=()), MEASURED, GOLD) == {}
