"""A sealed checkpoint is the parent with other bits in the mask's places, in the parent's own container: no more."""

import hashlib
import json
import os
import struct
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import mimu.files
from mimu import Mask, MaskError, describe_parent, restore, seal
from tests.helpers.foreign import CAT, Tied, mask_on, mlp, mobilenet, put, quantised, resnet, vit

NETS = {
    "mlp": (mlp, ["0.weight", "2.weight"]),
    "head": (mlp, ["2.weight", "2.bias"]),
    "resnet": (resnet, ["layer4.0.conv2.weight"]),
    "mobilenet": (mobilenet, ["features.11.block.1.0.weight", "classifier.0.weight"]),
    "vit": (vit, ["mlp.2.weight"]),
}


def masked_by_numpy(state: dict, mask: Mask) -> dict[str, np.ndarray]:
    found = {name: value.detach().numpy().copy() for name, value in state.items()}
    for name, flat in mask.positions.items():
        found[name].reshape(-1)[flat.numpy()] = mask.values[name].numpy() if name in mask.values else 0
    return found


both_kinds = pytest.mark.parametrize("values", [False, True], ids=["zeros", "values"])


def same(state: dict, expected: dict[str, np.ndarray]) -> bool:
    """Whether the keys, in their order, and all bytes are the same."""
    return list(state) == list(expected) and all(
        state[key].numpy().tobytes() == np.ascontiguousarray(value).tobytes() for key, value in expected.items()
    )


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


# --- containers -------------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_sealed_state_dict_is_numpys_and_loads_as_the_parents(name, suffix, values, tmp_path):
    make, targets = NETS[name]
    model, count = make(), 4 if name == "head" else 9
    mask, parent, out = (
        mask_on(model, targets, count, values=values),
        tmp_path / f"mine{suffix}",
        tmp_path / f"sealed{suffix}",
    )
    if suffix == ".pt":
        torch.save(model.state_dict(), parent)
    else:
        save_file(model.state_dict(), parent, {"format": "pt", "note": "mine"})
    before = parent.read_bytes()
    told = seal(parent, mask, out, removed=tmp_path / "key")
    assert parent.read_bytes() == before
    assert (told.out, told.fill, told.seed, told.left_out) == (out, "zero", None, [])
    assert told.weights == dict.fromkeys(targets, count)
    assert told.replaced == ({name: int((mask.positions[name] % 2).sum()) for name in targets} if values else {})
    read = torch.load(out, weights_only=True) if suffix == ".pt" else load_file(out)
    expected = masked_by_numpy(model.state_dict(), mask)
    assert same(read, expected if suffix == ".pt" else {key: expected[key] for key in read})
    fresh = make(1)
    fresh.load_state_dict(read, strict=True)
    with mask.applied(model):
        assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in model.state_dict().items())
    exact = restore(out, tmp_path / "key", tmp_path / f"again{suffix}")
    if suffix == ".safetensors":
        assert exact
        assert (tmp_path / "again.safetensors").read_bytes() == before
    again = (
        torch.load(tmp_path / "again.pt", weights_only=True)
        if suffix == ".pt"
        else load_file(tmp_path / "again.safetensors")
    )
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())
    assert left_behind(tmp_path) == []


def test_only_the_masked_bytes_of_a_safetensors_file_differ(tmp_path):
    model = mlp()
    mask = mask_on(model, "2.weight")
    save_file(model.state_dict(), tmp_path / "a", {"format": "pt"})
    seal(tmp_path / "a", mask, tmp_path / "b")
    a, b = ((tmp_path / name).read_bytes() for name in "ab")
    (length,) = struct.unpack("<Q", a[:8])
    begin = 8 + length + json.loads(a[8 : 8 + length])["2.weight"]["data_offsets"][0]
    allowed = {begin + 4 * place + byte for place in mask.positions["2.weight"].tolist() for byte in range(4)}
    differing = {at for at, (x, y) in enumerate(zip(a, b, strict=True)) if x != y}
    assert differing
    assert differing <= allowed
    with safe_open(tmp_path / "b", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


WRAPPED = {
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state},
    "model_state_dict": lambda state: {"model_state_dict": state},
    "module.": lambda state: {f"module.{key}": value for key, value in state.items()},
    "_orig_mod.module.": lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
    "nested": lambda state: {"model": {"state_dict": {f"module.{key}": value for key, value in state.items()}}},
    "lightning": lambda state: {
        "state_dict": {f"model.net.{key}": value for key, value in state.items()},
        "hparams": {"a": [1]},
    },
    "renamed": lambda state: {f"backbone.{key.replace('weight', 'kernel')}": value for key, value in state.items()},
}


def flat(value: object, path: tuple = ()) -> dict[tuple, object]:
    """All leaves of nested tables."""
    if not isinstance(value, dict):
        return {path: value}
    return {key: leaf for name, inner in value.items() for key, leaf in flat(inner, (*path, name)).items()}


@pytest.mark.parametrize("name", WRAPPED)
def test_keys_and_nesting_stay_and_the_content_finds_the_target(name, tmp_path):
    model = mlp()
    mask, value = mask_on(model, "2.weight"), WRAPPED[name](model.state_dict())
    torch.save(value, tmp_path / "a.pt")
    told = seal(tmp_path / "a.pt", mask, tmp_path / "b.pt")
    found, expected = flat(torch.load(tmp_path / "b.pt", weights_only=True)), flat(value)
    assert list(found) == list(expected)
    changed = [
        key for key, leaf in found.items() if isinstance(leaf, torch.Tensor) and not torch.equal(leaf, expected[key])
    ]
    assert len(changed) == 1
    assert list(told.weights) == [".".join(changed[0])]
    with mask.applied(model):
        assert torch.equal(found[changed[0]], model[2].weight)
    assert [leaf for leaf in found.values() if not isinstance(leaf, torch.Tensor)] == [
        leaf for leaf in expected.values() if not isinstance(leaf, torch.Tensor)
    ]


def test_the_older_format_of_torch_and_what_hangs_on_a_state_dict_stay(tmp_path):
    model = resnet()
    mask = mask_on(model, "fc.weight")
    torch.save(model.state_dict(), tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    seal(tmp_path / "a.pth", mask, tmp_path / "b.pth")
    assert (tmp_path / "b.pth").read_bytes()[:2] != b"PK"
    read = torch.load(tmp_path / "b.pth", weights_only=True)
    assert isinstance(read, OrderedDict)
    assert read._metadata == model.state_dict()._metadata
    assert same(read, masked_by_numpy(model.state_dict(), mask))


@both_kinds
def test_tied_tensors_stay_tied(values, tmp_path):
    torch.manual_seed(0)
    model = Tied()
    mask = mask_on(model, "first.weight", values=values)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    told = seal(tmp_path / "a.pt", mask, tmp_path / "b.pt", fill="noise")
    read = torch.load(tmp_path / "b.pt", weights_only=True)
    assert read["first.weight"].data_ptr() == read["second.weight"].data_ptr()
    assert told.weights == {"first.weight": 5, "second.weight": 5}
    assert told.replaced == dict.fromkeys(["first.weight", "second.weight"] if values else [], mask.replaced)
    assert int((read["first.weight"] != model.first.weight).sum()) == 5


def test_a_tied_tensor_that_is_stored_once_is_found_by_its_alias(tmp_path):
    torch.manual_seed(0)
    model = Tied()
    mask = mask_on(model, "first.weight")
    state = {key: value for key, value in model.state_dict().items() if key != "first.weight"}
    save_file(state, tmp_path / "a.safetensors")
    assert seal(tmp_path / "a.safetensors", mask, tmp_path / "b").weights == {"second.weight": 5}


@both_kinds
def test_a_cast_of_the_parent_is_sealed_in_its_own_type(values, tmp_path):
    model = mlp()
    mask = mask_on(model, "2.weight", values=values)
    state = {key: value.bfloat16() for key, value in model.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    seal(tmp_path / "a.safetensors", mask, tmp_path / "b.safetensors")
    read = load_file(tmp_path / "b.safetensors")
    assert {value.dtype for value in read.values()} == {torch.bfloat16}
    assert torch.equal(read["2.weight"], put(state["2.weight"], mask, "2.weight"))


def test_a_bfloat16_parent_is_sealed_with_bfloat16_values(tmp_path):
    model = mlp().bfloat16()
    mask = mask_on(model, ["2.weight", "2.bias"], 4, values=True)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    seal(tmp_path / "a.safetensors", mask, tmp_path / "b.safetensors", removed=tmp_path / "key")
    read = load_file(tmp_path / "b.safetensors")
    for name in mask.positions:
        assert torch.equal(read[name], put(model.state_dict()[name], mask, name))
    assert restore(tmp_path / "b.safetensors", tmp_path / "key", tmp_path / "c.safetensors")
    assert (tmp_path / "c.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_a_value_that_is_too_large_for_the_files_type_is_refused(tmp_path):
    parent = describe_parent(mlp(), ["2.weight"])
    mask = Mask(
        {"2.weight": torch.tensor([3])}, {"forgotten": CAT, "parent": parent}, {"2.weight": torch.tensor([1e9])}
    )
    torch.save(mlp().half().state_dict(), tmp_path / "a.pt")
    with pytest.raises(MaskError, match=r"1 of the mask's values in 2\.weight are too large for float16"):
        seal(tmp_path / "a.pt", mask, tmp_path / "b.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


# --- shards -----------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    """A folder as Hugging Face's: three shards, an index, settings, an optimiser's state and training arguments."""
    model = resnet()
    state, folder = model.state_dict(), tmp_path / "hf"
    folder.mkdir()
    names = [f"model-0000{part}-of-00003.safetensors" for part in (1, 2, 3)]
    index = {}
    for part, name in enumerate(names):
        keys = list(state)[part::3]
        save_file({key: state[key] for key in keys}, folder / name, {"format": "pt"})
        index |= dict.fromkeys(keys, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text("{}")
    (folder / "sub").mkdir()
    (folder / "sub" / "labels.txt").write_text("cat")
    torch.save({"state": {0: {"exp_avg": state["fc.weight"]}}}, folder / "optimizer.pt")
    torch.save(nn.Linear(1, 1), folder / "training_args.bin")
    return model, folder, index


@both_kinds
def test_only_the_shard_that_holds_a_target_is_rewritten(shards, values, tmp_path):
    model, folder, index = shards
    mask, out = mask_on(model, "layer4.0.conv2.weight", values=values), tmp_path / "sealed"
    told = seal(folder, mask, out, removed=tmp_path / "key")
    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    after = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert {path.name for path in set(before) - set(after)} == {"optimizer.pt", "training_args.bin"}
    assert len(told.left_out) == 2
    assert [path.name for path, data in after.items() if data != before[path]] == [index["layer4.0.conv2.weight"]]
    assert told.weights == {f"{index['layer4.0.conv2.weight']}: layer4.0.conv2.weight": 5}
    merged = {key: value for name in set(index.values()) for key, value in load_file(out / name).items()}
    expected = masked_by_numpy(model.state_dict(), mask)
    assert same({key: merged[key] for key in expected}, expected)
    assert restore(out, tmp_path / "key", tmp_path / "again")
    for path, data in after.items():
        assert (tmp_path / "again" / path).read_bytes() == before[path], data[:0]


def test_targets_in_several_shards(shards, tmp_path):
    model, folder, index = shards
    targets = ["layer4.0.conv2.weight", "fc.weight", "fc.bias", "conv1.weight"]
    mask = mask_on(model, targets, values=True)
    told = seal(folder, mask, tmp_path / "sealed", fill="noise", removed=tmp_path / "key")
    assert set(told.weights) == {f"{index[name]}: {name}" for name in targets}
    read = {name: load_file(tmp_path / "sealed" / index[name])[name] for name in targets}
    for name in targets:
        new = mask.values[name]
        assert torch.equal(read[name].view(-1)[mask.positions[name].long()][new != 0], new[new != 0])
    assert restore(tmp_path / "sealed", tmp_path / "key", tmp_path / "again")


def test_a_shard_that_is_missing_is_missed(shards, tmp_path):
    model, folder, index = shards
    (folder / index["layer4.0.conv2.weight"]).unlink()
    with pytest.raises(MaskError, match=r"does not hold the parent's layer4\.0\.conv2\.weight \[64x64x3x3\]"):
        seal(folder, mask_on(model, "layer4.0.conv2.weight"), tmp_path / "sealed")
    assert not (tmp_path / "sealed").exists()
    assert left_behind(tmp_path) == []


def test_a_second_copy_of_the_weights_in_the_folder_is_sealed_too_and_another_frameworks_refused(shards, tmp_path):
    model, folder, _ = shards
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    told = seal(folder, mask_on(model, "fc.weight"), tmp_path / "sealed")
    assert {name.partition(":")[0] for name in told.weights} > {"pytorch_model.bin"}
    assert int((torch.load(tmp_path / "sealed" / "pytorch_model.bin", weights_only=True)["fc.weight"] == 0).sum()) == 5
    (folder / "tf_model.h5").write_bytes(b"weights")
    with pytest.raises(MaskError, match=r"tf_model\.h5 is of another framework"):
        seal(folder, mask_on(model, "fc.weight"), tmp_path / "other")


def test_links_to_files_are_followed_and_links_to_folders_refused(shards, tmp_path):
    model, folder, _ = shards
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for path in folder.glob("*"):
        if path.is_file():
            (linked / path.name).symlink_to(path)
    seal(linked, mask_on(model, "fc.weight"), tmp_path / "sealed")
    assert not [path for path in (tmp_path / "sealed").iterdir() if path.is_symlink()]
    (linked / "sub").symlink_to(folder / "sub")
    with pytest.raises(MaskError, match="link to a folder"):
        seal(linked, mask_on(model, "fc.weight"), tmp_path / "other")


# --- averaged copies and optimisers -----------------------------------------------------------------------


def averaged(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value * 0.9 for key, value in model.state_dict().items()}


COPIES = {
    "timm": lambda model: {"state_dict": model.state_dict(), "state_dict_ema": averaged(model), "epoch": 1},
    "model_ema": lambda model: {
        "model": model.state_dict(),
        "model_ema": {f"module.{k}": v for k, v in averaged(model).items()},
    },
    "prefix": lambda model: (
        {f"net.{k}": v for k, v in model.state_dict().items()} | {f"ema_net.{k}": v for k, v in averaged(model).items()}
    ),
    "swa": lambda model: {"state_dict": model.state_dict(), "swa_state_dict": averaged(model)},
    "equal": lambda model: {
        "state_dict": model.state_dict(),
        "ema": {k: v.clone() for k, v in model.state_dict().items()},
    },
}


@both_kinds
@pytest.mark.parametrize("name", COPIES)
def test_averaged_copies_are_asked_about_then_sealed_or_dropped(name, values, tmp_path):
    model = mlp()
    mask, value = mask_on(model, "2.weight", values=values), COPIES[name](model)
    torch.save(value, tmp_path / "a.pt")
    with pytest.raises(MaskError, match="ema='seal' to seal both, or ema='drop'"):
        seal(tmp_path / "a.pt", mask, tmp_path / "b.pt")
    assert not (tmp_path / "b.pt").exists()
    weights = [key for key in flat(value) if key[-1].endswith("2.weight")]
    told = seal(tmp_path / "a.pt", mask, tmp_path / "b.pt", ema="seal", removed=tmp_path / "key")
    read = flat(torch.load(tmp_path / "b.pt", weights_only=True))
    assert list(read) == list(flat(value))
    assert len(told.weights) == len(weights) == 2
    for key in weights:
        assert torch.equal(read[key], put(flat(value)[key], mask, "2.weight"))
    restore(tmp_path / "b.pt", tmp_path / "key", tmp_path / "again.pt")
    again = flat(torch.load(tmp_path / "again.pt", weights_only=True))
    assert all(torch.equal(again[key], leaf) for key, leaf in flat(value).items() if isinstance(leaf, torch.Tensor))
    told = seal(tmp_path / "a.pt", mask, tmp_path / "c.pt", ema="drop")
    read = flat(torch.load(tmp_path / "c.pt", weights_only=True))
    assert [key for key in read if key[-1].endswith("2.weight")] == [weights[0]]
    assert not [key for key in read if "ema" in str(key) or "swa" in str(key)]
    assert any("averaged copy" in line for line in told.left_out)


def test_an_averaged_copy_in_a_safetensors_file_is_dropped_by_writing_the_rest(tmp_path):
    model = mlp()
    state = model.state_dict() | {f"model_ema.{key}": value for key, value in averaged(model).items()}
    save_file(state, tmp_path / "a.safetensors", {"format": "pt"})
    seal(tmp_path / "a.safetensors", mask_on(model, "2.weight"), tmp_path / "b.safetensors", ema="drop")
    read = load_file(tmp_path / "b.safetensors")
    assert set(read) == set(model.state_dict())
    assert int((read["2.weight"] == 0).sum()) == 5
    with safe_open(tmp_path / "b.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_averaged_copy_may_be_the_parent(tmp_path):
    """As timm loads it: then the plain weights are the others, and the copy cannot be dropped."""
    model = mlp()
    value = {"state_dict": mlp(1).state_dict(), "state_dict_ema": model.state_dict()}
    torch.save(value, tmp_path / "a.pt")
    mask = mask_on(model, "2.weight")
    with pytest.raises(MaskError, match="also holds averaged copies"):
        seal(tmp_path / "a.pt", mask, tmp_path / "b.pt")
    with pytest.raises(MaskError, match="made for the averaged copy"):
        seal(tmp_path / "a.pt", mask, tmp_path / "b.pt", ema="drop")
    seal(tmp_path / "a.pt", mask, tmp_path / "b.pt", ema="seal")
    read = torch.load(tmp_path / "b.pt", weights_only=True)
    assert [int((read[key]["2.weight"] == 0).sum()) for key in value] == [5, 5]


def test_a_layer_that_is_called_ema_is_no_copy(tmp_path):
    model = nn.ModuleDict({"ema": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    torch.save(model.state_dict(), tmp_path / "a.pt")
    assert seal(tmp_path / "a.pt", mask_on(model, "ema.weight"), tmp_path / "b.pt").weights == {"ema.weight": 5}


def test_another_version_without_such_a_name_is_refused(tmp_path):
    model = mlp()
    torch.save({"state_dict": model.state_dict(), "model": mlp(1).state_dict()}, tmp_path / "a.pt")
    with pytest.raises(MaskError, match="one version of the model"):
        seal(tmp_path / "a.pt", mask_on(model, "2.weight"), tmp_path / "b.pt", ema="seal")


OTHERS = {
    "a best epoch": {"best": {f"net.{key}": value for key, value in mlp(1).state_dict().items()}},
    "a table in a table": {"callbacks": {"checkpoint": {"weights": mlp(1).state_dict()}}},
    "a list without names": {"history": [list(mlp(1).state_dict().values())]},
    "a list of weights alone": {"history": (mlp(1)[0].weight.detach(), mlp(1)[2].weight.detach())},
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_version_is_found_wherever_it_stands(name, tmp_path):
    """Who loads it has the class back."""
    model = mlp()
    torch.save({"state_dict": model.state_dict(), **OTHERS[name]}, tmp_path / "a.pt")
    with pytest.raises(MaskError, match=r"holds other values of 2\.weight in .*one version of the model"):
        seal(tmp_path / "a.pt", mask_on(model, "2.weight"), tmp_path / "b.pt", ema="seal")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_what_has_only_the_shape_of_a_weight_is_no_version_of_it(tmp_path):
    """Neither a block's own layer, nor a layer of another table, nor a list of other things."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    more = {
        "memory": [torch.zeros(4, 4), torch.ones(7)],
        "means": {"0": torch.ones(4, 4)},
        "other.weight": torch.ones(4, 4),
    }
    torch.save({"state_dict": model.state_dict(), **more}, tmp_path / "a.pt")
    assert seal(tmp_path / "a.pt", mask_on(model, "0.weight"), tmp_path / "b.pt").weights == {"state_dict.0.weight": 5}


LISTED = {
    "of Lightning": lambda values: {"callbacks": {"EMA": {"decay": 0.9, "ema_weights": values}}},
    "without names": lambda values: {"ema": {"decay": 0.9, "shadow_params": list(values.values())}},
}


@pytest.mark.parametrize("kind", LISTED)
def test_averages_deep_in_a_file_are_asked_about_too(kind, tmp_path):
    model = mlp()
    mask, average = mask_on(model, "2.weight"), averaged(model)
    torch.save({"state_dict": model.state_dict()} | LISTED[kind](average), tmp_path / "a.pt")
    with pytest.raises(MaskError, match="ema='seal' to seal both, or ema='drop'"):
        seal(tmp_path / "a.pt", mask, tmp_path / "b.pt")
    seal(tmp_path / "a.pt", mask, tmp_path / "b.pt", ema="seal")
    read = torch.load(tmp_path / "b.pt", weights_only=True)
    if kind == "without names":
        sealed = read["ema"]["shadow_params"][list(average).index("2.weight")]
    else:
        sealed = read["callbacks"]["EMA"]["ema_weights"]["2.weight"]
    assert torch.equal(sealed, put(average["2.weight"], mask, "2.weight"))
    seal(tmp_path / "a.pt", mask, tmp_path / "c.pt", ema="drop")
    assert {key[0] for key in flat(torch.load(tmp_path / "c.pt", weights_only=True))} == {"state_dict"}


@pytest.mark.parametrize("name", ["checkpoint-500/model.safetensors", "model_ema.safetensors", "last.ckpt"])
def test_another_version_in_a_file_of_its_own_is_refused(name, tmp_path):
    """A folder of a training has earlier checkpoints beside the last."""
    model, folder = mlp(), tmp_path / "hf"
    (folder / name).parent.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    if name.endswith(".ckpt"):
        torch.save({"state_dict": {f"net.{key}": value for key, value in mlp(1).state_dict().items()}}, folder / name)
    else:
        save_file(mlp(1).state_dict(), folder / name)
    with pytest.raises(
        MaskError, match=rf"{name} holds other values of 2\.weight in .*take that file out of the folder$"
    ):
        seal(folder, mask_on(model, "2.weight"), tmp_path / "sealed")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    (folder / name).unlink()
    assert seal(folder, mask_on(model, "2.weight"), tmp_path / "sealed").weights == {"model.safetensors: 2.weight": 5}


def test_the_state_of_optimisers_is_left_out_and_said(tmp_path):
    model = mlp()
    optimiser = torch.optim.Adam(model.parameters())
    mask = mask_on(model, "2.weight")
    model(torch.zeros(1, 6)).sum().backward()
    optimiser.step()
    mask = mask_on(model, "2.weight")
    value = {"model": model.state_dict(), "optimizer": optimiser.state_dict(), "optimizer_states": [1], "epoch": 2}
    torch.save(value, tmp_path / "a.pt")
    told = seal(tmp_path / "a.pt", mask, tmp_path / "b.pt")
    assert list(torch.load(tmp_path / "b.pt", weights_only=True)) == ["model", "epoch"]
    assert told.left_out == ["optimizer (state of an optimiser)", "optimizer_states (state of an optimiser)"]


# --- what fills, and what was removed ---------------------------------------------------------------------


def test_noise_has_the_scale_of_its_layer_and_comes_from_its_seed(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 400), nn.Linear(400, 4))
    with torch.no_grad():
        model[0].weight.mul_(7)
    mask = mask_on(model, "0.weight", 20_000)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    told = [
        seal(tmp_path / "a.pt", mask, tmp_path / f"{n}.pt", fill="noise", seed=seed)
        for n, seed in enumerate((1, 1, None))
    ]
    read = [torch.load(tmp_path / f"{n}.pt", weights_only=True)["0.weight"] for n in range(3)]
    assert torch.equal(read[0], read[1])
    assert not torch.equal(read[0], read[2])
    assert [one.seed for one in told[:2]] == [1, 1]
    off = ~mask.keep()["0.weight"]
    noise, rest = read[0][off], model[0].weight.detach()[~off]
    assert torch.equal(read[0][~off], rest)
    # 20,000 draws: the standard deviation is known to 0.5 %, the mean to 0.7 % of it
    assert abs(float(noise.std() / rest.std()) - 1) < 0.02
    assert abs(float(noise.mean() / rest.std())) < 0.03
    assert int((noise == 0).sum()) == 0
    assert told[2].seed is not None
    assert str(told[2].seed).encode() not in (tmp_path / "2.pt").read_bytes()


def test_noise_stands_where_zeros_would_and_values_stand_as_the_mask_says(tmp_path):
    """The same draws for the zeros of both files, and a mask that is after it what it was before."""
    model = mlp()
    mask, digest = mask_on(model, "2.weight", 20, values=True), mask_on(model, "2.weight", 20, values=True).digest
    torch.save(model.state_dict(), tmp_path / "a.pt")
    told = seal(tmp_path / "a.pt", mask, tmp_path / "b.pt", fill="noise", seed=3, removed=tmp_path / "key")
    read = torch.load(tmp_path / "b.pt", weights_only=True)["2.weight"]
    places, new = mask.positions["2.weight"].long(), mask.values["2.weight"]
    assert torch.equal(read.view(-1)[places][new != 0], new[new != 0])
    noise = read.view(-1)[places][new == 0]
    assert 0 < mask.switched_off == len(noise) < 20
    draws = torch.randn(
        len(noise),
        generator=torch.Generator().manual_seed(int(hashlib.sha256(b"3 2.weight").hexdigest()[:15], 16)),
        dtype=torch.float64,
    )
    rest = model[2].weight[mask.keep()["2.weight"]].detach().double()
    assert torch.equal(noise, (draws * rest.std(correction=0)).float())
    assert torch.equal(read[mask.keep()["2.weight"]], model[2].weight[mask.keep()["2.weight"]])
    assert told.replaced == {"2.weight": mask.replaced}
    assert Mask(mask.positions, mask.config, mask.values).digest == digest
    restore(tmp_path / "b.pt", tmp_path / "key", tmp_path / "c.pt")
    assert torch.equal(torch.load(tmp_path / "c.pt", weights_only=True)["2.weight"], model[2].weight)


@both_kinds
def test_the_removed_values_are_in_their_own_file_and_in_no_other(values, tmp_path):
    model = mlp()
    mask = mask_on(model, "2.weight", 30, values=values)
    torch.save({"model": model.state_dict(), "extra": model[2].bias.detach()}, tmp_path / "a.pt")
    seal(tmp_path / "a.pt", mask, tmp_path / "b.pt", removed=tmp_path / "key")
    removed = [
        model[2].weight.view(-1)[place].detach().numpy().tobytes() for place in mask.positions["2.weight"].long()
    ]
    assert not [value for value in removed if value in (tmp_path / "b.pt").read_bytes()]
    assert all(value in (tmp_path / "key").read_bytes() for value in removed)


def test_removed_values_fit_one_sealed_file_alone(tmp_path):
    for seed in (0, 1):
        model = mlp(seed)
        torch.save(model.state_dict(), tmp_path / f"{seed}.pt")
        seal(
            tmp_path / f"{seed}.pt",
            mask_on(model, "2.weight"),
            tmp_path / f"s{seed}.pt",
            removed=tmp_path / f"key{seed}",
        )
    with pytest.raises(MaskError, match=r"s0\.pt is not the file that .*key1 was removed from"):
        restore(tmp_path / "s0.pt", tmp_path / "key1", tmp_path / "again.pt")
    key = bytearray((tmp_path / "key0").read_bytes())
    key[-1] ^= 1
    (tmp_path / "key0").write_bytes(key)
    with pytest.raises(MaskError, match="is not the parent's again"):
        restore(tmp_path / "s0.pt", tmp_path / "key0", tmp_path / "again.pt")
    (tmp_path / "key0").write_bytes(key[:50])
    with pytest.raises(MaskError, match="damaged or of another kind"):
        restore(tmp_path / "s0.pt", tmp_path / "key0", tmp_path / "again.pt")
    with pytest.raises(MaskError, match="damaged or of another kind"):
        restore(tmp_path / "s0.pt", tmp_path / "s1.pt", tmp_path / "again.pt")
    assert not (tmp_path / "again.pt").exists()


# --- what is refused --------------------------------------------------------------------------------------


def test_nothing_is_overwritten(tmp_path):
    model = mlp()
    mask, parent = mask_on(model, "2.weight"), tmp_path / "a.pt"
    torch.save(model.state_dict(), parent)
    os.link(parent, tmp_path / "same.pt")
    before = parent.read_bytes()
    for out in (parent, tmp_path / "same.pt", tmp_path):
        with pytest.raises(MaskError, match="is not overwritten"):
            seal(parent, mask, out)
    with pytest.raises(MaskError, match="is not overwritten"):
        seal(parent, mask, tmp_path / "b.pt", removed=parent)
    folder = tmp_path / "hf"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    with pytest.raises(MaskError, match="lies inside of the parent"):
        seal(folder, mask, folder / "sealed")
    with pytest.raises(MaskError, match="beside the sealed weights"):
        seal(folder, mask, tmp_path / "sealed", removed=tmp_path / "sealed" / "key")
    assert parent.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "hf", "same.pt"]


def test_an_interrupted_seal_leaves_nothing(tmp_path, monkeypatch):
    model = mlp()
    mask = mask_on(model, "2.weight")
    torch.save(model.state_dict(), tmp_path / "a.pt")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mimu.sealing._removed", stop)
    with pytest.raises(KeyboardInterrupt):
        seal(tmp_path / "a.pt", mask, tmp_path / "b.pt", removed=tmp_path / "key")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_copy_that_is_not_read_back_as_it_was_written_is_thrown_away(tmp_path, monkeypatch):
    model = mlp()
    mask = mask_on(model, "2.weight")
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    real = mimu.files.patch
    monkeypatch.setattr(mimu.files, "patch", lambda path, new: real(path, {at - 4: data for at, data in new.items()}))
    with pytest.raises(MaskError, match=r"was not read back"):
        seal(tmp_path / "a.safetensors", mask, tmp_path / "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def other_parent(folder: Path) -> Path:
    torch.save(mlp(1).state_dict(), folder / "a.pt")
    return folder / "a.pt"


def other_model(folder: Path) -> Path:
    save_file({"w": torch.zeros(3)}, folder / "a.safetensors")
    return folder / "a.safetensors"


def onnx(folder: Path) -> Path:
    (folder / "a.onnx").write_bytes(b"\x08\x07\x12\x07pytorch")
    return folder / "a.onnx"


def torchscript(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(mlp(), torch.zeros(1, 6)).save(folder / "a.pt")
    return folder / "a.pt"


def pickled(folder: Path) -> Path:
    torch.save(mlp(), folder / "a.pt")
    return folder / "a.pt"


def in_integers(folder: Path) -> Path:
    torch.save(quantised().state_dict(), folder / "a.pt")
    return folder / "a.pt"


def damaged(folder: Path) -> Path:
    torch.save(mlp().state_dict(), folder / "a.pt")
    (folder / "a.pt").write_bytes((folder / "a.pt").read_bytes()[:-700])
    return folder / "a.pt"


def text(folder: Path) -> Path:
    (folder / "a.txt").write_text("weights")
    return folder / "a.txt"


def no_table(folder: Path) -> Path:
    torch.save([torch.zeros(2)], folder / "a.pt")
    return folder / "a.pt"


def nothing(folder: Path) -> Path:
    return folder / "a.pt"


REFUSED = {
    other_parent: r"does not hold the parent's 2\.weight \[4x8\].*tensors of that shape: 2\.weight",
    other_model: "it has no tensor of that shape",
    onnx: "ONNX.*seal the checkpoint in PyTorch's own form",
    torchscript: "TorchScript program: save the state dict",
    pickled: r"pickled object that needs torch\.nn\.modules\.\w+.*nothing of it is run",
    in_integers: "quantised: mask the float parent|pickled object",
    damaged: "damaged or of another kind",
    text: "neither a safetensors file nor one of torch.save",
    no_table: "holds a list, no dictionary",
    nothing: "there is no file or folder",
}


@pytest.mark.parametrize(("make", "says"), REFUSED.items(), ids=lambda one: getattr(one, "__name__", ""))
def test_what_cannot_be_sealed_is_refused_in_one_sentence(make, says, tmp_path):
    parent = make(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(MaskError, match=says) as told:
        seal(parent, mask_on(mlp(), "2.weight"), tmp_path / "sealed")
    assert "\n" not in str(told.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_file_of_equal_names_is_sealed_only_if_asked_for(tmp_path):
    told = seal(other_parent(tmp_path), mask_on(mlp(), "2.weight"), tmp_path / "b.pt", any_parent=True)
    assert told.weights == {"2.weight": 5}


def test_the_name_on_disk_finds_what_content_does_not(tmp_path):
    parent = describe_parent(mlp(), ["2.weight"], names_on_disk={"2.weight": "classifier.kernel"})
    mask = Mask({"2.weight": torch.tensor([3])}, {"forgotten": CAT, "parent": parent})
    torch.save({"classifier.kernel": mlp(1)[2].weight.detach()}, tmp_path / "a.pt")
    assert seal(tmp_path / "a.pt", mask, tmp_path / "b.pt", any_parent=True).weights == {"classifier.kernel": 1}


def test_unknown_words_are_refused(tmp_path):
    with pytest.raises(MaskError, match="choose zero or noise"):
        seal(other_parent(tmp_path), mask_on(mlp(), "2.weight"), tmp_path / "b.pt", fill="ones")
