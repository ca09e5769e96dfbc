"""Models of timm and transformers, from a folder or a file to a sealed one that these load by themselves.

Run with `uv run --extra timm --extra hf pytest tests/forgetting/test_extras.py`; skipped where they are not installed.
"""

import hashlib
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import main
from erasing.descent import Schedule
from erasing.erasure import Eraser
from forgetting.answers import TARGET, Ways
from forgetting.artefact import to_mask, usual_layers
from forgetting.opening import Opened, Opening, open_model
from mimu import Mask, state_sha256
from models.preprocessing import Given
from tests.helpers.extras import made_by_transformers
from tests.helpers.patterns import NAMES, write_folder

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
KAPPA = 40


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("photos"), 8)


def answers(net: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        found = net.eval()(images)
    return getattr(found, "logits", found)


def masked_by(opened: Opened, folder: Path, way: Ways) -> Mask:
    """A mask for the second class; of random weights, so that nothing is asked of their accuracy."""
    asked = opened.answering(usual_layers(way))
    answer = asked.answer((1,), KAPPA, way)
    how = opened.loaded.preprocessing.describe()
    to_mask(asked, answer, opened.loaded.classes, opened.parent, how, TARGET).save(folder)
    return Mask.load(folder)


def digests(place: Path) -> dict[str, str]:
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def written(net: nn.Module, mask: Path) -> nn.Module:
    """What a mask's file says, by hand, through the names that the framework's own module has."""
    stored = load_file(mask / "mask.safetensors")
    with torch.no_grad():
        for name in (name for name in stored if not name.startswith(".values.")):
            new = stored.get(f".values.{name}", torch.zeros(len(stored[name])))
            net.get_parameter(name).view(-1)[stored[name].long()] = new
    return net


def there_and_back(
    spec: str,
    parent: Path,
    sealed: Path,
    load: Callable[[Path], nn.Module],
    photos: Path,
    how: Opening,
    mask: Path,
    way: Ways = Ways.first_order,
) -> dict[str, str]:
    """Ask, seal and load by the framework alone; give the digests of the sealed files that differ from the parent's."""
    before, theirs = digests(parent), load(parent)
    opened = open_model(spec, photos, how)
    found = masked_by(opened, mask, way)
    assert found.switched_off == KAPPA
    module, state = opened.loaded.module, state_sha256(opened.loaded.module)
    images = torch.cat([batch.images for batch in opened.images])
    assert torch.equal(answers(theirs, images), answers(module, images))
    written(theirs, mask)
    with found.applied(module):
        assert torch.equal(answers(module, images), answers(theirs, images))
    assert state_sha256(module) == state == found.config.parent.state_sha256
    assert main.main(["seal", spec, str(mask), "--out", str(sealed)]) == 0
    assert digests(parent) == before
    assert torch.equal(answers(load(sealed), images), answers(theirs, images))
    return {name: digest for name, digest in digests(sealed).items() if before.get(name) != digest}


def saved_by_transformers(kind: str, parent: Path, shard: str = "1GB") -> Callable[[Path], nn.Module]:
    """A small model in a folder, and what loads such a folder."""
    transformers = pytest.importorskip("transformers")
    names = dict(enumerate(NAMES))
    module, processor = made_by_transformers(
        kind, num_labels=4, id2label=names, label2id={v: k for k, v in names.items()}
    )
    for parameter in module.parameters():  # layers that begin as zeros or ones would hide a mask
        nn.init.normal_(parameter, std=0.2)
    module.save_pretrained(parent, max_shard_size=shard)
    processor.save_pretrained(parent)
    return transformers.AutoModelForImageClassification.from_pretrained


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("kind", ["vit", "deit", "swin", "resnet", "convnext"])
def test_folders_of_transformers(kind, shard, photos, tmp_path):
    """Names in memory are others than on disk, and only shards that hold a target are written anew."""
    parent = tmp_path / "parent"
    load = saved_by_transformers(kind, parent, shard)
    changed = there_and_back(f"hf:{parent}", parent, tmp_path / "sealed", load, photos, Opening(), tmp_path / "m")
    assert len(changed) == 1
    assert Mask.load(tmp_path / "m").forgotten == (NAMES[1],)


TIMM = {"resnet18": {}, "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 2}, "convnext_atto": {}}


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_files_of_timm(name, photos, tmp_path):
    timm = pytest.importorskip("timm")
    settings = {**TIMM[name], "num_classes": 4}
    torch.manual_seed(0)
    torch.save(timm.create_model(name, **settings).state_dict(), tmp_path / "x.pt")

    def load(file: Path) -> nn.Module:
        return timm.create_model(name, checkpoint_path=str(file), **settings)

    words = "".join(f",{key}={value}" for key, value in TIMM[name].items())
    how = Opening(given=Given(size=32, mean=(0.5,), std=(0.25,)))
    spec = f"timm:{name}{words}@{tmp_path}/x.pt"
    there_and_back(spec, tmp_path / "x.pt", tmp_path / "sealed.pt", load, photos, how, tmp_path / "m")


def test_folders_of_timm(photos, tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    module = timm.create_model("convnext_atto", num_classes=4)
    about = {"label_names": list(NAMES)}
    timm.models.save_for_hf(module, tmp_path / "parent", model_config=about, safe_serialization=True)

    def load(folder: Path) -> nn.Module:
        return timm.create_model(f"local-dir:{folder}", pretrained=True)

    parent, how = tmp_path / "parent", Opening(given=Given(size=32, mean=(0.5,), std=(0.25,)))
    changed = there_and_back(f"timm:{parent}", parent, tmp_path / "sealed", load, photos, how, tmp_path / "m")
    assert list(changed) == ["model.safetensors"]


# --- erasing ----------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch) -> None:
    """A few steps of descent do: nothing is asked of how well the class is erased."""
    monkeypatch.setattr(Eraser, "erase", partialmethod(Eraser.erase, schedule=Schedule(steps=3)))


def new_row(folder: Path, head: str) -> Tensor:
    """The second class's row as the mask has it; it has values nowhere else."""
    mask = Mask.load(folder)
    assert list(mask.values) == [head]
    values, width = mask.values[head], mask.config.parent.targets[head].shape[1]
    assert mask.positions[head][values != 0].tolist() == list(range(width, 2 * width))
    return values[values != 0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_class_is_erased_from_a_folder_of_transformers(kind, photos, tmp_path, quick):
    parent, mask = tmp_path / "parent", tmp_path / "m"
    load = saved_by_transformers(kind, parent)
    head = "classifier.weight" if kind == "vit" else "classifier.1.weight"
    old = load(parent).get_parameter(head)[1]
    there_and_back(f"hf:{parent}", parent, tmp_path / "sealed", load, photos, Opening(), mask, Ways.erase)
    assert torch.cosine_similarity(new_row(mask, head), old, 0).abs() < 0.9  # drawn anew, not the old one scaled
    assert torch.equal(load(tmp_path / "sealed").get_parameter(head)[1], new_row(mask, head))


@pytest.mark.slow
def test_a_class_is_erased_from_a_file_of_timm(photos, tmp_path, quick):
    timm = pytest.importorskip("timm")
    name, settings = "vit_tiny_patch16_224", {**TIMM["vit_tiny_patch16_224"], "num_classes": 4}
    torch.manual_seed(0)
    torch.save(timm.create_model(name, **settings).state_dict(), tmp_path / "x.pt")

    def load(file: Path) -> nn.Module:
        return timm.create_model(name, checkpoint_path=str(file), **settings)

    spec = f"timm:{name},img_size=32,patch_size=8,depth=2@{tmp_path}/x.pt"
    how = Opening(given=Given(size=32, mean=(0.5,), std=(0.25,)))
    sealed, mask = tmp_path / "sealed.pt", tmp_path / "m"
    there_and_back(spec, tmp_path / "x.pt", sealed, load, photos, how, mask, Ways.erase)
    assert torch.equal(load(sealed).get_parameter("head.weight")[1], new_row(mask, "head.weight"))
