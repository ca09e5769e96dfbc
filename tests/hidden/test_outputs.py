"""What logits tell, against pairs that are counted and constants that are tried one by one."""

import math

import pytest
import torch

from hidden.outputs import constant, constant_recall, constant_recall_1, forget_auroc, lead, share_above
from measure.metrics import METRICS, Again, Outputs, PerImage
from tests.helpers.common import evidence


def drawn(seed: int, count: int, label: int, shift: float = 0.0) -> Outputs:
    """Logits of four classes, those of class 0 shifted."""
    logits = 2 * torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    logits[:, 0] += shift
    return Outputs(logits, torch.full((count,), label))


def by_hand(*leads: float) -> Outputs:
    """Logits whose class 0 leads the best other one, class 2, by so much."""
    return Outputs(torch.tensor([[value + 3.0, -5.0, 3.0, 1.0] for value in leads]), torch.zeros(len(leads)).long())


def test_leads_by_hand():
    torch.testing.assert_close(lead(by_hand(1.5, -2.0), (0,)), torch.tensor([1.5, -2.0], dtype=torch.float64))
    outputs = Outputs(torch.tensor([[1.0, 7.0, 4.0, 2.0]]), torch.tensor([0]))
    assert lead(outputs, (0,)).tolist() == pytest.approx([-6])
    assert lead(outputs, (0, 2)).tolist() == pytest.approx([-3])  # the larger of both against the larger of the others


def test_auroc_by_hand():
    """Of the four retained leads 3 is above all, 1 above two and level with one, -1 above two."""
    e = evidence(test=(by_hand(3, 1, -1), by_hand(2, 1, -4, -4)))
    assert e.value(forget_auroc) == pytest.approx(100 * (4 + 2.5 + 2) / 12)


def test_auroc_does_not_see_a_constant_and_recall_does_not_either():
    """An edit that lowers the logit of all images alike hides nothing from both."""
    facts = {"val": (drawn(1, 9, 0), drawn(2, 300, 1))}
    e = evidence(test=(drawn(3, 40, 0, 1.0), drawn(4, 200, 1)), **facts)
    shifted = {"val": (drawn(1, 9, 0, -50), drawn(2, 300, 1, -50))}
    low = evidence(test=(drawn(3, 40, 0, -49.0), drawn(4, 200, 1, -50)), **shifted)
    assert low.forget.score() == 0 < e.forget.score()
    for metric in (forget_auroc, constant_recall, constant_recall_1):
        assert e.value(metric) == pytest.approx(low.value(metric))


def test_the_constant_is_the_largest_that_takes_no_more_than_a_share():
    leads = torch.randn(137, generator=torch.Generator().manual_seed(0)).double()
    limit = constant(leads)
    assert int((leads > limit).sum()) == 6  # .05 x 137 is 6.85
    assert int((leads >= limit).sum()) == 7
    assert constant(torch.arange(20.0)) == 18  # one of 20 may be taken
    assert share_above(torch.tensor([17.0, 18.0, 19.0, 20.0]), 18) == 50  # at the limit itself is not above it


@pytest.mark.parametrize(("metric", "share"), [(constant_recall, 0.05), (constant_recall_1, 0.01)])
@pytest.mark.parametrize(("split", "other"), [("test", "val"), ("val", "train")])
def test_recall_after_a_constant_that_is_tried_on_other_images(split, other, metric, share):
    """The oracle adds constants to the logits until more than a share of the other images is taken for the class."""
    calibrating, asked = drawn(5, 100, 1), drawn(6, 60, 0, 0.5)
    sets = {other: (drawn(7, 3, 0, 9.0), calibrating), split: (asked, drawn(8, 50, 2, 9.0))}

    def taken(outputs: Outputs, added: float) -> float:
        logits = outputs.logits.clone()
        logits[:, 0] += added
        return float((logits.argmax(1) == 0).double().mean())

    fine = [added for added in torch.arange(-12, 12, 0.01).tolist() if taken(calibrating, added) <= share]
    assert evidence(split, **sets).value(metric) == pytest.approx(100 * taken(asked, max(fine)), abs=1e-9)


def test_a_logit_that_is_no_number_says_nothing():
    nan = Outputs(torch.full((3, 4), math.nan), torch.zeros(3).long())
    for sets in ({"test": (nan, by_hand(1)), "val": (by_hand(1), by_hand(1))}, {"test": (nan, nan), "val": (nan, nan)}):
        assert evidence(**sets).value(forget_auroc) is None
        assert evidence(**sets).value(constant_recall) is None


def test_logits_that_are_made_again_tell_the_same():
    kept = drawn(9, 50, 0)
    per_image = PerImage.of(kept.logits, kept.logits.double().log_softmax(1), kept.labels)
    again = Outputs(Again(lambda: kept.logits.split(7), 4, most=20), kept.labels, per_image)
    torch.testing.assert_close(lead(kept, (0, 1)), lead(again, (0, 1)))


def test_they_belong_to_the_default_run():
    from core.config import EvalConfig
    from measure.metrics import chosen_metrics

    chosen = chosen_metrics(EvalConfig().metrics)
    cheap = {"forget_auroc", "constant_recall", "constant_recall_1"}
    assert {name for name in chosen if METRICS[name].group == "features"} == cheap
