"""What a run says while it works: log lines and progress on the terminal, training curves in trackio."""

import io
import sys
import time
import unicodedata
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from threading import Event, Thread
from types import ModuleType
from typing import Any, TypeVar

from core.config import Trackers

TRACKIO_PROJECT = "mimu"
TURNS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # the direction of writing
PIXELS = 8  # of a picture's cell, in each direction
RECENT, LEAST_MARKS, APART = 20.0, 4, 0.1  # seconds and marks that a rate is judged by; seconds between two marks
_START = time.monotonic()
_QUIET = [False]
T = TypeVar("T")


def be_quiet(quiet: bool = True) -> None:
    """From now on (not) a word about progress; errors are said in any case."""
    _QUIET[0] = quiet


def is_quiet() -> bool:
    """Whether progress goes unsaid."""
    return _QUIET[0]


@contextmanager
def unheard() -> Generator[None]:
    """Not a word about progress meanwhile."""
    before = _QUIET[0]
    be_quiet()
    try:
        yield
    finally:
        be_quiet(before)


def visible(text: str, keep: str = "") -> str:
    """Text as it may be shown: what a terminal would obey instead of showing it is spelled out, e.g. `\\x1b`.

    These are control characters (so every name is one line, and has no ANSI sequences), line separators, marks that
    turn the direction of writing, and the halves of characters that stand for bytes of a name that is no UTF-8.

    Args:
        keep: characters that are passed on all the same.
    """
    return text if text.isprintable() else "".join(one if one in keep else _spelled(one) for one in text)


def _spelled(sign: str) -> str:
    obeyed = unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp") or sign in TURNS
    if "\udc80" <= sign <= "\udcff":  # a byte that is no UTF-8, as the file system gives it
        return f"\\x{ord(sign) - 0xDC00:02x}"
    return ascii(sign)[1:-1] if obeyed else sign


def log(text: str) -> None:
    """One plain line for people, on stderr."""
    if not _QUIET[0]:
        print(f"[{time.monotonic() - _START:7.1f} s] {visible(text)}", file=sys.stderr, flush=True)


class Pace:
    """How fast work goes, judged by its last seconds.

    The first piece never counts: it pays for what all share, such as retrained models, imports and first reads.
    """

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int]] = deque()  # (when, pieces that had ended), the oldest first

    def ended(self, count: int, now: float) -> None:
        """Note that `count` pieces have ended by the time `now`, in seconds of any clock."""
        if not self._marks or now - self._marks[-1][0] >= APART:
            self._marks.append((now, count))
        while len(self._marks) > LEAST_MARKS and now - self._marks[1][0] >= RECENT:
            self._marks.popleft()

    def rate(self, count: int, now: float) -> float | None:
        """Return pieces a second; None until a second piece has ended."""
        when, before = self._marks[0] if self._marks else (now, count)
        return (count - before) / (now - when) if count > before and now > when else None


def seconds_left(seconds: float) -> str:
    """Write a time to come: as exact as a guess can be."""
    if seconds < 100:
        return f"{seconds:.0f} s left"
    return f"{seconds / 60:.0f} min left" if seconds < 6000 else f"{seconds / 3600:.1f} h left"


def progress(items: Iterable[T], description: str, every: float = 5.0) -> Iterator[T]:
    """Pass `items` on; show a bar on a terminal, and one plain line each `every` seconds anywhere else.

    Either names the stage, how far it is, its rate and the time left, both from the last seconds.
    """
    if _QUIET[0]:
        yield from items
        return
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, desc=description, leave=False, file=sys.stderr)
        return
    total = len(items) if isinstance(items, Sized) else None
    last, pace = time.monotonic(), Pace()
    for count, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        pace.ended(count, now)
        if now - last >= every and count != total:  # at the end, the stage says what came of it
            last = now
            log(f"{description}: {_so_far(count, total, pace.rate(count, now))}")


def _so_far(count: int, total: int | None, rate: float | None) -> str:
    said = [f"{count}/{total}" if total else f"{count}"]
    if rate is not None:
        said.append(f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each")
        said += [seconds_left((total - count) / rate)] if total else []
    return ", ".join(said)


@contextmanager
def working(what: str, every: float = 5.0) -> Generator[None]:
    """Say what is being done, and again every few seconds for as long as it takes."""
    log(what)
    ended, begun = Event(), time.monotonic()

    def repeat() -> None:
        while not ended.wait(every):
            log(f"{what}: {time.monotonic() - begun:.0f} s so far")

    speaker = Thread(target=repeat, daemon=True)
    speaker.start()
    try:
        yield
    finally:
        ended.set()
        speaker.join()


@dataclass
class Tracker:
    """Training curves: kept as a list for the stage's `history.json`, mirrored to trackio if asked for."""

    kind: Trackers
    name: str
    config: dict
    history: list[dict] = field(default_factory=list)

    def __enter__(self) -> "Tracker":
        if self.kind is Trackers.trackio:
            plain = {"auto_log_gpu": False, "auto_log_cpu": False}
            with redirect_stdout(io.StringIO()):  # a banner in colours
                _trackio().init(
                    project=TRACKIO_PROJECT, name=visible(self.name), config=_all_visible(self.config), **plain
                )
        return self

    def log(self, step: int, **values: float) -> None:
        """Record plain numbers at one step."""
        self.history.append({"step": step, **values})
        if self.kind is Trackers.trackio:
            _trackio().log(values, step=step)

    def picture(self, step: int, name: str, cells: Sequence[Sequence[int]]) -> None:
        """Show counts [R][C] as an image, bright where there are most (in trackio alone: a history holds numbers)."""
        if self.kind is Trackers.trackio:
            import numpy as np

            grey = 255 * np.asarray(cells, dtype=np.float64) / max(1, *map(max, cells))
            enlarged = grey.astype(np.uint8).repeat(PIXELS, 0).repeat(PIXELS, 1)
            image = _trackio().Image(np.stack([enlarged] * 3, 2), caption=name)
            _trackio().log({name: image}, step=step)

    def __exit__(self, *_: object) -> None:
        if self.kind is Trackers.trackio:
            with redirect_stdout(io.StringIO()):
                _trackio().finish()


def _all_visible(value: Any) -> Any:
    """The same with every text as it may be shown: trackio's database takes UTF-8 alone, paths hold any bytes."""
    if isinstance(value, dict):
        return {key: _all_visible(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_all_visible(item) for item in value]
    return visible(value) if isinstance(value, str) else value


def _trackio() -> ModuleType:
    """The trackio module, imported late: it takes seconds, and reads TRACKIO_DIR (set by main.py) just once."""
    import trackio

    return trackio
