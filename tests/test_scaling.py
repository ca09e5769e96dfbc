"""The simulation of many jobs on many workers, against schedules written out by hand."""

import pytest

from planning.forecast import SimulatedJob, simulate

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
