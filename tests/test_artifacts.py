"""Nothing half-written, nothing reused on doubt."""

import json
from dataclasses import replace

import numpy as np
import pytest

from artifacts import read_json, read_tensors, write_json, write_tensors, write_text, writing
from config import PROJECT_ROOT, GCNConfig, PipelineConfig, Trackers, UserError, derive_seed, plain
from config_files import load_config
from hashes import code_key, key_of, sha256_arrays
from store import build_stage, sha256_folder


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"b": 1, "a": [2]})
    assert path.read_text() == '{\n "b": 1,\n "a": [\n  2\n ]\n}\n'

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
    assert code_key("masks.py") != code_key("masks.py", "model.py")


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
    assert (config.forget_class, config.gcn.steps, config.gcn.prior.value) == ((3,), 11, "UNIFORM")
    assert config.kappa_list == (7, 8)
    assert "~" not in str(config.output_dir)
    assert config.gcn == GCNConfig(steps=11, prior=config.gcn.prior)
    (tmp_path / "again.yaml").write_text(json.dumps(plain(config)))
    assert load_config([tmp_path / "again.yaml"]) == config
    assert load_config([]) == PipelineConfig()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gcn: {stepz: 1}", "bad.yaml: Key 'stepz' not in 'GCNConfig'"),
        ("seed: -1", "seed is -1: give a number >= 0"),
        ("kappa_list: [0]", "kappa_list holds 0: every entry must be at least 1"),
        ("kappa_list: [5, 5]", "name each value once"),
        ("data: {val_fraction: 1.0}", "give a share between 0 and 1"),
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
