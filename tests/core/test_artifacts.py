"""Nothing half-written, nothing reused on doubt."""

import json
import math
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import get_args, get_origin

import numpy as np
import pytest
import yaml

from core.artifacts import read_json, read_tensors, write_json, write_tensors, write_text, writing
from core.choices import GCNPriorDistribution, SupportedDatasets, bare, fit, hints
from core.config import PROJECT_ROOT, GCNConfig, PipelineConfig, Trackers, TrainConfig, UserError, derive_seed, plain
from core.hashes import code_key, key_of, sha256_arrays
from core.store import build_stage, sha256_folder
from core.yaml_files import load_config


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"b": 1, "a": [2]})
    assert path.read_text().startswith('{\n "b": 1,\n "a": [\n  2\n ],\n "digest": "')

    def fails() -> None:
        with writing(path) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"b": 1, "a": [2]}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/x.* with --output-dir"):
        write_text(tmp_path / "file" / "x", "")
    with pytest.raises(UserError, match=r"cannot (write|lock) .*file/"):
        build_stage(tmp_path / "file", "s", {}, lambda folder: {})


def test_stage_is_made_once_for_the_same_inputs_and_again_for_others(tmp_path):
    made = []

    def make(folder):
        made.append(folder)
        write_text(folder / "out.txt", "content")
        return {"figure": 7}

    first = build_stage(tmp_path, "stage", {"a": 1, "b": 2}, make)
    again = build_stage(tmp_path, "stage", {"b": 2, "a": 1}, make)
    assert (first.path, first.facts, len(made)) == (again.path, {"figure": 7}, 1)
    other = build_stage(tmp_path, "stage", {"a": 1, "b": 3}, make)
    assert other.path != first.path
    assert len(made) == 2
    (first.path / "out.txt").write_text("contenT")  # same size, another byte
    build_stage(tmp_path, "stage", {"a": 1, "b": 2}, make)
    assert len(made) == 3
    assert (first.path / "out.txt").read_text() == "content"


def test_a_failed_stage_leaves_nothing(tmp_path):
    def fails(folder):
        write_text(folder / "out.txt", "half")
        raise KeyError

    with pytest.raises(KeyError):
        build_stage(tmp_path, "stage", {}, fails)
    assert list(tmp_path.iterdir()) == []


def test_tensor_files_are_equal_bytes_and_garbage_is_refused(tmp_path):
    facts = {name: index for index, name in enumerate("abcdefgh")}
    paths = [tmp_path / name for name in ("one", "two", "three")]
    for path in paths:
        write_tensors(path, {"w": np.eye(3, dtype=np.float32)}, facts)
    assert len({path.read_bytes() for path in paths}) == 1
    tensors, again = read_tensors(paths[0])
    assert again == facts
    assert (tensors["w"] == np.eye(3)).all()
    paths[0].write_bytes(paths[0].read_bytes()[:-3])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        read_tensors(paths[0])
    with pytest.raises(UserError, match="there is no file"):
        read_tensors(tmp_path / "none")


def test_hashes_see_what_matters(tmp_path):
    zeros = np.zeros(6, np.float32)
    others = [zeros.reshape(2, 3), zeros.astype(np.int32), np.array([1, 0, 0, 0, 0, 0], np.float32)]
    assert len({sha256_arrays([array]) for array in (zeros, *others)}) == 4
    assert sha256_arrays([zeros]) == sha256_arrays([np.zeros(12, np.float32)[::2]])
    assert key_of({"a": 1, "b": [2]}) == key_of({"b": [2], "a": 1}) != key_of({"a": 1, "b": [3]})
    (tmp_path / "x").write_text("1")
    before = sha256_folder(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    assert sha256_folder(tmp_path) == before
    (tmp_path / "x").rename(tmp_path / "y")
    assert sha256_folder(tmp_path) != before
    assert code_key("unlearn.masks") != code_key("model")


def test_derived_seeds_are_fixed_and_apart():
    assert derive_seed(0, "random", 100) == derive_seed(0, "random", 100) == 1501228317691009263
    seeds = {derive_seed(*parts) for parts in ((0, "a"), (1, "a"), (0, "b"), (0, "a", ""), (0, "a", 1), (0, "a1"))}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_yaml_is_layered_and_plain_gives_it_back(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("forget_class: 3\ngcn:\n  steps: 9\n  prior: UNIFORM\noutput_dir: ~/x\n")
    two.write_text("gcn: {steps: 11}\nkappa_list: [7, 8]\n")
    config = load_config([one, two])
    assert (config.forget_class, config.gcn.steps, config.gcn.prior.value) == (("3",), 11, "UNIFORM")
    assert config.kappa_list == (7, 8)
    assert "~" not in str(config.output_dir)
    assert config.gcn == GCNConfig(steps=11, prior=config.gcn.prior)
    (tmp_path / "again.yaml").write_text(json.dumps(plain(config)))
    assert load_config([tmp_path / "again.yaml"]) == config
    assert load_config([]) == PipelineConfig()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gcn: {stepz: 1}", "bad.yaml, line 1: gcn has no field 'stepz': did you mean 'steps'?"),
        ("seed: -1", "seed is -1: give a whole number from 0"),
        ("kappa_list: [0]", "kappa_list is 0: give a whole number from 1"),
        ("kappa_list: [5, 5]", "name each value once"),
        ("data: {val_fraction: 1.0}", "data.val_fraction is 1.0: give a number from 1e-06 to 0.999999"),
        ("device: gpu", "choose auto, cpu, cuda or cuda:N"),
        ("reporter: {formats: [gif]}", "reporter.formats has gif: choose from png, svg, pdf"),
    ],
)
def test_a_wrong_value_is_named(tmp_path, text, said):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_config([tmp_path / "bad.yaml"])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_python_and_command_line_start_from_the_same_values():
    """`PipelineConfig()` is what `uv run main.py` runs; the command line's file adds training curves, nothing else."""
    shipped = load_config([PROJECT_ROOT / "configs/default.yaml"])
    assert shipped == replace(PipelineConfig(), tracker=Trackers.trackio)


# --- what people write in YAML files ----------------------------------------------------------------------

TAKEN = {
    "forget_class: no": ("forget_class", ("no",)),
    "forget_class: 007": ("forget_class", ("007",)),
    "forget_class: '7'": ("forget_class", ("7",)),
    "forget_class: 7": ("forget_class", ("7",)),
    "forget_class: 1e5": ("forget_class", ("1e5",)),
    "forget_class: 2024-01-31": ("forget_class", ("2024-01-31",)),
    "forget_class: [null_, yes, 3]": ("forget_class", ("null_", "yes", "3")),
    "mask_layer: None": ("mask_layer", None),
    "mask_layer: ~": ("mask_layer", None),
    "mask_layer: -1": ("mask_layer", (-1,)),
    "kappa_list: 200": ("kappa_list", (200,)),
    "train: {lr: 1e-3}": ("train.lr", 0.001),
    "train: {lr: 1}": ("train.lr", 1.0),
    "resume: yes": ("resume", True),
    "resume: Off": ("resume", False),
    "vision_dataset: cifar10": ("vision_dataset", SupportedDatasets.CIFAR10),
    "gcn: {prior: uniform}": ("gcn.prior", GCNPriorDistribution.UNIFORM),
    "tracker: none": ("tracker", Trackers.none),
    "dataset_path: 2024": ("dataset_path", Path("2024")),
    "eval: {mask_strategy: None}": ("eval.mask_strategy", None),
    "": ("seed", 0),
    "# words only": ("seed", 0),
}


@pytest.mark.parametrize("text", TAKEN)
def test_the_field_says_what_a_word_is(tmp_path, text):
    """`no` is a switch where the field is one and a name where it takes names; so is every other word."""
    (tmp_path / "good.yaml").write_text(text)
    value = load_config([tmp_path / "good.yaml"])
    name, wanted = TAKEN[text]
    for part in name.split("."):
        value = getattr(value, part)
    assert (value, type(value)) == (wanted, type(wanted))


REFUSED = {
    "mask_layer: second": (
        "line 1: mask_layer is second: give a whole number, or several in brackets",
        "mask_layer: [-2]",
    ),
    "mask_layer: {a: 1}": ("mask_layer is {'a': '1'}", "or null"),
    "forget_class:": ("forget_class is null: give a text or a whole number, or several in brackets: [a, b]",),
    "seed: [1, 2]": ("seed is ['1', '2']: give a whole number from 0", "e.g. `seed: 0`"),
    "seed: 1.5": ("seed is 1.5: give a whole number",),
    "seed: true": ("seed is true: give a whole number",),
    "resume: maybe": ("resume is maybe: give true or false", "`resume: false`"),
    "\nvision_dataset: NOPE": ("line 2: vision_dataset is NOPE: give one of DIGITS, FASHION_MNIST",),
    "train:\n  epochs: .inf": ("line 2: train.epochs is .inf: give a whole number",),
    "train: {lr: .nan}": ("train.lr is .nan: give a number",),
    "train: {lr: nan}": ("train.lr is nan: give a number",),
    "train: {lr: 1e308}": ("train.lr is 1e308: give a number above 0 to 1e+30",),
    "train:": ("train is null: it is a section, write `train: {field: value}`",),
    "train: 3": ("train is 3: it is a section",),
    "epochs: 3": ("has no field 'epochs': did you mean train.epochs, written `train: {epochs: ...}`?",),
    "train.epochs: 3": ("has no field 'train.epochs': did you mean train.epochs, written `train: {epochs: ...}`?",),
    "train: {seed: 3}": ("train has no field 'seed': did you mean seed, written `seed: ...` at the margin?",),
    "forget-class: 3": ("has no field 'forget-class': did you mean 'forget_class'?",),
    "sweep: {over: {}}": ("main.py sweep",),
    "seed: 1\ntracker: none\nseed: 2": ("line 1: seed stands in line 3 too",),
    "train:\n\tepochs: 3": ("line 2 ('epochs: 3'): a tab stands in it",),
    "a: [1": ("a bracket, quote, colon or indentation is missing",),
    "seed: 1\n---\nseed: 2": ("a second document begins there",),
    "- 1": ("holds ['1']: give fields and values",),
    "words": ("holds words: give fields and values",),
    "? [a]\n: b": ("a key that is no word",),
    "seed: !!python/object:os.system x": ("seed carries the tag",),
    "a: &a [*a]": ("a holds itself",),
    "dataset_path: ${oc.env:HF_TOKEN}": (
        "dataset_path is '${oc.env:HF_TOKEN}': a file's values",
        "as they stand",
    ),
    "forget_class: ['${seed}']": ("a file's values are taken as they stand",),
    "sweep: {over: {dataset_path: ['${oc.env:HF_TOKEN}']}}": ("taken as they stand",),
    "dataset_path: ''": ("dataset_path is '': give a path",),
    "kappa_list: []": ("kappa_list is empty",),
    "[" * 3000: ("nested too deeply",),
    "seed: \x01": ("control characters",),
}
FOREIGN = (
    "$VALUE",
    "ValidationError",
    "full_key",
    "object_type",
    "ScalarNode",
    "found character",
    "expected",
    "could not",
)


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_what_a_file_gets_wrong_is_said_in_our_words(tmp_path, text, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_0123")
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config([path])
    said = str(caught.value)
    assert said.startswith(str(path))
    assert [part for part in REFUSED[text] if part not in said] == [], said
    assert [word for word in (*FOREIGN, "hf_0123", "\n") if word in said] == []


def leaves(kind=PipelineConfig, prefix="") -> dict:
    """Dotted name -> type of every field."""
    found = {}
    for name, hint in hints(kind).items():
        found |= leaves(bare(hint), f"{prefix}{name}.") if is_dataclass(bare(hint)) else {prefix + name: hint}
    return found


WRONG = (
    [[1]],
    {"a": 1},
    True,
    -1,
    1.5,
    float("inf"),
    float("nan"),
    1e308,
    -1e308,
    2**63,
    "word",
    "",
    None,
    "2001-01-01",
)


@pytest.mark.parametrize("name", leaves())
def test_any_value_fits_or_is_refused_by_name(tmp_path, name):
    """Every field x values of every kind: a configuration, or one sentence with the file and the field in it."""
    for value in WRONG:
        nested = value
        for part in reversed(name.split(".")):
            nested = {part: nested}
        path = tmp_path / "some.yaml"
        path.write_text(yaml.safe_dump(nested))
        try:
            assert isinstance(load_config([path]), PipelineConfig)
        except UserError as error:
            said = str(error)
            assert name in said, (value, said)
            assert str(path) in said
            assert [word for word in (*FOREIGN, "\n") if word in said] == []


def test_every_number_has_a_range_and_keeps_to_it(tmp_path):
    """No field takes what is not finite, or an integer that no counter holds."""
    for name, hint in leaves().items():
        kinds = [part for part in (hint, *get_args(hint)) if bare(part) in (int, float)]
        if not kinds or name == "forget_class":
            continue
        for value in (math.inf, -math.inf, math.nan, 1e308, -1e308):
            with pytest.raises(UserError):
                fit(value, hint, name)
        if bare(kinds[0]) is int and get_origin(bare(hint)) is not tuple:
            with pytest.raises(UserError):
                fit(2**63, hint, name)


def test_python_says_the_same_as_files():
    with pytest.raises(UserError, match=r"train.epochs is 'many': give a whole number"):
        TrainConfig(epochs="many")
    assert PipelineConfig(vision_dataset="digits", forget_class=3) == PipelineConfig(forget_class=(3,))
