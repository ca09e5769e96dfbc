"""The simulation of many jobs on many workers, and ImageNet on paper, against schedules written out by hand."""

from benchmarks.imagenet import Units, epoch, exchange, graphs, requests

import pytest

from planning.forecast import SimulatedJob, simulate
from planning.library import Pieces
from planning.units import Cost

A, B = (SimulatedJob(((key, 10.0),), 1.0) for key in "ab")
CASES = {
    "one job": ([A], 1, 11),
    "made once": ([A, A, A], 1, 13),
    "the second waits": ([A, A], 2, 11),
    "together: both wait for a, then for b": ([A, A, B, B], 2, 22),
    "in turn: a and b are made at once": ([A, B, A, B], 2, 12),
    "nothing shared": ([SimulatedJob((), 2.0)] * 6, 4, 4),
    "two stages": ([SimulatedJob((("a", 3.0), ("b", 4.0)), 1.0), SimulatedJob((("a", 3.0), ("c", 5.0)), 1.0)], 2, 9),
}


@pytest.mark.parametrize(("jobs", "workers", "seconds"), CASES.values(), ids=CASES)
def test_by_hand(jobs, workers, seconds):
    assert simulate(jobs, workers) == seconds
    assert simulate(jobs, workers, starting=5) == seconds + 5


def test_imagenet_on_paper_by_hand():
    load, read, check, first, further = (Cost(value, value) for value in (5.0, 0.01, 2.0, 30.0, 10.0))
    pieces = Pieces(load, read, check, first, further, {"start": 1, "images": 2, "masks": 7}, 4_000, 100.0)
    units = Units(decode=0.01, train=0.09, forward=0.03, gradients=100_000_000, memory=9, library=pieces)
    assert exchange(units, 1) == 0
    assert exchange(units, 8) == pytest.approx(1_281_167 / (16 * 32) * 2 * 7 / 8 * 0.1 / 1.25)
    assert epoch(units, 1) == pytest.approx(1_281_167 * 0.1 / 2)
    assert epoch(units, 8) == pytest.approx(1_281_167 * 0.1 / 16 + exchange(units, 8))
    assert graphs(units) == pytest.approx(64_000 * 0.04 / 2)
    # 64 machines, 128 processes: each reads 50,000 images, and the fullest makes 8 of 1,000 masks
    assert requests(units, 64).seconds == pytest.approx(5 + 500 + 2 + 30 + 7 * 10)
    assert requests(units, 1).total.disk == 100_000
    assert requests(units, 1).total.memory == 2 + 2 * 50_000 * 4_000  # batches are joined: 200 MB of rows, twice
