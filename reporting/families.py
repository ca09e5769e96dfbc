"""Tell which runs are pooled into a family, by which settings two families of one name differ, and what command makes
a run again.

A *run* is a list of records that differ in top_k and kappa alone; a *family* is a list of runs that differ in the seed
and in the classes to forget alone. Files and folders count by their contents, never by where they lie.
"""

import os
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import PurePath

from core.config import PROJECT_ROOT, plain
from core.hashes import key_of
from core.observe import log, visible
from core.records import Record
from core.yaml_files import load_config

Run = list[Record]
MANY_ENTRIES, MOST_OWN = 6, 3  # of a list that is told by its length; of those entries that it has and others have not
APART = {
    # what runs of a family may differ in
    *("seed", "forget_class"),
    # the sweep's points: those that the run has are counted instead
    *("topK_list", "kappa_list"),
    # files and folders: their contents are counted instead
    *("vision_dataset", "dataset_path", "trained_vision_model_path", "graph_dir", "gcn_path", "plugins"),
    # the kind of device that was used is counted instead
    "device",
    # what no value depends on
    *("reporter", "tracker", "output_dir", "resume", "data.num_workers", "data.skip_bad_images"),
    *("train.ddp_timeout", "train.ddp_restarts", "train.save_seconds"),
}
SHORT = 6  # digits of a hash, where people read it
DEFAULT_CONFIG = PROJECT_ROOT / "configs" / "default.yaml"
NO_FLAGS = ("reporter", "output_dir", "tracker", "resume")  # say nothing about the results
PATHS = ("dataset_path", "trained_vision_model_path", "graph_dir", "gcn_path")


def runs_of(records: Iterable[Record]) -> list[Run]:
    """Group records by run, each run in order of top_k and kappa."""
    runs: dict[str, Run] = {}
    for record in records:
        runs.setdefault(record["run"], []).append(record)
    return [sorted(run, key=lambda record: (record["top_k"], record["kappa"])) for run in runs.values()]


def labels_of(record: Record) -> list[int]:
    """Return the classes to forget, in order."""
    return sorted(record["forget_class"])


def dataset_of(record: Record) -> str:
    """Name a dataset as people do: by its name, a folder of images also by the folder's."""
    path = record["config"].get("dataset_path")
    return f"{record['dataset']} {PurePath(path).name}" if record["dataset"] == "FOLDER" and path else record["dataset"]


def _flat(values: Mapping, prefix: str = "") -> dict[str, object]:
    """Flatten nested settings to dotted names, without those in APART."""
    flat: dict[str, object] = {}
    for name, value in values.items():
        dotted = prefix + name
        if dotted not in APART:
            flat |= _flat(value, f"{dotted}.") if isinstance(value, Mapping) else {dotted: value}
    return flat


def identity(run: Run) -> dict[str, object]:
    """Everything that defines a run but its seed and its classes to forget, by name."""
    first, about = run[0], run[0]["provenance"]
    points = {"top_k tried": sorted({record["top_k"] for record in run})}
    automatic = first["auto"] is not None  # else its settings have no effect, and the kappas that were tried count
    if not automatic:
        points["kappa tried"] = sorted({record["kappa"] for record in run})
    made_by = {"code": first["code"], "device": about["device"].partition(":")[0]}
    plugins = {"plugins": sorted(about["plugins"].values())} if about["plugins"] else {}
    return {
        "model": first["model"],
        "images": first["images"],
        **{name: value for name, value in _flat(first["config"]).items() if automatic or not name.startswith("auto.")},
        **{f"given {name}": value for name, value in first["given"].items()},
        **points,
        **made_by,
        **plugins,
        **about["versions"],
    }


def family_key(run: Run, beside: Collection[str] = ()) -> str:
    """Hash what the runs of a family share; `beside`: settings that they may differ in, too, such as "eval.methods"."""
    return key_of({name: value for name, value in identity(run).items() if name not in beside})[:8]


def families(runs: Iterable[Run], beside: Collection[str] = (), say: Callable[[str], object] = log) -> list[list[Run]]:
    """Runs by family. Of several with the same seed and classes as well, the one that started last; that is said.

    Args:
        beside: as of `family_key`.
        say: Takes each sentence about a run that is left out.
    """
    found: dict[str, dict[str, Run]] = {}
    for run in sorted(runs, key=lambda run: run[0]["provenance"]["started"]):
        place = f"{run[0]['seed']} {labels_of(run[0])}"
        family = found.setdefault(family_key(run, beside), {})
        if place in family:
            say(f"report: run {family[place][0]['run']} is left out of its family: {run[0]['run']} repeats it")
        family[place] = run
    return [
        sorted(family.values(), key=lambda run: (run[0]["seed"], str(run[0]["forget_class"])))
        for family in found.values()
    ]


# --- in words ---------------------------------------------------------------------------------------------


def _short(name: str, value: object) -> str:
    """Return a setting's value for people: hashes by their first digits, lists without brackets."""
    if name == "plugins" and isinstance(value, list):
        return " ".join(str(one)[:SHORT] for one in value)
    if name in ("images", "code") or name.startswith("given "):
        return str(value)[:SHORT] if value else "none"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def differing(groups: Sequence[Sequence[Run]]) -> dict[str, list[str]]:
    """Settings that groups of runs differ in: name -> what each group has, for people ("": it has no such setting)."""
    held = [[identity(run) for run in group] for group in groups]
    names = dict.fromkeys(name for group in held for one in group for name in one)
    found = {}
    for name in names:
        values = _told(name, [[one.get(name, "") for one in group] for group in held])
        joined = [" or ".join(dict.fromkeys(group)) for group in values]
        if len(set(joined)) > 1:
            found[name] = joined
    return found


def _told(name: str, held: Sequence[Sequence[object]]) -> list[list[str]]:
    """Values of a setting for people; of long lists their length and what is not in all of them, if that is enough."""
    whole = [[_short(name, value) if value != "" else "" for value in group] for group in held]
    lists = [value for group in held for value in group if isinstance(value, list)]
    if name == "plugins" or not lists or max(map(len, lists)) <= MANY_ENTRIES:
        return whole
    common = set(map(str, lists[0])).intersection(*(map(str, one) for one in lists[1:]))

    def brief(value: object) -> str:
        own = [str(one) for one in value if str(one) not in common] if isinstance(value, list) else []
        more = f" with {' '.join(own[:MOST_OWN])}{' ...' if len(own) > MOST_OWN else ''}" if own else ""
        return f"{len(value)}{more}" if isinstance(value, list) else _short(name, value) if value != "" else ""

    told = [[brief(value) for value in group] for group in held]
    pairs = {pair for group in zip(whole, told, strict=True) for pair in zip(*group, strict=True)}
    return told if len({short for _, short in pairs}) == len(pairs) else whole


def as_told(found: Mapping[str, list[str]], count: int) -> list[str]:
    """Return the values of some settings in words, for each group."""
    return [", ".join(f"{name} {values[place] or 'none'}" for name, values in found.items()) for place in range(count)]


def told_apart(groups: Sequence[list[Run]]) -> list[str]:
    """For each family what tells it from the others of the same model and dataset: "train.epochs 2, code 3fa9c1"."""
    named = [(group[0][0]["model"], dataset_of(group[0][0])) for group in groups]
    said = [""] * len(groups)
    for name in set(named):
        places = [place for place, one in enumerate(named) if one == name]
        found = differing([groups[place] for place in places])
        short = as_told({name: values for name, values in found.items() if all(values)}, len(places))
        enough = all(short) and len(set(short)) == len(places)  # else name what some of them do not have, too
        for place, told in zip(places, short if enough else as_told(found, len(places)), strict=True):
            said[place] = told
    return said


# --- the command that makes a run again -------------------------------------------------------------------


@lru_cache
def _defaults() -> dict:
    return plain(load_config([DEFAULT_CONFIG]))


def _flags(values: Mapping, defaults: Mapping, prefix: str = "") -> list[str]:
    """Command-line flags for every value that is not the default."""
    flags = []
    for name, value in values.items():
        known, flag = defaults.get(name), f"--{prefix}{name.replace('_', '-')}"
        if value == known or name in NO_FLAGS or name not in defaults:
            continue
        if name == "plugins":  # each by the flag that is read ahead of all others, which may be names it registers
            flags += [word for path in value for word in ("--plugin", path)]
        elif isinstance(value, dict):
            flags += _flags(value, known or {}, f"{prefix}{name.replace('_', '-')}.")
        elif isinstance(value, bool):
            flags.append(flag if value else f"--{prefix}no-{name.replace('_', '-')}")
        else:
            flags += [flag, *(map(str, value) if isinstance(value, list) else [_typed(name, value)])]
    return flags


def _typed(name: str, value: object) -> str:
    """Return a value as it may be typed after its flag."""
    text = str(value)
    if name in PATHS and value is not None and (text[:1] in ("-", "~") or text == "None"):
        return f"./{text}"  # else it would be a flag, the home folder or no path at all
    return text


def command(run: Run, seeds: Sequence[int] = ()) -> str:
    """Return the command that makes a run again, from the commit that its provenance names: text for a POSIX shell.

    Args:
        seeds: Once for each of these instead of the run's own seed.
    """
    config = dict(run[0]["config"])
    if seeds:
        config["seed"] = _defaults().get("seed")
    config["topK_list"] = sorted({record["top_k"] for record in run})
    if run[0]["auto"] is None:
        config["kappa_list"] = sorted({record["kappa"] for record in run})
    elif "kappa_list" in _defaults():
        config["kappa_list"] = _defaults()["kappa_list"]
    flags = [*_flags(config, _defaults()), *(["--seeds", *map(str, seeds)] if seeds else [])]
    return " ".join(map(_quoted, ["uv", "run", "main.py", "run", *flags]))


def _quoted(word: str) -> str:
    """Return a word for a shell; bytes that are no UTF-8 are spelled out as bash, zsh and ksh read them."""
    if word.isprintable() or not any("\ud800" <= sign <= "\udfff" for sign in word):
        return shlex.quote(word)
    codes = "".join(f"\\x{byte:02x}" for byte in os.fsencode(word))
    return f"$'{codes}'"


# --- in words: which classes ---


def classes_of(record: Record) -> str:
    """ "class 0", or "classes 0 and 3"."""
    return _listed([str(label) for label in labels_of(record)])


def named_classes(record: Record) -> str:
    """Return the same with their names: "class 0 (zero)"."""
    pairs = zip(map(str, labels_of(record)), map(visible, record["forget_names"]), strict=True)
    return _listed([label if name == label else f"{label} ({name})" for label, name in pairs])


def _listed(classes: list[str]) -> str:
    return f"class {classes[0]}" if len(classes) == 1 else f"classes {', '.join(classes[:-1])} and {classes[-1]}"
