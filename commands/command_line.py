"""How the words of a command line become the parameters of a command; tyro reads them.

A command is a function with typed parameters. Each is a flag, and its help stands in the docstring. Four parameters are
special; a command has those that it needs:

    here: Environment    what main.py has read from the environment; the first parameter, and no flag
    settings: Settings   the configuration of a run; every field is a flag, and --config FILE comes with them
    config: Files        configuration files as they were named, for a command without `settings`
    rest: Rest           words that no flag takes, for a command with a sentence of its own about them; no flag
"""

import ast
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import lru_cache, partial, wraps
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TextIO, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from core.choices import Choice, Plain, Section, bare, fit, hints
from core.config import PROJECT_ROOT, PipelineConfig, UserError
from core.observe import visible
from core.yaml_files import load_config

DEFAULT_CONFIG = PROJECT_ROOT / "configs" / "default.yaml"
SHORT = {"eval.methods": "--methods", "eval.metrics": "--metrics", "data.skip_bad_images": "--skip-bad-images"}
"""Second names of fields that are typed often."""
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


Settings = Annotated[PipelineConfig, tyro.conf.arg(name="")]  # without a prefix: --seed, --train.lr
Files = Annotated[tyro.conf.UseAppendAction[tuple[Path, ...]], tyro.conf.arg(metavar="FILE")]
Rest = Annotated[tuple[str, ...], tyro.conf.Suppress]


@dataclass(frozen=True)
class _Named:
    """The files that `--config` names."""

    config: Files = ()


def show(text: object, file: TextIO | None = None) -> None:
    """Print for people: nothing in a name is obeyed by the terminal."""
    print(visible(str(text), keep="\n"), file=file)


def call(command: Callable[..., int | None], words: Sequence[str], name: str, here: Environment) -> int:
    """Carry out a command with the parameters that the words give; returns its exit code.

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

    @wraps(command)
    def asked(*given: Any, **values: Any) -> Callable[[], int | None]:
        return partial(command, *given, **values)

    reader: Callable[..., Any] = partial(asked, here) if "here" in known else asked
    if "settings" in known:
        reader = partial(reader, settings=load_config(_files(words)))
    how: dict[str, Any] = {"args": words, "prog": f"main.py {name}", "registry": _registry()}
    if "rest" not in known:
        return tyro.cli(reader, **how)() or 0
    ready, rest = tyro.cli(reader, return_unknown_args=True, **how)
    return partial(ready, rest=tuple(rest))() or 0


def _files(words: Sequence[str]) -> Sequence[Path]:
    """Read the configuration files that are named ahead of everything else: they set the defaults of all other flags.

    Raises:
        UserError: a flag names none.
    """
    try:
        found, _ = tyro.cli(_Named, args=words, add_help=False, console_outputs=False, return_unknown_args=True)
    except SystemExit:  # all that can be wrong where words that are not known do not count
        raise UserError("--config names no file: give one, e.g. --config configs/default.yaml") from None
    return found.config or [DEFAULT_CONFIG]


# --- switches ---------------------------------------------------------------------------------------------


def _switches(command: Callable[..., Any]) -> Iterator[str]:
    """Name the flags of a command that are on or off."""

    def within(parameters: Mapping[str, Any], prefix: str) -> Iterator[str]:
        for name, hint in parameters.items():
            if bare(hint) is bool:
                yield f"--{prefix}{name}".replace("_", "-")
                yield from [SHORT[prefix + name]] if prefix + name in SHORT else []
            elif is_dataclass(bare(hint)):
                yield from within(hints(bare(hint)), "" if hint == Settings else f"{prefix}{name}.")

    parameters = get_type_hints(command, include_extras=True)
    return within({name: hint for name, hint in parameters.items() if name not in ("here", "return")}, "")


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
    """Tell tyro of this project's types: closed choices, and the sections of a configuration."""
    registry = ConstructorRegistry()
    registry.primitive_rule(_choice)
    registry.struct_rule(_section)
    return registry


def _choice(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Take a closed choice by its name, in any case, and what may be absent as None."""
    kind: Any = info.type
    optional = get_origin(kind) in (Union, UnionType) and set(get_args(kind)) <= {NoneType, *METAVARS}
    return _value(kind, "it") if optional or (isinstance(kind, type) and issubclass(kind, Choice)) else None


def _section(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Take a section of the configuration field by field; the whole of it comes with `--config`."""
    kind: Any = info.type
    if not (isinstance(kind, type) and issubclass(kind, Section)):
        return None
    default = info.default if isinstance(info.default, kind) else kind()
    fields = [
        StructFieldSpec(name, _flag(kind, name, hint), getattr(default, name), partial(_described, kind, name))
        for name, hint in hints(kind).items()
    ]
    if kind is not PipelineConfig:
        return StructConstructorSpec(kind, tuple(fields))
    files: Any = Files
    about = (
        f"YAML file of settings; later files win over earlier ones, flags over files. Without: {DEFAULT_CONFIG.name}."
    )
    return StructConstructorSpec(_configuration, (StructFieldSpec("config", files, (), about), *fields))


def _configuration(config: tuple[Path, ...], **values: Any) -> PipelineConfig:
    """Make the configuration; what its files say has come in as the defaults of the values."""
    return PipelineConfig(**values)


def _flag(kind: type[Section], name: str, hint: Any) -> Any:
    """The type that tyro sees of a field: switches and sections as they are, all others by the rules of the schema."""
    if is_dataclass(bare(hint)):
        return hint
    whole = f"{kind.SECTION}.{name}" if kind.SECTION else name
    names = tyro.conf.arg(aliases=(SHORT[whole],) if whole in SHORT else None)
    return Annotated[bool, names] if bare(hint) is bool else Annotated[object, _value(hint, whole), names]


def _value(hint: Any, name: str) -> PrimitiveConstructorSpec:
    """How words become a value of the schema: by `fit`, as those of a file do.

    Args:
        hint: the field's type, with its range.
        name: of the field, dotted, for errors.
    """
    parts = get_args(bare(hint)) if get_origin(bare(hint)) in (Union, UnionType) else (hint,)
    several = any(get_origin(bare(part)) is tuple for part in parts)
    given = Union[tuple(part for part in parts if part is not NoneType)]  # noqa: UP007

    def made(words: list[str]) -> Any:
        if NoneType in parts and words == ["None"]:
            return None
        plain = [Path(word) if Path in parts else Plain(word) for word in words]
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
    """What a flag takes, for its help: INT, PATH|None, {list,auto}, INT [INT ...]."""
    kind, origin = bare(hint), get_origin(bare(hint))
    if origin in (Union, UnionType):
        return "|".join(_metavar(part) for part in get_args(kind))
    if origin is tuple:
        one = _metavar(get_args(kind)[0])
        return f"{one} [{one} ...]"
    if isinstance(kind, type) and issubclass(kind, Choice):
        return f"{{{','.join(one.value for one in kind)}}}"
    return METAVARS[kind]


@lru_cache
def _descriptions(file: str) -> dict[tuple[str, str], str]:
    """Read the texts below the fields of the classes in a source file: (class, field) -> text, in one line."""
    found = {}
    classes = [node for node in ast.parse(Path(file).read_text("utf-8")).body if isinstance(node, ast.ClassDef)]
    for kind in classes:
        for field, text in pairwise(kind.body):
            said = text.value.value if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) else None
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(said, str):
                found[kind.name, field.target.id] = " ".join(said.split())
    return found


def _described(kind: type, name: str) -> str | None:
    """The text below a field; read when a help page shows it, from one parse of the file for all fields."""
    return _descriptions(str(sys.modules[kind.__module__].__file__)).get((kind.__name__, name))
