"""The records of a run: where they lie, reading them back. No torch, no dataset."""

from collections.abc import Mapping
from pathlib import Path

from core.artifacts import SCHEMA, DamagedError, read_json
from core.config import UserError
from core.hashes import sha256_file
from core.observe import log
from core.record_schema import complaint

RECORDS = Path("eval/metrics_and_plots/json")
SHARED = ("model", "dataset", "objective", "images", "num_classes", "forget_class", "seed", "mask_layer", "answer")
"""What the records of one run have in common, beside their methods and metrics."""


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
    wrong = complaint(record)
    if wrong or record["schema"] != SCHEMA or record_path(output_dir, record) != path:
        raise DamagedError(path, wrong or f"no {SCHEMA} record of this place")
    return record


def read_records(output_dir: Path) -> list[dict]:
    """All records below `output_dir`, in path order; a broken or foreign file is named and left out."""
    records, runs = [], {}
    for path in sorted((output_dir / RECORDS).glob("*/*.json")):
        try:
            record = read_record(output_dir, path)
            if _of_its_run(record) != runs.setdefault(record["run"], _of_its_run(record)):
                raise DamagedError(path, f"it says other things of run {record['run']} than the run's other records")
            records.append(record)
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


def _of_its_run(record: dict) -> list:
    return [*(record[name] for name in SHARED), *(list(record[name]) for name in ("labels", "metrics"))]
