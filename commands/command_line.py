"""How the words of a command line become the parameters of a command; tyro reads them.

A command is a function with typed parameters. Each is a flag, and its help stands in the docstring. Some are special; a
command has those that it needs:

    settings: Settings      the configuration of a run: every field is a flag, and --config FILE comes with them
    read: Reading           a `Group` of flags that several commands share
    files: Files            paths, one for each time that the flag is given
    class_: Words           the same for words
    plugin: Files           plugins, by this name; they are imported before any other flag is read
    here: Environment       what main.py has read from the environment; by this name, and no flag
    rest: tuple[str, ...]   words that no flag takes, for a command that refuses them itself; by this name, and no flag
"""

import ast
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TextIO, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from core.choices import Choice, OpenChoice, Plain, Section, bare, fit, hints
from core.config import PROJECT_ROOT, PipelineConfig, UserError
from core.hashes import load_plugins
from core.observe import visible
from core.yaml_files import load_config

DEFAULT_CONFIG = PROJECT_ROOT / "configs" / "default.yaml"
SHORT = {"eval.methods": "--methods", "eval.metrics": "--metrics", "data.skip_bad_images": "--skip-bad-images"}
"""Second names of fields that are typed often."""
EXAMPLES = {"config": "configs/default.yaml", "plugin": "my_method.py"}
METAVARS = {str: "TEXT", int: "INT", float: "NUMBER", Path: "PATH", NoneType: "None"}


@dataclass(frozen=True)
class Environment:
    """What main.py has read from the environment, for the commands that need it.

    Args:
        curves: output folder -> the folder in which trackio keeps training curves, in this process and in those that
            it starts: TRACKIO_DIR if the user has set it, else a folder below the output folder.
        torchrun: whether torchrun started this process.
        restarted: whether torchrun started it again, after one of its processes failed.
    """

    curves: Callable[[Path], Path]
    torchrun: bool = False
    restarted: bool = False


class Group:
    """Flags that several commands share: a frozen dataclass, the help of each field in a text below it."""


Settings = Annotated[PipelineConfig, tyro.conf.arg(name="")]  # without a prefix: --seed, --train.lr
Files = Annotated[tyro.conf.UseAppendAction[tuple[Path, ...]], tyro.conf.arg(metavar="FILE")]  # a flag for each
Words = Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="TEXT")]


@dataclass(frozen=True)
class _Named:
    """The files that `--config` names."""

    config: tyro.conf.UseAppendAction[tuple] = ()
    plugin: tyro.conf.UseAppendAction[tuple] = ()


def show(text: object, file: TextIO | None = None) -> None:
    """Print a text for people; control characters in it are spelled out, so that no terminal obeys them."""
    print(visible(str(text), keep="\n"), file=file)


def call(command: Callable[..., int | None], words: Sequence[str], name: str, here: Environment) -> int:
    """Read the words, call the command with the parameters that they give, and return its exit code.

    Args:
        command: a function as described above; it returns an exit code, or None for 0.
        words: what was typed after the command's name.
        name: of the command, as it is typed.
        here: the environment, for a command that asks for it.

    Raises:
        UserError: a configuration file cannot be used, or the command says so.
        SystemExit: `--help` was asked for (0), or tyro has said what it cannot read (2).
    """
    known = inspect.signature(command).parameters
    words = list(_without_values(words, set(_switches(command))))
    if {"settings", "plugin"} & {*known}:
        load_plugins(_files(words, "plugin"))  # other flags may be names that a plugin registers
    settings = "settings" in known and load_config(_files(words, "config") or [DEFAULT_CONFIG])
    defaults = {"settings": settings} if settings else {}
    tolerant = "rest" in known
    found: Any = tyro.cli(
        _reader(command, defaults),
        args=words,
        prog=f"main.py {name}",
        registry=_registry(),
        return_unknown_args=tolerant,
    )
    values, rest = found if tolerant else (found, ())
    offered = {"here": here, "rest": tuple(rest)}
    return command(**values, **{one: value for one, value in offered.items() if one in known}) or 0


def _reader(command: Callable[..., Any], defaults: Mapping[str, Any]) -> Callable[..., dict[str, Any]]:
    """Make the function that tyro calls in a command's place: it returns the parameters, and carries nothing out.

    Args:
        command: the function whose parameters and docstring tyro is to see, as `_flag` shows them.
        defaults: parameter -> default, where the function states none.
    """
    types = get_type_hints(command, include_extras=True)
    seen = [one for one in inspect.signature(command).parameters.values() if one.name not in ("here", "rest")]
    seen = [
        one.replace(annotation=_flag(types[one.name], one.name), default=defaults.get(one.name, one.default))
        for one in seen
    ]

    def reader(**values: Any) -> dict[str, Any]:
        repeated = {name: get_args(bare(types[name]))[0] for name in values if _repeats(types[name])}
        return {
            name: tuple(map(repeated[name], value)) if name in repeated else value for name, value in values.items()
        }

    reader.__doc__ = command.__doc__
    reader.__signature__ = inspect.Signature(seen)  # ty: ignore[missing-attribute]
    reader.__annotations__ = {one.name: one.annotation for one in seen}
    return reader


def _repeats(hint: Any) -> bool:
    """Whether a flag may be given several times, once for each value."""
    return tyro.conf.UseAppendAction in get_args(hint)


def _files(words: Sequence[str], flag: str) -> Sequence[Path]:
    """Read the files that are named ahead of everything else: other flags take defaults and names from them.

    Args:
        flag: "config" or "plugin".

    Raises:
        UserError: a flag names no file.
    """
    try:
        found, _ = tyro.cli(_Named, args=words, add_help=False, console_outputs=False, return_unknown_args=True)
    except SystemExit:  # unknown words are let through here, so a missing value is the only mistake left
        wrong = next((name for name in EXAMPLES if _names_none(words, name)), flag)
        raise UserError(f"--{wrong} names no file: give one, e.g. --{wrong} {EXAMPLES[wrong]}") from None
    return [Path(file) for file in getattr(found, flag)]


def _names_none(words: Sequence[str], flag: str) -> bool:
    """Whether a flag that takes a file stands without one."""
    after = zip(words, [*words[1:], "--"], strict=True)
    return any(word == f"--{flag}" and following.startswith("--") for word, following in after)


# --- switches ---------------------------------------------------------------------------------------------


def _switches(command: Callable[..., Any]) -> Iterator[str]:
    """Yield the flags of a command whose type is bool."""

    def within(parameters: Mapping[str, Any], prefix: str) -> Iterator[str]:
        for name, hint in parameters.items():
            if bare(hint) is bool:
                yield f"--{prefix}{name}".replace("_", "-")
                yield from [SHORT[prefix + name]] if prefix + name in SHORT else []
            elif is_dataclass(bare(hint)):
                yield from within(hints(bare(hint)), "" if _is_bare(hint) else f"{prefix}{name}.")

    parameters = get_type_hints(command, include_extras=True)
    return within({name: hint for name, hint in parameters.items() if name not in ("here", "return")}, "")


def _is_bare(hint: Any) -> bool:
    """Whether the flags of a section or group stand without its name before them."""
    return any(getattr(extra, "name", None) == "" for extra in get_args(hint)[1:])


def _without_values(words: Sequence[str], switches: set[str]) -> Iterator[str]:
    """Write `--switch=true` as `--switch`, and `--switch=false` as `--no-switch`; all other words stay as they are.

    These are the only words that change before tyro reads them. tyro 1.0 knows two kinds of switches, those without a
    value (`--resume`, `--no-resume`) and those with one (`--resume True`), and a flag is of one kind.

    Raises:
        UserError: a switch has a value that is neither true nor false.
    """
    for word in words:
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        if not equals or flag not in switches:
            yield word
            continue
        section, dot, own = flag.removeprefix("--").rpartition(".")
        yield flag if fit(value, bool, flag) else f"--{section}{dot}no-{own}"


# --- types ------------------------------------------------------------------------------------------------


def _registry() -> ConstructorRegistry:
    """Tell tyro of the sections of a configuration, and of groups of flags."""
    registry = ConstructorRegistry()
    registry.struct_rule(_section)
    return registry


def _section(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Tell tyro the fields of a section of the configuration, or of a group; the configuration has --config, too."""
    kind: Any = info.type
    if not (isinstance(kind, type) and issubclass(kind, (Section, Group))):
        return None
    default = info.default if isinstance(info.default, kind) else kind()
    prefix = f"{kind.SECTION}." if issubclass(kind, Section) and kind.SECTION else ""
    fields = [
        StructFieldSpec(name, _flag(hint, prefix + name), getattr(default, name), partial(_described, kind, name))
        for name, hint in hints(kind).items()
    ]
    if kind is not PipelineConfig:
        return StructConstructorSpec(kind, tuple(fields))
    about = f"YAML file of settings; later files win over earlier ones, flags over all. Without: {DEFAULT_CONFIG.name}."
    files = StructFieldSpec("config", _flag(Files, "config"), (), about)
    return StructConstructorSpec(_configuration, (files, *fields))


def _configuration(config: tuple[str, ...], **values: Any) -> PipelineConfig:
    """Make the configuration from the values of its fields, which have the files' values as their defaults."""
    return PipelineConfig(**values)


def _flag(hint: Any, name: str) -> Any:
    """Return the type by which tyro reads a parameter or field.

    Sections and switches stay as they are, and a flag that repeats is a `tuple`. All other values are objects to tyro,
    which `fit` makes of words: so flags take what files take, and tyro need not load typeguard (0.1 s).
    """
    kind, extras = bare(hint), get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    if is_dataclass(kind):
        return hint
    if name in SHORT:
        extras = (*extras, tyro.conf.arg(aliases=(SHORT[name],)))
    if kind is bool:
        return Annotated[bool, *extras] if extras else bool
    if _repeats(hint):
        return Annotated[tuple, *extras]
    return Annotated[object, _value(hint, name), *extras]


def _value(hint: Any, name: str) -> PrimitiveConstructorSpec:
    """Tell tyro how many words a value takes, and to let `fit` convert them, as it converts words of a file.

    Args:
        hint: type of the field or parameter, with its range.
        name: its dotted name, for errors.
    """
    parts = get_args(bare(hint)) if get_origin(bare(hint)) in (Union, UnionType) else (hint,)
    several = any(get_origin(bare(part)) is tuple for part in parts)
    path = any(bare(part) is Path for part in parts)
    given = Union[tuple(part for part in parts if part is not NoneType)]  # noqa: UP007

    def made(words: list[str]) -> Any:
        if NoneType in parts and words == ["None"]:
            return None
        plain = [Path(word) if path else Plain(word) for word in words]
        return fit(plain if several else plain[0], given, name)

    def written(value: Any) -> list[str]:
        return [str(one) for one in value] if isinstance(value, tuple) else [str(value)]

    return PrimitiveConstructorSpec(
        nargs="*" if several else 1,
        metavar=_metavar(hint),
        instance_from_str=made,
        is_instance=lambda _: True,
        str_from_instance=written,
    )


def _metavar(hint: Any) -> str:
    """Describe for the help page what a flag takes: INT, PATH|None, {list,auto}, INT [INT ...]."""
    kind, origin = bare(hint), get_origin(bare(hint))
    if origin in (Union, UnionType):
        return "|".join(_metavar(part) for part in get_args(kind))
    if origin is tuple:
        one = _metavar(get_args(kind)[0])
        return f"{one} [{one} ...]"
    if isinstance(kind, type) and issubclass(kind, (Choice, OpenChoice)):
        return f"{{{','.join(one.value for one in kind)}}}"
    return METAVARS[kind]


@lru_cache
def _descriptions(file: str) -> dict[tuple[str, str], str]:
    """Parse a source file; return (class, field) -> the text below the field, on one line."""
    found = {}
    classes = [node for node in ast.parse(Path(file).read_text("utf-8")).body if isinstance(node, ast.ClassDef)]
    for kind in classes:
        for field, text in pairwise(kind.body):
            said = text.value.value if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) else None
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(said, str):
                found[kind.name, field.target.id] = " ".join(said.split())
    return found


def _described(kind: type, name: str) -> str | None:
    """Return the text below a field in the source. Only help pages ask; the file is parsed once for all fields."""
    return _descriptions(str(sys.modules[kind.__module__].__file__)).get((kind.__name__, name))
