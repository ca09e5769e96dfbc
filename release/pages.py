"""A sheet as a self-contained HTML page and as Markdown; both are text, and the same sheet gives the same text."""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from core.observe import visible
from mimu.config import FRONT_MATTER
from release.sheet import Part, Sheet
from reporting.write import as_text, in_markdown

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATE = Path(__file__).parent / "templates" / "certificate.html"


@lru_cache
def _template() -> "Template":
    """Compile the page's template, once for this process."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_shown, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _shown(value: object) -> object:
    return visible(value) if type(value) is str else value


def as_html(sheet: Sheet, forgotten: str) -> str:
    """A page that needs no other file, light and dark, for the screen and for one sheet of A4.

    Args:
        forgotten: the classes, for the title of the window.
    """
    return _template().render(sheet=sheet, forgotten=forgotten)


def as_markdown(sheet: Sheet) -> str:
    """A model card: what a hub reads in front, then the sheet."""
    lines = [*FRONT_MATTER, f"# {in_markdown(sheet.title)}", "", f"**{in_markdown(sheet.word)}**", ""]
    lines += [f"{in_markdown(line)}\n" for line in sheet.said]
    for part in sheet.parts:
        lines += [f"## {part.title}", "", *_section(part)]
    return "\n".join([*lines, in_markdown(sheet.foot)]) + "\n"


def _section(part: Part) -> list[str]:
    lines = [f"- {in_markdown(label)}: {in_markdown(value)}" for label, value in part.pairs]
    lines += [""] if part.pairs else []
    lines += [as_text(part.table)] if part.table else []
    for what, command in part.commands:
        lines += [f"{in_markdown(what)}:", "", "```bash", visible(command), "```", ""]
    lines += [f"- {in_markdown(item)}" for item in part.items]
    return [*lines, ""] if part.items else lines
