"""A sheet as a PDF file of one page of A4: text that is set line by line, as matplotlib draws letters, not plots."""

import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from core.config import UserError
from core.observe import visible
from release.sheet import Part, Sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.ft2font import FT2Font

WIDTH, HEIGHT, MARGIN = 595.0, 842.0, 42.0  # of a page, in points
BODY, LEAST = 8.6, 5.0  # size of letters: as they are set, and below which no page is made
LEADING = 1.32  # from line to line, in letters
LABEL = 0.3  # of the line's length, for the labels of pairs
MARK, SOFT, LINE = "#0050a0", "#555555", "#bbbbbb"
SETTINGS: dict[Any, Any] = {"pdf.fonttype": 42, "font.family": "DejaVu Sans"}  # letters that can be copied and searched


@dataclass(frozen=True)
class Run:
    """Some letters in one line.

    Args:
        x: points from the left margin. size: of the body's letters. align: "left" or "right".
    """

    text: str
    x: float = 0.0
    size: float = 1.0
    bold: bool = False
    mono: bool = False
    colour: str = "black"
    align: str = "left"


@dataclass(frozen=True)
class Line:
    """A line: what is in it, how much space is above it (in letters), and whether a rule is drawn below it."""

    runs: tuple[Run, ...]
    above: float = 0.0
    rule: bool = False

    @property
    def height(self) -> float:
        """Of the line with the space above, in letters of the body."""
        return self.above + LEADING * max(run.size for run in self.runs)


@lru_cache
def _font(bold: bool, mono: bool) -> "FT2Font":
    """The font that matplotlib brings."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    family = "DejaVu Sans Mono" if mono else "DejaVu Sans"
    return get_font(findfont(FontProperties(family=family, weight="bold" if bold else "normal")))


def drawable(text: str, bold: bool = False, mono: bool = False) -> str:
    """A text as the font can show it: a letter that it lacks is spelled out, e.g. `\\u4e2d`, so that none is lost."""
    font = _font(bold, mono)
    shown = visible(text)
    return "".join(one if font.get_char_index(ord(one)) else ascii(one)[1:-1] for one in shown)


@lru_cache(maxsize=10_000)  # a page is set in several sizes, of which each asks for nearly the same texts
def _letters(text: str, bold: bool, mono: bool) -> float:
    """How long a text is, as a multiple of the size of its letters."""
    from matplotlib.ft2font import LoadFlags

    font = _font(bold, mono)
    font.set_size(100, 72)
    font.set_text(text, 0.0, flags=LoadFlags.NO_HINTING)  # paper has no pixels that letters would be moved to
    return font.get_width_height()[0] / 64 / 100


def width_of(text: str, size: float, bold: bool = False, mono: bool = False) -> float:
    """How long a text is when it is set, in points; `size`: of its letters, in points."""
    return size * _letters(text, bold, mono)


def wrapped(text: str, size: float, most: float, bold: bool = False, mono: bool = False) -> list[str]:
    """A text in lines of at most `most` points; a word that is longer than a line is cut."""
    lines, line = [], ""
    for word in drawable(text, bold, mono).split(" "):
        joined = f"{line} {word}" if line else word
        if width_of(joined, size, bold, mono) <= most:
            line = joined
            continue
        if line:
            lines.append(line)
        line = word
        while width_of(line, size, bold, mono) > most:
            count = max(1, bisect_right(range(len(line)), most, key=lambda n: width_of(line[:n], size, bold, mono)) - 1)
            lines.append(line[:count])
            line = line[count:]
    return [*lines, line]


# --- what is set ------------------------------------------------------------------------------------------


class Setting:
    """Sets a sheet in letters of one size.

    Args:
        size: of the body's letters, in points.
    """

    def __init__(self, size: float):
        self.size, self.length = size, WIDTH - 2 * MARGIN

    def paragraph(self, text: str, above: float = 0.0, **how: Any) -> Iterator[Line]:
        """Yield the lines of a text, the space above the first."""
        x, size = how.pop("x", 0.0), how.get("size", 1.0)
        kind = {name: how.get(name, False) for name in ("bold", "mono")}
        for place, line in enumerate(wrapped(text, size * self.size, self.length - x, **kind)):
            yield Line((Run(line, x, **how),), 0 if place else above)

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> Iterator[Line]:
        """Yield labels on the left, and values beside them."""
        x = LABEL * self.length
        for label, value in pairs:
            mono = label.startswith("SHA-256")
            labels = wrapped(label, self.size, x - 6)
            values = wrapped(value, (0.92 if mono else 1) * self.size, self.length - x, mono=mono)
            for place in range(max(len(labels), len(values))):
                runs = [Run(labels[place], colour=SOFT)] if place < len(labels) else []
                runs += [Run(values[place], x, 0.92 if mono else 1.0, mono=mono)] if place < len(values) else []
                yield Line(tuple(runs), 0 if place else 0.12)

    def table(self, rows: Sequence[Sequence[str]]) -> Iterator[Line]:
        """Yield rows: the first column on the left, the others to the right, as wide as what stands in them."""
        shown = [[drawable(cell, bold=not place) for cell in row] for place, row in enumerate(rows)]
        widths = [
            max(width_of(cell, self.size, bold=not place) for place, cell in enumerate(column))
            for column in zip(*shown, strict=True)
        ]
        gap = max(4.0, min(24.0, (self.length - sum(widths)) / len(widths)))
        ends = [self.length - sum(widths[at + 1 :]) - gap * (len(widths) - 1 - at) for at in range(len(widths))]
        for place, row in enumerate(shown):
            first = wrapped(row[0], self.size, max(40.0, ends[1] - widths[1] - gap), bold=not place)
            rest = [Run(cell, end, bold=not place, align="right") for cell, end in zip(row[1:], ends[1:], strict=True)]
            for number, text in enumerate(first):
                runs = (Run(text, bold=not place), *(rest if number == 0 else ()))
                above = 0 if number else 0.12 if place else 0.4
                yield Line(runs, above, rule=number == len(first) - 1)

    def part(self, part: Part) -> Iterator[Line]:
        """Yield a section."""
        yield Line((Run(drawable(part.title, bold=True), bold=True, size=1.12),), 0.75, rule=True)
        yield from self.pairs(part.pairs)
        yield from self.table(part.table) if part.table else ()
        for what, command in part.commands:
            yield from self.paragraph(what, 0.2, colour=SOFT)
            yield from self.paragraph(command, mono=True, size=0.92, x=8)
        for item in part.items:
            first, *rest = self.paragraph(item, 0.12, x=9)
            yield Line((Run("•"), *first.runs), first.above)
            yield from rest

    def sheet(self, sheet: Sheet) -> Iterator[Line]:
        """Yield the whole page."""
        yield from self.paragraph(sheet.title, bold=True, size=1.6)
        yield from self.paragraph(sheet.word, 0.3, bold=True, size=1.45, colour=MARK)
        for line in sheet.said:
            yield from self.paragraph(line, 0.15, size=1.08)
        for part in sheet.parts:
            yield from self.part(part)
        yield from self.paragraph(sheet.foot, 0.9, colour=SOFT, size=0.9)


def set_to_fit(sheet: Sheet) -> tuple[float, list[Line]]:
    """Set a sheet in the largest letters, up to BODY, with which it fits on its page.

    Returns:
        Size of the letters, in points, and the lines.

    Raises:
        UserError: even the smallest do not.
    """
    for tenths in range(round(10 * BODY), round(10 * LEAST) - 1, -2):
        size = tenths / 10
        lines = list(Setting(size).sheet(sheet))
        if size * sum(line.height for line in lines) <= HEIGHT - 2 * MARGIN:
            return size, lines
    raise UserError("the certificate does not fit on one page of paper, its names are too long: rename the classes")


def draw(sheet: Sheet) -> "Figure":
    """Draw the page."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    size, lines = set_to_fit(sheet)
    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
    y = HEIGHT - MARGIN
    for line in lines:
        y -= size * line.height
        for run in line.runs:
            font: dict[str, Any] = {"fontsize": size * run.size, "fontweight": "bold" if run.bold else "normal"}
            font |= {"family": "DejaVu Sans Mono" if run.mono else "DejaVu Sans", "color": run.colour}
            place = ((MARGIN + run.x) / WIDTH, (y + 0.3 * size) / HEIGHT)
            figure.text(*place, run.text, ha=run.align, va="baseline", parse_math=False, **font)
        if line.rule:
            ends = [MARGIN / WIDTH, 1 - MARGIN / WIDTH]
            figure.add_artist(Line2D(ends, [y / HEIGHT, y / HEIGHT], color=LINE, linewidth=0.5))
    return figure


def as_pdf(sheet: Sheet) -> bytes:
    """The page as a PDF file; the same sheet gives the same bytes with the same matplotlib.

    Raises:
        UserError: it does not fit.
    """
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        data = io.BytesIO()
        draw(sheet).savefig(data, format="pdf", metadata={"CreationDate": None, "Title": visible(sheet.title)})
    return data.getvalue()
