"""Draw panels for print: a matplotlib figure, one column (3.4 inches) wide, and its files. No other file draws.

Run as a script (`python -m reporting.draw`), it draws what `save_all` of another process writes to its stdin.

Colours are Okabe and Ito's, distinct for colour-blind readers; markers and dashes tell methods apart in grey.
"""

import io
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from core.artifacts import write_bytes
from core.config import PROJECT_ROOT, ReporterConfig, plain
from core.observe import log, visible
from reporting.panels import Panel, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8B6D00", "#000000")
MARKERS, DASHES = "osD^vP<>", ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
LEVELS = ((0, (4, 2)), (0, (1, 1.5)), (0, (8, 2)), (0, (5, 1.5, 1, 1.5)))  # dashes of horizontal lines
COLUMN, HEIGHT = 3.4, 2.5  # inches: the width of one column of a paper, the height of a panel
FEW_LINES, LINE = 4, 0.14  # of a legend, for which there is room in any case; inches of each further one
SIDE_BY_SIDE = 4  # from as many panels on they stand in two columns
SMALL, TINY = 7.5, 6.5  # points
MOST_LETTERS = 40  # of the names below an axis that are written across; of more they are turned
PAD = 0.12  # of the range of an axis that ends before some values: room to name them
TITLE = 48  # characters of a title's line that fit into a column
POWER = re.compile(r"\^\{(-?\d+)\}")
RAISED = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")
METADATA: dict[str, Any] = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
START, WORTH = 2, 12  # panels drawn while a process starts; panels from which on a second process saves more than that
SETTINGS: dict[Any, Any] = {"svg.hashsalt": "mimu", "font.size": SMALL, "axes.linewidth": 0.6}


def draw(panels: Sequence[Panel]) -> "Figure":
    """Draw some panels as one figure with one legend."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        across = 2 if len(panels) >= SIDE_BY_SIDE else 1
        down = -(-len(panels) // across)
        figure = Figure(figsize=(COLUMN * across, HEIGHT * down + 0.6), layout="constrained")
        axes = list(figure.subplots(down, across, squeeze=False).flat)
        for ax, panel in zip(axes, panels, strict=False):
            _draw_panel(ax, panel)
        for ax in axes[len(panels) :]:
            ax.remove()
        named = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        if max(len(panel.series) for panel in panels) > 1:
            columns = 2 * across
            taller = max(0, -(-len(named) // columns) - FEW_LINES) * LINE  # else many methods leave the axes no room
            figure.set_figheight(figure.get_figheight() + taller)
            place = {"loc": "outside lower center", "ncols": columns, "fontsize": TINY, "frameon": False}
            figure.legend(named.values(), named.keys(), handlelength=2.4, columnspacing=1, **place)
        _remember_ticks(figure)
    return figure


def _remember_ticks(figure: "Figure") -> None:
    """Let each axis find its ticks, and measure their labels, once for each size: matplotlib does so up to six times.

    The methods are matplotlib's own and not public: a version that has no such methods takes its time again.
    """
    from matplotlib.axis import Axis

    for axis in figure.findobj(Axis):
        for name in ("_update_ticks", "_get_ticklabel_bboxes"):
            if method := getattr(axis, name, None):
                setattr(axis, name, _remembered(method, partial(_size_of, axis)))


def _size_of(axis: "Axis") -> tuple:
    """Return what the ticks of an axis depend on, as long as neither data nor settings change."""
    return *axis.get_view_interval(), *axis.axes.bbox.bounds, axis.axes.figure.dpi


def _remembered(method: Callable[..., Any], state: Callable[[], tuple]) -> Callable[..., Any]:
    """Wrap a method: called again with the arguments and in the state of the last call, it returns the last result.

    The last arguments are held, so that no other renderer gets the identity of the last one.
    """
    last: list[Any] = [None, None]

    def call(*given: object) -> object:
        if last[0] != (now := (state(), given)):
            last[:] = now, method(*given)
        return last[1]

    return call


def _draw_panel(ax: "Axes", panel: Panel) -> None:
    ax.set_title(_wrapped(panel.title, TITLE - 14 if panel.margins else TITLE), fontsize=SMALL)
    ax.set_xlabel(_shown(panel.x_label), fontsize=SMALL)
    ax.set_ylabel(_wrapped(panel.y_label, TITLE - 14), fontsize=SMALL)
    ax.tick_params(labelsize=TINY, width=0.6, length=2.5)
    if panel.cells is not None:
        _draw_cells(ax, panel)
        return
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, lw=0.5)
    ax.set_axisbelow(True)
    if panel.x_log:
        ax.set_xscale("log")
        _name_powers(ax.xaxis)
    if panel.y_log:
        ax.set_yscale("symlog", linthresh=1) if panel.series[0].kind == "steps" else ax.set_yscale("log")
        _name_powers(ax.yaxis)
    bars = [one for one in panel.series if one.kind == "bars"]
    for place, one in enumerate(bars):
        width = 0.8 / len(bars)
        shifted = [x + (place - (len(bars) - 1) / 2) * width for x in one.x]
        ax.bar(shifted, one.y, width=width, color=_colour(one), label=_shown(one.label))
    for one in panel.series:
        if one.kind != "bars":
            _draw_series(ax, one)
    if panel.y_range:
        _end_axis(ax, panel)
    if panel.ticks:
        crowded = len(panel.ticks) > 10 or len("".join(panel.ticks)) > MOST_LETTERS
        ax.set_xticks(
            range(len(panel.ticks)), [*map(_shown, panel.ticks)], fontsize=TINY, rotation=90 if crowded else 0
        )


def _name_powers(axis: "Axis") -> None:
    """Write the numbers of a logarithmic axis as plain text: as formulas they take as long as the rest of a panel."""
    from matplotlib.ticker import LogFormatterSciNotation

    class Plain(LogFormatterSciNotation):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return _without_formula(super().__call__(x, pos))

    major, minor = axis.get_major_formatter(), axis.get_minor_formatter()
    for found, give in ((major, axis.set_major_formatter), (minor, axis.set_minor_formatter)):
        if type(found) is LogFormatterSciNotation:
            plain = Plain()
            vars(plain).update(vars(found))
            give(plain)


def _without_formula(text: str) -> str:
    """Turn matplotlib's formula of a number into text: `$\\mathdefault{2\\times10^{-3}}$` into 2 x 10 to the -3."""
    plain = text.removeprefix(r"$\mathdefault{").removesuffix("}$").replace(r"\times", "\u00d7")
    return POWER.sub(lambda found: found[1].translate(RAISED), plain).replace("-", "\u2212")


def _end_axis(ax: "Axes", panel: Panel) -> None:
    """End the y axis where the panel says, and name at its ends what lies beyond."""
    low, high = panel.y_range or (0.0, 1.0)
    room = (high / low) ** PAD if panel.y_log else PAD * (high - low or 1)
    ax.set_ylim(*((low / room, high * room) if panel.y_log else (low - room, high + room)))
    for names, place, side, sign in ((panel.above, 0.99, "top", "\u25b2"), (panel.below, 0.01, "bottom", "\u25bc")):
        if names:
            text = _wrapped(f"{sign} {', '.join(names)}", TITLE)
            ax.text(0.01, place, text, va=side, fontsize=TINY, transform=ax.transAxes, zorder=6)


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.fill(line, width) for line in _shown(text).split("\n"))


def _shown(text: str) -> str:
    """Text that matplotlib draws as it is: `$` would begin a formula, and a legend leaves out what begins with `_`."""
    plain = visible(text, keep="\n").replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain


def _colour(series: Series) -> str:
    return "#777777" if series.style < 0 else COLOURS[series.style % len(COLOURS)]


def _draw_series(ax: "Axes", one: Series) -> None:
    colour, turn = _colour(one), max(0, one.style) // len(COLOURS)
    marker = MARKERS[(one.style + turn // 4) % len(MARKERS)]  # hollow in every second turn, small in two of four
    shape: dict[str, Any] = {"marker": marker, "ms": 3.5 if turn % 4 < 2 else 2.2} | (
        {"mfc": "none"} if turn % 2 else {}
    )
    dash = DASHES[one.style // len(COLOURS) % len(DASHES)]
    if one.kind == "level":
        ax.axhline(one.y[0], color=colour, ls=LEVELS[one.style % len(LEVELS)], lw=1, label=_shown(one.label))
        if one.low and one.high:
            ax.axhspan(one.low[0], one.high[0], color=colour, alpha=0.1, lw=0)
    elif one.kind == "steps":
        ax.stairs(one.y, one.x, fill=True, alpha=0.55, color=colour, label=_shown(one.label))
    elif one.kind == "front":
        ax.step(one.x, one.y, where="post", color=colour, lw=3, alpha=0.35, label=_shown(one.label), zorder=1)
    elif one.kind == "star":
        ax.plot(one.x, one.y, "*", ms=11, color=colour, mec="white", mew=0.6, label=_shown(one.label), zorder=5)
    else:
        few = len(one.x) <= 30
        style: dict[str, Any] = {"ls": "none"} if one.kind == "points" else {"ls": dash, "lw": 1.1}
        ax.plot(one.x, one.y, color=colour, label=_shown(one.label), **style, **(shape if few else {}))
        if one.low and one.high and one.kind == "line":
            ax.fill_between(one.x, one.low, one.high, color=colour, alpha=0.15, lw=0)
        elif one.low and one.high:
            ax.vlines(one.x, one.low, one.high, color=colour, lw=1)


def _draw_cells(ax: "Axes", panel: Panel) -> None:
    cells = panel.cells or [[0.0]]
    most = max(1e-9, *(abs(value) for row in cells for value in row))
    colours: dict[str, Any] = (
        {"cmap": "PuOr", "vmin": -most, "vmax": most} if panel.signed else {"cmap": "cividis", "vmin": 0}
    )
    image = ax.imshow(cells, aspect="auto" if panel.margins else "equal", interpolation="nearest", **colours)
    if panel.ticks:
        turn = 90 if max(map(len, panel.ticks)) > 2 else 0
        ax.set_xticks(range(len(panel.ticks)), panel.ticks, fontsize=TINY, rotation=turn)
        ax.set_yticks(range(len(panel.ticks)), panel.ticks, fontsize=TINY)
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.04)
    bar.ax.tick_params(labelsize=TINY)
    if not panel.signed:
        bar.locator = _whole(5)
    if panel.margins:
        _draw_margins(ax, cells)


def _whole(most: int) -> Any:
    """Choose about `most` ticks at whole numbers, for counts."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, integer=True)


def _draw_margins(ax: "Axes", cells: Sequence[Sequence[float]]) -> None:
    """Sums of the rows on the right, of the columns below the title, on the heat map's own axes."""
    ax.set_xticks([])
    ax.set_yticks([])
    right, top = ax.inset_axes((1.03, 0, 0.22, 1)), ax.inset_axes((0, 1.03, 1, 0.22))
    right.barh(range(len(cells)), [sum(row) for row in cells], height=1, color=COLOURS[0])
    right.set_ylim(len(cells) - 0.5, -0.5)
    right.set_yticks([])
    sums = [sum(column) for column in zip(*cells, strict=True)]
    top.bar(range(len(sums)), sums, width=1, color=COLOURS[0])
    top.set_xlim(-0.5, len(sums) - 0.5)
    top.set_xticks([])
    for margin, axis in ((right, right.xaxis), (top, top.yaxis)):
        margin.tick_params(labelsize=TINY, width=0.6, length=2)
        axis.set_major_locator(_whole(2))
        margin.spines[["top", "right"]].set_visible(False)
    top.set_title(ax.get_title(), fontsize=SMALL)
    ax.set_title("")


def save(panels: Sequence[Panel], folder: Path, name: str, config: ReporterConfig) -> None:
    """Draw and write `<folder>/<name>.png`, .svg, .pdf as configured; equal panels give equal bytes."""
    import matplotlib

    figure = draw(panels)
    with matplotlib.rc_context(SETTINGS):
        if layout := figure.get_layout_engine():
            layout.execute(figure)
        figure.set_layout_engine("none")  # what has been laid out once is not laid out again for every format
        for kind in config.formats:
            write_bytes(folder / f"{name}.{kind}", _drawn(figure, kind, config.dpi), lasting=False)


def _drawn(figure: "Figure", kind: str, dpi: int) -> bytes:
    """A figure's bytes in a format. `Figure.savefig` makes the same, but draws twice, in case the layout changes."""
    file, figure.dpi = io.BytesIO(), dpi
    if kind == "png":
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        FigureCanvasAgg(figure).print_png(file, metadata=METADATA[kind])
    elif kind == "svg":
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        FigureCanvasSVG(figure).print_svg(file, metadata=METADATA[kind])
    else:  # imported for a PDF alone: it loads fontTools, for as long as four figures take
        from matplotlib.backends.backend_pdf import FigureCanvasPdf

        FigureCanvasPdf(figure).print_pdf(file, metadata=METADATA[kind])
    return file.getvalue()


# --- many figures -----------------------------------------------------------------------------------------


def save_all(figures: Mapping[str, Sequence[Panel]], folder: Path, config: ReporterConfig) -> None:
    """Draw and write figures (name -> panels) as `save`; where there are many, a second process draws half of them.

    What the second process fails to draw, this one draws: an error is raised here.
    """
    mine, others = _shared(figures)
    if not others:
        _save_each(mine, folder, config)
        return
    work = {"figures": {name: [asdict(one) for one in panels] for name, panels in others.items()}}
    with tempfile.TemporaryFile("w+") as given:
        given.write(json.dumps(work | {"folder": str(folder.resolve()), "config": plain(config)}))
        given.seek(0)
        command = [sys.executable, "-m", "reporting.draw"]
        silent: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, stdin=given, cwd=PROJECT_ROOT, **silent) as helper:
            try:
                _save_each(mine, folder, config)
                failed = helper.wait()
            except BaseException:
                helper.kill()
                raise
    if failed:
        log("report: a second process could not draw its figures, so that they are drawn here")
        _save_each(others, folder, config)


def _shared(figures: Mapping[str, Sequence[Panel]]) -> tuple[dict, dict]:
    """Divide figures between this process and a second one, which has none where a second one would not pay."""
    mine, others = {}, {}
    if _cores() == 1 or sum(map(len, figures.values())) < WORTH:
        return dict(figures), {}
    for name in sorted(figures, key=lambda name: -len(figures[name])):
        loads = [sum(map(len, share.values())) for share in (mine, others)]
        (mine if loads[0] <= loads[1] + START else others)[name] = figures[name]
    return mine, others


def _cores() -> int:
    """Return how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _save_each(figures: Mapping[str, Sequence[Panel]], folder: Path, config: ReporterConfig) -> None:
    for name, panels in figures.items():
        save(panels, folder, name, config)


def _help(given: TextIO) -> None:
    """Draw what `save_all` of another process has written."""
    work = json.load(given)
    config = ReporterConfig(**work["config"])
    for name, panels in work["figures"].items():
        shown = [replace(Panel(**one), series=[Series(**series) for series in one["series"]]) for one in panels]
        save(shown, Path(work["folder"]), name, config)


if __name__ == "__main__":
    _help(sys.stdin)
