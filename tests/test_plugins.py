"""Plugins: every example of docs/extending.md runs through the real pipeline, and its values are what numpy says."""

import hashlib
import json
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import reporter
from commands.sweep import load_sweep
from core import choices, hashes
from core.choices import FeatureSets, SupportedDatasets, SupportedVisionModels, UserError
from core.config import PROJECT_ROOT, GCNConfig, PipelineConfig, plain, written
from core.hashes import check_same_code, load_plugins, plugin, whole_code
from core.observe import be_quiet
from core.records import read_records
from core.store import Stage, build_stage
from core.yaml_files import load_config
from main import main
from reporting.panels import FIGURES
from stages import setup
from stages.setup import Setup
from tests.helpers.common import settings_of
from tests.helpers.records import page_data
from unlearn.features import FEATURES as FEATURE_SETS

GUIDE = (PROJECT_ROOT / "docs/extending.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"```python\n# (my_\w+\.py)\n(.*?)```", GUIDE, re.DOTALL))
METHOD, METRIC, DATASET, MODEL, FEATURES, PLOT = EXAMPLES.values()
FORGOTTEN, KAPPA = 2, 40  # ring
SETTINGS = """
vision_dataset: shapes
model_architecture: SmallConv
forget_class: ring
device: cpu
topK_list: [64]
kappa_list: [40]
train: {epochs: 6, batch_size: 16, lr: 0.01}
graph: {num_samples: 256}
gcn: {features: sized, steps: 2, hidden_dim: 4, passes: 1}
eval: {methods: [mimu, smallest, default], metrics: [core, sure], references: 0}
reporter: {dpi: 40, formats: [png]}
"""


def unload() -> None:
    """Forget every plugin that this process has imported, so that other tests meet the project's own parts alone."""
    for one in hashes._PLUGINS.values():
        for entry in list(choices.ENTERED):
            registry, name = entry
            if f"{registry.kind} {name}" in one.registered:
                registry.remove(name)
                choices.ENTERED.remove(entry)
    for name in [name for name in sys.modules if name.startswith("plugin_my_")]:
        del sys.modules[name]
    hashes._PLUGINS.clear()


@pytest.fixture(autouse=True)
def plugins_end_with_the_test() -> Iterator[None]:
    yield
    unload()
    be_quiet(False)


def write(folder: Path, **texts: str) -> list[Path]:
    """Plugin files of these names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    return [folder / f"{name}.py" for name in texts]


LEVELS = 4 * np.arange(64)  # the levels of every image, so that their mean and deviation do not depend on the split


def shapes(split: str) -> dict[str, np.ndarray]:
    """Four classes of 8x8 images: the brightest quarter of the levels lies, in random order, in the class's corner."""
    count = {"train": 40, "test": 12}[split]
    rng, labels = np.random.default_rng(count), np.repeat(np.arange(4), count)
    images = np.empty((len(labels), 1, 8, 8), np.uint8)
    for image, label in zip(images[:, 0], labels, strict=True):
        corner = np.zeros((8, 8), bool)
        corner[4 * (label // 2) :, 4 * (label % 2) :][:4, :4] = True
        image[corner], image[~corner] = rng.permutation(LEVELS[48:]), rng.permutation(LEVELS[:48])
    return {"images": images, "labels": labels}


# --- what numpy says of a run -----------------------------------------------------------------------------


def tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["facts"])  # noqa: SIM118


def answers(weights: dict[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    """Probabilities [S, C] of the example's classifier, by its docstring."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    patches = np.lib.stride_tricks.sliding_window_view(images[:, 0], (3, 3), axis=(1, 2))  # [S, 6, 6, 3, 3]
    maps = np.einsum("sijab,oab->soij", patches, w["body.0.weight"][:, 0]) + w["body.0.bias"][:, None, None]
    maps = np.maximum(maps, 0)
    cuts = [(int(np.floor(6 * k / 4)), int(np.ceil(6 * (k + 1) / 4))) for k in range(4)]
    means = np.stack([[maps[:, :, a:b, c:d].mean((2, 3)) for c, d in cuts] for a, b in cuts])  # [4, 4, S, 8]
    h = means.transpose(2, 3, 0, 1).reshape(len(images), -1)
    logits = np.maximum(h @ w["linears.0.weight"].T, 0) @ w["linears.1.weight"].T
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


@dataclass(frozen=True)
class Run:
    """One run with all six examples: its folder, the plugin files, its record, and stage -> plugins in its key."""

    folder: Path
    files: list[Path]
    record: dict
    keys: dict[str, list[str]]

    @property
    def flags(self) -> list[str]:
        return [word for file in self.files for word in ("--plugin", str(file))]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Through the command line; two plugins are named in the file, the others by flags."""
    folder, keys = tmp_path_factory.mktemp("six"), {}
    files = write(folder, **{name.removesuffix(".py"): text for name, text in EXAMPLES.items()})
    (folder / "run.yaml").write_text(SETTINGS + f"plugins: [{files[0]}, {files[1]}]\n")
    place = folder / "datasets/shapes"
    place.mkdir(parents=True)
    for split in ("train", "test"):
        np.savez(place / f"{split}.npz", allow_pickle=False, **shapes(split))

    def build(target: Path, label: str, inputs: dict, make: Callable) -> Stage:
        keys[target.name] = inputs["plugins"]
        return build_stage(target, label, inputs, make)

    flags = [word for file in files[2:] for word in ("--plugin", str(file))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "build_stage", build)
        words = ["run", "--config", str(folder / "run.yaml"), *flags, "--output-dir", str(folder), "--quiet"]
        try:
            assert main(words) == 0
        finally:
            unload()
    (record,) = read_records(folder)
    return Run(folder, files, record, keys)


def test_the_guide_has_an_example_of_each_kind():
    assert list(EXAMPLES) == [f"my_{kind}.py" for kind in ("method", "metric", "dataset", "model", "features", "plot")]


@pytest.mark.slow
def test_values_are_what_numpy_says(run):
    """Method, metric, dataset and classifier: everything is recomputed from the files that the run left."""
    record = run.record
    weights, facts = tensors(run.folder / record["classifier_path"])
    assert (facts["architecture"], record["dataset"], record["forget_names"]) == ("SmallConv", "SHAPES", ["ring"])
    test, forgotten = shapes("test"), shapes("test")["labels"] == FORGOTTEN
    assert sum(record["split_sizes"].values()) == len(test["labels"]) + len(shapes("train")["labels"])
    layer = weights["linears.0.weight"]
    kept = np.ones(layer.size, bool)
    kept[np.abs(layer).ravel().argsort()[:KAPPA]] = False
    stored, _ = tensors(run.folder / record["mask_paths"]["smallest"])
    assert (stored["mask"].ravel() == kept).all()
    masked = weights | {"linears.0.weight": layer * kept.reshape(layer.shape)}
    images = (test["images"] - LEVELS.mean()) / LEVELS.std()
    for method, model in (("default", weights), ("smallest", masked)):
        p = answers(model, images)
        found, right = record["methods"][method], p.argmax(1) == test["labels"]
        assert found["sure"] == pytest.approx(100 * (p[forgotten, FORGOTTEN] > 0.5).mean())
        assert found["forget_score"] == pytest.approx(100 * right[forgotten].mean())
        assert found["retain_score"] == pytest.approx(100 * right[~forgotten].mean())
        mean = p[forgotten].mean(0)
        assert record["class_probability"][method] == pytest.approx(mean, abs=1e-5)
    assert record["methods"]["default"]["retain_score"] > 80  # they are learned: guessing reaches 25 %


@pytest.mark.slow
def test_the_graph_network_reads_the_columns(run):
    _, facts = tensors(run.folder / run.record["gcn_path"])
    assert facts["features"] == "sized"
    assert facts["columns"][:5] == ["h", "z", "W", "g", "size"]
    load_plugins([run.files[4]])
    w = np.random.default_rng(0).normal(size=(5, 7))
    request: Any = SimpleNamespace(statistics=SimpleNamespace(weight=torch.from_numpy(w)))
    (column,) = FEATURE_SETS["sized"].compute(request)
    assert column.numpy() == pytest.approx((np.abs(w) - np.abs(w).mean()) / np.abs(w).std())


@pytest.mark.slow
def test_the_plot_shows_the_record(run):
    (drawn,) = run.folder.rglob("kept.png")
    assert drawn.read_bytes().startswith(b"\x89PNG")
    (data,) = page_data((run.folder / "reports/index.html").read_text())
    (panel,) = data["figures"]["kept"]
    assert panel["ticks"] == ["MIMU (ours)", "smallest weights", "untouched"]
    scores = [run.record["methods"][name]["retain_score"] for name in ("mimu", "smallest", "default")]
    assert panel["series"][0]["y"] == pytest.approx(scores, abs=0.01)


@pytest.mark.slow
def test_records_and_keys_name_the_plugins(run):
    digests = {str(file): sha(file.read_text()) for file in run.files}
    assert run.record["provenance"]["plugins"] == digests
    assert run.record["config"]["plugins"] == list(digests)
    assert run.keys == {key: list(digests.values()) for key in ("classifier", "Graphs", "gcn")}
    page = (run.folder / "reports/index.html").read_text()
    assert all(f"{name} (sha256 {value})" in page for name, value in digests.items())
    assert run.record["metrics"]["sure"]["definition"].startswith("Share of T's images of the forgotten classes whose")


@pytest.mark.slow
def test_a_report_imports_what_its_flags_name_and_nothing_else(run, tmp_path, monkeypatch):
    """Records name plugins, whose files need not even be there; what is drawn depends on those that are imported."""
    drawn: list[str] = []
    monkeypatch.setattr(reporter, "save_all", lambda figures, folder, config: drawn.extend(figures))
    shutil.copytree(run.folder / "eval/metrics_and_plots/json", tmp_path / "eval/metrics_and_plots/json")
    for file in run.files[:5]:
        file.rename(file.with_suffix(".away"))
    try:
        assert main(["report", "--output-dir", str(tmp_path)]) == 0
        without, drawn[:] = list(drawn), []
        assert main(["report", "--plugin", str(run.files[5]), "--output-dir", str(tmp_path)]) == 0
        assert {*drawn} - {*without} == {"kept"}
    finally:
        for file in run.files[:5]:
            file.with_suffix(".away").rename(file)
    assert [one.path for one in hashes._PLUGINS.values()] == [run.files[5]]


@pytest.mark.slow
def test_the_leaderboard_has_a_row_and_its_command_is_taken(run, capsys):
    """Without the plugins: a row is made from records, and its command names the files that register its parts."""
    capsys.readouterr()
    assert main(["leaderboard", str(run.folder)]) == 0
    html = Path(capsys.readouterr().out.strip()).read_text(encoding="utf-8")
    assert re.search(r'<th scope="row" class="c1">smallest weights<small class="note">1 seed, 1 cell', html)
    assert "<dt>sure</dt><dd>Share of T&#39;s images of the forgotten classes whose" in html
    assert hashes._PLUGINS == {}
    (line,) = re.findall(r"<pre><code>(.*?)</code></pre>", html, re.DOTALL)
    again = settings_of(shlex.split(unescape(line))[4:])
    assert plain(written(again)) | {"reporter": None, "tracker": None} == {
        **run.record["config"],
        "reporter": None,
        "tracker": None,
    }


@pytest.mark.slow
def test_docs_and_datasets_have_them(run, tmp_path, capsys):
    shutil.copy(PROJECT_ROOT / "docs/example.json", tmp_path)
    assert main(["docs", *run.flags, "--folder", str(tmp_path)]) == 0
    assert "## `smallest`: smallest weights\n\nSwitch off the kappa weights" in (tmp_path / "methods.md").read_text()
    assert "## `sure` [%]\n\nShare of T's images" in (tmp_path / "metrics.md").read_text()
    assert plugin(run.files[3]).registered == ("vision model SmallConv",)
    capsys.readouterr()
    assert main(["datasets", *run.flags, "--output-dir", str(run.folder)]) == 0
    assert re.search(r"^SHAPES +8x8 grey +4 +208 ", capsys.readouterr().out, re.MULTILINE)


# --- names ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_name_is_a_choice_while_its_plugin_is_loaded(run):
    with pytest.raises(UserError, match=r"vision_dataset is 'shapes': give one of DIGITS, .*FOLDER"):
        PipelineConfig(vision_dataset="shapes")
    load_plugins(run.files)
    config = PipelineConfig(
        vision_dataset="shapes",
        model_architecture="smallconv",
        gcn=GCNConfig(features="SIZED"),
        plugins=tuple(run.files),
    )
    assert plain(config)["vision_dataset"] == "SHAPES"
    assert config.model_architecture is SupportedVisionModels["SmallConv"]
    assert config.gcn.features is FeatureSets("sized")
    sent = pickle.dumps(config)
    unload()
    assert SupportedDatasets.found("SHAPES") is None
    received = pickle.loads(sent)  # as a worker does, before it has loaded anything
    assert received == config
    load_plugins(received.plugins)
    assert received.vision_dataset is SupportedDatasets["SHAPES"]


def test_an_edited_plugin_has_another_key(tmp_path):
    (file,) = write(tmp_path, mine=METRIC)
    config = PipelineConfig(plugins=(file,), device="cpu", output_dir=tmp_path)
    first, code = Setup(config).common, whole_code(config.plugins)
    file.write_text(METRIC.replace("0.5", "0.9"))
    assert Setup(config).common == first  # what runs is what was imported
    check_same_code(code, config.plugins)
    unload()
    second = Setup(config).common
    assert (first["plugins"], second["plugins"]) == ([sha(METRIC)], [sha(METRIC.replace("0.5", "0.9"))])
    assert {**first, "plugins": None} == {**second, "plugins": None}
    with pytest.raises(UserError, match="source files were changed since this run began"):
        check_same_code(code, config.plugins)


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- what is refused --------------------------------------------------------------------------------------

ADD = "from reporting.panels import figure\n\n\n@figure({!r})\ndef drawn(runs):\n    return []\n"
IMPORT = r"cannot be imported \("
REFUSED = {
    "one.py": (None, r"plugins names \S+, which is not there: give the path of a file that ends in \.py"),
    "one.txt": (ADD.format("x"), r"plugins names \S+, which is no Python file: give the path of a file .*"),
    "idle.py": ("x = 1\n", r"the plugin \S+ registers nothing: let it register a method or another part, see .*"),
    "syntax.py": ("x = 1\ny = = 2\n", rf"the plugin \S+, line 2, {IMPORT}SyntaxError: .*"),
    "raises.py": (
        "def f():\n    return 1 / 0\n\n\nf()\n",
        rf"the plugin \S+, line 2, {IMPORT}ZeroDivisionError: division by zero\): correct that line",
    ),
    "leaves.py": ("import sys\nsys.exit(0)\n", rf"the plugin \S+, line 2, {IMPORT}SystemExit: 0\).*"),
    "lacks.py": ("\nimport no_such_thing\n", rf"the plugin \S+, line 2, {IMPORT}ModuleNotFoundError: No module .*"),
    "taken.py": (
        ADD.format("Trade_Off"),
        r"the plugin \S+, line 4: plugin_taken_\w+ registers a second figure 'Trade_Off', reporting\.panels "
        "registers one: choose another name",
    ),
    "named.py": (ADD.format("../x"), r"the plugin \S+, line 4: .*a name has letters, digits and _ \. @ - alone"),
    "over.py": (ADD.format("UA_over_kappa"), r"the plugin \S+, line 4: a figure cannot be called .*"),
    "half.py": (ADD.format("fine") + "x = nothing\n", rf"the plugin \S+, line 7, {IMPORT}NameError: .*"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plugin_is_said_in_one_sentence(name, tmp_path, capsys):
    text, said = REFUSED[name]
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["datasets", "--plugin", str(tmp_path / name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(f"error: {said}", line)
    assert not {"fine", "x", "Trade_Off"} & {*FIGURES}
    assert not hashes._PLUGINS
    assert not [module for module in sys.modules if module.startswith(f"plugin_{Path(name).stem}_")]


def test_a_file_of_settings_says_where_it_names_one(tmp_path):
    (tmp_path / "run.yaml").write_text("seed: 1\nplugins: [no.py]\n")
    with pytest.raises(UserError, match=r"run\.yaml, line 2: plugins names no\.py, which is not there"):
        load_config([tmp_path / "run.yaml"])
    (tmp_path / "run.yaml").write_text("sweep: {over: {plugins: [[a.py], [b.py]]}}\n")
    with pytest.raises(UserError, match=r"sweep\.over\.plugins: name plugins once, for all jobs"):
        load_sweep([tmp_path / "run.yaml"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (METHOD.replace('"smallest"', '"all"'), "a method 'all', which means something else"),
        (METHOD.replace('"smallest"', '"SFT"'), "a second method 'SFT', unlearn.methods registers one"),
        (METRIC.replace('"sure"', '"seconds"'), "a metric 'seconds', which means something else"),
        (METRIC.replace('"sure"', '"UA"'), "a second metric 'UA', measure.metrics registers one"),
        (DATASET.replace('"SHAPES"', '"digits"'), "a second dataset 'digits', images.specs registers one"),
        (MODEL.replace("SmallConv", "HookedResnet"), "a second vision model 'HookedResnet', model registers one"),
        (FEATURES.replace('"sized"', '"taylor"'), "a second feature set 'taylor', unlearn.features registers one"),
        (FEATURES.replace('"basic"', '"basics"'), "'basics' is not a valid FeatureSets"),
        (DATASET.replace("read=read", "layout='x', read=read"), "needs either `read` and the names of its `classes`"),
    ],
)
def test_no_name_is_registered_twice(text, said, tmp_path):
    (file,) = write(tmp_path, mine=text)
    with pytest.raises(UserError, match=re.escape(said)):
        load_plugins([file])


# --- other processes --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_workers_of_a_sweep_and_of_ddp_import_them(run, tmp_path):
    """A sweep's worker trains the plugin's classifier in two more processes, on the plugin's images."""
    shutil.copytree(run.folder / "datasets/shapes", tmp_path / "datasets/shapes")
    sweep = "sweep: {over: {seed: [0]}, workers: 1}\ntrain: {use_ddp: true, num_workers: 2, epochs: 1}\n"
    (tmp_path / "sweep.yaml").write_text(SETTINGS.replace("train:", "#") + sweep + f"output_dir: {tmp_path}\n")
    command = [sys.executable, "main.py", "sweep", "--config", str(tmp_path / "sweep.yaml"), *run.flags]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = read_records(tmp_path)
    assert record["provenance"]["plugins"] == run.record["provenance"]["plugins"]
    assert (record["model"], record["dataset"]) == ("SmallConv", "SHAPES")
