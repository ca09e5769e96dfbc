"""The mask file: small, whole, readable by anything, and refused when it says what cannot be."""

import hashlib
import json
import os
import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mimu import Config, Mask, MaskError, describe_parent
from tests.helpers.foreign import CAT, bits, mask_on, mlp, resnet, some_places, some_values

ROOT = Path(__file__).resolve().parents[2]
FACTS = {
    "preprocessing": {"source": "torchvision weights.transforms()", "size": 224},
    "scores": {
        "clean": 91.5,
        "forget": 0.4,
        "retain": 91.25,
        "n": {"clean": 5000, "forget": 500},
        "intervals": {"forget": [0.1, 1.4]},
    },
    "method": "mimu refined",
    "kappa": 40,
    "data_sha256": "ab" * 32,
    "tool": "mimu 0.1.0",
}


@pytest.fixture(params=[False, True], ids=["zeros", "values"])
def mask(request):
    """Zeros in two parameters; or zeros in the first, and both kinds in the second."""
    model = mlp()
    parent = describe_parent(model, ["0.weight", "2.weight"], "torchvision:x@mine.pt", {"2.weight": "fc.weight"})
    flat = {"0.weight": some_places(48, 30), "2.weight": some_places(32, 10, 1)}
    values = {"2.weight": some_values(flat["2.weight"])} if request.param else None
    return Mask(flat, {"forgotten": CAT, "parent": parent} | FACTS, values)


def same(one: Mask, other: Mask) -> bool:
    """Whether two masks put the same bits in the same places of the same parameters."""
    tables = [
        {name: (value.dtype, value.shape, value.numpy().tobytes()) for name, value in table.items()}
        for mask in (one, other)
        for table in (mask.positions, mask.values)
    ]
    return tables[:2] == tables[2:]


def test_a_mask_comes_back_as_it_was_from_its_folder_and_from_its_file_alone(mask, tmp_path):
    mask.save(tmp_path / "cat")
    assert sorted(path.name for path in (tmp_path / "cat").iterdir()) == [
        "README.md",
        "mask.safetensors",
        "mask_config.json",
    ]
    for place in (tmp_path / "cat", tmp_path / "cat" / "mask.safetensors"):
        again = Mask.load(place)
        assert again.config == mask.config
        assert again.digest == mask.digest
        assert same(again, mask)
    written = json.loads((tmp_path / "cat" / "mask_config.json").read_text())
    assert {key: written[key] for key in FACTS} == FACTS
    assert written["parent"]["targets"]["2.weight"]["name_on_disk"] == "fc.weight"


def test_equal_masks_are_equal_bytes(mask, tmp_path):
    mask.save(tmp_path / "a")
    Mask.load(tmp_path / "a").save(tmp_path / "b")
    for name in ("mask.safetensors", "mask_config.json", "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_mask_of_2000_weights_is_small(tmp_path):
    mask = mask_on(resnet(), "layer4.0.conv2.weight", 2000)
    mask.save(tmp_path / "m")
    assert mask.positions["layer4.0.conv2.weight"].dtype == torch.int32
    assert (tmp_path / "m" / "mask.safetensors").stat().st_size <= 16_000
    assert sum(path.stat().st_size for path in (tmp_path / "m").iterdir()) <= 16_000


def test_the_page_reads_a_mask_with_numpy_alone(mask, tmp_path):
    """The block of docs/mask-format.md runs without torch and without mimu, and finds what was put in."""
    mask.save(tmp_path / "cat")
    page = (ROOT / "docs" / "mask-format.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(import json.*?)```", page, re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    block = block.replace("masks/cat/mask.safetensors", str(tmp_path / "cat" / "mask.safetensors"))
    after = "\nimport sys\nassert not {'torch', 'mimu', 'safetensors'} & set(sys.modules)\n"
    after += "for found in (positions, values):\n"
    after += "    print(json.dumps({name: one.tolist() for name, one in found.items()}))\nprint(json.dumps(config))"
    done = subprocess.run([sys.executable, "-c", block + after], capture_output=True, text=True, check=True)
    positions, values, config = map(json.loads, done.stdout.splitlines())
    assert positions == {name: flat.tolist() for name, flat in mask.positions.items()}
    assert values == {name: new.tolist() for name, new in mask.values.items()}
    assert config.pop("digest") == mask.digest
    assert config == mask.config.plain()


def test_the_card_says_what_was_measured_and_what_a_mask_does_not_do(mask, tmp_path):
    mask.save(tmp_path / "cat")
    card = (tmp_path / "cat" / "README.md").read_text()
    assert "cat (class 3)" in card
    assert "| forget | 0.4 | 0.1 to 1.4 | 500 |" in card
    assert "| retain | 91.25 | not measured | not recorded |" in card
    assert mask.config.parent.state_sha256 in card
    if mask.values:
        assert "lists 40 weights" in card
        assert "33 of them at zero and 7 replaced by other values" in card
        assert "| parameter | shape | type | switched off | replaced |\n| --- | --- | --- | --- | --- |" in card
        assert "| 0.weight | 8 x 6 | float32 | 30 | 0 |\n| 2.weight | 4 x 8 | float32 | 3 | 7 |\n" in card
    else:
        assert "with\nthose weights at zero" in card
        assert "| 0.weight | 8 x 6 | float32 | 30 |\n| 2.weight | 4 x 8 | float32 | 10 |\n" in card
    assert "torchvision weights.transforms()" in card
    assert "neither smaller nor faster" in card
    assert "can lift it" in card
    assert "It suppresses a class; it does not erase what was learned" in card


@pytest.mark.parametrize("measured", [True, False])
def test_the_card_of_an_erasing_mask_claims_what_is_known_and_no_more(measured, mask, tmp_path):
    told = {"features_before": "fc 61", "features_may": "fc 40", "features_now": "fc 38"}
    config = replace(mask.config, method="erase, with new rows", scores=told if measured else None)
    Mask(mask.positions, config, mask.values).save(tmp_path / "cat")
    card = " ".join((tmp_path / "cat" / "README.md").read_text().split())
    assert "what two small networks lead one to expect" in card
    assert "that the class is erased is not claimed" in card
    assert ("features_now say how far" in card) == measured
    assert "It suppresses a class;" not in card


@pytest.mark.parametrize("method", ["erased by hand", "refined, then erase", None])
def test_the_first_word_of_the_method_alone_makes_an_erasing_mask(method, mask, tmp_path):
    Mask(mask.positions, replace(mask.config, method=method), mask.values).save(tmp_path / "cat")
    assert "It suppresses a class;" in (tmp_path / "cat" / "README.md").read_text()


def test_saving_again_replaces_a_mask_but_no_other_files(mask, tmp_path):
    mask.save(tmp_path / "cat")
    other = mask_on(mlp(), "0.weight")
    other.save(tmp_path / "cat")
    assert Mask.load(tmp_path / "cat").digest == other.digest
    (tmp_path / "cat" / "notes.txt").write_text("mine")
    with pytest.raises(MaskError, match=r"notes\.txt"):
        mask.save(tmp_path / "cat")
    assert Mask.load(tmp_path / "cat").digest == other.digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat"]


def test_a_failed_save_leaves_nothing(mask, tmp_path, monkeypatch):
    monkeypatch.setattr("mimu.mask.card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mask.save(tmp_path / "cat")
    assert list(tmp_path.iterdir()) == []


# --- files that are refused -------------------------------------------------------------------------------


def rewritten(path: Path, change) -> None:
    """Change (positions, config) of a mask file without making its digest anew."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    config = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["config"])
    positions = load_file(path)
    positions, config = change(positions, config) or (positions, config)
    save_file(positions, path, metadata={"config": json.dumps(config)})


def other_position(positions, config):
    positions["0.weight"][-1] = 47 - (positions["0.weight"][-1] == 47).int()


def other_score(positions, config):
    config["scores"]["forget"] = 0.0


def unsorted(positions, config):
    positions["0.weight"] = positions["0.weight"].flip(0)


def twice(positions, config):
    positions["0.weight"][1] = positions["0.weight"][0]


def outside(positions, config):
    positions["0.weight"][-1] = 48


def negative(positions, config):
    positions["0.weight"][0] = -1


def wide(positions, config):
    positions["0.weight"] = positions["0.weight"].long()


def floating(positions, config):
    positions["0.weight"] = positions["0.weight"].float()


def square(positions, config):
    positions["0.weight"] = positions["0.weight"].view(2, -1)


def stranger(positions, config):
    positions["4.weight"] = torch.tensor([1], dtype=torch.int32)


def lacking(positions, config):
    del positions["2.weight"]


def empty(positions, config):
    return {name: flat[:0] for name, flat in positions.items()}, config


def other_format(positions, config):
    config["format"] = "adapter"


def newer(positions, config):
    config["version"] = 3


def unknown_field(positions, config):
    config["run_me"] = "x"


def no_parent(positions, config):
    del config["parent"]


def no_class(positions, config):
    config["forgotten"] = []


def bad_class(positions, config):
    config["forgotten"] = [{"index": "three", "name": "cat"}]


def bad_hash(positions, config):
    config["parent"]["state_sha256"] = "../../etc"


def bad_shape(positions, config):
    config["parent"]["targets"]["0.weight"]["shape"] = [-8, -6]


def huge_shape(positions, config):
    config["parent"]["targets"]["0.weight"]["shape"] = [2**40, 2**40]


def no_digest(positions, config):
    del config["digest"]


def a_list(positions, config):
    return positions, [1]


BAD = {
    other_position: "its digest says",
    other_score: "its digest says",
    no_digest: "its digest says",
    unsorted: "not sorted",
    twice: "some are there twice",
    outside: "outside of its 48 weights",
    negative: "outside of its 48 weights",
    wide: "give torch.int32",
    floating: "give int32 or int64",
    square: "give int32 or int64",
    stranger: "4.weight, which its config does not describe",
    lacking: "describes 2.weight, in which the mask has no positions",
    empty: "no weight off",
    other_format: '"adapter" as format',
    newer: "3 as version",
    unknown_field: "unknown field 'run_me'",
    no_parent: "lacks fields in the config .*parent",
    no_class: "as forgotten",
    bad_class: '"three" as index',
    bad_hash: "64 hexadecimal digits",
    bad_shape: "as shape",
    huge_shape: "as shape",
    a_list: "no mask config",
}


@pytest.mark.parametrize(("change", "says"), BAD.items(), ids=lambda one: getattr(one, "__name__", ""))
def test_a_changed_file_is_refused(mask, tmp_path, change, says):
    mask.save(tmp_path / "cat")
    rewritten(tmp_path / "cat" / "mask.safetensors", change)
    with pytest.raises(MaskError, match=says) as told:
        Mask.load(tmp_path / "cat" / "mask.safetensors")
    assert len(str(told.value)) < 400


def test_an_edited_config_beside_the_file_is_refused(mask, tmp_path):
    mask.save(tmp_path / "cat")
    config = tmp_path / "cat" / "mask_config.json"
    whole = config.read_text()
    config.write_text(whole.replace('"forget": 0.4', '"forget": 0.0'))
    with pytest.raises(MaskError, match=r"does not say what mask\.safetensors says"):
        Mask.load(tmp_path / "cat")
    config.write_text(whole[:-9])
    with pytest.raises(MaskError, match=r"mask_config\.json is damaged"):
        Mask.load(tmp_path / "cat")
    config.write_text("[" * 100_000)
    with pytest.raises(MaskError, match=r"mask_config\.json is damaged"):
        Mask.load(tmp_path / "cat")


@pytest.mark.parametrize("kept", [0, 7, 9, 500, -1])
def test_a_cut_file_is_refused(mask, tmp_path, kept):
    mask.save(tmp_path / "cat")
    file = tmp_path / "cat" / "mask.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(MaskError, match=r"mask\.safetensors"):
        Mask.load(tmp_path / "cat")


def test_a_flipped_bit_is_never_read_as_another_mask(mask, tmp_path):
    """Every 37th bit of the file in turn: it is refused, or the mask is the very same (padding)."""
    mask.save(tmp_path / "cat")
    file = tmp_path / "cat" / "mask.safetensors"
    whole = file.read_bytes()
    for at in range(0, 8 * len(whole), 37):
        changed = bytearray(whole)
        changed[at // 8] ^= 1 << at % 8
        file.write_bytes(changed)
        try:
            again = Mask.load(file)
        except MaskError:
            continue
        assert again.config == mask.config
        assert same(again, mask)


def test_what_is_not_there_or_no_mask_is_said(tmp_path):
    with pytest.raises(MaskError, match=r"there is no file .*mask"):
        Mask.load(tmp_path / "mask")
    with pytest.raises(MaskError, match=r"there is no file .*mask\.safetensors"):
        Mask.load(tmp_path)
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(MaskError, match="holds no mask config"):
        Mask.load(tmp_path / "model.safetensors")
    torch.save({"w": torch.zeros(2)}, tmp_path / "model.pt")
    with pytest.raises(MaskError, match="damaged or of another kind"):
        Mask.load(tmp_path / "model.pt")


# --- values -----------------------------------------------------------------------------------------------

# Written by the version before values, with a parent that no model has: what it says is all that its digest depends on.
FIXED: dict[str, Any] = {
    "forgotten": [{"index": 3, "name": "cat"}],
    "parent": {
        "state_sha256": "a" * 64,
        "framework": "torch 2",
        "targets": {
            "0.weight": {"shape": [8, 6], "dtype": "float32", "sha256": "b" * 64},
            "1.weight": {"shape": [4, 8], "dtype": "bfloat16", "sha256": "c" * 64},
        },
    },
    "tool": "mimu 0.1.0",
}
PLACES = {"0.weight": torch.tensor([1, 5, 47]), "1.weight": torch.tensor([0, 31])}
OLD_DIGEST = "a8eb4fdeda80cfb4c1263dd31d493bd530dbe33ad22e2b4bc3291c5dc70fa111"
OLD_FILES = {
    "mask.safetensors": "261c5411ae40b7e63c20b4ff551c5eecdd8e61092522a75c37c7ec62c552db6d",
    "mask_config.json": "1492a9ce9ad42f847e27700eabd3d05dcf3f843b91c544fc7f6c53acff2a13cd",
}


@pytest.mark.parametrize("values", [None, {}, {"1.weight": torch.tensor([0, -0.0], dtype=torch.bfloat16)}])
def test_a_mask_of_zeros_has_the_files_and_the_digest_that_it_had_before_there_were_values(values, tmp_path):
    mask = Mask(PLACES, FIXED, values)
    assert mask.digest == OLD_DIGEST
    assert mask.config.version == 1
    mask.save(tmp_path / "m")
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / "m").iterdir()}
    del found["README.md"]  # the card, which is text for readers
    assert found == OLD_FILES
    assert Mask.load(tmp_path / "m").digest == OLD_DIGEST


def test_values_are_in_the_file_and_in_the_digest_as_its_page_says(tmp_path):
    """The file is of version 2, which a reader of version 1 refuses by that number."""
    new = torch.tensor([2.5, 0], dtype=torch.bfloat16)
    mask = Mask(PLACES, FIXED, {"1.weight": new})
    mask.save(tmp_path / "m")
    config = json.loads((tmp_path / "m/mask_config.json").read_text())
    digest = config.pop("digest")
    assert config == Mask(PLACES, FIXED).config.plain() | {"version": 2}
    tensors = load_file(tmp_path / "m/mask.safetensors")
    assert {name: value.dtype for name, value in tensors.items()} == {
        "0.weight": torch.int32,
        "1.weight": torch.int32,
        ".values.1.weight": torch.bfloat16,
    }
    assert torch.equal(tensors[".values.1.weight"], new)
    raw = {name: value.view(torch.uint8).numpy().tobytes() for name, value in tensors.items()}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in raw.items()}
    values = {"1.weight": hashes.pop(".values.1.weight")}
    known = json.dumps({"positions": hashes, "config": config, "values": values}, sort_keys=True)
    assert digest == mask.digest == hashlib.sha256(known.encode()).hexdigest()


def test_what_is_off_and_what_is_replaced_are_told_apart():
    mask = Mask(PLACES, FIXED, {"0.weight": torch.tensor([0.0, 1, 2])})
    assert (mask.switched_off, mask.replaced, mask.changed) == (3, 2, 5)
    assert mask.counts == {"0.weight": (1, 2), "1.weight": (2, 0)}
    assert repr(mask) == "Mask(forgets 'cat'; switched off: 1 of 0.weight, 2 of 1.weight; replaced: 2 of 0.weight)"
    assert repr(Mask(PLACES, FIXED)) == "Mask(forgets 'cat'; switched off: 3 of 0.weight, 2 of 1.weight)"
    assert (~mask.keep()["0.weight"]).flatten().nonzero().flatten().tolist() == [1, 5, 47]


def test_minus_zero_is_written_as_zero_and_the_values_are_a_copy():
    given = torch.tensor([-0.0, 1, -2])
    mask = Mask(PLACES, FIXED, {"0.weight": given})
    given[1] = 7
    assert mask.values["0.weight"].tolist() == [0, 1, -2]
    assert not mask.values["0.weight"][0].signbit()
    assert mask.digest == Mask(PLACES, FIXED, {"0.weight": torch.tensor([0.0, 1, -2])}).digest


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_values_of_every_type_come_back_and_are_put_in_a_weight_and_a_bias(dtype, tmp_path):
    """As the last layer's row of one class [8] and its entry of the bias."""
    model = mlp().to(dtype)
    parent = describe_parent(model, ["2.weight", "2.bias"])
    flat = {"2.weight": torch.arange(8, 16), "2.bias": torch.tensor([1])}
    row = torch.linspace(-1, 1, 8, dtype=torch.float64).to(dtype)
    new = {"2.weight": row, "2.bias": torch.tensor([-30.0]).to(dtype)}
    Mask(flat, {"forgotten": CAT, "parent": parent}, new).save(tmp_path / "m")
    mask, before = Mask.load(tmp_path / "m"), bits(model)
    other = {**before, "2.weight": bytearray(before["2.weight"]), "2.bias": bytearray(before["2.bias"])}
    size = dtype.itemsize
    other["2.weight"][8 * size : 16 * size] = new["2.weight"].view(torch.uint8).numpy().tobytes()
    other["2.bias"][size : 2 * size] = new["2.bias"].view(torch.uint8).numpy().tobytes()
    with mask.applied(model) as fit:
        assert fit.grade == "parent"
        assert bits(model) == {name: bytes(data) for name, data in other.items()}
    assert bits(model) == before


WRONG = {
    "no positions": ({"2.weight": torch.ones(1)}, r"values of 2\.weight, in which it has no positions"),
    "too few": ({"0.weight": torch.ones(2)}, r"torch.float32 \[2\]: give float32 \[3\]"),
    "square": ({"0.weight": torch.ones(1, 3)}, r"give float32 \[3\]"),
    "another type": ({"0.weight": torch.ones(3).bfloat16()}, r"torch.bfloat16 \[3\]: give float32 \[3\]"),
    "integers": ({"0.weight": torch.ones(3, dtype=torch.int32)}, "give float32"),
    "infinite": ({"0.weight": torch.tensor([1, 2, torch.inf])}, r"0\.weight are not all finite"),
    "NaN": ({"1.weight": torch.tensor([torch.nan, 2]).bfloat16()}, r"1\.weight are not all finite"),
}


@pytest.mark.parametrize(("values", "says"), WRONG.values(), ids=WRONG)
def test_wrong_values_are_refused(values, says):
    with pytest.raises(MaskError, match=says):
        Mask(PLACES, FIXED, values)


@pytest.mark.parametrize("name", [".values.w", ".values.v"])
def test_a_parameter_that_is_called_as_the_files_values_are_is_refused(name):
    """Only a state dict that no module of torch made has such a name."""
    targets = dict.fromkeys(("w", name), FIXED["parent"]["targets"]["0.weight"])
    config, flat = (
        FIXED | {"parent": FIXED["parent"] | {"targets": targets}},
        dict.fromkeys(targets, PLACES["0.weight"]),
    )
    assert Mask(flat, config).switched_off == 6
    with pytest.raises(MaskError, match=r"^\.values\.[wv] is called as values are in the mask's file"):
        Mask(flat, config, {"w": torch.ones(3)})


def old_version(tensors, config):
    config["version"] = 1


def without_values(tensors, config):
    del tensors[".values.2.weight"]


def another_value(tensors, config):
    tensors[".values.2.weight"][tensors[".values.2.weight"] != 0] *= 2


def minus_zero(tensors, config):
    tensors[".values.2.weight"][tensors[".values.2.weight"] == 0] *= -1


def fewer_values(tensors, config):
    tensors[".values.2.weight"] = tensors[".values.2.weight"][1:]


def rounded_values(tensors, config):
    tensors[".values.2.weight"] = tensors[".values.2.weight"].half()


def infinite_value(tensors, config):
    tensors[".values.2.weight"][3] = -torch.inf


def values_of_a_stranger(tensors, config):
    tensors[".values.4.weight"] = torch.ones(1)


def more_zeros(tensors, config):
    tensors[".values.0.weight"] = torch.zeros(30)


def only_zeros(tensors, config):
    tensors[".values.2.weight"].zero_()


BAD_VALUES = {
    old_version: r"positions in \.values\.2\.weight, which its config does not describe",
    without_values: "of version 2, but no weight is replaced",
    only_zeros: "of version 2, but no weight is replaced",
    another_value: "its digest says",
    minus_zero: "its digest says",
    more_zeros: "its digest says",
    fewer_values: r"torch.float32 \[9\]: give float32 \[10\]",
    rounded_values: r"torch.float16 \[10\]: give float32 \[10\]",
    infinite_value: r"2\.weight are not all finite",
    values_of_a_stranger: r"values of 4\.weight, in which it has no positions",
}


@pytest.mark.parametrize("mask", [True], indirect=True, ids=["values"])
@pytest.mark.parametrize(("change", "says"), BAD_VALUES.items(), ids=lambda one: getattr(one, "__name__", ""))
def test_changed_values_are_refused(mask, tmp_path, change, says):
    mask.save(tmp_path / "cat")
    rewritten(tmp_path / "cat" / "mask.safetensors", change)
    with pytest.raises(MaskError, match=says):
        Mask.load(tmp_path / "cat" / "mask.safetensors")


def test_a_config_with_values_is_no_config_of_zeros():
    mask = mask_on(mlp(), "2.weight", values=True)
    with pytest.raises(MaskError, match="of version 2, but no weight is replaced: give the values, too"):
        Mask(mask.positions, mask.config)


# --- in memory --------------------------------------------------------------------------------------------


def test_positions_of_large_parameters_have_64_bits():
    parent = describe_parent(mlp(), ["0.weight"]).targets["0.weight"]
    known = {"state_sha256": "0" * 64, "framework": "torch"}
    for shape, dtype in (((2**31,), torch.int32), ((2**31 + 1,), torch.int64)):
        targets = {"w": {"shape": shape, "dtype": "float32", "sha256": parent.sha256}}
        config = {"forgotten": CAT, "parent": known | {"targets": targets}}
        mask = Mask({"w": torch.tensor([0, shape[0] - 1])}, config)
        assert mask.positions["w"].dtype == dtype
        assert mask.positions["w"].tolist() == [0, shape[0] - 1]


def test_full_masks_and_positions_say_the_same():
    model = mlp()
    mask = mask_on(model, ["0.weight", "2.weight"], 7)
    keep = mask.keep()
    for name, flat in mask.positions.items():
        assert np.flatnonzero(~keep[name].numpy().ravel()).tolist() == flat.tolist()
    for kind in (torch.bool, torch.uint8, torch.float32):
        again = Mask.from_keep({name: one.to(kind) for name, one in keep.items()}, mask.config)
        assert again.digest == mask.digest
    with pytest.raises(MaskError, match=r"shape \[6, 8\]: give \[8, 6\]"):
        Mask.from_keep({"0.weight": keep["0.weight"].mT, "2.weight": keep["2.weight"]}, mask.config)


def test_a_config_that_is_no_json_is_refused():
    parent = describe_parent(mlp(), ["0.weight"])
    for scores in ({"forget": float("nan")}, {"forget": object()}):
        with pytest.raises(MaskError, match="cannot be written as JSON"):
            Config.read({"forgotten": CAT, "parent": parent, "scores": scores})


def test_reading_a_mask_runs_nothing(tmp_path):
    """A pickle in the mask's place is refused before anything in it is called."""

    class Runs(nn.Module):
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "cat").mkdir()
    torch.save(Runs(), tmp_path / "cat" / "mask.safetensors")
    with pytest.raises(MaskError):
        Mask.load(tmp_path / "cat")
    assert not (tmp_path / "ran").exists()


WITHOUT_NUMPY = """
import sys
from dataclasses import replace
sys.modules["numpy"] = None  # every import of it fails
import warnings
warnings.simplefilter("ignore")
from pathlib import Path
import torch
from mimu import Mask, describe_parent, restore, seal, state_sha256
model = torch.nn.Linear(4, 4)
before, parent = state_sha256(model), describe_parent(model, ["weight", "bias"])
places = {"weight": torch.tensor([1, 5]), "bias": torch.tensor([3])}
config = {"forgotten": [{"index": 0, "name": "a"}], "parent": parent}
Mask(places, config, {"bias": torch.tensor([2.5])}).save("m")
mask = Mask.load("m")
with mask.applied(model):
    assert model.weight.view(-1)[[1, 5]].tolist() == [0, 0]
    assert model.bias[3] == 2.5
torch.save(model.state_dict(), "a.pt")
seal("a.pt", mask, "b.pt", fill="noise", removed="key")
restore("b.pt", "key", "c.pt")
model.load_state_dict(torch.load("c.pt", weights_only=True))
print(state_sha256(model) == before)
"""


@pytest.mark.slow
def test_numpy_is_not_needed(tmp_path):
    """Torch does not bring it."""
    own = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", WITHOUT_NUMPY], cwd=tmp_path, env=own, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True\n", "")
