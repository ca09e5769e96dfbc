"""YAML files -> a configuration: each over the ones before it, all over the defaults.

A file is read as words, and the schema says what each word is: `no` is a switch where the field is one, and a name
where the field takes names. So the rules by which YAML guesses types (yes and no, octals, dates, `1e-3`) do not matter.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.choices import Plain, UserError, at_home, bare, did_you_mean, fit, hints, shown
from core.config import PipelineConfig
from core.hashes import load_plugins

if TYPE_CHECKING:
    from yaml import Node

MOST_BYTES = 2**20
EMPTY = ("", "~", "null", "Null", "NULL")
TAGS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map"))


@dataclass
class Words:
    """What a file says: nested mappings and lists of words, and the line of every (dotted) key."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)

    def wrong(self, name: str, text: str) -> UserError:
        """An error that says where."""
        line = f", line {self.lines[name]}" if name in self.lines else ""
        return UserError(f"{self.path}{line}: {text}")


def read_words(path: Path) -> Words:
    """A YAML file as words.

    Raises:
        UserError: it is missing, no text, no YAML, no mapping, or says a key twice.
    """
    import yaml

    words = Words(path)
    try:
        with at_home(path).open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise UserError(f"{path} has more than {MOST_BYTES} bytes: give a YAML file of settings, see configs/")
        root = yaml.compose(data.decode("utf-8-sig"), Loader=yaml.BaseLoader)
        if root is not None and not (isinstance(root, yaml.ScalarNode) and root.value in EMPTY):
            words.values = _values(words, root, "")
    except FileNotFoundError:
        raise UserError(f"there is no config file {path}: see configs/ for the ones that ship") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): give a YAML file, see configs/") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text in UTF-8: give a YAML file, see configs/") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply: a configuration has sections of fields, see configs/") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_place(error, data)}: see configs/ for files that are right") from None
    if not isinstance(words.values, dict):
        raise UserError(f"{path} holds {shown(words.values)}: give fields and values, e.g. `seed: 1`, one a line")
    return words


def _place(error: Exception, data: bytes) -> str:
    """Where a file stops being YAML, and what is most likely wrong there."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:
        return " holds characters that no YAML file may hold (control characters)"
    lines = data.decode("utf-8-sig").splitlines()
    text = lines[mark.line] if mark.line < len(lines) else ""
    if "\t" in text:
        why = "a tab stands in it where YAML takes spaces only"
    elif text.startswith("---") and mark.line:
        why = "a second document begins there, and a configuration is one"
    else:
        why = "a bracket, quote, colon or indentation is missing or too much, here or above"
    return f", line {mark.line + 1} ({shown(text.strip())}): {why}"


def _values(words: Words, node: "Node", name: str, inside: tuple = ()) -> Any:
    """A node of the file as mappings, lists, words and None."""
    import yaml

    if node in inside:
        raise words.wrong(name, f"{name} holds itself: write its value out")
    if node.tag not in TAGS:
        raise words.wrong(name, f"{name} carries the tag {node.tag}: write the value alone, its field says the type")
    inside = (*inside, node)
    if isinstance(node, yaml.MappingNode):
        return _mapping(words, node, name, inside)
    if isinstance(node, yaml.SequenceNode):
        return [_values(words, item, name, inside) for item in node.value]
    if "${" in node.value:
        needed = "a file's values are taken as they stand, so that no secret of the environment gets into records"
        raise words.wrong(name, f"{name or 'it'} is {shown(node.value)}: {needed}; write the value itself")
    if isinstance(node, yaml.ScalarNode) and node.style is not None:
        return str(node.value)
    return None if node.value in EMPTY else Plain(node.value)


def _mapping(words: Words, node: Any, name: str, inside: tuple) -> dict[str, Any]:
    """Keys and values; `<<` takes over the keys of another mapping."""
    found: dict[str, Any] = {}
    taken: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key.value, str):
            raise words.wrong(name, f"{name or 'it'} has a key that is no word: write `field: value`")
        whole = f"{name}.{key.value}" if name else key.value
        if key.value in found:
            raise words.wrong(whole, f"{whole} stands in line {key.start_mark.line + 1} too: keep one of the two")
        words.lines[whole] = key.start_mark.line + 1
        inner = _values(words, value, whole, inside)
        if key.value == "<<" and key.style is None:
            for other in inner if isinstance(inner, list) else [inner]:
                taken = (other if isinstance(other, dict) else {}) | taken
        else:
            found[key.value] = inner
    return taken | found


def resolved(value: Any, exactly: bool = False) -> Any:
    """Words that no schema describes as numbers, switches and texts; with `exactly`, only if they print as written."""
    if isinstance(value, Mapping):
        return {key: resolved(item, exactly) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [resolved(item, exactly) for item in value]
    if not isinstance(value, Plain):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        try:
            found = fit(value, kind, "")
        except UserError:
            continue
        if not exactly or str(found) == value:
            return found
    return str(value)


def _fields_named(name: str, kind: type = PipelineConfig, prefix: str = "") -> list[str]:
    """Every field of the schema with this last name, dotted."""
    found = []
    for own, hint in hints(kind).items():
        if own == name:
            found.append(prefix + own)
        if is_dataclass(bare(hint)):
            found += _fields_named(name, bare(hint), f"{prefix}{own}.")
    return found


def _unknown(key: str, kind: type, prefix: str) -> str:
    """What to say of a key that is no field."""
    last = key.replace("-", "_").rpartition(".")[2]
    elsewhere = _fields_named(last)
    where = prefix.rstrip(".") or "a configuration"
    if key == "sweep" and not prefix:
        return "sweep is a section of the command `main.py sweep`: run that, or take the section out"
    if elsewhere and prefix + last not in elsewhere:
        section, _, own = elsewhere[0].rpartition(".")
        written = f"`{section}: {{{own}: ...}}`" if section else f"`{own}: ...` at the margin"
        return f"{where} has no field {key!r}: did you mean {elsewhere[0]}, written {written}?"
    return f"{where} has no field {key!r}{did_you_mean(key, list(hints(kind)))}"


def typed(
    values: Mapping[str, Any],
    wrong: Callable[[str, str], UserError],
    kind: type = PipelineConfig,
    prefix: str = "",
) -> dict[str, Any]:
    """Nested values in the types of the schema's fields, ranges checked; sections stay mappings.

    Args:
        wrong: makes the error from a dotted name and a sentence.

    Raises:
        UserError: a key is no field, or a value does not fit its field.
    """
    found: dict[str, Any] = {}
    known = hints(kind)
    for key, value in values.items():
        name = prefix + str(key)
        if key not in known:
            raise wrong(name, _unknown(str(key), kind, prefix))
        section = bare(known[key])
        if is_dataclass(section):
            if not isinstance(value, Mapping):
                raise wrong(name, f"{name} is {shown(value)}: it is a section, write `{name}: {{field: value}}`")
            found[key] = typed(value, wrong, section, f"{name}.")
            continue
        try:
            found[key] = fit(value, known[key], name)
        except UserError as error:
            raise wrong(name, f"{error}, e.g. `{key}: {_example(kind, key)}`") from None
    return found


def _example(kind: Any, name: str) -> str:
    """A field's default as it is written in a file."""
    (own,) = (item for item in fields(kind) if item.name == name)
    value = own.default if own.default is not MISSING else None

    def written(one: Any) -> str:
        if isinstance(one, tuple):
            return f"[{', '.join(map(written, one))}]"
        return "null" if one is None else str(one).lower() if isinstance(one, bool) else str(one)

    return written(value)


def merged(under: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, the second's values over the first's."""
    both = dict(under)
    for key, value in over.items():
        known = both.get(key)
        both[key] = merged(known, value) if isinstance(known, dict) and isinstance(value, Mapping) else value
    return both


def made(values: Mapping[str, Any], kind: type = PipelineConfig) -> Any:
    """The dataclass with these typed values, sections included, over its defaults."""
    known = hints(kind)
    return kind(
        **{
            key: made(value, bare(known[key])) if is_dataclass(bare(known[key])) else value
            for key, value in values.items()
        }
    )


def load_config(paths: Sequence[Path], aside: Sequence[str] = ()) -> PipelineConfig:
    """Merge YAML files, in order, over the defaults; keys named in `aside` are someone else's.

    Plugins that a file names are imported first, so that other values may be names that they register.

    Raises:
        UserError: a file is missing or not YAML, a key or value does not fit the schema, or as `load_plugins`.
    """
    values: dict[str, Any] = {}
    said = [read_words(Path(path)) for path in paths]
    for words in said:
        if "plugins" in words.values:
            named = typed({"plugins": words.values["plugins"]}, words.wrong)["plugins"]
            try:
                load_plugins(named)
            except UserError as error:
                raise words.wrong("plugins", str(error)) from None
    for words in said:
        own = {key: value for key, value in words.values.items() if key not in aside}
        values = merged(values, typed(own, words.wrong))
    try:
        return made(values)
    except UserError as error:
        raise UserError(f"{', '.join(str(path) for path in paths)}: {error}") from None
