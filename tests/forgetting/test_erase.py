"""`--depth erase`: a mask with new rows of the last layer, recomputed by plain torch, sealed, lifted, and refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import main
from forgetting.answers import Ways
from forgetting.artefact import kappa_of, usual_layers
from forgetting.python import forget
from mimu import Mask, state_sha256
from tests.helpers.patterns import NAMES, network, pictures, prepared, spec_of, trained, words_for, write_folder

WANTED = 2


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("erase")
    trained(root)
    write_folder(root / "photos", 60)
    return root


@pytest.fixture
def net(home) -> nn.Module:
    module = network(home / "net.py")
    module.load_state_dict(torch.load(home / "net.pt", weights_only=True))
    return module.eval()


@pytest.fixture(scope="module")
def erased(home, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("masks") / "m"
    words = ["forget", *words_for(home, "--class", NAMES[WANTED], "--depth", "erase", "--out", place)]
    assert main.main(words) == 0
    return place


def written(net: nn.Module, folder: Path) -> nn.Module:
    """The module with what a mask's file says, by plain torch."""
    stored = load_file(folder / "mask.safetensors")
    with torch.no_grad():
        for name, flat in stored.items():
            if not name.startswith(".values."):
                new = stored.get(f".values.{name}", torch.zeros(len(flat)))
                net.get_parameter(name).view(-1)[flat.long()] = new
    return net


def test_the_class_is_no_longer_answered_and_the_rest_is(home, net, erased):
    images, labels = pictures(home / "photos")
    with torch.no_grad():
        before, after = net(images).argmax(1), written(net, erased)(images).argmax(1)
    of = labels == WANTED
    assert (before == labels)[of].double().mean() > 0.8
    assert (after == labels)[of].double().mean() < 0.1
    assert (after == labels)[~of].double().mean() > (before == labels)[~of].double().mean() - 0.1


def test_two_percent_of_the_last_stages_are_off_and_one_row_is_new(net, erased):
    mask = Mask.load(erased)
    sizes = {name: net.get_parameter(name).numel() for name in ("conv1.weight", "conv2.weight", "fc.weight")}
    assert mask.switched_off == round(0.02 * sum(sizes.values()))
    assert mask.replaced == 24
    row = {WANTED * 24 + column for column in range(24)}
    values = dict(zip(mask.positions["fc.weight"].tolist(), mask.values["fc.weight"].tolist(), strict=True))
    assert {place for place, value in values.items() if value} == row
    assert set(mask.values) == {"fc.weight"}


def test_the_card_says_what_features_tell_and_that_nothing_was_compared(erased):
    config = json.loads((erased / "mask_config.json").read_text())
    names = ("features_before", "features_may", "features_now")
    for name in names:
        assert [part.split()[0] for part in config["scores"][name].split(", ")] == ["conv2", "fc"]
    told = {
        name: int(config["scores"][name].split()[-1]) for name in ("features_before", "features_may", "features_now")
    }
    assert told["features_now"] < told["features_before"]
    assert config["method"].startswith("erase, ")
    assert "no retrained model" in config["method"]
    assert "features_now" in (erased / "README.md").read_text()


def test_it_is_verified_sealed_and_lifted(home, net, erased, tmp_path, capsys):
    assert main.main(["verify", *words_for(home, erased)]) == 0
    said = capsys.readouterr().out
    assert "all zero" in said
    assert "all as the mask says" in said
    assert "lifted: the parent, bit for bit" in said
    assert main.main(["seal", spec_of(home), str(erased), "--out", str(tmp_path / "sealed.pt")]) == 0
    sealed = torch.load(tmp_path / "sealed.pt", weights_only=True)
    wanted = written(net, erased).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in sealed.items())


def test_python_finds_the_same_edit(home, net, erased):
    before = state_sha256(net)
    mask = forget(net, home / "photos", [NAMES[WANTED]], prepare=prepared, way=Ways.erase)
    other = Mask.load(erased)
    assert all(torch.equal(flat, other.positions[name]) for name, flat in mask.positions.items())
    assert torch.equal(mask.values["fc.weight"], other.values["fc.weight"])
    assert state_sha256(net) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--depth", "deeper"), "--depth is 'deeper': choose from suppress, erase"),
        (("--way", "erase"), "--way is 'erase': choose from refined, robust, first_order, network, network_refined"),
        (("--depth", "erase", "--way", "first_order"), "--way, --tau and --epsilon say how outputs are made to forget"),
        (("--depth", "erase", "--tau", "1"), "--way, --tau and --epsilon say how outputs are made to forget"),
        (
            ("--depth", "erase", "--layer", "conv2"),
            "erasing draws rows of fc.weight anew: name it with",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(more, message, home, tmp_path, capsys):
    words = ["forget", *words_for(home, "--class", NAMES[0], "--out", tmp_path / "m", *more)]
    assert main.main(words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_auto_is_a_share_to_erase_and_a_search_to_suppress():
    assert kappa_of("auto", 10_000, Ways.erase) == 200
    assert kappa_of("auto", 10_000, Ways.refined) is None
    assert kappa_of("5%", 10_000, Ways.erase) == 500
    assert usual_layers(Ways.erase) == ("deep",)
    assert usual_layers(Ways.first_order) == ("auto",)
