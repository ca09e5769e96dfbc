"""The records of a run: where they lie, reading them back. No torch, no dataset."""

from collections.abc import Mapping
from pathlib import Path

from artifacts import SCHEMA, DamagedError, read_json
from config import UserError
from hashes import sha256_file
from observe import log

RECORDS = Path("eval/metrics_and_plots/json")
NEEDED = (
    *("id", "run", "model", "dataset", "forget_class", "seed", "top_k", "kappa", "mask_layer", "num_graph_vertices"),
    *("images", "num_classes", "split_sizes", "classifier_sha256", "given"),
    *("objective", "answer", "auto", "config", "classifier_path", "gcn_path"),
    *("methods", "validation", "metrics", "labels", "axes", "weight_histogram", "class_probability"),
)  # of a record that can be reported
SCORES = ("forget_score", "retain_score")  # always measured: points, verdicts and the answer rest on them


def record_path(output_dir: Path, record: Mapping[str, object]) -> Path:
    """Where a record lies: `<model>_<dataset>_top-{K}_kappa_{kappa}/<id>.json`."""
    point = f"{record['model']}_{record['dataset']}_top-{record['top_k']}_kappa_{record['kappa']}"
    return output_dir / RECORDS / point / f"{record['id']}.json"


def read_record(output_dir: Path, path: Path) -> dict:
    """The record in a file below `output_dir`.

    Raises:
        DamagedError: it is not what was written, or no record of this place.
        UserError, MachineError: it cannot be read.
    """
    record = read_json(path)
    try:
        if record.get("schema") != SCHEMA or record_path(output_dir, record) != path:
            raise DamagedError(path, f"no {SCHEMA} record of this place")
        if missing := [name for name in NEEDED if name not in record]:
            raise DamagedError(path, f"it has no {', '.join(missing)}")
        if lacking := _without_scores(record):
            raise DamagedError(path, f"it has no scores of {', '.join(lacking)}")
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedError(path, str(error)) from None
    return record


def read_records(output_dir: Path) -> list[dict]:
    """All records below `output_dir`, in path order; a broken or foreign file is named and left out."""
    records = []
    for path in sorted((output_dir / RECORDS).glob("*/*.json")):
        try:
            records.append(read_record(output_dir, path))
        except UserError as error:
            log(f"left out: {error.found if isinstance(error, DamagedError) else error}")
    return records


def read_whole(output_dir: Path, path: Path) -> dict | None:
    """The record in a file, if it is there and whole, its masks included; damage is said in the log."""
    if not path.exists():
        return None
    try:
        record = read_record(output_dir, path)
        for name, digest in record["mask_sha256"].items():
            mask = output_dir / record["mask_paths"][name]
            if not mask.is_file():
                raise DamagedError(mask, "it is missing")
            if sha256_file(mask) != digest:
                raise DamagedError(mask, f"its content is not what {path.name} says")
    except DamagedError as error:
        log(f"evaluation: {error.found}, so that the point is measured anew")
        return None
    return record


def _without_scores(record: Mapping[str, Mapping]) -> list[str]:
    """Methods that a record names without the figures that points are chosen by."""
    figures = [record[part] for part in ("methods", "validation")]
    return [name for name in record["labels"] if not all(set(part.get(name, ())) >= set(SCORES) for part in figures)]
