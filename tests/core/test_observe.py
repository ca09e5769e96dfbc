"""What a run says of the time left, against a clock that the test turns."""

import time
from collections.abc import Callable, Iterable
from threading import active_count

import pytest

from core import observe
from core.observe import be_quiet, progress, seconds_left, working


@pytest.fixture
def said(monkeypatch, capsys) -> Callable[[Iterable[float]], list[str]]:
    """Pieces that take so many seconds each -> the lines about them, without the time in front."""

    def run(seconds: Iterable[float]) -> list[str]:
        now = [1000.0]
        monkeypatch.setattr(observe.time, "monotonic", lambda: now[0])
        for piece in progress(list(seconds), "sweep"):
            now[0] += piece
        return [line.partition("] ")[2] for line in capsys.readouterr().err.splitlines()]

    be_quiet(False)
    return run


def test_a_first_piece_that_pays_for_the_others_is_no_measure_of_them(said):
    """By the mean, 601 s for the first of five points would be 2,404 s for the others, which take 5 s in all."""
    assert said([601, 1.25, 1.25, 1.25, 1.25]) == ["sweep: 1/5"]
    assert said([601, 5, 5, 5, 5]) == [
        "sweep: 1/5",
        "sweep: 2/5, 5.0 s each, 15 s left",
        "sweep: 3/5, 5.0 s each, 10 s left",
        "sweep: 4/5, 5.0 s each, 5 s left",
    ]


def test_the_time_left_follows_the_last_seconds(said):
    """Of a machine that becomes eight times slower after 20 s, the estimate knows within 25 s."""
    lines = said([1 / 64] * 1280 + [1 / 8] * 320)
    assert lines[0] == "sweep: 320/1600, 64.0/s, 20 s left"
    assert lines[-1] == "sweep: 1560/1600, 8.0/s, 5 s left"
    late = [line for line in lines if int(line.split("/")[0].removeprefix("sweep: ")) > 1280 + 25 * 8]
    assert {line.split(", ")[1] for line in late} == {"8.0/s"}


def test_lines_come_every_few_seconds_and_not_at_the_end(said):
    assert len(said([0.05] * 400)) == 3, "20 s have lines at 5, 10 and 15 s"
    assert said([1, 1, 1]) == []
    assert said([100]) == []


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s left"), (99, "99 s left"), (150, "2 min left"), (9000, "2.5 h left")]
)
def test_seconds_left(seconds, words):
    assert seconds_left(seconds) == words


def test_long_silent_work_says_so_again_and_again(capsys):
    threads = active_count()
    with working("loading torch", every=0.02):
        time.sleep(0.2)
    lines = [line.partition("] ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines[:2] == ["loading torch", "loading torch: 0 s so far"]
    assert len(lines) > 3
    assert active_count() == threads
    be_quiet()
    with working("loading torch", every=0.001):
        time.sleep(0.02)
    be_quiet(False)
    assert capsys.readouterr().err == ""
