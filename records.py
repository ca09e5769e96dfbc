"""The records of a run: where they lie, reading them back. No torch, no dataset."""

from collections.abc import Mapping
from pathlib import Path

from artifacts import SCHEMA, read_json
from config import UserError
from observe import log

RECORDS = Path("eval/metrics_and_plots/json")
NEEDED = (
    *("id", "run", "model", "dataset", "forget_class", "seed", "top_k", "kappa", "mask_layer", "num_graph_vertices"),
    *("objective", "answer", "auto", "config", "classifier_path", "gcn_path"),
    *("methods", "validation", "metrics", "labels", "axes", "weight_histogram", "class_probability"),
)  # of a record that can be reported
SCORES = ("forget_score", "retain_score")  # always measured: points, verdicts and the answer rest on them


def record_path(output_dir: Path, record: Mapping[str, object]) -> Path:
    """Where a record lies: `<model>_<dataset>_top-{K}_kappa_{kappa}/<id>.json`."""
    point = f"{record['model']}_{record['dataset']}_top-{record['top_k']}_kappa_{record['kappa']}"
    return output_dir / RECORDS / point / f"{record['id']}.json"


def read_records(output_dir: Path) -> list[dict]:
    """All records below `output_dir`, in path order; a broken or foreign file is named and left out."""
    records = []
    for path in sorted((output_dir / RECORDS).glob("*/*.json")):
        try:
            record = read_json(path)
            if record.get("schema") != SCHEMA or record_path(output_dir, record) != path:
                raise UserError(f"{path} is no {SCHEMA} record of this place")
            if missing := [name for name in NEEDED if name not in record]:
                raise UserError(f"{path} has no {', '.join(missing)}: delete it and run again")
            if lacking := _without_scores(record):
                raise UserError(f"{path} has no scores of {', '.join(lacking)}: delete it and run again")
            records.append(record)
        except (UserError, KeyError, TypeError, AttributeError) as error:
            log(f"left out: {error}")
    return records


def _without_scores(record: Mapping[str, Mapping]) -> list[str]:
    """Methods that a record names without the figures that points are chosen by."""
    figures = [record[part] for part in ("methods", "validation")]
    return [name for name in record["labels"] if not all(set(part.get(name, ())) >= set(SCORES) for part in figures)]
