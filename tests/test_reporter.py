"""Reports from hand-made records: what is chosen, what is written, and that nothing is drawn twice."""

import json

import pytest

from artifacts import SCHEMA, read_records, record_path, write_json
from config import ReporterConfig, UserError
from reporter import MOST_BARS, Reporter, _draw_bars, as_csv, as_text, best_points, choose, headline, remarks, table

METRICS = {
    "forget_loss": ("nats", "higher"),
    "retain_loss": ("nats", "lower"),
    "forget_probability": ("probability", "lower"),
    "forget_score": ("%", "lower"),
    "retain_score": ("%", "higher"),
    "unheard_of": ("furlongs", "lower"),
}


def values(forget: float, retain: float, changed: int) -> dict:
    scores = {"forget_score": forget, "retain_score": retain, "unheard_of": forget / 8}
    rest = {"forget_loss": 1.0, "retain_loss": 2.0, "forget_probability": forget / 100}
    return rest | scores | {"seconds": 0.5, "weights_changed": changed}


def record(top_k: int, kappa: int, validation: tuple, test: tuple, classes: int = 3) -> dict:
    others = {"default": values(90, 80, 0), "novel": values(40, 60, 9)}
    return {
        "schema": SCHEMA,
        "id": f"{top_k}-{kappa}",
        "run": "abc",
        "model": "M",
        "dataset": "D",
        "forget_class": 1,
        "seed": 0,
        "top_k": top_k,
        "kappa": kappa,
        "mask_layer": -2,
        "num_graph_vertices": 1000,
        "classifier_path": "checkpoints/none/c.safetensors",
        "gcn_path": "checkpoints/none/g.safetensors",
        "metrics": {name: {"unit": unit, "better": better} for name, (unit, better) in METRICS.items()},
        "objective": "elbo",
        "answer": "mimu",
        "auto": None,
        "labels": {"mimu": "MIMU", "default": "untouched", "novel": "a novel method"},
        "axes": {"mimu": ["topK", "kappa"], "default": [], "novel": ["kappa"]},
        "methods": {"mimu": values(*test, kappa), **others},
        "validation": {"mimu": values(*validation, kappa), **others},
        "weight_histogram": {"edges": [-1, 0, 1], "kept": [5, 4], "switched_off": [1, 0]},
        "class_probability": {name: [1 / classes] * classes for name in ("mimu", "default", "novel")},
    }


@pytest.fixture
def records() -> list[dict]:
    return [
        record(5, 100, validation=(50, 80), test=(0, 99)),  # the best on test images, which must not matter
        record(5, 200, validation=(10, 79), test=(12, 78)),
        record(9, 200, validation=(10, 79), test=(20, 70)),  # a tie: the smaller topK wins
    ]


def test_points_are_chosen_on_validation_images(records):
    assert choose(records, "mimu")["id"] == "5-200"
    chosen = {best.method: (best.top_k, best.kappa) for best in best_points(records)}
    assert chosen == {"mimu": (5, 200), "default": (None, None), "novel": (None, 100)}


def test_table_and_headline_by_hand(records):
    rows = table(records)
    assert rows[0][:4] == ["method", "topK", "kappa", "forget_loss [nats, up]"]
    assert "unheard_of [furlongs, down]" in rows[0]
    assert rows[1] == ["MIMU", "5", "200", "1", "2", "0.12", "12", "78", "1.5", "200", "0.500"]
    assert rows[3][:3] == ["a novel method", "-", "100"]
    assert as_csv(rows).splitlines()[1] == "MIMU,5,200,1,2,0.12,12,78,1.5,200,0.500"
    assert len({len(line) for line in as_text(rows).splitlines()}) == 1
    assert headline(records) == (
        "Switching off 200 weights (20.0 % of the layer), class 1 is recognised 12.0 % of the time (before: 90.0 %); "
        "the other classes score 78.0 % (before: 80.0 %)."
    )


def test_verdicts_of_the_chosen_point_are_shown(records):
    assert (remarks(records), "verdict" in table(records)[0]) == ([], False)  # a record from before there were any
    bad, fine = {"key": "collapsed", "sentence": "too much is lost"}, {"key": "fine", "sentence": "nothing found"}
    records[0]["verdicts"] = {"mimu": [fine]}  # not the point that is chosen
    records[1]["verdicts"] = {"mimu": [bad, {"key": "too random", "sentence": "it guesses"}], "default": [fine]}
    rows = table(records)
    assert [row[-1] for row in rows] == ["verdict", "collapsed, too random", "-", "-"]
    assert rows[1][-3:-1] == ["200", "0.500"]
    records[0]["verdicts"]["default"] = [fine]
    assert [row[-1] for row in table(records)][2] == "fine"
    assert remarks(records) == ["MIMU: too much is lost.", "MIMU: it guesses."]
    for name in ("default", "novel"):
        records[0]["verdicts"][name] = [{"key": "fine", "sentence": "nothing found; not checked"}]
    assert remarks(records)[2:] == ["untouched, a novel method: nothing found; not checked."]


def test_bytes_are_reproducible_and_nothing_is_drawn_twice(records, tmp_path):
    config = ReporterConfig(formats=("png", "svg", "pdf"), dpi=30)
    drawn = [Reporter(tmp_path / name, config).plot(records)[0] for name in ("a", "b")]
    first, second = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in drawn)
    assert first == second
    assert {"score_over_kappa.svg", "trade_off.pdf", "weight_histogram.png", "table.md"} <= set(first)
    assert b"a novel method" in first["table.csv"]
    times = {p.name: p.stat().st_mtime_ns for p in drawn[0].iterdir()}
    Reporter(tmp_path / "a", config).plot(records)
    assert {p.name: p.stat().st_mtime_ns for p in drawn[0].iterdir()} == times
    (drawn[0] / "trade_off.png").unlink()
    Reporter(tmp_path / "a", config).plot(records)
    assert (drawn[0] / "trade_off.png").read_bytes() == first["trade_off.png"]
    records[0]["methods"]["mimu"]["retain_score"] = 1.0
    Reporter(tmp_path / "a", config).plot(records)
    assert (drawn[0] / "trade_off.png").read_bytes() != first["trade_off.png"]


def test_many_classes_are_cut_to_the_largest():
    one = record(5, 100, (50, 80), (50, 80), classes=300)
    one["class_probability"]["mimu"][250] = 0.5
    (ax,) = _draw_bars(one).axes
    assert len(ax.patches) == 2 * MOST_BARS
    assert "250" in [tick.get_text() for tick in ax.get_xticklabels()]
    assert "of 300" in ax.get_xlabel()


def test_broken_and_foreign_records_are_named_and_left_out(records, tmp_path, capsys):
    paths = [record_path(tmp_path, one) for one in records]
    for one, path in zip(records, paths, strict=True):
        write_json(path, one)
    paths[0].write_text("{")
    write_json(paths[1], {"schema": "another"})
    assert read_records(tmp_path) == [records[2]]
    said = capsys.readouterr().err
    assert str(paths[0]) in said
    assert str(paths[1]) in said
    assert json.loads(paths[2].read_text()) == records[2]


def test_no_records_says_what_to_run(tmp_path):
    with pytest.raises(UserError, match=r"no records below .* `uv run main\.py"):
        Reporter(tmp_path).plot()
