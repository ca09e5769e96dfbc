"""How words become parameters: special parameters, files that repeat, switches, help pages and what they load."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, get_type_hints

import pytest
import tyro

import main
from commands.command_line import SHORT, Environment, Files, Group, Settings, _described, call
from core.choices import Choice, bare, hints
from core.config import PROJECT_ROOT, PipelineConfig, UserError

HERE = Environment(lambda folder: folder / "curves")
HEAVY = ("torch", "torchvision", "torch_geometric", "numpy", "pyarrow", "PIL", "matplotlib", "sklearn", "trackio")
INTERNAL = ("UseAppendAction", "FlagCreatePairsOff", "tyro", "{fixed}", "{None}", "Annotated", "STR", "dataclass")
PAGES = """
import contextlib, io, json, sys, main
shown = io.StringIO()
with contextlib.redirect_stdout(shown):
    try:
        code = main.main(sys.argv[1:])
    except SystemExit as stop:
        code = stop.code
print(json.dumps([code, shown.getvalue(), sorted(sys.modules)]))
"""


def answer(command, *words: str, here: Environment = HERE) -> list:
    """The parameters that a command gets."""
    got: list = []
    assert call(command(got), list(words), "probe", here) == 0
    return got


@pytest.mark.parametrize("name", ["", *main.COMMANDS])
def test_a_help_page_loads_nothing_heavy_and_names_nothing_of_tyro(name):
    words = [name, "--help"] if name else ["--help"]
    done = subprocess.run(
        [sys.executable, "-c", PAGES, *words], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True
    )
    code, text, loaded = json.loads(done.stdout)
    assert code == 0
    assert [package for package in (*HEAVY, "typeguard") if package in loaded] == []
    assert [word for word in INTERNAL if word in text] == []
    assert f"usage: main.py {name or 'run'}" in text


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_flag_of_a_command_says_what_it_is(name):
    """Parameters of commands; fields of the configuration are described where they stand."""
    command = main.COMMANDS[name]
    described = (command.__doc__ or "").partition("Args:")[2]
    kinds = {one: bare(hint) for one, hint in get_type_hints(command, include_extras=True).items()}
    groups = {one: kind for one, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Group)}
    assert [field for kind in groups.values() for field in hints(kind) if not _described(kind, field)] == []
    apart = {"here", "rest", "settings", "reporter", "return", *groups}
    own = [one for one in command.__annotations__ if one not in apart]
    assert [one for one in own if f"{one}:" not in described] == []
    first = (command.__doc__ or "").partition("\n")[0]
    assert first.endswith(".")
    assert len(f"    uv run main.py {name:<10} {first}") <= 120


def test_every_short_form_is_that_of_a_field():
    for field in SHORT:
        value: object = PipelineConfig()
        for part in field.split("."):
            value = getattr(value, part)


class Colour(Choice):
    """A choice of these tests."""

    red = "red"
    dark_blue = "dark_blue"


def probe(got: list):
    def command(
        here: Environment,
        place: Annotated[Colour, tyro.conf.Positional],
        paths: Files = (),
        limit: int | None = None,
        words: tuple[str, ...] = ("x",),
        loud: bool = False,
        rest: tuple[str, ...] = (),
    ) -> None:
        got.extend([here.curves(Path("a")), place, paths, limit, words, loud, rest])

    return command


def test_parameters_get_their_types():
    curves = Path("a/curves")
    assert answer(probe, "RED") == [curves, Colour.red, (), None, ("x",), False, ()]
    words = ["Dark_Blue", "--paths", "a", "--limit=3", "--paths=b c", "--words", "1", "none", "--loud"]
    assert answer(probe, *words) == [curves, Colour.dark_blue, (Path("a"), Path("b c")), 3, ("1", "none"), True, ()]
    words = ["red", "--limit", "None", "--loud=no", "--unknown", "7"]
    assert answer(probe, *words) == [curves, Colour.red, (), None, ("x",), False, ("--unknown", "7")]


def configured(got: list):
    def command(settings: Settings, quiet: bool = False) -> None:
        got.extend([settings, quiet])

    return command


def test_a_home_folder_is_none_only_if_it_says_so(monkeypatch, tmp_path):
    """`~` is no value in YAML, and the home folder on a command line."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for word, expected in (("~", tmp_path), ("~/a", tmp_path / "a"), ("None", None), ("none", Path("none"))):
        assert answer(configured, f"--gcn-path={word}")[0].gcn_path == expected


@pytest.mark.parametrize("words", [["--config"], ["--config", "--seed", "3"], ["--seed", "3", "--config"]])
def test_a_config_flag_without_a_file_is_one_sentence(words):
    with pytest.raises(UserError, match="--config names no file: give one"):
        answer(configured, *words)


def test_a_flag_that_tyro_refuses_ends_with_2(capsys):
    for words in (["--sed", "3"], ["--seed"], ["--seed", "many"], ["stray"]):
        with pytest.raises(SystemExit) as ended:
            answer(configured, *words)
        assert ended.value.code == 2
        assert words[0] in capsys.readouterr().err


def test_an_exit_code_is_passed_on():
    assert call(lambda: 7, [], "probe", HERE) == 7
