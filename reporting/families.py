"""Tell which runs are pooled into a family, and by which settings two families of one name differ.

A *run* is a list of records that differ in top_k and kappa alone; a *family* is a list of runs that differ in the seed
and in the classes to forget alone. Files and folders count by their contents, never by where they lie.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath

from core.hashes import key_of
from core.observe import log
from core.records import Record

Run = list[Record]
APART = {
    # what runs of a family may differ in
    *("seed", "forget_class"),
    # the sweep's points: those that the run has are counted instead
    *("topK_list", "kappa_list"),
    # files and folders: their contents are counted instead
    *("vision_dataset", "dataset_path", "trained_vision_model_path", "graph_dir", "gcn_path"),
    # the kind of device that was used is counted instead
    "device",
    # what no value depends on
    *("reporter", "tracker", "output_dir", "resume", "data.num_workers", "data.skip_bad_images"),
    *("train.ddp_timeout", "train.ddp_restarts", "train.save_seconds"),
}
SHORT = 6  # digits of a hash, where people read it


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
    return {
        "model": first["model"],
        "images": first["images"],
        **{name: value for name, value in _flat(first["config"]).items() if automatic or not name.startswith("auto.")},
        **{f"given {name}": value for name, value in first["given"].items()},
        **points,
        **made_by,
        **about["versions"],
    }


def family_key(run: Run) -> str:
    """Hash what the runs of a family share."""
    return key_of(identity(run))[:8]


def families(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs by family. Of several with the same seed and classes as well, the one that started last; that is said."""
    found: dict[str, dict[str, Run]] = {}
    for run in sorted(runs, key=lambda run: run[0]["provenance"]["started"]):
        place = f"{run[0]['seed']} {labels_of(run[0])}"
        family = found.setdefault(family_key(run), {})
        if place in family:
            log(f"report: run {family[place][0]['run']} is left out of its family: {run[0]['run']} repeats it")
        family[place] = run
    return [
        sorted(family.values(), key=lambda run: (run[0]["seed"], str(run[0]["forget_class"])))
        for family in found.values()
    ]


# --- in words ---------------------------------------------------------------------------------------------


def _short(name: str, value: object) -> str:
    """Return a setting's value for people: hashes by their first digits, lists without brackets."""
    if name in ("images", "code") or name.startswith("given "):
        return str(value)[:SHORT] if value else "none"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def differing(groups: Sequence[Sequence[Run]]) -> dict[str, list[str]]:
    """Settings that groups of runs differ in: name -> what each group has, for people ("": it has no such setting)."""
    held = [[identity(run) for run in group] for group in groups]
    names = dict.fromkeys(name for group in held for one in group for name in one)
    found = {}
    for name in names:
        values = [[_short(name, one[name]) if name in one else "" for one in group] for group in held]
        joined = [" or ".join(dict.fromkeys(group)) for group in values]
        if len(set(joined)) > 1:
            found[name] = joined
    return found


def _told(found: Mapping[str, list[str]], count: int) -> list[str]:
    """Return the values of some settings in words, for each group."""
    return [", ".join(f"{name} {values[place] or 'none'}" for name, values in found.items()) for place in range(count)]


def told_apart(groups: Sequence[list[Run]]) -> list[str]:
    """For each family what tells it from the others of the same model and dataset: "train.epochs 2, code 3fa9c1"."""
    named = [(group[0][0]["model"], dataset_of(group[0][0])) for group in groups]
    said = [""] * len(groups)
    for name in set(named):
        places = [place for place, one in enumerate(named) if one == name]
        found = differing([groups[place] for place in places])
        short = _told({name: values for name, values in found.items() if all(values)}, len(places))
        enough = all(short) and len(set(short)) == len(places)  # else name what some of them do not have, too
        for place, told in zip(places, short if enough else _told(found, len(places)), strict=True):
            said[place] = told
    return said
