"""From a user's checkpoint and images to a mask and a sealed file: the oracles are plain torch and PIL, which know no
MIMU, and bytes.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import main
from core.choices import UserError
from core.config import PROJECT_ROOT, AutoConfig
from forgetting.answers import TARGET, Ways, _standing_on
from forgetting.opening import Opening, open_model
from forgetting.python import forget
from forgetting.samples import read_samples
from measure.auto_kappa import Attempt, kappas
from mimu import Mask, describe_parent, restore, state_sha256
from models.foreign import ForeignClassifier
from models.preprocessing import Given
from planning.library import repeated
from tests.helpers.foreign import bits
from tests.helpers.patterns import (
    FLAGS,
    MEAN,
    NAMES,
    SIDE,
    STD,
    network,
    pictures,
    prepared,
    spec_of,
    trained,
    write_folder,
)

WANTED = 2  # the class of most tests
GIVEN = Given(size=SIDE, mean=MEAN, std=STD)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with net.py, net.pt, photos (a folder for each class), and parted (photos below train, val and test)."""
    root = tmp_path_factory.mktemp("home")
    trained(root)
    write_folder(root / "photos", 60)
    for seed, part in enumerate(("train", "val", "test"), 10):
        write_folder(root / "parted" / part, 30, seed=seed)
    return root


@pytest.fixture
def net(home) -> nn.Module:
    return plain(home / "net.pt", home)


def plain(file: Path, home: Path) -> nn.Module:
    """A checkpoint in the user's own module, by torch alone."""
    module = network(home / "net.py")
    module.load_state_dict(torch.load(file, weights_only=True))
    return module.eval()


def asked(home: Path, images: str = "photos", *more: object) -> list[str]:
    """The words that every command with images has after its name."""
    return [spec_of(home), *map(str, more), "--images", str(home / images), *FLAGS, "--quiet"]


def card(mask: Mask) -> dict[str, Any]:
    assert mask.config.scores is not None
    return dict(mask.config.scores)


def forgotten(home: Path, out: Path, *more: object, images: str = "photos", name: str = NAMES[WANTED]) -> Mask:
    words = ["forget", *asked(home, images), "--class", name, "--out", str(out), *map(str, more)]
    assert main.main(words) == 0
    return Mask.load(out)


# --- recomputed without MIMU ------------------------------------------------------------------------------


def zeroed(net: nn.Module, folder: Path) -> nn.Module:
    """The module with the positions of a mask's file at zero."""
    with torch.no_grad():
        for name, flat in load_file(folder / "mask.safetensors").items():
            net.get_parameter(name).view(-1)[flat.long()] = 0
    return net


def percent(right: Tensor) -> float:
    return 100 * (int(right.sum()) / len(right))


@pytest.mark.parametrize("way", ["refined", "first_order"])
def test_the_cards_scores_are_those_of_plain_torch(way, home, net, tmp_path):
    """Test images are those that the folder calls so; BatchNorm's new statistics are means of retained train images."""
    forgotten(home, tmp_path / "m", "--kappa", 70, "--way", way, images="parted")
    scores = json.loads((tmp_path / "m/mask_config.json").read_text())["scores"]
    images, labels = pictures(home / "parted/test")
    of = labels == WANTED
    with torch.no_grad():
        clean, logits = net(images).argmax(1) == labels, zeroed(net, tmp_path / "m")(images)
    right = logits.argmax(1) == labels
    assert (scores["clean_forget"], scores["clean_retain"]) == (percent(clean[of]), percent(clean[~of]))
    assert (scores["forget"], scores["retain"]) == (percent(right[of]), percent(right[~of]))
    assert scores["forget"] < scores["clean_forget"]
    assert scores["retain_change"] == pytest.approx(percent(right[~of]) - percent(clean[~of]), abs=1e-9)
    assert scores["p_forget"] == pytest.approx(100 * float(logits[of].softmax(1)[:, WANTED].mean()), rel=1e-4)
    assert (scores["n"]["forget"], scores["n"]["retain"]) == (int(of.sum()), int((~of).sum()))
    train, train_labels = pictures(home / "parted/train")
    with torch.no_grad():
        again = renewed(net, train[train_labels != WANTED])(images).argmax(1) == labels
    assert scores["forget_recalibrated"] == pytest.approx(percent(again[of]), abs=100 / int(of.sum()))
    assert scores["retain_recalibrated"] == pytest.approx(percent(again[~of]), abs=100 / int((~of).sum()))
    bias = net.fc.bias.tolist()
    others = sorted(bias[:WANTED] + bias[WANTED + 1 :])
    assert scores["class_bias"] == f"{bias[WANTED]:+.3f} (others {others[0]:+.3f} to {others[-1]:+.3f})"


def test_a_change_of_nothing_has_no_sign(home, tmp_path, capsys):
    mask = forgotten(home, tmp_path / "m", "--kappa", 1)
    assert str(card(mask)["retain_change"]) == "0.0"
    assert "-0.0 " not in capsys.readouterr().out


# --- the whole of it --------------------------------------------------------------------------------------


def test_forget_verify_seal_compose(home, net, tmp_path, capsys):
    """Masks are lifted bit for bit; the sealed file is an ordinary checkpoint with the masked model's answers."""
    before = (home / "net.pt").read_bytes()
    first = forgotten(home, tmp_path / "a", "--kappa", 70)
    second = forgotten(home, tmp_path / "b", "--kappa", "2%", name="bars")
    assert (first.switched_off, second.switched_off) == (70, round(0.02 * net.conv2.weight.numel()))
    assert main.main(["verify", *asked(home, "photos", tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    for line in ("parent: the very one", "70 weights, all zero", "those that the mask was made with", "bit for bit"):
        assert line in said
    assert main.main(["seal", spec_of(home), str(tmp_path / "a"), "--out", str(tmp_path / "sealed.pt")]) == 0
    assert main.main(["compose", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "both")]) == 0
    both = Mask.load(tmp_path / "both")
    union = {one for mask in (first, second) for one in mask.positions["conv2.weight"].tolist()}
    assert both.positions["conv2.weight"].tolist() == sorted(union)
    assert set(both.forgotten) == {NAMES[WANTED], "bars"}
    capsys.readouterr()
    assert main.main(["verify", *asked(home, "photos", tmp_path / "both")]) == 0
    assert re.search(r"perhaps not those .*\nforget: [0-9.]+ % of 36 .*the card says nothing", capsys.readouterr().out)
    images, _ = pictures(home / "photos")
    sealed, state = plain(tmp_path / "sealed.pt", home), bits(net)
    with torch.no_grad():
        with first.applied(net):
            masked = net(images)
        assert torch.equal(sealed(images), masked)
        assert not torch.equal(net(images), masked)
    assert bits(net) == state
    assert (home / "net.pt").read_bytes() == before


FRESH = """
import sys
from pathlib import Path
import torch
import net
module = net.net()
module.load_state_dict(torch.load("sealed.pt", weights_only=True))
with torch.no_grad():
    torch.save(module.eval()(torch.load("images.pt")), "logits.pt")
print(sorted({"mimu", "forgetting", "models", "core"} & set(sys.modules)))
"""


@pytest.mark.slow
def test_a_sealed_file_needs_nothing_of_this_project(home, net, tmp_path):
    """In a process of its own, in a folder with the user's files alone."""
    mask = forgotten(home, tmp_path / "m", "--kappa", 70)
    assert main.main(["seal", spec_of(home), str(tmp_path / "m"), "--out", str(tmp_path / "sealed.pt")]) == 0
    shutil.copy(home / "net.py", tmp_path)
    images, _ = pictures(home / "photos")
    torch.save(images, tmp_path / "images.pt")
    (tmp_path / "fresh.py").write_text(FRESH)
    done = subprocess.run([sys.executable, "fresh.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    with torch.no_grad(), mask.applied(net):
        assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), net(images))


@pytest.fixture
def replacing(net) -> Mask:
    """Two weights of conv2 off; the head's row of the wanted class and its entry of the bias replaced."""
    width = net.fc.in_features
    flat = {
        "conv2.weight": torch.tensor([3, 70]),
        "fc.weight": torch.arange(WANTED * width, (WANTED + 1) * width),
        "fc.bias": torch.tensor([WANTED]),
    }
    values = {"fc.weight": torch.linspace(-1, 1, width), "fc.bias": torch.tensor([-20.0])}
    forgets = [{"index": WANTED, "name": NAMES[WANTED]}]
    return Mask(flat, {"forgotten": forgets, "parent": describe_parent(net, flat)}, values)


def test_restore_brings_the_parent_back(home, tmp_path, capsys):
    """The command that `seal` names; without the values of that very file nothing is written."""
    forgotten(home, tmp_path / "m", "--kappa", 70)
    out, key, again = (tmp_path / name for name in ("sealed.pt", "key.safetensors", "again.pt"))
    words = ["seal", spec_of(home), str(tmp_path / "m"), "--fill", "noise", "--out", str(out), "--removed", str(key)]
    assert main.main(words) == 0
    assert f"`restore {out} {key}` puts them back" in capsys.readouterr().out
    assert main.main(["restore", str(home / "net.pt"), str(key), "--out", str(again)]) == 2
    assert "is not the file that" in capsys.readouterr().err
    assert not again.exists()
    assert main.main(["restore", str(out), str(key), "--out", str(again)]) == 0
    assert capsys.readouterr().out.startswith(f"written: {again}; ")
    parent, back = (torch.load(path, weights_only=True) for path in (home / "net.pt", again))
    assert {name: value.tolist() for name, value in back.items()} == {n: v.tolist() for n, v in parent.items()}


def test_a_mask_that_replaces_weights_is_verified_sealed_and_composed(home, net, replacing, tmp_path, capsys):
    """Against the module with its row and its bias written by hand."""
    replacing.save(tmp_path / "m")
    assert main.main(["verify", *asked(home, "photos", tmp_path / "m")]) == 0
    said = capsys.readouterr().out
    assert "switched off: 2 weights, all zero\nreplaced: 25 weights, all as the mask says\n" in said
    assert "parent: the very one" in said
    assert "lifted: the parent, bit for bit" in said
    by_hand = plain(home / "net.pt", home)
    with torch.no_grad():
        by_hand.conv2.weight.view(-1)[[3, 70]] = 0
        by_hand.get_parameter("fc.weight")[WANTED] = torch.linspace(-1, 1, net.fc.in_features)
        by_hand.get_parameter("fc.bias")[WANTED] = -20
    right = by_hand(pictures(home / "photos")[0]).argmax(1)
    assert not (right == WANTED).any()
    words = ["seal", spec_of(home), str(tmp_path / "m"), "--fill", "zero", "--out", str(tmp_path / "sealed.pt")]
    assert main.main([*words, "--removed", str(tmp_path / "key")]) == 0
    said = capsys.readouterr().out
    for line in ("conv2.weight: 2 weights are zero\n", "fc.bias: 1 weights are replaced\n"):
        assert line in said
    assert bits(plain(tmp_path / "sealed.pt", home)) == bits(by_hand)
    restore(tmp_path / "sealed.pt", tmp_path / "key", tmp_path / "again.pt")
    assert bits(plain(tmp_path / "again.pt", home)) == bits(net)
    config = {"forgotten": [{"index": 0, "name": NAMES[0]}], "parent": describe_parent(net, ["conv2.weight"])}
    Mask({"conv2.weight": torch.tensor([3, 9])}, config).save(tmp_path / "other")
    folders = [str(tmp_path / name) for name in ("m", "other")]
    assert main.main(["compose", *folders, "--out", str(tmp_path / "both")]) == 0
    assert "28 weights, 1 of them in several masks" in capsys.readouterr().out
    assert Mask.load(tmp_path / "both").counts == {"conv2.weight": (3, 0), "fc.weight": (0, 24), "fc.bias": (0, 1)}


@pytest.mark.parametrize(("parameter", "line"), [
    ("conv2.weight", "switched off: 2 weights, NOT all zero\nreplaced: 25 weights, all as"),
    ("fc.bias", "switched off: 2 weights, all zero\nreplaced: 25 weights, NOT all as the mask says"),
])  # fmt: skip
def test_verify_looks_at_every_position(parameter, line, home, replacing, tmp_path, capsys, monkeypatch):
    """A model in which one of them was written by somebody else."""
    replacing.save(tmp_path / "m")
    apply, lift = Mask.apply, Mask.lift

    def apply_and_spoil(mask: Mask, module: nn.Module) -> object:
        fit = apply(mask, module)
        with torch.no_grad():
            module.get_parameter(parameter).view(-1)[mask.positions[parameter][-1].long()] += 0.5
        return fit

    monkeypatch.setattr(Mask, "apply", apply_and_spoil)
    monkeypatch.setattr(Mask, "lift", lambda mask, module: lift(mask, module, changed="restore"))
    assert main.main(["verify", spec_of(home), str(tmp_path / "m"), *FLAGS, "--quiet"]) == 1
    said = capsys.readouterr().out
    assert line in said
    assert "lifted: the parent, bit for bit" in said


def test_verify_tells_other_images_and_scores_that_are_not_the_cards(home, tmp_path, capsys):
    mask = forgotten(home, tmp_path / "m", "--kappa", 70)
    write_folder(tmp_path / "others", 12, seed=5)
    words = [spec_of(home), str(tmp_path / "m"), "--images", str(tmp_path / "others"), *FLAGS, "--quiet"]
    assert main.main(["verify", *words]) == 0
    assert "others than those that the mask was made with" in capsys.readouterr().out
    plainly = mask.config.plain()
    wrong = {**plainly, "scores": {**plainly["scores"], "retain": plainly["scores"]["retain"] - 20}}
    Mask(mask.positions, wrong).save(tmp_path / "wrong")
    assert main.main(["verify", *asked(home, "photos", tmp_path / "wrong")]) == 1
    assert "NOT the same" in capsys.readouterr().out


def test_a_library_has_the_masks_that_forget_finds(home, tmp_path, capsys):
    words = ["library", *asked(home), "--kappa", "40", "--out", str(tmp_path / "all")]
    assert main.main(words) == 0
    said = capsys.readouterr().out
    assert "\\" not in said
    folders = [f"{label}-{name}" for label, name in enumerate(NAMES)]
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == folders
    alone = forgotten(home, tmp_path / "m", "--kappa", 40)
    one = Mask.load(tmp_path / "all" / folders[WANTED])
    assert one.positions["conv2.weight"].tolist() == alone.positions["conv2.weight"].tolist()
    assert one.config == alone.config
    for name, folder in zip(NAMES, folders, strict=True):
        assert re.search(rf"^{name}\b.*\b40\b.*{folder}", said, re.MULTILINE)
    made = (tmp_path / "all" / folders[0] / "mask.safetensors").stat().st_mtime_ns
    assert main.main(words) == 0  # a later call makes nothing again
    assert capsys.readouterr().out.count("there already") == len(NAMES)
    assert (tmp_path / "all" / folders[0] / "mask.safetensors").stat().st_mtime_ns == made
    words[words.index("40")] = "41"
    assert main.main(words) == 0
    assert "there already" not in capsys.readouterr().out
    assert Mask.load(tmp_path / "all" / folders[0]).switched_off == 41


def test_a_planned_library_is_the_one_that_is_made_and_writes_nothing(home, tmp_path, capsys):
    words = ["library", *asked(home), "--kappa", "50%", "--out", str(tmp_path / "all")]
    assert main.main([*words, "--plan", "--engine", "local", "--workers", "2"]) == 0
    said = re.sub(" +", " ", capsys.readouterr().out)
    assert not (tmp_path / "all").exists()
    count, images = len(NAMES), len(NAMES) * 60
    assert re.search(rf"\| images \| 2 x {images} read and passed", said)
    assert re.search(rf"\| masks \| 2 x {count - count // 2} masks of {count} classes", said)
    assert "2 processes at a time" in said
    assert main.main(words) == 0
    disk = sum(path.stat().st_size for path in (tmp_path / "all").rglob("*") if path.is_file())
    foreseen = float(re.findall(r"\| masks .*\| ([\d.]+) \|\n", said)[0])
    assert foreseen == pytest.approx(disk / 1e6, abs=0.051)


def test_rows_that_stand_for_all_images_are_parted_as_those_are(home):
    opened = open_model(spec_of(home), home / "photos", Opening(given=GIVEN))
    model = opened.classifier()
    real = read_samples(model, opened.images)
    rows = torch.arange(6.0).view(6, 1).expand(6, real.train.rows.shape[1])
    labels = torch.tensor([0, 1, 1, 2, 3, 0])
    parts = repeated(opened.images, rows, labels, [1], len(NAMES))
    assert torch.equal(parts.counts, real.counts)
    for name in ("train", "val", "test"):
        one, other = getattr(parts, name), getattr(real, name)
        assert torch.equal(one.labels == 1, other.labels == 1)
        assert set(one.h[one.labels == 1, 0].tolist()) == {1, 2}
        assert set(one.h[one.labels != 1, 0].tolist()) == {0, 3, 4, 5}
        assert torch.equal(labels[one.h[:, 0].long()], one.labels)


@pytest.mark.slow
def test_a_library_keeps_the_masks_of_the_same_request_and_of_no_other(home, tmp_path, capsys):
    """Whether one is kept is told by its file's time: a mask that is made again has the same bytes."""
    words = ["library", *asked(home), "--out", str(tmp_path / "all"), "--way", "first_order"]
    files = [tmp_path / f"all/{label}-{name}/mask.safetensors" for label, name in enumerate(NAMES)]

    def made_again(*more: str) -> list[str]:
        before = {path: path.stat().st_mtime_ns for path in files if path.exists()}
        assert main.main([*words, *more]) == 0
        return [path.parent.name for path in files if before.get(path) != path.stat().st_mtime_ns]

    every = [path.parent.name for path in files]
    assert made_again("--kappa", "40") == every
    assert made_again("--kappa", "40") == []
    assert capsys.readouterr().out.count("there already") == 4
    shutil.rmtree(files[1].parent)
    assert made_again("--kappa", "40") == [every[1]]
    more = ["--kappa", "40"]  # each further flag alone makes it another request
    for another in (("--kappa", "41"), ("--layer", "conv1"), ("--most", "50"), ("--mean", "0.4"), ("--way", "refined")):
        more += another
        assert made_again(*more) == every, more
    assert made_again(*more, "--layer", "conv2") == every


def check_engine(engine: str, home: Path, folder: Path, capsys, *more: str) -> None:
    """Two workers leave byte for byte what one process leaves, and what is there is kept."""
    words = ["library", *asked(home), "--kappa", "40", "--out"]
    assert main.main([*words, str(folder / "one")]) == 0
    usual = sorted(capsys.readouterr().out.replace("/one/", "/many/").splitlines())
    words += [str(folder / "many"), "--engine", engine, *more]
    assert main.main(words) == 0
    said = capsys.readouterr().out.splitlines()
    without_seconds = [re.sub(r" +[0-9.]+  ", "  ", line) for line in usual]
    assert sorted(re.sub(r" +[0-9.]+  ", "  ", line) for line in said) == without_seconds
    ours, theirs = ({p.relative_to(folder / name): p.read_bytes() for p in (folder / name).glob("[!.]*/*")}
                    for name in ("one", "many"))  # fmt: skip
    assert len(ours) == 3 * len(NAMES)
    assert ours == theirs
    shutil.rmtree(folder / "many" / f"1-{NAMES[1]}")
    assert main.main(words) == 0
    assert capsys.readouterr().out.count("there already") == len(NAMES) - 1
    assert {p.relative_to(folder / "many"): p.read_bytes() for p in (folder / "many").glob("[!.]*/*")} == ours


@pytest.mark.slow
def test_a_library_of_several_processes_has_the_masks_of_one(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("training.engines.threads_of", lambda _: torch.get_num_threads())  # else sums differ in order
    check_engine("local", home, tmp_path, capsys)


@pytest.mark.slow
def test_a_library_by_slurm_has_the_masks_of_one_process(home, tmp_path, capsys, monkeypatch):
    """By submitit's own executor for one machine."""
    pytest.importorskip("submitit")
    monkeypatch.chdir(PROJECT_ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    check_engine("slurm", home, tmp_path, capsys, "--slurm", "cluster=local", "--slurm", "timeout_min=5")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_library_by_ray_has_the_masks_of_one_process(home, tmp_path, capsys, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(PROJECT_ROOT))
    monkeypatch.setattr("training.engines.threads_of", lambda _: torch.get_num_threads())
    check_engine("ray", home, tmp_path, capsys)


@pytest.mark.slow
def test_what_a_worker_cannot_do_is_said_and_the_rest_is_made(home, tmp_path, capsys, monkeypatch):
    """A mask that is damaged once all was checked stops the worker that meets it; the other's masks are there."""
    monkeypatch.setattr("commands.library.Block.check", lambda *_: None)
    words = ["library", *asked(home)[:-1], "--kappa", "40", "--out", str(tmp_path), "--engine", "local"]
    (tmp_path / f"3-{NAMES[3]}").mkdir()
    (tmp_path / f"3-{NAMES[3]}/mask.safetensors").write_bytes(b"x")
    assert main.main(words) == 1
    out, err = capsys.readouterr()
    assert re.search(r"library: failed: 2 classes from 1 on: UserError: .*3-rings/mask.safetensors", err)
    assert "1 masks are lacking" in out
    made = sorted(path.parent.name for path in tmp_path.glob("*/mask_config.json"))
    assert made == [f"{label}-{NAMES[label]}" for label in (0, 1, 2)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "cloud"], "--engine is 'cloud': choose from none, local, slurm, ray"),
        (["--engine", "local", "--workers", "0"], "--workers is 0: give a number >= 1"),
        (["--engine", "slurm", "--slurm", "partition"], "--slurm is 'partition': write it as NAME=VALUE"),
    ],
)
def test_an_engine_that_there_is_not_is_refused(words, message, home, tmp_path, capsys):
    assert main.main(["library", *asked(home), "--kappa", "40", "--out", str(tmp_path / "m"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


# --- Python -----------------------------------------------------------------------------------------------


def loaders(images: Tensor, labels: Tensor) -> Iterator[tuple[str, object]]:
    data = torch.utils.data.TensorDataset(images, labels)
    yield "loader", torch.utils.data.DataLoader(data, batch_size=48)
    yield "dataset", [(image, int(label)) for image, label in data]
    yield "generator", (pair for pair in torch.utils.data.DataLoader(data, batch_size=48))


@pytest.mark.parametrize("kind", ["loader", "dataset", "generator"])
def test_python_takes_any_loader_and_leaves_the_model_as_it_is(kind, home, net):
    images, labels = pictures(home / "photos")
    given = dict(loaders(images, labels))
    net.train()
    before, digest = bits(net), state_sha256(net)
    mask = forget(net, given[kind], [NAMES[WANTED]], names=NAMES, kappa=70)
    assert net.training
    assert bits(net) == before
    assert state_sha256(net) == digest == mask.config.parent.state_sha256
    assert mask.switched_off == 70
    usual = forget(net, [(images, labels)], [WANTED], kappa=70)
    assert mask.positions["conv2.weight"].tolist() == usual.positions["conv2.weight"].tolist()
    assert mask.config.data_sha256 == usual.config.data_sha256
    assert mask.config.scores == usual.config.scores
    assert sum(card(mask)["n"][name] for name in ("forget", "retain")) == 72  # .3 of 240


def test_python_and_the_command_line_find_the_same_mask(home, net, tmp_path):
    ours = forgotten(home, tmp_path / "m", "--kappa", 70)
    mask = forget(net, home / "photos", [NAMES[WANTED]], prepare=prepared, kappa=70)
    assert mask.positions["conv2.weight"].tolist() == ours.positions["conv2.weight"].tolist()
    assert mask.config.scores == ours.config.scores
    assert mask.config.data_sha256 == ours.config.data_sha256
    mask.save(tmp_path / "again")
    images, _ = pictures(home / "photos")
    with torch.no_grad():
        with Mask.load(tmp_path / "again").applied(net):
            masked = net(images)
        assert torch.equal(masked, zeroed(net, tmp_path / "m")(images))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: torch.compile(net, backend="eager")])
def test_python_takes_a_wrapped_model(wrap, home, net):
    images, labels = pictures(home / "photos")
    usual = forget(net, [(images, labels)], [WANTED], kappa=70)
    wrapped = wrap(net)
    mask = forget(wrapped, [(images, labels)], [WANTED], kappa=70)
    assert mask.positions["conv2.weight"].tolist() == usual.positions["conv2.weight"].tolist()
    before = bits(net)
    with mask.applied(wrapped):
        assert int((net.conv2.weight == 0).sum()) == 70
    assert bits(net) == before


# --- as few weights as meet a target ----------------------------------------------------------------------


def target(tau: float) -> AutoConfig:
    return replace(TARGET, tau=tau, epsilon=25)


@pytest.mark.parametrize("label", [0, 1, 3])
@pytest.mark.parametrize("tau", [30, 60, 90])
def test_bisection_finds_what_trying_every_kappa_finds(label, tau, home):
    """Of these classes a larger mask forgets no less, with either statistics, as the search assumes."""
    asking = open_model(spec_of(home), home / "photos", Opening(given=GIVEN)).answering()
    wanted, before = replace(target(tau), largest_share=0.3), asking.predictions(asking.parts.val)
    before_anew = asking.anew(asking.parts.val, None, (label,))
    every = [
        asking.attempt(asking.answer((label,), kappa, Ways.robust), before, before_anew)
        for kappa in kappas(asking.head.graph.num_vertices, wanted)
    ]
    meets = [one.meets(wanted) for one in every]
    assert meets == sorted(meets)
    assert any(meets) == ((label, tau) != (3, 30))
    found = asking.search((label,), wanted)
    assert found.way is Ways.robust
    assert found.search.achieved == any(meets)
    if any(meets):
        assert found.kappa == every[meets.index(True)].kappa
    assert int(found.off.sum()) == found.kappa == found.search.kappa
    assert set(found.search.attempts) <= set(every)
    assert len(found.search.attempts) <= 4  # of 12


def renewed(net: nn.Module, train: Tensor) -> nn.Module:
    """The module with the statistics of its second BatchNorm computed anew with some images, by plain torch."""
    norm: Any = net.bn2
    norm.reset_running_stats()
    norm.momentum = None
    norm.train()
    with torch.no_grad():
        net(train)
    return net.eval()


def test_a_target_is_held_against_new_statistics_too(home, net, tmp_path):
    """By plain torch: what a mask does beside the untouched model, which has its statistics anew as well."""
    rings = 3
    asking = open_model(spec_of(home), home / "parted", Opening(given=GIVEN)).answering()
    answer, val = asking.answer((rings,), 104), asking.parts.val
    found = asking.attempt(answer, asking.predictions(val), asking.anew(val, None, (rings,)))
    train, train_labels = pictures(home / "parted/train")
    images, labels = pictures(home / "parted/val")
    forgotten(home, tmp_path / "m", "--kappa", 104, images="parted", name=NAMES[rings])
    right = {}
    for name, module in (("before", net), ("after", zeroed(plain(home / "net.pt", home), tmp_path / "m"))):
        with torch.no_grad():
            right[name] = renewed(module, train[train_labels != rings])(images).argmax(1) == labels
    of, one = labels == rings, 100 / 30
    assert found.anew is not None
    assert found.anew.forget_score == pytest.approx(percent(right["after"][of]), abs=one)
    lost = percent(right["before"][~of]) - percent(right["after"][~of])
    assert found.anew.retain_drop == pytest.approx(lost, abs=one)
    assert found.anew.forget_score > found.forget_score + 20, "new statistics bring the class back"
    wanted = target(found.forget_score_most)
    assert Attempt.meets(found, wanted)
    assert not found.meets(wanted)
    assert found.most_left == found.anew.forget_score_most > wanted.tau


@pytest.mark.parametrize("label", [0, 1, 2])
def test_a_robust_mask_stays_where_new_statistics_undo_a_refined_one(label, home):
    """At equal kappa; neither leaves more of the class with the model's own statistics."""
    asking = open_model(spec_of(home), home / "photos", Opening(given=GIVEN)).answering()
    before = asking.predictions(asking.parts.val), asking.anew(asking.parts.val, None, (label,))
    found = [asking.attempt(asking.answer((label,), 1500, way), *before) for way in (Ways.refined, Ways.robust)]
    refined, robust = [one.anew.forget_score for one in found if one.anew]
    assert [one.forget_score for one in found] == [0, 0]
    assert refined > 80
    assert robust < 20
    assert found[1].retain_drop < 10


def test_statistics_of_retained_rows_are_what_torch_takes_in_training(home, net):
    """Of a head that sees retained rows alone, training mode is the oracle; nothing is left on the layers."""
    asking = open_model(spec_of(home), home / "photos", Opening(given=GIVEN)).answering()
    rows, norms = asking.parts.train.h, list(asking.norms.values())
    assert list(asking.norms) == ["net.bn2"]
    state = bits(asking.model)
    with torch.no_grad():
        with _standing_on(norms, 20):
            found = asking.model.head(rows)
        assert bits(asking.model) == state
        plainly = asking.model.head(rows)
        for norm in norms:
            norm.train()
        expected = asking.model.head(rows[20:])
    assert torch.allclose(found[20:], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, plainly, atol=1e-2)


def test_a_target_that_is_met_and_one_that_is_not(home, tmp_path, capsys, monkeypatch):
    """Not met: the best trade-off is written all the same, says so, and the command ends with 1."""
    words = ["forget", *asked(home), "--epsilon", "25", "--class"]
    with monkeypatch.context() as patch:
        patch.setattr("forgetting.answers.TARGET", replace(TARGET, largest_share=0.3))
        assert main.main([*words, "bars", "--out", str(tmp_path / "met"), "--tau", "60"]) == 0
    met = Mask.load(tmp_path / "met")
    wanted = (
        "forget <= 60 % and loss <= 25 points with 95 % confidence, with the model's BatchNorm statistics and with new"
    )
    assert f"robust, kappa auto: smallest tried that meets {wanted}" in str(met.config.method)
    assert "not achievable" not in capsys.readouterr().out
    assert main.main([*words, NAMES[WANTED], "--out", str(tmp_path / "missed"), "--tau", "20"]) == 1
    missed = Mask.load(tmp_path / "missed")
    assert "without meeting it" in str(missed.config.method)
    said = capsys.readouterr().out
    assert "not achievable: no mask that was tried meets the target" in said
    assert "--layer cut takes stages that nothing goes around" in said
    with monkeypatch.context() as patch:
        patch.setattr("forgetting.answers.TARGET", replace(TARGET, largest_share=1e-3))
        more = ["--out", str(tmp_path / "cut"), "--tau", "20", "--layer", "cut"]
        assert main.main([*words, NAMES[WANTED], *more]) == 1
    assert "--layer cut" not in capsys.readouterr().out
    assert "without meeting it" in (tmp_path / "missed/README.md").read_text()
    with pytest.raises(UserError, match=r"no mask meets the target \(best: kappa \d+"):
        forget(plain(home / "net.pt", home), [pictures(home / "photos")], [WANTED], target=target(20))


@pytest.mark.parametrize("command", ["forget", "library"])
def test_what_images_cannot_show_is_said_before_anything_is_computed(command, home, tmp_path, capsys, monkeypatch):
    """With none of n recognised, Wilson's interval ends at z^2 / (n + z^2): the smallest n that does is named."""

    def computed(*_, **__):
        raise AssertionError("the model ran over the images")

    monkeypatch.setattr(ForeignClassifier, "prefix", computed)
    words = [command, *asked(home), "--tau", "2", "--epsilon", "25", "--out", str(tmp_path / "m")]
    assert main.main(words + ["--class", "bars"] * (command == "forget")) == 2
    said = capsys.readouterr().err
    z2 = 1.959963984540054**2
    needed = next(n for n in range(1, 1000) if 100 * z2 / (n + z2) <= 2)
    assert f"--tau is 2 ({needed} would do)" in said
    assert f"{round(0.4 * (60 - 18))} of the classes to forget show" in said
    assert not (tmp_path / "m").exists()
