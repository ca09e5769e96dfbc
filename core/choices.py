"""The choices of a run, closed ones and open ones, and the errors that are said in one sentence. No torch here.

A closed choice is an enum. An open choice is a name under which something is registered: a dataset, a classifier, a set
of node features; a plugin (`core.hashes.load_plugins`) registers more.
"""

import importlib
import json
import math
import numbers
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum, StrEnum
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Generic, Self, TypeVar, Union, get_args, get_origin, get_type_hints


class UserError(ValueError):
    """Something the user can put right. Its text is one sentence: found, needed, what to do. Exit code 2."""


class MachineError(RuntimeError):
    """A failure of the machine, such as a full disk. Its text is one sentence: what failed, why, what to do. Exit 1."""


class Diverged(UserError):
    """A training whose loss or weights are no longer finite, with these settings."""


class NoHomeError(UserError):
    """The home folder is needed, and nobody knows it."""


def at_home(path: Path) -> Path:
    """A path with a leading `~` replaced by the home folder.

    Raises:
        NoHomeError: there is no home folder to be found.
    """
    try:
        return path.expanduser()
    except RuntimeError:
        raise NoHomeError(
            f"{path} needs the home folder, of which neither HOME nor the password file knows: set HOME, or give a "
            "path without ~"
        ) from None


class Choice(StrEnum):
    """A closed choice whose NAME equals its VALUE, so that YAML, flags, file names and README agree."""


class SFTModes(Choice):
    """What the supervised fine-tuning baseline trains the target layer on."""

    Randomize_Forget = "Randomize_Forget"
    Finetune_Retain = "Finetune_Retain"
    Randomize_Forget_Finetune_Retain = "Randomize_Forget_Finetune_Retain"


class GCNPriorDistribution(Choice):
    """Prior p over the weights in the ELBO's KL term: proportional to |W|, |g|, |W g|, or flat."""

    WEIGHT = "WEIGHT"
    GRADIENT = "GRADIENT"
    SALIENCY = "SALIENCY"
    UNIFORM = "UNIFORM"


class TopKSamplers(Choice):
    """Relaxed k-subset samplers (gumbel arXiv:1903.06059, sinkhorn arXiv:2002.06504)."""

    sinkhorn = "sinkhorn"
    threshold = "threshold"
    gumbel = "gumbel"


class MaskStrategies(Choice):
    """How theta becomes one unlearning mask.

    direct: the answer to the request itself. The others weigh the theta of every class.
    """

    direct = "direct"
    feasibility = "feasibility"
    set_difference = "set_difference"


class Objectives(Choice):
    """What the GCN is trained for: to forget on request, or to find each class's mask prior."""

    unlearning = "unlearning"
    elbo = "elbo"


class ForgetLosses(Choice):
    """What is asked of the samples to forget.

    margin: that another class leads. match: the classifier's own probabilities without the classes to forget,
    renormalised, which is what retraining comes close to. both: the margin and a tenth of the match.
    """

    margin = "margin"
    match = "match"
    both = "both"


class KappaModes(Choice):
    """Which kappas are run: those of `kappa_list`, or the smallest that meets the target of `auto`."""

    list = "list"
    auto = "auto"


class Starts(Choice):
    """What refinement starts from.

    taylor: ranks of the signed Taylor score. taylor_tail: -log of the share of weights that score higher; only the
    first few times kappa of them are refined, for layers of millions of weights.
    """

    gcn = "gcn"
    taylor = "taylor"
    taylor_tail = "taylor_tail"
    noise = "noise"


class Importances(Choice):
    """What `feasibility` ranks: the GCN's logits, or the mask prior q = softmax(theta)."""

    theta = "theta"
    q = "q"


class Aggregations(Choice):
    """How a node of the graph sums up its neighbours."""

    mean = "mean"
    gcn = "gcn"


class Activations(Choice):
    """Non-linearity of a round of message passing."""

    sigmoid = "sigmoid"
    relu = "relu"


class Trackers(Choice):
    """Where training curves go besides the JSON history that every stage writes."""

    trackio = "trackio"
    none = "none"


# --- open choices: names under which something is registered ----------------------------------------------------------

NAME = r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,79}"
"""What a registered name looks like: it becomes part of records and of paths."""


class Names(type):
    """The class of an open choice: its names are looked up, counted and listed as those of an enum are."""

    _known: dict[str, Any]

    def __getitem__(cls, name: str) -> Any:
        """The choice of this name. Raises KeyError: there is none."""
        return cls._known[name]

    def __getattr__(cls, name: str) -> Any:
        """The same as an attribute, for names that no text has as a method. Raises AttributeError: there is none."""
        try:
            return vars(cls)["_known"][name]
        except KeyError:
            raise AttributeError(f"{cls.__name__} has no {name}") from None

    def __iter__(cls) -> Iterator[Any]:
        return iter(list(cls._known.values()))

    def __len__(cls) -> int:
        return len(cls._known)


class OpenChoice(str, metaclass=Names):
    """A name under which something is registered. NAME equals VALUE, and there is one object for each name.

    The names that the source of one file registers are built in: they are read from its text, so that settings are
    checked, and `--help` lists them, without importing torch. `Registry.add` makes others known.

    Raises:
        ValueError: nothing is registered under the name.
    """

    __slots__ = ()
    built_in: ClassVar[tuple[str, ...]]
    """The names that the project registers, in order."""
    registered_in: ClassVar[str]
    """The module whose import registers what belongs to the project."""
    _known: ClassVar[dict[str, Any]]
    _made: ClassVar[dict[str, Any]]

    def __init_subclass__(cls, registered_in: str, how: str) -> None:
        """Read the built-in names.

        Args:
            registered_in: the module that registers them. how: what stands before a name there, as a pattern that
                begins with a line.
        """
        cls.registered_in, cls._known, cls._made = registered_in, {}, {}
        source = Path(__file__).resolve().parents[1] / f"{registered_in.replace('.', '/')}.py"
        cls.built_in = tuple(re.findall(rf"^{how}({NAME})", source.read_text(encoding="utf-8"), re.MULTILINE))
        for name in cls.built_in:
            cls.known(name)

    def __new__(cls, name: str) -> Self:
        if name not in cls._known:
            raise ValueError(f"{name!r} is not a valid {cls.__name__}")
        return cls._known[name]

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process reads a configuration before it loads the plugin that registers the name.
        return _unpickled, (type(self), str(self))

    def __deepcopy__(self, _: object) -> Self:
        return self

    @classmethod
    def one(cls, name: str) -> Self:
        """The object of a name, whether or not anything is registered under it."""
        return cls._made.setdefault(name, str.__new__(cls, name))

    @classmethod
    def known(cls, name: str) -> Self:
        """The object of a name that is known from now on."""
        return cls._known.setdefault(name, cls.one(name))

    @classmethod
    def forget(cls, name: str) -> None:
        """Know a name no longer."""
        cls._known.pop(name, None)

    @classmethod
    def found(cls, name: str) -> Self | None:
        """The known choice of a name in any case, None if there is none."""
        matching = [one for known, one in cls._known.items() if known.lower() == name.lower()]
        return matching[0] if matching else None

    @property
    def value(self) -> str:
        """The name as a plain text."""
        return str(self)

    name = value


def _unpickled(kind: type[OpenChoice], name: str) -> OpenChoice:
    return kind.one(name)


class SupportedVisionModels(OpenChoice, registered_in="model", how=r"@vision_model\nclass "):
    """Classifier architectures; `model.vision_model` registers one."""


class SupportedDatasets(OpenChoice, registered_in="images.specs", how=r'dataset\(\s*"'):
    """Image datasets; `images.specs.dataset` registers one. FOLDER is any tree of class folders with images."""


class FeatureSets(OpenChoice, registered_in="unlearn.features", how=r'@feature_set\(\s*"'):
    """Node features of the unlearning objective; `unlearn.features.feature_set` registers a set.

    basic: h, z, W, g. contrast: besides, the forgotten classes against the retained. taylor: besides, signed
    first-order importances.
    """


# --- registries -------------------------------------------------------------------------------------------

Entry = TypeVar("Entry")
PLUGIN = "plugin_"
"""What the names of plugins begin with as modules."""
ENTERED: list[tuple["Registry", str]] = []
"""Everything that was registered in this process, in order."""


class NotRegistered(ValueError):
    """A name that is taken, or that nothing can be registered under."""


class Registry(dict[str, Entry], Generic[Entry]):
    """What is registered of one kind, by name: methods, metrics, datasets, classifiers, node features or figures.

    Args:
        kind: what one entry is called in error messages.
        names: the open choice that the names belong to, if settings name an entry.
        reserved: names that mean something else.
        home: the module that imports all files of the project that register, where the registry's own does not.

    Attributes:
        modules: name -> the module that registered it.
    """

    def __init__(self, kind: str, names: type[OpenChoice] | None = None, reserved: Sequence[str] = (), home: str = ""):
        super().__init__()
        self.kind, self.names, self.reserved, self.home = kind, names, tuple(reserved), home
        self.modules: dict[str, str] = {}

    def add(self, name: str, entry: Entry, module: str) -> None:
        """Keep an entry under a free name.

        Args:
            module: the module that registers it.

        Raises:
            NotRegistered: the name is taken, reserved, or no name.
        """
        if self.home and module.startswith(PLUGIN):
            importlib.import_module(self.home)  # a plugin may be the first to import the registry
        if taken := next((known for known in self if known.lower() == name.lower()), None):
            other = f"{self.modules[taken]} registers one"
            raise NotRegistered(f"{module} registers a second {self.kind} {name!r}, {other}: choose another name")
        if name in self.reserved:
            raise NotRegistered(
                f"{module} registers a {self.kind} {name!r}, which means something else: choose another name"
            )
        if not re.fullmatch(NAME, name):
            raise NotRegistered(
                f"{module} registers a {self.kind} {name!r}: a name has letters, digits and _ . @ - alone"
            )
        self[name], self.modules[name] = entry, module
        if self.names:
            self.names.known(name)
        ENTERED.append((self, name))

    def remove(self, name: str) -> None:
        """Take an entry out, with its name."""
        del self[name]
        if self.names and name not in self.names.built_in:
            self.names.forget(name)


# --- a value of a configuration -> its field's type, whoever wrote it: YAML, a sweep, a flag or Python ----------------

WHOLE = re.compile(r"[-+]?[0-9]{1,40}")
TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NOTHING = ("none", "null", "~")
LONGEST_SHOWN = 60


class Plain(str):
    """A word of a YAML file without quotes: the field's type says whether it is a number, a switch or a text."""

    __slots__ = ()


@dataclass(frozen=True)
class Within:
    """The range of a number; both ends belong to it unless `above` leaves out the lower one."""

    least: float
    most: float
    above: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number lies in the range; not-a-number never does."""
        return self.least <= value <= self.most and not (self.above and value == self.least)

    def __str__(self) -> str:
        return f"{'above' if self.above else 'from'} {self.least} to {self.most}"


class Section:
    """A part of the schema whose fields are brought to their types, and checked, as soon as it is made."""

    SECTION: ClassVar[str] = ""
    """Its name in files and flags; empty for the whole."""

    def __post_init__(self) -> None:
        prefix = f"{self.SECTION}." if self.SECTION else ""
        for name, hint in hints(type(self)).items():
            object.__setattr__(self, name, fit(getattr(self, name), hint, prefix + name))
        self.check()

    def check(self) -> None:
        """Raise `UserError` where fields do not go together."""


@lru_cache
def hints(kind: Any) -> dict[str, Any]:
    """The fields of a dataclass and their types, ranges included."""
    types = get_type_hints(kind, include_extras=True)
    return {item.name: types[item.name] for item in fields(kind)}


def bare(hint: Any) -> Any:
    """A type without its range."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def shown(value: object) -> str:
    """A value for people, short."""
    if isinstance(value, Plain) or (isinstance(value, numbers.Number) and not isinstance(value, bool)):
        text = str(value)
    else:
        text = json.dumps(value, ensure_ascii=False, default=str).replace('"', "'")
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """`: did you mean 'steps'?`, or the choices where none is near."""
    near = get_close_matches(word.replace("-", "_"), known, 1) or get_close_matches(word.upper(), known, 1)
    return f": did you mean {near[0]!r}?" if near else f": choose from {', '.join(known)}"


def needed(hint: Any) -> str:
    """What a field of this type takes, as the end of a sentence."""
    kind, origin = bare(hint), get_origin(bare(hint))
    limits = next((f" {item}" for item in get_args(hint)[1:] if isinstance(item, Within)), "")
    if origin in (Union, UnionType):
        return " or ".join("null" if part is NoneType else needed(part) for part in get_args(kind))
    if origin is tuple:
        return f"{needed(get_args(kind)[0])}, or several in brackets: [a, b]"
    if isinstance(kind, type) and issubclass(kind, Enum | OpenChoice):
        return f"one of {', '.join(one.value for one in kind)}"
    words = {bool: "true or false", int: f"a whole number{limits}", float: f"a number{limits}", str: "a text"}
    return words.get(kind, "a path in quotes" if kind is Path else "its fields, e.g. {name: value}")


def fit(value: Any, hint: Any, name: str) -> Any:
    """The value in its field's type.

    Raises:
        UserError: it is of another kind, or out of the range that the type states.
    """
    kind, origin = bare(hint), get_origin(bare(hint))
    if origin in (Union, UnionType):
        return _one_of(value, kind, name)
    if origin is tuple:
        return _several(value, hint, name)
    if is_dataclass(kind) and isinstance(value, kind):
        return value
    found = _converted(value, kind)
    limits = [item for item in get_args(hint)[1:] if isinstance(item, Within)]
    finite = not isinstance(found, float) or math.isfinite(found)
    if found is None or not finite or not all(item.holds(found) for item in limits):
        raise UserError(f"{name} is {shown(value)}: give {needed(hint)}")
    return found


def _one_of(value: Any, union: Any, name: str) -> Any:
    """The value in the first type of a union that takes it."""
    kinds = get_args(union)
    if NoneType in kinds and (value is None or (isinstance(value, str) and value.lower() in NOTHING)):
        return None
    for kind in kinds:
        if kind is NoneType:
            continue
        try:
            return fit(value, kind, name)
        except NoHomeError:
            raise
        except UserError:
            pass
    raise UserError(f"{name} is {shown(value)}: give {needed(union)}")


def _several(value: Any, hint: Any, name: str) -> tuple:
    """A tuple; one value may stand without brackets."""
    kind = get_args(bare(hint))[0]
    one = isinstance(value, str | Enum | numbers.Number | Path)
    if not one and not (isinstance(value, Sequence) and not isinstance(value, bytes)):
        raise UserError(f"{name} is {shown(value)}: give {needed(hint)}")
    return tuple(fit(item, kind, name) for item in ([value] if one else value))


def _converted(value: Any, kind: Any) -> Any:
    """The value as this type, None where it is of another kind."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        named = value.value if isinstance(value, kind) else value
        found = [one for one in kind if isinstance(named, str) and one.value.lower() == named.lower()]
        return found[0] if found else None
    if isinstance(kind, type) and issubclass(kind, OpenChoice):
        return value if isinstance(value, kind) else _open(value, kind)
    if kind is bool:
        return value if isinstance(value, bool) else TRUTH.get(value.lower()) if isinstance(value, str) else None
    if isinstance(value, bool):
        return None
    if kind is int:
        whole = isinstance(value, numbers.Integral) or (isinstance(value, str) and WHOLE.fullmatch(value))
        return int(value) if whole else None
    if kind is float:
        return _number(value)
    if kind is str:
        return str(value) if isinstance(value, str) and not isinstance(value, Enum | OpenChoice) else None
    if kind is Path:
        usable = isinstance(value, str | Path) and str(value) and "\0" not in str(value)
        return at_home(Path(value)) if usable else None
    return None


def _open(value: Any, kind: type[OpenChoice]) -> OpenChoice | None:
    """The open choice of this name in any case; a name that is not known yet may belong to the project all the same."""
    if not isinstance(value, str) or isinstance(value, Enum | OpenChoice):
        return None
    if not kind.found(value):
        importlib.import_module(kind.registered_in)
    return kind.found(value)


def _number(value: Any) -> float | None:
    if not isinstance(value, numbers.Real | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
