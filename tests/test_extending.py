"""A method and a metric that nobody has heard of: registered in a test, they are in everything that a run writes."""

import csv
import json
import re
from pathlib import Path

import pytest

from core.choices import FeatureSets, OpenChoice, SupportedDatasets, SupportedVisionModels
from core.config import EvalConfig, ReporterConfig
from images.specs import SPECS
from measure.metrics import METRICS, Evidence, metric
from model import VISION_MODELS
from pipeline import Pipeline
from rivals.compared import METHODS
from tests.helpers.common import tiny
from tests.helpers.records import page_data
from unlearn.features import FEATURES
from unlearn.registry import Context, Edit, Point, method


@pytest.fixture
def unheard_of():
    """Both are gone after the test."""

    @method("stranger", "a stranger", axes=("kappa",))
    def stranger(context: Context, point: Point) -> Edit:
        """Leave all as it is."""
        return Edit(context.model, allowed={})

    @metric("oddity", "furlongs", "lower")
    def oddity(e: Evidence) -> float:
        """How many images there are of the forgotten classes, halved."""
        return len(e.forget.labels) / 2

    yield
    del METHODS["stranger"], METRICS["oddity"]


@pytest.mark.slow
def test_they_are_in_json_tables_figures_and_page(unheard_of, tmp_path):
    config = EvalConfig(methods=("mimu", "stranger", "default"), metrics=("core", "oddity"), references=0)
    drawn = ReporterConfig(dpi=40, formats=("png",))
    records = Pipeline(tiny(tmp_path, eval=config, topK_list=(300,), reporter=drawn)).run()
    written = [json.loads(path.read_text()) for path in tmp_path.rglob("json/*/*.json")]
    assert [one["methods"]["stranger"]["oddity"] for one in written] == [18, 18]  # 36 test images of class 0
    (folder,) = (path for path in Path(tmp_path / "eval/metrics_and_plots/plots").iterdir() if path.name != "grid")
    rows = list(csv.reader((folder / "table_all.csv").read_text().splitlines()))
    column = rows[0].index("oddity [furlongs, ↓]")
    assert {row[0]: row[column] for row in rows[1:]} == {"MIMU (ours)": "18", "a stranger": "18", "untouched": "18"}
    assert r"oddity [furlongs, $\downarrow$]" in (folder / "table_all.tex").read_text()
    assert (folder / "other_metrics_over_kappa.png").stat().st_size > 0
    page = (tmp_path / "reports/index.html").read_text()
    assert "How many images there are of the forgotten classes, halved." in page
    assert re.search(r'<th scope="row" class="c1">a stranger</th>', page)
    (data,) = page_data(page)
    titles = {panel["title"]: panel for panel in data["figures"]["other_metrics_over_kappa"]}
    lines = {one["label"]: one["y"] for one in titles["oddity [furlongs], lower is better"]["series"]}
    assert lines == {"MIMU (ours)": [18, 18], "a stranger": [18, 18], "untouched": [18]}
    assert len(records) == 2


@pytest.mark.parametrize(
    ("choice", "registry"),
    [(SupportedDatasets, SPECS), (SupportedVisionModels, VISION_MODELS), (FeatureSets, FEATURES)],
)
def test_help_lists_what_the_source_registers(choice: type[OpenChoice], registry: dict):
    """The names are read from the text of the file that registers them, which is not imported for it."""
    assert choice.built_in == tuple(registry)
    assert [getattr(choice, name) for name in registry] == list(choice) == list(registry)
    assert not hasattr(choice, "nothing")
