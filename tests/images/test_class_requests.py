"""Classes that a person names: text survives every way in, and means a name where a class has it, else a label."""

import shlex
import unicodedata
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from commands.sweep import expand, load_sweep
from core.config import GCNConfig, PipelineConfig, SupportedDatasets, UserError, plain, spelled, written
from core.observe import visible
from core.yaml_files import load_config
from images.names import resolve_classes
from images.specs import SPECS
from reporting import families
from stages.chain import Stages
from tests.helpers.common import settings_of
from tests.helpers.formats import photo, write_tree
from utils_data import get_unlearning_dataset

ONE_TO_THREE = ("1", "2", "3")
PADDED = ("007", "7", "10")
CAFE = unicodedata.normalize("NFC", "café")


@pytest.mark.parametrize(
    ("typed", "dataset", "labels"),
    [
        (["trouser"], "FASHION_MNIST", (1,)),
        (["T-SHIRT/top", 3], "FASHION_MNIST", (0, 3)),
        (["lawn mower", "0"], "CIFAR100", (0, 41)),
        (["n01440764", "toilet tissue"], "IMAGENET_SMALL", (0, 999)),
        (["nine", "label:2", "name:four"], "MNIST", (2, 4, 9)),
    ],
)
def test_classes_by_name(typed, dataset, labels):
    spec = SPECS[SupportedDatasets[dataset]]
    for one in permutations(typed):
        assert resolve_classes(one, spec.classes, spec.ids) == labels


@pytest.mark.parametrize(
    ("typed", "classes", "label"),
    [
        ("1", ONE_TO_THREE, 0),
        ("0", ONE_TO_THREE, 0),  # no class has this name
        (1, ONE_TO_THREE, 1),  # Python's
        ("label:1", ONE_TO_THREE, 1),
        ("name:1", ONE_TO_THREE, 0),
        ("12", tuple(map(str, range(1, 13))), 11),
        ("007", PADDED, 0),
        ("7", PADDED, 1),
        ("10", PADDED, 2),
        ("2", PADDED, 2),
        ("-1", ("-1", "0", "1"), 0),
        ("1", ("-1", "0", "1"), 2),
        ("label:1", ("label:1", "b"), 1),
        ("name:label:1", ("label:1", "b"), 0),
        ("name:b", ("b", "name:b"), 0),
        ("name:name:b", ("b", "name:b"), 1),
        ("name:c", ("name:c", "b"), 0),
        ("a-b", ("a b", "a-b"), 1),  # the very name before what may be meant by it
        ("_", ("_", "-"), 0),
        ("no", ("yes", "no"), 1),
        ("1e3", ("a", "1e3"), 1),
        (CAFE, (unicodedata.normalize("NFD", CAFE), "dog"), 0),
        (unicodedata.normalize("NFD", "CAFÉ"), ("dog", CAFE), 1),
        ("Å", ("Å", "dog"), 0),  # the sign of the ångström
        ("Ofﬁce", ("cat", "office"), 1),
        ("STRASSE", ("straße", "dog"), 0),
        ("caf\udce9", (r"caf\xe9", "dog"), 0),  # a byte that is no UTF-8, as the file system gives it
        (r"caf\xe9", (r"caf\xe9", "dog"), 0),
    ],
)
def test_a_text_is_a_name_where_a_class_has_it_else_a_label(typed, classes, label):
    assert resolve_classes([typed], classes) == (label,)


@pytest.mark.parametrize(
    ("typed", "classes", "message"),
    [
        (["trousers"], SPECS[SupportedDatasets.FASHION_MNIST].classes, "did you mean 'trouser'"),
        (["qqqq"], SPECS[SupportedDatasets.MNIST].classes, "e.g. 'zero'"),
        (["one", 1], SPECS[SupportedDatasets.MNIST].classes, "names a class twice"),
        (["1", "label:0"], ONE_TO_THREE, "names a class twice"),
        (["4"], ONE_TO_THREE, "forget_class is 4, but X has classes 0 to 2"),
        (["name:0"], ONE_TO_THREE, "'name:0', which is no class of X"),
        (["label:3"], ONE_TO_THREE, "forget_class is label:3, but X has classes 0 to 2"),
        ([12], ONE_TO_THREE, "forget_class is 12, but X has classes 0 to 2"),
        (["03"], ONE_TO_THREE, "'03', which is no class of X: did you mean '3'"),
        (["-1"], ONE_TO_THREE, "'-1', which is no class of X"),
        (["１"], ("a", "b"), "'１', which is no class of X"),
        ([""], ONE_TO_THREE, "'', which is no class of X"),
    ],
)
def test_what_is_no_class_is_refused(typed, classes, message):
    with pytest.raises(UserError, match=message):
        resolve_classes(typed, classes, (), "X")


def test_a_name_that_fits_twice_is_refused():
    with pytest.raises(UserError, match=r"'a-b' fits several classes of X, 0 \(n1\), 2 \(n3\): give one of these"):
        resolve_classes(["a-b"], ("a b", "c", "A_B"), ("n1", "n2", "n3"), "X")


def test_the_log_says_what_a_number_was_taken_for(capsys):
    resolve_classes(["1"], ONE_TO_THREE)
    assert "forget_class 1: taken as the name of class 0; write label:1 for label 1 ('2')" in capsys.readouterr().err
    resolve_classes(["0"], ONE_TO_THREE)
    assert "forget_class 0: no class has this name, taken as label 0 ('1')" in capsys.readouterr().err
    resolve_classes(["label:1", "name:1", 2], ONE_TO_THREE)
    resolve_classes(["1"], ("0", "1"))
    resolve_classes(["1"], ("zero", "one"))
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@given(st.lists(st.text(min_size=1, max_size=4), min_size=2, max_size=6, unique=True), st.data())
def test_spelled_labels_mean_the_same_whatever_the_classes_are_called(classes, data):
    label = data.draw(st.integers(0, len(classes) - 1))
    assert resolve_classes(spelled((label,)), classes) == (label,)


@given(st.binary(max_size=12))
def test_any_name_can_be_visible(name):
    text = visible(name.decode("utf-8", "surrogateescape"))
    assert visible(text) == text
    assert text.encode("utf-8").decode("utf-8") == text


# --- the ways in ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("forget_class: 1", ("1",)),
        ("forget_class: 007", ("007",)),
        ("forget_class: [010, 1_0, no, 1.50, '3', 0x1f]", ("010", "1_0", "no", "1.50", "3", "0x1f")),
        ("forget_class: label:1", ("label:1",)),
        ("forget_class: &x [1, 2]", ("1", "2")),
        ("forget_class:\n- cat\n- 2", ("cat", "2")),
        ("seed: 1", (0,)),
    ],
)  # fmt: skip
def test_yaml_keeps_the_text(text, taken, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text + "\n", encoding="utf-8")
    assert load_config([path]).forget_class == taken


def test_yaml_keeps_the_text_of_sections(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("gcn: {train_classes: [007, 2]}\n")
    assert load_config([path]).gcn.train_classes == ("007", "2")
    path.write_text("sweep: {over: {forget_class: [1, 007, [no, 2]], gcn.train_classes: [[01], 2], seed: [0]}}\n")
    jobs = expand(*load_sweep([path]))
    assert [job.config.forget_class for job in jobs[::2]] == [("1",), ("007",), ("no", "2")]
    assert [job.config.gcn.train_classes for job in jobs[:2]] == [("01",), ("2",)]


@pytest.mark.parametrize("words", [["--forget-class", "1", "007", "-1"], ["--forget-class=1"]])
def test_flags_keep_the_text(words):
    config = settings_of(words)
    assert config.forget_class == (("1", "007", "-1") if len(words) > 1 else ("1",))


# --- a run ------------------------------------------------------------------------------------------------


@pytest.fixture
def numbered(tmp_path):
    """Three classes whose names are the numbers after their labels."""
    write_tree(tmp_path / "n", ONE_TO_THREE, 6)
    gcn = GCNConfig(train_classes=("3", "1"))
    folder = {"vision_dataset": SupportedDatasets.FOLDER, "dataset_path": tmp_path / "n", "kappa_list": (5,)}
    return PipelineConfig(forget_class=("3", "2"), gcn=gcn, topK_list=(9,), output_dir=tmp_path / "out", **folder)


def test_a_run_works_with_labels_and_records_what_means_the_same(numbered):
    config = Stages(numbered).config
    assert (config.forget_class, config.gcn.train_classes) == ((1, 2), (0, 2))
    again = replace(numbered, forget_class=spelled((2, 1)), gcn=GCNConfig(train_classes=("label:0", "name:3")))
    assert Stages(again).config == config
    kept = plain(written(config))
    assert (kept["forget_class"], kept["gcn"]["train_classes"]) == (["label:1", "label:2"], ["label:0", "label:2"])


def test_the_pages_command_makes_the_same_run(numbered):
    config = Stages(numbered).config
    kept = {"config": plain(written(config)), "top_k": 9, "kappa": 5, "auto": None}
    words = shlex.split(families.command([kept]))[4:]
    place = ["--output-dir", str(config.output_dir)]
    assert Stages(settings_of([*words, *place])).config.forget_class == (1, 2)


def test_numbers_out_of_range_are_refused_before_any_image_is_read(numbered):
    (Path(numbered.dataset_path) / "1" / "0.jpg").write_bytes(b"no image")
    for config in (replace(numbered, forget_class=(3,)), replace(numbered, forget_class=(0, 1, 2))):
        with pytest.raises(UserError, match=r"classes 0 to 2|all 3 classes"):
            Stages(config)


def test_order_makes_no_other_request(tmp_path):
    for name in ("a", "b", "c", "d"):
        (tmp_path / "t" / name).mkdir(parents=True)
        for i in range(5):
            photo().save(tmp_path / "t" / name / f"{i}.png")

    def load(*forget):
        return get_unlearning_dataset(SupportedDatasets.FOLDER, 4, forget, tmp_path / "t", datasets_dir=tmp_path)

    one, other = load(0, 3), load("d", "a")
    assert one.forget_class == other.forget_class == (0, 3)
    assert torch.equal(one.splits["train"].labels, other.splits["train"].labels)
