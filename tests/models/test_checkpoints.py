"""Networks and graphs that a user brings: read whatever holds them, or refused in one sentence that names the file."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from core.artifacts import appending_array
from core.config import GCNConfig, GraphConfig, PipelineConfig, SupportedDatasets, SupportedVisionModels, UserError
from data import LAYOUT_FILE, GraphDataset, GraphGenerator
from model import HookedMLPClassifier, HookedModel, MaskingGCN, save_classifier, vision_model_loader
from models.checkpoints import load_state, read_checkpoint
from stages.chain import Stages
from tests.helpers.common import LOG_LINE
from unlearn.requests import Unlearner
from utils_data import get_unlearning_dataset

MLP = SupportedVisionModels.HookedMLPClassifier
SHAPE = (10, 1, 8)


@pytest.fixture
def model() -> HookedModel:
    torch.manual_seed(0)
    return HookedMLPClassifier(*SHAPE).eval()


def written(model: nn.Module, path: Path, change: Callable = lambda name, value: (name, value)) -> Path:
    """A classifier as `run` writes it, its tensors changed by somebody who kept the facts beside them."""
    from safetensors import safe_open

    save_classifier(model, path, MLP, SHAPE, {})
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
    save_file(dict(change(name, value) for name, value in load_file(path).items()), path, metadata=facts)
    return path


def same(path: Path, model: nn.Module) -> bool:
    loaded = vision_model_loader(MLP, *SHAPE, path)
    return all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        vision_model_loader(MLP, *SHAPE, path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "model.module."])
@pytest.mark.parametrize("container", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_state_dicts_of_training_scripts(prefix, container, zipped, model, tmp_path):
    state = {prefix + name: value for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    value = {container: state, "optimizer": optimizer, "epoch": 3} if container else state
    torch.save(value, tmp_path / "state.pt", _use_new_zipfile_serialization=zipped)
    assert same(tmp_path / "state.pt", model)
    facts_kept = written(model, tmp_path / "own.safetensors", lambda name, value: (prefix + name, value))
    assert same(facts_kept, model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2"])
def test_kinds_of_floats_are_converted_and_said(dtype, model, tmp_path, capfd):
    kind = getattr(torch, dtype)
    path = written(model, tmp_path / "kind.safetensors", lambda name, value: (name, value.to(kind)))
    loaded = vision_model_loader(MLP, *SHAPE, path).state_dict()
    assert all(value.dtype is torch.float32 for value in loaded.values())
    assert all(torch.equal(loaded[name], value.to(kind).float()) for name, value in model.state_dict().items())
    lines = [line for line in capfd.readouterr().err.splitlines() if str(path) in line]
    assert [line.endswith(f"{path} holds {dtype}: converted to float32") for line in lines] == [True]
    assert all(LOG_LINE.match(line) for line in lines)


def test_wrappers_inside_a_model(tmp_path):
    """torch.compile or DataParallel around a part of a model leaves its mark in the middle of a name."""
    inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    wrapped = {f"0._orig_mod.{name.removeprefix('0.')}" if name.startswith("0") else name: value + 1 for name, value in
               inner.state_dict().items()}  # fmt: skip
    torch.save(wrapped, tmp_path / "x.pt")
    load_state(inner, read_checkpoint(tmp_path / "x.pt"))
    assert all(
        torch.equal(inner.state_dict()[name.replace("_orig_mod.", "")], value) for name, value in wrapped.items()
    )


# --- refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["facts", "pt"])
def test_numbers_that_are_none(value, kind, model, tmp_path):
    with torch.no_grad():
        model.linears[1].weight[0, 0] = value
    path = tmp_path / f"bad.{kind}"
    if kind == "pt":
        torch.save(model.state_dict(), path)
    else:
        written(model, path)
    assert "holds 1 values that are not finite in linears.1.weight" in refusal(path)


def test_a_changed_value_is_damage(model, tmp_path):
    """Finite, but not what was written: the digest in the file says so."""
    path = written(
        model, tmp_path / "one.safetensors", lambda name, value: (name, value + (name == "linears.1.weight"))
    )
    assert "is damaged" in refusal(path)


class Unknown(nn.Module):
    """A model whose class is not part of torch."""


def whole_model(model: nn.Module, path: Path) -> None:
    torch.save(model, path)


def script(model: nn.Module, path: Path) -> None:
    torch.jit.save(torch.jit.trace(model, torch.zeros(1, 1, 8, 8)), path)


def plain_pickle(model: nn.Module, path: Path) -> None:
    path.write_bytes(pickle.dumps({name: value.tolist() for name, value in model.state_dict().items()}))


def two_models(model: nn.Module, path: Path) -> None:
    torch.save({"state_dict": model.state_dict(), "state_dict_ema": model.state_dict()}, path)


def other_classes(model: nn.Module, path: Path) -> None:
    torch.save(HookedMLPClassifier(7, 1, 8).state_dict(), path)


def other_size(model: nn.Module, path: Path) -> None:
    torch.save(HookedMLPClassifier(10, 1, 9).state_dict(), path)


def other_names(model: nn.Module, path: Path) -> None:
    torch.save({f"fc{n}.{part}": torch.zeros(2) for n in range(3) for part in ("weight", "bias")}, path)


def integers(model: nn.Module, path: Path) -> None:
    torch.save({name: (127 * value).to(torch.int8) for name, value in model.state_dict().items()}, path)


def sparse(model: nn.Module, path: Path) -> None:
    torch.save({name: value.to_sparse() for name, value in model.state_dict().items()}, path)


def a_tensor(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict()["linears.0.weight"], path)


def no_tensors(model: nn.Module, path: Path) -> None:
    torch.save({"epoch": 3, "loss": 0.5}, path)


def a_gcn(model: nn.Module, path: Path) -> None:
    unlearner = Unlearner.fresh(GCNConfig(hidden_dim=8))
    unlearner.gcn.save(path, unlearner.facts)


def empty(model: nn.Module, path: Path) -> None:
    path.touch()


def half(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def picture(model: nn.Module, path: Path) -> None:
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))


REFUSALS = [
    (
        whole_model,
        r"pickled model, .*\(model\.HookedMLPClassifier, torch\..*\): .*torch\.save\(model\.state_dict\(\), 'sta",
    ),
    (script, r"TorchScript .*torch\.save\(model\.state_dict\(\)"),
    (plain_pickle, "no whole file of torch.save"),
    (two_models, r"several models \(state_dict, state_dict_ema\): save the one that is meant"),
    (other_classes, "tells 7 classes apart, the dataset has 10"),
    (other_size, r"linears\.0\.weight \[128, 81\], needed \[128, 64\]"),
    (
        other_names,
        r"3 tensors are missing \(linears\.0\.weight, .*, linears\.2\.weight\) and "
        r"6 tensors are unexpected \(fc0\.bias, fc0\.weight, fc1\.bias, \.\.\.\)",
    ),
    (integers, r"int8 in linears\.0\.weight: give the model with plain float32 weights"),
    (sparse, r"linears\.0\.weight: give the model with plain float32 weights"),
    (a_tensor, "holds a Tensor, no state dict"),
    (no_tensors, "holds no tensors but 'epoch', 'loss'"),
    (a_gcn, "is a GCN, no classifier: name it with gcn_path"),
    (empty, "neither a whole safetensors file nor one of torch.save"),
    (half, "no whole file of torch.save"),
    (picture, "neither a whole safetensors file nor one of torch.save"),
]


@pytest.mark.parametrize(("make", "message"), REFUSALS, ids=[make.__name__ for make, _ in REFUSALS])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_what_is_refused(make, message, model, tmp_path):
    make(model, tmp_path / "given")
    assert re.search(message, refusal(tmp_path / "given"))


def test_nothing_in_a_file_is_run(model, tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    torch.save({"state_dict": model.state_dict(), "trap": Trap()}, tmp_path / "trap.pt")
    assert "pickled model" in refusal(tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()


def test_networks_in_place_of_each_other_and_broken(model, tmp_path):
    save_classifier(model, tmp_path / "classifier", MLP, SHAPE, {})
    a_gcn(model, tmp_path / "gcn")
    with pytest.raises(UserError, match="is a classifier, no GCN"):
        MaskingGCN.load(tmp_path / "classifier")
    unlearner, facts = Unlearner.load(tmp_path / "gcn")
    with torch.no_grad():
        unlearner.gcn.readout.bias[0] = float("nan")
    unlearner.gcn.save(tmp_path / "nan", facts)
    with pytest.raises(UserError, match=r"nan holds 1 values that are not finite in readout\.bias"):
        MaskingGCN.load(tmp_path / "nan")
    facts["masking_gcn"]["hidden_dim"] = 10**9
    save_file(load_file(tmp_path / "gcn"), tmp_path / "big", metadata={"facts": json.dumps(facts)})
    with pytest.raises(UserError, match="name more values than it holds"):
        MaskingGCN.load(tmp_path / "big")


# --- a run ------------------------------------------------------------------------------------------------


def test_given_files_are_checked_before_anything_is_made(model, tmp_path):
    """And what they lead to later is blamed on them, too: weights too large, scores that are no numbers."""
    (tmp_path / "bad").write_bytes(b"PK\3\4")
    for name in ("trained_vision_model_path", "gcn_path"):
        with pytest.raises(UserError, match=r"no whole file of torch\.save"):
            Stages(PipelineConfig(output_dir=tmp_path / "out", device="cpu", **{name: tmp_path / "bad"}))
    with torch.no_grad():
        model.linears[1].weight.fill_(1e38)
    save_classifier(model, tmp_path / "large", MLP, SHAPE, {})
    stages = Stages(
        PipelineConfig(output_dir=tmp_path / "out", device="cpu", trained_vision_model_path=tmp_path / "large")
    )
    with pytest.raises(UserError, match="large answers with numbers that are not finite"):
        _ = stages.classifier
    assert not (tmp_path / "out/checkpoints").exists()


def test_scores_of_a_given_gcn_are_its_own(model, graphs, tmp_path):
    unlearner = Unlearner.fresh(GCNConfig(hidden_dim=8))
    with torch.no_grad():
        unlearner.gcn.readout.weight.fill_(3e38)
    unlearner.gcn.save(tmp_path / "gcn", unlearner.facts)
    save_classifier(model, tmp_path / "classifier", MLP, SHAPE, {})
    given = {"trained_vision_model_path": tmp_path / "classifier", "graph_dir": graphs, "gcn_path": tmp_path / "gcn"}
    stages = Stages(PipelineConfig(output_dir=tmp_path / "out", device="cpu", **given))
    with pytest.raises(UserError, match=r"gcn gives scores that are not finite .*: give another GCN"):
        stages.learn_importance(300)


# --- graphs -----------------------------------------------------------------------------------------------


def made(model: HookedModel, folder: Path, **data: int) -> Path:
    folder.mkdir()
    dataset = get_unlearning_dataset(SupportedDatasets.DIGITS, 64)
    GraphGenerator(model, dataset, -2, GraphConfig(num_samples=200, min_per_class=20), **data).generate(folder)
    return folder


@pytest.fixture
def graphs(model, tmp_path) -> Path:
    return made(model, tmp_path / "graphs")


def given_graphs(model: HookedModel, folder: Path, tmp_path: Path) -> Stages:
    save_classifier(model, tmp_path / "classifier", MLP, SHAPE, {})
    given = {"trained_vision_model_path": tmp_path / "classifier", "graph_dir": folder}
    return Stages(PipelineConfig(output_dir=tmp_path / "out", device="cpu", **given))


def put(path: Path, values: np.ndarray) -> None:
    with appending_array(path, values.shape, values.dtype.type) as append:
        append(values)


def array(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return lambda path: put(path, change(np.load(path)))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def one_nan(values: np.ndarray) -> np.ndarray:
    values[3, 2] = np.nan
    return values


GRAPH_CHANGES = {
    "gone": (Path.unlink, "there is no file"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "is damaged"),
    "half precision": (array(lambda values: values.astype(np.float16)), "is float16"),
    "fewer rows": (array(lambda values: values[:-1]), "is float32"),
    "transposed": (array(lambda values: values.T), "is float32"),
    "a scalar": (array(lambda values: np.float32(1).reshape(())), "is float32"),
    "NaN": (array(one_nan), "holds values that are not finite"),
    "rows of other images": (array(lambda values: values[::-1]), "is not what this classifier makes"),
    "scaled": (array(lambda values: values * np.float32(1.1)), "is not what this classifier makes"),
}


@pytest.mark.parametrize("name", ["h", "z", "delta"])
@pytest.mark.parametrize("change", GRAPH_CHANGES)
def test_graphs_that_do_not_fit(name, change, model, graphs, tmp_path):
    do, message = GRAPH_CHANGES[change]
    assert given_graphs(model, graphs, tmp_path).graphs.graph.num_vertices == 64 * 128
    do(graphs / f"{name}.npy")
    with pytest.raises(UserError, match=message) as caught:
        given_graphs(model, graphs, tmp_path)
    assert str(graphs) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_flipped_bits_of_a_header(model, graphs, tmp_path):
    """Each bit of the lowest of every byte: refused, or of no meaning (a blank of the padding)."""
    whole = (graphs / "z.npy").read_bytes()
    for place in range(128):
        flip(graphs / "z.npy", place)
        refused = None
        try:
            assert np.array_equal(GraphDataset(graphs).z, np.frombuffer(whole[128:], np.float32).reshape(-1, 64)), place
        except UserError as error:
            refused = str(error)
        assert refused is None or str(graphs / "z.npy") in refused, place
        (graphs / "z.npy").write_bytes(whole)


def test_labels_of_other_images(model, graphs, tmp_path):
    labels = np.load(graphs / "labels.npy")
    put(graphs / "labels.npy", np.roll(labels, 1))
    with pytest.raises(UserError, match=r"delta\.npy is not what this classifier makes of h\.npy and labels\.npy"):
        given_graphs(model, graphs, tmp_path)
    put(graphs / "labels.npy", np.where(labels == 9, 8, labels))
    with pytest.raises(UserError, match="no graph of class 9"):
        given_graphs(model, graphs, tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"shapes": [[64]], "joined": [], "names": ["x"]}', '{"shapes": 3}'])
def test_layouts_that_say_nothing(text, model, graphs, tmp_path):
    (graphs / LAYOUT_FILE).write_text(text)
    with pytest.raises(UserError, match=LAYOUT_FILE):
        given_graphs(model, graphs, tmp_path)


def test_graphs_of_another_run(model, graphs, tmp_path):
    """Whole ones of another classifier or layer, and single arrays of one."""
    other = made(HookedMLPClassifier(*SHAPE).eval(), tmp_path / "other")
    with pytest.raises(UserError, match="other holds graphs of another classifier"):
        given_graphs(model, other, tmp_path)
    shutil.copy(other / "z.npy", graphs / "z.npy")
    with pytest.raises(UserError, match=r"z\.npy is not what this classifier makes"):
        given_graphs(model, graphs, tmp_path)
