"""What cannot be done is said in one sentence, with exit code 2, and nothing is written."""

import copy
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import squeezenet1_1

import main
from core.choices import UserError
from forgetting.artefact import kappa_of
from forgetting.python import forget
from mimu import Mask
from tests.helpers.patterns import FLAGS, NAMES, network, pattern, prepared, spec_of, trained, words_for, write_folder

Case = Callable[[Path, Path], list[str]]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with net.py, net.pt, photos, and mask, a mask of the model."""
    root = tmp_path_factory.mktemp("home")
    trained(root)
    write_folder(root / "photos", 30)
    words = ["forget", *words_for(root), "--class", "bars", "--kappa", "50", "--out", str(root / "mask")]
    assert main.main(words) == 0
    return root


def everything(*folders: Path) -> dict[Path, bytes]:
    """Every file below some folders, and its bytes."""
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def refused(words: list[str], message: str, capsys: pytest.CaptureFixture, *folders: Path) -> str:
    """What a command says that ends with 2, writes nothing, and says it in one line."""
    capsys.readouterr()
    before = everything(*folders)
    assert main.main(words) == 2
    assert everything(*folders) == before
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line
    return line


def asking(*more: str, **how: str) -> Case:
    """A request for bars, with other words and settings."""
    return lambda home, place: ["forget", *words_for(home, **how), "--class", "bars", "--kappa", "50", *more]


# --- the request ------------------------------------------------------------------------------------------

REQUESTS: dict[str, tuple[Case, str]] = {
    "no class": (lambda home, place: ["forget", *words_for(home), "--kappa", "50"], "no class to forget is named"),
    "missing class": (asking("--class", "doors"), "'doors', which is no class of the model: did you mean"),
    "number of no class": (asking("--class", "4"), "--class is 4, but the model has classes 0 to 3"),
    "every class": (asking(*(word for name in NAMES for word in ("--class", name))), "all of classes to forget"),
    "no images": (
        lambda home, place: ["forget", spec_of(home), *FLAGS, "--class", "bars", "--kappa", "50"],
        "give a folder of them with --images",
    ),
    "way": (
        asking("--way", "magic"),
        "--way is 'magic': choose from refined, robust, first_order, network, network_refined",
    ),
    "layer": (asking("--layer", "conv9"), "no Linear or Conv2d weight 'conv9'.*conv"),
    "layer twice": (asking("--layer", "conv1", "--layer", "conv1.weight"), "names a weight twice"),
    "a norm's weight": (asking("--layer", "bn2"), "no Linear or Conv2d weight 'bn2'"),
    "method": (asking("--methods", "magic"), "there is no method 'magic'"),
    "tau": (asking("--tau", "101"), "--tau is 101"),
    "few of a class": (asking("--most", "2"), "--most is 2: give at least 3"),
    "no such file": (
        lambda home, place: ["forget", *words_for(home, file="gone.pt"), "--class", "bars"],
        "there is no file .*gone.pt",
    ),
    "no such folder": (
        lambda home, place: ["forget", *words_for(home, images=home / "gone"), "--class", "bars"],
        "there is no folder .*gone",
    ),
    "taken place": (asking("--out", "{photos}"), "photos holds other files .*choose a new folder"),
    "place in a file": (asking("--out", "{photos}/bars/0.png/m"), "0.png is a file, .*choose another place"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_requests(name, home, tmp_path, capsys):
    make, message = REQUESTS[name]
    words = [word.replace("{photos}", str(home / "photos")) for word in make(home, tmp_path)]
    words += [] if "--out" in words else ["--out", str(tmp_path / "m")]
    refused(words, message, capsys, home, tmp_path)


def test_a_library_whose_last_place_is_taken(home, tmp_path, capsys):
    """It is seen before the first mask is made."""
    (tmp_path / "3-rings").mkdir()
    (tmp_path / "3-rings/notes").touch()
    words = ["library", *words_for(home), "--kappa", "9", "--out", str(tmp_path)]
    refused(words, "3-rings holds other files", capsys, tmp_path)


@pytest.mark.parametrize("kappa", ["0", "-3", "1.5", "200%", "0%", "0.001%", "few", "nan", "inf", "1e9", "0,3%", "1,5"])
def test_kappas(kappa, home, tmp_path, capsys):
    words = ["forget", *words_for(home), "--class", "bars", f"--kappa={kappa}", "--out", str(tmp_path / "m")]
    refused(
        words, rf"kappa is '{re.escape(kappa)}', the target weights are 5,184: give auto, a whole", capsys, tmp_path
    )


def test_kappas_that_are_some():
    """By hand."""
    given = {"auto": None, "1": 1, "5184": 5184, "1,000": 1000, "2_000": 2000, "0.3%": 16, "100%": 5184, " 7 ": 7}
    assert {text: kappa_of(text, 5184) for text in given} == given
    assert kappa_of(12, 5184) == 12


# --- the model --------------------------------------------------------------------------------------------


def saved(value: object, home: Path) -> Case:
    torch.save(value, home / "other.pt")
    return asking(file="other.pt")


def of(home: Path, **settings: object) -> nn.Module:
    torch.manual_seed(3)
    return network(home / "net.py", **settings)


def quantised(home: Path) -> object:
    one = torch.quantize_per_tensor(torch.ones(3, 3), 0.1, 0, torch.qint8)
    return {**of(home).state_dict(), "fc._packed_params._packed_params": (one, None), "fc.scale": torch.ones(())}


MODELS: dict[str, tuple[Callable[[Path], Case], str]] = {
    "pickled module": (
        lambda home: saved(nn.Sequential(nn.Linear(2, 2)), home),
        r"is a pickled model.*torch\.save\(model\.state_dict",
    ),
    "quantised": (lambda home: saved(quantised(home), home), "quantised model .*float model"),
    "several labels": (lambda home: asking(end="sigmoid"), "ends in a sigmoid, for several labels a picture"),
    "regression": (lambda home: saved(of(home, outputs=1).state_dict(), home), "fc.bias"),
    "other names": (
        lambda home: saved({f"a.{n}": value for n, value in enumerate(of(home).state_dict().values())}, home),
        r"15 tensors are missing \(.*15 tensors are unexpected",
    ),
    "chance": (
        lambda home: saved(of(home).state_dict(), home),
        r"recognises [\d.]+ % of \d+ images, no more than chance",
    ),
    "no numbers": (
        lambda home: saved({**of(home).state_dict(), "fc.bias": torch.full((4,), torch.nan)}, home),
        "not finite",
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_models(name, home, tmp_path, capsys):
    make, message = MODELS[name]
    words = make(home)(home, tmp_path)
    refused([*words, "--out", str(tmp_path / "m")], message, capsys, tmp_path)


def test_one_output(home, tmp_path, capsys):
    torch.save(of(home, outputs=1).state_dict(), tmp_path / "one.pt")
    spec = f"py:{home}/net.py:net,outputs=1@{tmp_path}/one.pt"
    words = ["forget", spec, "--images", str(home / "photos"), *FLAGS, "--quiet", "--class", "bars"]
    refused(
        [*words, "--out", str(tmp_path / "m")], "one output: forgetting a class needs two or more", capsys, tmp_path
    )


@pytest.mark.parametrize("command", ["forget", "library"])
def test_a_folder_that_holds_the_mask_of_another_model(command, home, tmp_path, capsys):
    """It is lost otherwise. The same request again replaces its own mask, and says so."""
    torch.save(of(home, outputs=4).state_dict(), tmp_path / "other.pt")
    words = ["--images", str(home / "photos"), *FLAGS, "--quiet"]
    place = {"forget": tmp_path / "m", "library": tmp_path}[command]
    one = ["--class", "bars", "--kappa", "50"]
    assert main.main(["forget", spec_of(home), *words, *one, "--out", str(tmp_path / "m")]) == 0
    if command == "library":
        (tmp_path / "m").rename(tmp_path / "0-bars")
        one = ["--kappa", "50"]
    spec = f"py:{home}/net.py:net@{tmp_path}/other.pt"
    message = "holds the mask that forgets bars of another model: choose another folder with --out, or move that"
    refused([command, spec, *words, *one, "--out", str(place)], message, capsys, tmp_path)


def test_a_folder_that_holds_another_request_s_mask(home, tmp_path, capsys):
    words = ["forget", *words_for(home), "--out", str(tmp_path / "m"), "--kappa"]
    assert main.main([*words, "50", "--class", "bars"]) == 0
    refused([*words, "50", "--class", "dots"], r"m holds the mask that forgets bars: choose another", capsys, tmp_path)
    capsys.readouterr()
    assert main.main([*words, "50", "--class", "bars"]) == 0
    assert "the same as before" in capsys.readouterr().out
    assert main.main([*words, "60", "--class", "bars"]) == 0
    assert "the one before is replaced: switched off: 50 of " in capsys.readouterr().out
    (tmp_path / "m/mask.safetensors").write_bytes(b"no mask")
    refused([*words, "50", "--class", "bars"], "m holds a mask that cannot be read .*move that one", capsys, tmp_path)


@pytest.mark.parametrize(
    "flags",
    [
        ("--size", "16", "--mean", "40", "--std", "0.25"),
        ("--size", "16", "--mean", "0.5", "--std", "90"),
        ("--size", "2", "--mean", "0.5", "--std", "0.25"),
    ],
)
def test_another_preprocessing(flags, home, tmp_path, capsys):
    words = ["forget", spec_of(home), "--images", str(home / "photos"), *flags, "--quiet", "--class", "bars"]
    refused([*words, "--out", str(tmp_path / "m"), "--kappa", "9"], "check the preprocessing", capsys, tmp_path)


def test_another_order_of_classes(home, tmp_path, capsys):
    """The folders are right and the file of names is not: which name belongs to which output is said."""
    (tmp_path / "names").write_text("\n".join([*NAMES[1:], NAMES[0]]))
    words = [*asking("--classes", str(tmp_path / "names"))(home, tmp_path), "--out", str(tmp_path / "m")]
    said = refused(words, "does well in another order of classes", capsys, tmp_path)
    assert "'checks' is output 1" in said
    assert said.endswith("with --classes FILE")


def test_a_library_in_another_order_of_classes(home, tmp_path, capsys):
    (tmp_path / "names").write_text("\n".join([*NAMES[1:], NAMES[0]]))
    words = ["library", *words_for(home), "--kappa", "9", "--classes", str(tmp_path / "names")]
    refused([*words, "--out", str(tmp_path / "all")], "another order of classes", capsys, tmp_path)


def test_verify_in_another_order_of_classes(home, tmp_path, capsys):
    """The file of names calls another output by the name of the class that the mask forgets."""
    (tmp_path / "names").write_text("\n".join([*NAMES[1:], NAMES[0]]))
    words = ["verify", *words_for(home, home / "mask"), "--classes", str(tmp_path / "names")]
    refused(
        words, rf"the mask forgets 'bars', which is output 0 .*output 3 here \({tmp_path}/names\)", capsys, tmp_path
    )


def test_inspect_and_verify_tell_another_preprocessing(home, capsys):
    """`inspect` is what is asked first; `verify` compares with the card."""
    images = ["--images", str(home / "photos"), "--quiet"]
    wrong = ["--size", "16", "--mean", "40", "--std", "0.25"]
    assert main.main(["inspect", spec_of(home), *images, *wrong]) == 0
    assert re.search(
        r"^note: the model recognises .*no more than chance: check the prep", capsys.readouterr().out, re.M
    )
    assert main.main(["verify", spec_of(home), str(home / "mask"), *images, *wrong]) == 1
    assert "preprocessing: not the card's, other mean, std: the scores" in capsys.readouterr().out
    assert main.main(["inspect", *words_for(home)]) == 0
    assert "note: the model" not in capsys.readouterr().out
    assert main.main(["verify", *words_for(home, home / "mask")]) == 0
    assert "preprocessing" not in capsys.readouterr().out


def test_inspect_tells_another_order_of_classes_and_counts_each(home, tmp_path, capsys):
    """The oracle is the module itself on every file."""
    net = network(home / "net.py")
    net.load_state_dict(torch.load(home / "net.pt", weights_only=True))
    assert main.main(["inspect", *words_for(home)]) == 0
    said = capsys.readouterr().out
    for label, name in enumerate(NAMES):
        pictures = torch.stack([prepared(Image.open(path)) for path in (home / "photos" / name).iterdir()])
        with torch.no_grad():
            share = 100 * float((net.eval()(pictures).argmax(1) == label).double().mean())
        assert re.search(rf"^\| {label} +\| {name} +\| 30 +\| {share:.1f} % ", said, re.MULTILINE)
    (tmp_path / "names").write_text("\n".join([*NAMES[1:], NAMES[0]]))
    assert main.main(["inspect", *words_for(home), "--classes", str(tmp_path / "names")]) == 0
    assert "note: the model recognises" in (said := capsys.readouterr().out)
    assert "'checks' is output 1" in said


def test_a_class_that_is_not_recognised_is_told(home, tmp_path, capsys):
    """Two names exchanged leave the model better than chance, but not in these two classes."""
    (tmp_path / "names").write_text("\n".join([NAMES[1], NAMES[0], *NAMES[2:]]))
    words = [*asking("--classes", str(tmp_path / "names"))(home, tmp_path), "--out"]
    assert main.main([*words, str(tmp_path / "m")]) == 0
    message = "the untouched model recognises 0.0 % of these images, no more than chance"
    assert message in capsys.readouterr().out
    words[words.index("bars")] = "dots"
    assert main.main([*words, str(tmp_path / "n")]) == 0
    assert message not in capsys.readouterr().out


def test_folders_in_another_order_than_the_outputs(home, tmp_path, capsys):
    """Sorted names of folders are taken for the outputs' unless a file names these."""
    folders = ("d_bars", "a_checks", "b_dots", "c_rings")
    write_folder(tmp_path / "photos", 30, folders)
    words = ["forget", *words_for(home, images=tmp_path / "photos"), "--class", "b_dots", "--kappa", "50"]
    words += ["--out", str(tmp_path / "m")]
    assert "'a_checks' is output 1" in refused(words, "another order of classes", capsys, tmp_path)
    (tmp_path / "names").write_text("\n".join(folders))
    assert main.main([*words, "--classes", str(tmp_path / "names")]) == 0
    assert [one.index for one in Mask.load(tmp_path / "m").config.forgotten] == [2]


# --- the images -------------------------------------------------------------------------------------------


@pytest.fixture
def photos(home, tmp_path) -> Path:
    return Path(shutil.copytree(home / "photos", tmp_path / "photos"))


def words_with(photos: Path, home: Path, *more: str) -> list[str]:
    words = ["forget", *words_for(home, images=photos), "--class", "bars", "--kappa", "50", *more]
    return [*words, "--out", str(photos.parent / "m")]


def test_folders_that_are_no_class(photos, home, capsys):
    (photos / "checks").rename(photos / "doors")
    names = photos.parent / "names"
    names.write_text("\n".join(NAMES))
    more = ("--classes", str(names))
    refused(words_with(photos, home, *more), r"1 of 4 folders .*no class .*\('doors'\)", capsys, photos.parent)
    (photos / "doors").rename(photos / "bars, stripes")
    names.write_text("\n".join(["bars, stripes", *NAMES[1:]]))
    refused(words_with(photos, home, *more), "two folders of images are of the class 'bars, s", capsys, photos.parent)


def test_folders_of_fewer_classes_need_names(photos, home, capsys):
    shutil.rmtree(photos / "checks")
    said = refused(words_with(photos, home), "no class", capsys, photos.parent)
    assert "bars" in said


@pytest.mark.parametrize("each", [1, 2])
def test_a_class_without_enough_images(each, photos, home, capsys):
    for path in sorted((photos / "bars").iterdir())[each:]:
        path.unlink()
    refused(words_with(photos, home), rf"'bars' has {each} images, of which none is left for", capsys, photos.parent)


def test_a_class_without_images(photos, home, capsys):
    names = photos.parent / "names"
    names.write_text("\n".join(NAMES))
    shutil.rmtree(photos / "bars")
    more = ("--classes", str(names))
    refused(words_with(photos, home, *more), "'bars' has 0 images", capsys, photos.parent)
    words = words_with(photos, home, *more)
    words[words.index("bars")] = "dots"
    assert main.main(words) == 0
    said = capsys.readouterr().out
    assert "1 classes have no images: what the mask does to them was not measured" in said


def test_a_broken_image_is_named_or_left_out(photos, home, capsys):
    (photos / "dots/7.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    refused(words_with(photos, home), r"dots/7\.png .*damaged image.*--skip-bad-images", capsys, photos.parent)
    words = [word for word in words_with(photos, home, "--skip-bad-images") if word != "--quiet"]
    assert main.main(words) == 0
    assert "left out: dots/7.png (damaged image" in capsys.readouterr().err
    again = ["verify", *words_for(home, photos.parent / "m", images=photos)]
    assert main.main([*again, "--skip-bad-images"]) == 0
    assert "those that the mask was made with" in capsys.readouterr().out


def test_nothing_but_broken_images(photos, home, capsys):
    for path in photos.rglob("*.png"):
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    refused(words_with(photos, home, "--skip-bad-images"), "there are no images to forget with", capsys, photos.parent)


def test_no_pictures_at_all(home, tmp_path, capsys):
    for name in NAMES:
        (tmp_path / "photos" / name).mkdir(parents=True)
    refused(words_with(tmp_path / "photos", home), "give a folder with a subfolder of images", capsys, tmp_path)


# --- masks of other models --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["verify", "seal"])
def test_another_parent(command, home, tmp_path, capsys):
    torch.save(of(home).state_dict(), tmp_path / "x.pt")
    spec = f"py:{home}/net.py:net@{tmp_path}/x.pt"
    more = [*FLAGS, "--quiet"] if command == "verify" else ["--out", str(tmp_path / "sealed.pt")]
    said = refused([command, spec, str(home / "mask"), *more], "parent", capsys, tmp_path)
    assert "any_parent" not in said, "programs alone can ask for that"


def test_another_architecture(home, tmp_path, capsys):
    torch.save(squeezenet1_1(num_classes=4).state_dict(), tmp_path / "x.pt")
    spec, flags = f"torchvision:squeezenet1_1@{tmp_path}/x.pt", ["--size", "64", "--mean", "0.5", "--std", "0.5"]
    refused(["verify", spec, str(home / "mask"), *flags, "--quiet"], "parent", capsys, tmp_path)
    refused(["seal", spec, str(home / "mask"), "--out", str(tmp_path / "s.pt")], "does not hold", capsys, tmp_path)


def test_no_mask_and_a_damaged_one(home, tmp_path, capsys):
    words = [spec_of(home), str(tmp_path / "m"), *FLAGS]
    refused(["verify", *words], r"^error: there is no file .*/m: check the path$", capsys, tmp_path)
    shutil.copytree(home / "mask", tmp_path / "m")
    (tmp_path / "m/mask.safetensors").write_bytes((home / "mask/mask.safetensors").read_bytes()[:-5])
    refused(["verify", *words], "is damaged", capsys, tmp_path)
    refused(["compose", str(tmp_path / "m"), "--out", str(tmp_path / "c")], "is damaged", capsys, tmp_path)


def test_the_parent_in_another_type_is_told(home, tmp_path, capsys):
    """After a cast it is the parent still: the mask is put on with a note."""
    state = torch.load(home / "net.pt", weights_only=True)
    torch.save({n: v.bfloat16() if v.is_floating_point() else v for n, v in state.items()}, tmp_path / "x.pt")
    assert main.main(["verify", f"py:{home}/net.py:net@{tmp_path}/x.pt", str(home / "mask"), *FLAGS]) == 0
    said = capsys.readouterr().out
    assert "after a change of their dtype" in said
    assert "lifted: the parent, bit for bit" in said


def test_seal_needs_a_new_place(home, tmp_path, capsys):
    words = ["seal", spec_of(home), str(home / "mask")]
    refused(words, "give --out", capsys, tmp_path)
    refused([*words, "--out", str(home / "net.pt")], "exists and is not overwritten", capsys, home)
    refused([*words, "--out", str(tmp_path / "s.pt"), "--fill", "ones"], "fill is 'ones'.*zero or", capsys, tmp_path)


# --- Python -----------------------------------------------------------------------------------------------


def python_cases(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> dict[str, tuple[tuple, dict, str]]:
    pairs = [(images, labels)]
    squashed = nn.Sequential(net, nn.Sigmoid())
    return {
        "a folder alone": ((net, "{photos}", ["bars"]), {}, "needs prepare="),
        "no images": ((net, [], [1]), {}, "there are no images"),
        "labels of no output": ((net, [(images, labels + 1)], [1]), {}, "outside of 0 to 3"),
        "labels that are none": ((net, [(images, labels.float())], [1]), {}, "no whole numbers"),
        "labels of another length": ((net, [(images, labels[1:])], [1]), {}, "give one for each"),
        "texts": ((net, [(images, ["bars"] * len(images))], [1]), {}, "no whole numbers"),
        "a dict": ((net, [{"pixel_values": images, "labels": labels}], [1]), {}, "a dict: give pairs"),
        "flat images": ((net, [(images.flatten(1), labels)], [1]), {}, r"give tensors \[B, C, H, W\]"),
        "names": ((net, pairs, ["bars"]), {"names": NAMES[1:]}, "names are 3, the model has 4 outputs"),
        "no such class": ((net, pairs, ["bars"]), {}, "'bars', which is no class"),
        "several labels": ((squashed, pairs, [1]), {}, "the model ends in a sigmoid"),
        "one output": ((nn.Sequential(net, nn.Linear(4, 1)), pairs, [1]), {}, "one output"),
        "half": ((copy.deepcopy(net).half(), pairs, [1]), {}, "does not take float32 images.*float32"),
        "kappa": ((net, pairs, [1]), {"kappa": 0}, "kappa is 0"),
        "layer": ((net, pairs, [1]), {"layers": ["fc2"]}, "no Linear or Conv2d weight 'fc2'"),
        "chance": ((copy.deepcopy(net).apply(forgets), pairs, [1]), {"kappa": 9}, "no more than chance"),
        "permuted": ((net, [(images, (labels + 1) % 4)], [1]), {"kappa": 9}, "another order of classes"),
        "few": ((net, pairs, [1]), {}, "would do"),
    }


def forgets(part: nn.Module) -> None:
    if isinstance(part, nn.Linear):
        nn.init.zeros_(part.weight)
        nn.init.zeros_(part.bias)


PYTHON = tuple(python_cases(nn.Linear(1, 1), torch.zeros(1, 1), torch.zeros(1, dtype=torch.long)))


@pytest.mark.parametrize("name", PYTHON)
def test_python(name, home):
    net = network(home / "net.py")
    net.load_state_dict(torch.load(home / "net.pt", weights_only=True))
    rng = np.random.default_rng(5)
    labels = torch.arange(4).repeat(30)
    images = torch.stack([prepared(Image.fromarray(pattern(label, rng))) for label in labels.tolist()])
    (model, given, classes), more, message = python_cases(net.eval(), images, labels)[name]
    given = home / "photos" if given == "{photos}" else given
    with pytest.raises(UserError, match=message) as caught:
        forget(model, given, classes, **more)
    assert "\n" not in str(caught.value)
