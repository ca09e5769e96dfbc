"""Holds the house to its plan by reading the source: who imports whom, how long, and who alone may do what.

Each rule is a function from a parsed room to its complaints, and is shown to fail on small bad examples.
To move a wall, change the table here and the tree in the README in the same commit.
"""

import ast
import re
import statistics
import subprocess
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The staircase, one step a line: a script at the top of the tree (no files), or a room and its files in their order. A
# file imports only from steps above its own line, and in its room only from files named before it. To add a file, name
# it here.
STAIRCASE = {
    "imagenet_classes": "",
    "mimu": "errors files config parent applying mask composing containers sealing",
    "core": "choices config observe hashes artifacts store records intervals yaml_files",
    "images": "specs decode archives names layouts pixel_cache index splits fetch",
    "graphs": "layout subsets edge_list message_passing",
    "training": "processes fork_server threads engines distributed resume optimisers",
    "models": "classifier checkpoints class_names preprocessing frameworks specs prefix targets foreign",
    "utils_data": "",
    "model": "",
    "trainer": "",
    "data": "",
    "erasing": "stages terms proxies guide descent head erasure teaching",
    "unlearn": "masks features requests objectives registry finetuning methods",
    "rivals": "closed_form trained subspaces representations compared",
    "measure": "attacks integrity metrics comparisons exhibits probes verdicts snapshots auto_kappa",
    "hidden": "outputs layers critics retraining heads positions normalisation words",
    "eval": "",
    "forgetting": "pictures samples answers scores artefact python opening comparison",
    "reporting": "write families tables sentences panels figures compare draw page",
    "release": "hub facts sheet pages paper files",
    "reporter": "",
    "stages": "setup limits crew classifier graphs gcn chain evaluation preflight",
    "pipeline": "",
    "planning": "extent units forecast asking library",
    "showing": "terminal standings leaderboard answers server",
    "commands": "command_line docs sweep run report inspect forget library masks",
    "main": "",
}
ROWS = [f"{step}.{file}" if file else step for step, files in STAIRCASE.items() for file in files.split() or [""]]
NINE = {step for step, files in STAIRCASE.items() if not files}
MOST_FILES, LEAST_FILES = 9, 3  # of a room

# Room -> who may enter it, beside its own files. A room that is not named is open to every step below it.
DOORS = {
    "images": {"utils_data", "stages", "commands", "models", "forgetting", "planning"},
    "reporting": {"reporter", "commands", "release", "showing", "planning"},
    "stages": {"pipeline", "planning"},
}
# A package that others install: it imports nothing of this project, and of libraries these alone. Its `__init__.py`
# names its public classes and functions, because `from mimu import Mask` is what its users write.
PACKAGE, PACKAGE_NEEDS = "mimu", {"torch", "safetensors"}
CORE_ALONE = ("core", "reporting")  # import from this project core alone, and no torch
WITHOUT_TORCH = (*CORE_ALONE, "reporter")

MAX_FILE_LINES = 280  # code lines: no docstrings, comments, imports or blanks, so that explaining costs nothing
MAX_FUNCTION_LINES = 45
MAX_MEDIAN_LINES = 10
DATA_ONLY = {"imagenet_classes"}
TORCH = ("torch", "torchvision", "torch_geometric")

# Dotted names -> the file (or files) that may use them, in any spelling (`import ... as`, `from ... import`).
ONLY = {
    ("os.environ", "os.environb", "os.getenv", "os.putenv", "sys.argv", "dotenv"): "main",
    (
        *("torch.manual_seed", "torch.seed", "torch.random.manual_seed", "torch.random.seed"),
        *("torch.cuda.manual_seed", "torch.cuda.manual_seed_all", "torch_geometric.seed_everything"),
        *("numpy.random.seed", "random.seed"),
    ): "stages.setup",
    ("torch.distributed",): "training.distributed",
    # What holds for the whole process: commands ask for it through `Pipeline.prepare_process`, no constructor does.
    ("training.processes.reuse_freed_memory", "training.distributed.make_repeatable"): "training.distributed",
    ("training.distributed.prepare_process",): "pipeline",
    ("matplotlib",): "reporting.draw release.paper",
    # One step of any of torch's own imports its compiler, which takes two seconds.
    ("torch.optim.Adam", "torch.optim.AdamW", "torch.optim.SGD"): "training.optimisers",
    # So that no p value or interval is computed over values that share a classifier: see `core.intervals.Cell`.
    ("scipy.stats", "statistics.stdev", "statistics.pstdev"): "core.intervals",
}
WRITER = "core.artifacts"
WRITERS_OF_FILES = {WRITER, "mimu.files"}  # the second because an installed package cannot import the first
# Calls that write a file; `open` and the methods of a path are told apart in `calls_that_write`.
WRITERS = {
    *("json.dump", "pickle.dump", "yaml.dump", "torch.save", "omegaconf.OmegaConf.save"),
    *("numpy.save", "numpy.savez", "numpy.savez_compressed", "numpy.savetxt"),
    *("numpy.memmap", "numpy.lib.format.open_memmap"),
    *("safetensors.torch.save_file", "safetensors.torch.save_model", "safetensors.numpy.save_file"),
}
# What runs code that it finds in a file, or hands a line to a shell. Records, masks and checkpoints come from others.
RUNS_WHAT_IT_READS = (
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "runpy", "code"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"),
    *("yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.UnsafeLoader", "yaml.Loader", "yaml.FullLoader"),
    *("yaml.full_load", "yaml.full_load_all", "torch.hub", "torch.jit.load", "torch.package", "pandas.read_pickle"),
)
RUN_BUILTINS = ("eval", "exec", "compile", "__import__")
ALLOWED_TO_RUN = {
    ("mimu.containers", "pickle"),  # the same name
    ("models.checkpoints", "pickle"),  # the name of the error that torch.load raises
    ("tests.models.test_checkpoints", "pickle"),  # makes a file that is refused
    ("tests.helpers.formats", "pickle"),  # writes CIFAR's files as their makers do
    ("tests.mimu.test_applying", "pickle"),  # a masked model, in whose bytes removed values are looked for
    ("tests.images.test_pixel_cache", "pickle"),  # what a worker process gets
    ("tests.test_utils_data", "pickle"),  # the oracle of the reader of those files, which needs no pickle
    ("tests.test_plugins", "pickle"),  # what a worker process gets
    ("training.engines", "__import__"),  # names of two engines, written beside it
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Node = TypeVar("Node", bound=ast.AST)


@dataclass(frozen=True)
class Room:
    """One source file: its module name and its text."""

    name: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def _by_kind(self) -> dict[type, list[Any]]:
        found: dict[type, list[Any]] = {}
        for node in ast.walk(self.tree):
            found.setdefault(type(node), []).append(node)
        return found

    def nodes(self, *kinds: type[Node]) -> list[Node]:
        """Nodes of these kinds at every depth: what a function imports counts as much as what the file imports."""
        return [node for kind in kinds for node in self._by_kind.get(kind, ())]

    @cached_property
    def bindings(self) -> list[tuple[int, str, str, str]]:
        """(line, local name, what it stands for, what is imported); `from a import b` imports a.b."""
        found = []
        for node in self.nodes(ast.Import):
            for item in node.names:
                local = item.asname or item.name.partition(".")[0]
                found.append((node.lineno, local, item.name if item.asname else local, item.name))
        for node in self.nodes(ast.ImportFrom):
            for item in node.names:
                name = f"{node.module}.{item.name}"
                found.append((node.lineno, item.asname or item.name, name, name))
        return found

    @cached_property
    def aliases(self) -> dict[str, str]:
        return {local: stands_for for _, local, stands_for, _ in self.bindings}

    def imports(self) -> Iterator[tuple[int, str]]:
        """(line, dotted name) of every import."""
        yield from ((line, name) for line, _, _, name in self.bindings)

    def dotted(self, node: ast.AST) -> str | None:
        """`np.random.seed` -> "numpy.random.seed"; None unless it starts at an imported name."""
        if isinstance(node, ast.Attribute):
            base = self.dotted(node.value)
            return base and f"{base}.{node.attr}"
        return self.aliases.get(node.id) if isinstance(node, ast.Name) else None

    def mentions(self) -> Iterator[tuple[int, str]]:
        """(line, dotted name) of every import and of every use of an imported name."""
        yield from self.imports()
        for node in self.nodes(ast.Attribute, ast.Name):
            if name := self.dotted(node):
                yield node.lineno, name

    @cached_property
    def code_lines(self) -> list[int]:
        """Numbers of the lines that hold code: no blanks, comments, imports or strings that stand alone."""
        aside = set()
        for node in self.nodes(ast.Expr, ast.Import, ast.ImportFrom):
            alone = node.value if isinstance(node, ast.Expr) else None
            is_text = isinstance(alone, ast.Constant) and isinstance(alone.value, str)
            if is_text or alone is None:
                aside |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        lines = enumerate(self.text.splitlines(), 1)
        return [n for n, line in lines if n not in aside and line.strip() and not line.strip().startswith("#")]

    def functions(self) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, int]]:
        """Every function and its length in code lines, decorators left out."""
        for node in self.nodes(*FUNCTIONS):
            last = node.end_lineno or node.lineno
            yield node, bisect_right(self.code_lines, last) - bisect_left(self.code_lines, node.lineno)


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def file_of(name: str) -> str | None:
    """The file of this project that an imported name is of; None: of a library."""
    return next((row for row in (*ROWS, "None") if within(name, row)), None)


def step_of(name: str) -> str:
    """The step of the staircase that an imported name is of: its room, or the script itself."""
    return name.partition(".")[0]


# --- rules for a room: each returns its complaints --------------------------------------------------------


def imports_run_downwards(room: Room) -> list[str]:
    above = ROWS[: ROWS.index(room.name)]
    return [
        f"line {line}: {room.name} imports {file}, which is not in a row above it"
        for line, name in room.imports()
        if (file := file_of(name)) and file not in above
    ]


def file_is_short(room: Room) -> list[str]:
    lines = len(room.code_lines)
    allowed = lines if room.name in DATA_ONLY else MAX_FILE_LINES
    return [f"{lines} code lines, {allowed} allowed: split it along its grain"] if lines > allowed else []


def functions_are_short(room: Room) -> list[str]:
    return [
        f"line {node.lineno}: {node.name} has {length} code lines, {MAX_FUNCTION_LINES} allowed"
        for node, length in room.functions()
        if length > MAX_FUNCTION_LINES
    ]


def keeps_to_its_own_things(room: Room) -> list[str]:
    return [
        f"line {line}: {name} belongs to {owners} alone"
        for line, name in room.mentions()
        for names, owners in ONLY.items()
        if room.name not in owners.split() and any(within(name, prefix) for prefix in names)
    ]


def mode_of(call: ast.Call) -> str:
    """The mode of an `open` call: second argument, or the first of a path's method; "?" if not literal."""
    named = [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    method = isinstance(call.func, ast.Attribute)
    candidates = named or (call.args[:2] if method else call.args[1:2])
    for node in candidates:
        if not isinstance(node, ast.Constant):
            if named or not method:
                return "?"
        elif re.fullmatch(r"[rwax][rwaxbt+|:gz*]*", str(node.value)):
            return str(node.value)
    return "r"


def calls_that_write(room: Room) -> Iterator[tuple[int, str]]:
    for node in room.nodes(ast.Call):
        name = room.dotted(node.func)
        method = getattr(node.func, "attr", "")
        of_a_path = method in ("write_text", "write_bytes") and name != f"{WRITER}.{method}"
        opens = "open" in (method, getattr(node.func, "id", ""))
        if name in WRITERS or of_a_path or (opens and set(mode_of(node)) & set("wax+?")):
            yield node.lineno, name or ast.unparse(node.func)


def leaves_writing_to_artifacts(room: Room) -> list[str]:
    if room.name in WRITERS_OF_FILES:
        return []
    return [f"line {line}: {name} writes, which {WRITER} is for" for line, name in calls_that_write(room)]


def enters_by_the_door(room: Room) -> list[str]:
    return [
        f"line {line}: {name} is entered by {' and '.join(sorted(DOORS[step]))} alone"
        for line, name in room.imports()
        if (step := step_of(name)) in DOORS and step_of(room.name) not in {step, *DOORS[step]}
    ]


def needs_core_alone(room: Room) -> list[str]:
    mine = step_of(room.name)
    return [
        f"line {line}: {name} in a room that needs core alone"
        for line, name in room.imports()
        if mine in CORE_ALONE and file_of(name) and step_of(name) not in ("core", mine)
    ]


def package_stands_alone(room: Room) -> list[str]:
    if step_of(room.name) != PACKAGE:
        return []
    allowed = {PACKAGE, *PACKAGE_NEEDS, *sys.stdlib_module_names}
    return [
        f"line {line}: {name} in a package that stands alone"
        for line, name in room.imports()
        if step_of(name) not in allowed
    ]


def needs_no_torch(room: Room) -> list[str]:
    if step_of(room.name) not in WITHOUT_TORCH:
        return []
    return [
        f"line {line}: {name} in a room without torch"
        for line, name in room.imports()
        if any(within(name, package) for package in TORCH)
    ]


def has_docstrings(room: Room) -> list[str]:
    named = (node for node in room.tree.body if isinstance(node, (*FUNCTIONS, ast.ClassDef)))
    public = (node for node in named if not node.name.startswith("_"))
    bare = [node for node in (room.tree, *public) if not ast.get_docstring(node)]
    return [f"{getattr(node, 'name', 'the module')} has no docstring" for node in bare]


# --- rules for every source file, tests included ----------------------------------------------------------


def never_imports_eval_whole(room: Room) -> list[str]:
    """`import eval` would hide the builtin: `from eval import ...` does not."""
    return [f"line {line}: import eval" for line, name in room.imports() if name == "eval"]


def has_no_wildcard_import(room: Room) -> list[str]:
    return [f"line {line}: {name}" for line, name in room.imports() if name.endswith(".*")]


def has_no_bare_except(room: Room) -> list[str]:
    return [f"line {node.lineno}: bare except" for node in room.nodes(ast.ExceptHandler) if node.type is None]


def loads_weights_only(room: Room) -> list[str]:
    keywords = (node for node in room.nodes(ast.keyword) if node.arg == "weights_only")
    return [
        f"line {node.value.lineno}: weights_only is not True"
        for node in keywords
        if not (isinstance(node.value, ast.Constant) and node.value.value is True)
    ]


def _unsafe_call(room: Room, call: ast.Call) -> str | None:
    """What about a call would run what it reads; None if nothing does."""
    name = room.dotted(call.func) or ""
    given = {word.arg: word.value for word in call.keywords}
    if any(word not in ("False", "None") for key in ("shell", "allow_pickle") for word in _words(given.get(key))):
        return "shell or allow_pickle is not False"
    if name == "torch.load" and "weights_only" not in given:
        return "torch.load without weights_only=True"
    if name in ("yaml.load", "yaml.load_all"):
        loaders = [room.dotted(node) for node in (*call.args[1:2], given.get("Loader")) if node is not None]
        return None if loaders in (["yaml.SafeLoader"], ["yaml.CSafeLoader"]) else f"{name} without SafeLoader"
    builtin = call.func.id if isinstance(call.func, ast.Name) and not name else ""
    return f"{builtin}(...)" if builtin in RUN_BUILTINS else None


def _words(node: ast.AST | None) -> list[str]:
    return [] if node is None else [ast.unparse(node)]


def spells_top_k_one_way(room: Room) -> list[str]:
    """`top_k` in code, as in records; `topK_list` in settings, `topK` in two methods that users call by that name."""
    if room.name == "pipeline":
        return []
    named = [(node.lineno, node.id) for node in room.nodes(ast.Name)]
    named += [(node.lineno, node.attr) for node in room.nodes(ast.Attribute)]
    named += [(node.lineno, node.arg or "") for node in room.nodes(ast.arg, ast.keyword)]
    return [f"line {line}: topK is spelled top_k" for line, name in named if name == "topK"]


def runs_nothing_that_it_reads(room: Room) -> list[str]:
    allowed = {what for name, what in ALLOWED_TO_RUN if name == room.name}
    found = [
        (line, name)
        for line, name in room.mentions()
        for prefix in RUNS_WHAT_IT_READS
        if within(name, prefix) and prefix not in allowed
    ]
    found += [(node.lineno, what) for node in room.nodes(ast.Call) if (what := _unsafe_call(room, node))]
    return [f"line {line}: {what}" for line, what in found if what.partition("(")[0] not in allowed]


# --- rules for the house ----------------------------------------------------------------------------------


def strangers(names: set[str]) -> set[str]:
    """Files that no row of the table speaks of."""
    return names - set(ROWS)


def missing(names: set[str]) -> set[str]:
    """Rows of the table without a file."""
    return set(ROWS) - names


def badly_filled(rooms: dict[str, int]) -> list[str]:
    """Rooms (name -> number of files) with too few or too many."""
    return [
        f"{room} has {files} files, {LEAST_FILES} to {MOST_FILES} are allowed"
        for room, files in rooms.items()
        if files > MOST_FILES or files < LEAST_FILES
    ]


def only_introduces(room: str, text: str) -> bool:
    """Whether a room's `__init__.py` is a docstring, and imports at most the room's own files that register.

    The installable package imports what its users call.
    """
    tree = ast.parse(text)
    rest = [node for node in tree.body[1:] if not isinstance(node, (ast.Assign, *FUNCTIONS))]
    froms = [node for node in rest if isinstance(node, ast.ImportFrom)]
    own = [node for node in froms if node.module == room or (room == PACKAGE and within(str(node.module), PACKAGE))]
    return bool(ast.get_docstring(tree)) and rest == own


def median_length(rooms: list[Room]) -> float:
    """The median over all functions of these rooms, in lines."""
    return statistics.median([length for room in rooms for _, length in room.functions()] or [0])


ROOM_RULES: list[Callable[[Room], list[str]]] = [
    imports_run_downwards,
    file_is_short,
    functions_are_short,
    keeps_to_its_own_things,
    leaves_writing_to_artifacts,
    enters_by_the_door,
    needs_core_alone,
    package_stands_alone,
    needs_no_torch,
    has_docstrings,
]
FILE_RULES: list[Callable[[Room], list[str]]] = [
    never_imports_eval_whole,
    has_no_wildcard_import,
    has_no_bare_except,
    loads_weights_only,
    runs_nothing_that_it_reads,
    spells_top_k_one_way,
]


# --- the house itself -------------------------------------------------------------------------------------

ROOMS = sorted(path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name not in ("benchmarks", "tests"))
FILES = [*sorted(ROOT.glob("*.py")), *(path for room in ROOMS for path in sorted(room.glob("[!_]*.py")))]
ALL_FILES = [*FILES, *sorted(ROOT.glob("tests/**/*.py")), *sorted(ROOT.glob("benchmarks/**/*.py"))]


def name_of(path: Path) -> str:
    """A file as it is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


KNOWN = [path for path in FILES if name_of(path) in ROWS]


@cache
def read(path: Path) -> Room:
    return Room(name_of(path), path.read_text(encoding="utf-8"))


def test_every_room_exists() -> None:
    assert not missing({name_of(path) for path in FILES})


def test_every_file_is_a_room() -> None:
    assert not strangers({name_of(path) for path in FILES})


def test_the_top_holds_the_nine_scripts() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == NINE
    assert len(NINE) == 9


def test_rooms_are_neither_drawers_nor_attics() -> None:
    assert badly_filled({room.name: len(list(room.glob("[!_]*.py"))) for room in ROOMS}) == []


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_room_says_what_it_is_for(room: Path) -> None:
    """Its `__init__.py` is a docstring, and at most the list of the files that register something: no re-exports."""
    assert only_introduces(room.name, (room / "__init__.py").read_text(encoding="utf-8"))


def test_most_functions_are_short() -> None:
    assert median_length([read(path) for path in KNOWN]) <= MAX_MEDIAN_LINES


def complaints(rule: Callable[[Room], list[str]], paths: list[Path]) -> dict[str, list[str]]:
    """What a rule says of files, by name; of those that it says nothing of, nothing."""
    return {name_of(path): found for path in paths if (found := rule(read(path)))}


# A test for each rule, not for each rule and file: two thousand tests of a millisecond took ten seconds to administer.
@pytest.mark.parametrize("rule", ROOM_RULES, ids=lambda rule: rule.__name__)
def test_room(rule: Callable[[Room], list[str]]) -> None:
    assert complaints(rule, KNOWN) == {}


@pytest.mark.parametrize("rule", FILE_RULES, ids=lambda rule: rule.__name__)
def test_file(rule: Callable[[Room], list[str]]) -> None:
    assert complaints(rule, ALL_FILES) == {}


@pytest.mark.slow
@pytest.mark.parametrize("step", WITHOUT_TORCH)
def test_importing_leaves_torch_out(step: str) -> None:
    """What a file imports may import torch in its turn, which no reading of one file shows."""
    files = ", ".join(name for name in ROWS if step_of(name) == step)
    code = f"import sys, {files}; print(set({TORCH!r}) & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("set()\n", "")


@pytest.mark.slow
def test_importing_the_package_loads_nothing_of_the_project() -> None:
    steps = sorted({step_of(name) for name in ROWS})
    code = f"import sys, {PACKAGE}; print(sorted(set({steps!r}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == (f"['{PACKAGE}']\n", "")


# --- every rule can fail ----------------------------------------------------------------------------------

LONG = "def f():\n    '''Long.'''\n" + "    x = 1\n" * MAX_FUNCTION_LINES
BAD = [
    (imports_run_downwards, "model", "def f():\n    from data import GraphDataset"),
    (imports_run_downwards, "eval", "from eval import Eval"),
    (imports_run_downwards, "eval", "from . import config"),
    (file_is_short, "model", "x = 1\n" * (MAX_FILE_LINES + 1)),
    (functions_are_short, "model", LONG),
    (functions_are_short, "model", "class A:\n" + "".join(f"    {line}\n" for line in LONG.splitlines())),
    (keeps_to_its_own_things, "core.artifacts", "import os\nos.environ.setdefault('A', 'b')"),
    (keeps_to_its_own_things, "core.artifacts", "from os import environ as e\ne['A']"),
    (keeps_to_its_own_things, "core.config", "import sys\nsys.argv[1:]"),
    (keeps_to_its_own_things, "pipeline", "from dotenv import load_dotenv"),
    (keeps_to_its_own_things, "trainer", "import torch\ntorch.manual_seed(0)"),
    (keeps_to_its_own_things, "trainer", "from torch import manual_seed"),
    (keeps_to_its_own_things, "data", "import numpy as np\ndef f():\n    np.random.seed(0)"),
    (keeps_to_its_own_things, "trainer", "import torch.distributed as dist"),
    (keeps_to_its_own_things, "stages.setup", "from training.processes import reuse_freed_memory"),
    (keeps_to_its_own_things, "commands.run", "def f():\n    from training.distributed import prepare_process"),
    (keeps_to_its_own_things, "pipeline", "from torch import distributed"),
    (keeps_to_its_own_things, "core.artifacts", "import torch\ntorch.distributed.get_rank()"),
    (keeps_to_its_own_things, "eval", "def f():\n    import matplotlib.pyplot as plt"),
    (keeps_to_its_own_things, "reporting.tables", "def f():\n    from scipy.stats import ttest_rel"),
    (leaves_writing_to_artifacts, "eval", "open('a', 'w')"),
    (leaves_writing_to_artifacts, "eval", "open('a', mode)"),
    (leaves_writing_to_artifacts, "eval", "path.open('r+')"),
    (leaves_writing_to_artifacts, "eval", "import tarfile\ntarfile.open(path, 'w:gz')"),
    (leaves_writing_to_artifacts, "reporter", "path.with_name('b').write_bytes(b'a')"),
    (leaves_writing_to_artifacts, "reporter", "import json\njson.dump({}, file)"),
    (leaves_writing_to_artifacts, "data", "from numpy.lib.format import open_memmap\nopen_memmap(path)"),
    (leaves_writing_to_artifacts, "model", "import torch\ntorch.save({}, path)"),
    (leaves_writing_to_artifacts, "model", "from safetensors.torch import save_file as s\ns({}, path)"),
    (enters_by_the_door, "trainer", "from images.decode import How"),
    (enters_by_the_door, "pipeline", "def f():\n    from reporting.draw import draw"),
    (enters_by_the_door, "reporter", "import stages.chain as c"),
    (needs_core_alone, "reporting.page", "from eval import Eval"),
    (needs_core_alone, "core.records", "def f():\n    import model"),
    (package_stands_alone, "mimu.parent", "from core.config import UserError"),
    (package_stands_alone, "mimu.parent", "def f():\n    import numpy as np"),
    (needs_no_torch, "core.artifacts", "def f():\n    from torch.nn import Module"),
    (needs_no_torch, "reporter", "import torchvision.transforms as t"),
    (has_docstrings, "model", "x = 1"),
    (has_docstrings, "model", "'''Model.'''\ndef f(): ..."),
    (has_docstrings, "model", "'''Model.'''\nclass A: ..."),
    (never_imports_eval_whole, "main", "def f():\n    import os, eval as e"),
    (has_no_wildcard_import, "main", "from core.config import *"),
    (has_no_bare_except, "main", "try:\n    pass\nexcept:\n    pass"),
    (loads_weights_only, "model", "load(path, weights_only=False)"),
    (loads_weights_only, "model", "load(path, weights_only=flag)"),
    (runs_nothing_that_it_reads, "model", "import pickle"),
    (runs_nothing_that_it_reads, "model", "def f():\n    from pickle import loads as l"),
    (runs_nothing_that_it_reads, "tests.test_model", "import joblib as j"),
    (runs_nothing_that_it_reads, "model", "eval(text)"),
    (runs_nothing_that_it_reads, "model", "exec(compile(text, 'a', 'exec'))"),
    (runs_nothing_that_it_reads, "main", "import os\nos.system('ls')"),
    (runs_nothing_that_it_reads, "main", "from os import popen"),
    (runs_nothing_that_it_reads, "main", "import subprocess\nsubprocess.run('ls', shell=True)"),
    (runs_nothing_that_it_reads, "main", "import subprocess\nsubprocess.run('ls', shell=flag)"),
    (runs_nothing_that_it_reads, "main", "import subprocess\nsubprocess.getoutput('ls')"),
    (runs_nothing_that_it_reads, "core.config", "import yaml\nyaml.load(text)"),
    (runs_nothing_that_it_reads, "core.config", "import yaml\nyaml.load(text, yaml.Loader)"),
    (runs_nothing_that_it_reads, "core.config", "import yaml\nyaml.load(text, Loader=yaml.FullLoader)"),
    (runs_nothing_that_it_reads, "core.config", "from yaml import unsafe_load"),
    (runs_nothing_that_it_reads, "model", "import torch\ntorch.load(path)"),
    (runs_nothing_that_it_reads, "model", "from torch import load\nload(path, 'cpu')"),
    (runs_nothing_that_it_reads, "core.artifacts", "import numpy as np\nnp.load(path, allow_pickle=True)"),
    (runs_nothing_that_it_reads, "core.artifacts", "__import__(name)"),
    (spells_top_k_one_way, "eval", "def f(topK): ..."),
    (spells_top_k_one_way, "eval", "point.topK"),
    (spells_top_k_one_way, "tests.test_eval", "Point(topK=1)"),
]
GOOD = [
    (enters_by_the_door, "stages.preflight", "from images.specs import SPECS\nfrom stages.given import check_paths"),
    (enters_by_the_door, "eval", "from measure.metrics import METRICS"),
    (needs_core_alone, "reporting.page", "from core.config import plain\nfrom reporting.write import as_text"),
    (needs_core_alone, "eval", "import model"),
    (package_stands_alone, "mimu.mask", "import json\nimport torch\nfrom mimu.errors import MaskError"),
    (package_stands_alone, "model", "import numpy"),
    (imports_run_downwards, "core.artifacts", "import json\nfrom core.config import PROJECT_ROOT"),
    (imports_run_downwards, "pipeline", "def f():\n    from eval import Eval"),
    (file_is_short, "imagenet_classes", "x = 1\n" * (MAX_FILE_LINES + 1)),
    (file_is_short, "model", "x = 1\n" * MAX_FILE_LINES + "import os\n'''A.\n\n'''\n# b\n\n" * 50),
    (functions_are_short, "model", LONG.removesuffix("    x = 1\n")),
    (keeps_to_its_own_things, "main", "import os\nfrom dotenv import load_dotenv\nos.environ['A']"),
    (keeps_to_its_own_things, "stages.setup", "import torch\ntorch.manual_seed(0)"),
    (keeps_to_its_own_things, "data", "import torch\ntorch.Generator().manual_seed(0)"),
    (keeps_to_its_own_things, "data", "import numpy as np\nnp.random.default_rng(0)"),
    (keeps_to_its_own_things, "data", "import os\nimport sys\nos.replace(a, b)\nsys.exit(1)"),
    (leaves_writing_to_artifacts, "utils_data", "open('a')\nopen('a', 'rb')\npath.open()\npath.open('rb')"),
    (leaves_writing_to_artifacts, "utils_data", "from PIL import Image\nImage.open(path)"),
    (leaves_writing_to_artifacts, "eval", "from core.artifacts import write_text\nwrite_text(path, 'a')"),
    (leaves_writing_to_artifacts, "eval", "import json\njson.dumps({})\nmask.save(path)"),
    (has_docstrings, "model", "'''Model.'''\ndef _f(): ...\nclass A:\n    '''A.'''\n    def f(self): ..."),
    (never_imports_eval_whole, "main", "from eval import Eval\nimport evaluate\nmodel.eval()"),
    (loads_weights_only, "model", "load(path, weights_only=True)"),
    (runs_nothing_that_it_reads, "model", "import torch\ntorch.load(path, weights_only=True)\nmodel.eval()"),
    (runs_nothing_that_it_reads, "core.config", "import yaml\nyaml.safe_load(a)\nyaml.load(a, Loader=yaml.SafeLoader)"),
    (runs_nothing_that_it_reads, "core.artifacts", "import numpy as np\nnp.load(path, allow_pickle=False)"),
    (runs_nothing_that_it_reads, "main", "import re\nimport subprocess\nre.compile('a')\nsubprocess.run(['ls'])"),
    (runs_nothing_that_it_reads, "main", "from eval import Eval\nself.eval(1)\nhtml.compile(text)"),
    (runs_nothing_that_it_reads, "tests.helpers.formats", "import pickle\npickle.dumps(1)"),
    (spells_top_k_one_way, "eval", "config.topK_list\nfacts['topK']"),
    (spells_top_k_one_way, "pipeline", "def run_gcn_training(topK): ..."),
]


@pytest.mark.parametrize(("rule", "name", "text"), BAD)
def test_rule_can_fail(rule: Callable[[Room], list[str]], name: str, text: str) -> None:
    assert rule(Room(name, text))


@pytest.mark.parametrize(("rule", "name", "text"), GOOD)
def test_rule_lets_good_code_pass(rule: Callable[[Room], list[str]], name: str, text: str) -> None:
    assert rule(Room(name, text)) == []


def test_every_rule_has_a_bad_example() -> None:
    assert {rule for rule, _, _ in BAD} == {*ROOM_RULES, *FILE_RULES}


def test_house_rules_can_fail() -> None:
    assert list(complaints(has_docstrings, KNOWN[:2])) == []
    assert list(complaints(lambda room: [room.name], KNOWN[:2])) == [name_of(path) for path in KNOWN[:2]]
    assert strangers({"core.config", "utils"}) == {"utils"}
    assert missing(set(ROWS) - {"eval"}) == {"eval"}
    assert badly_filled({"core": 9, "graphs": 3}) == []
    assert len(badly_filled({"core": 10, "images": 2, "models": 1})) == 3
    assert only_introduces("measure", "'Text.'\nREGISTER = ('a', 'b')")
    assert not only_introduces("measure", "'Text.'\nfrom core.config import plain")
    assert not only_introduces("measure", "REGISTER = ('a', 'b')")
    assert not only_introduces("measure", "'Text.'\nfrom measure.metrics import metric")
    assert only_introduces(PACKAGE, "'Text.'\nfrom mimu.mask import Mask\n__all__ = ['Mask']")
    assert median_length([Room("model", LONG)]) > MAX_MEDIAN_LINES
