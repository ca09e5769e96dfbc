"""Every method on a user's model: scores against plain torch, and in words what cannot be used there."""

import json

import pytest
import torch
from PIL import Image

import main
from mimu import Mask
from tests.helpers.patterns import FLAGS, NAMES, network, prepared, spec_of, trained, write_folder

METHODS = ("mimu", "mimu_refined", "random", "taylor_mask", "magnitude", "fisher_mask", "sft", "finetune", "ssd")
NOT_HERE = ("retrain", "bad_teacher", "head_retrain", "damp", "esc", "leace", "collapse", "cola", "pour_d")
WANTED, KAPPA = 2, 400


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of one comparison: net.pt, parted/test, mask, mask-methods.json."""
    root = tmp_path_factory.mktemp("compared")
    trained(root)
    for seed, part in enumerate(("train", "val", "test"), 10):
        write_folder(root / "parted" / part, 30, seed=seed)
    words = ["forget", spec_of(root), "--images", str(root / "parted"), *FLAGS, "--class", NAMES[WANTED], "--kappa"]
    words += [str(KAPPA), "--out", str(root / "mask"), "--quiet"]
    for name in (*METHODS, *NOT_HERE):
        words += ["--methods", name]
    assert main.main(words) == 0
    return root


@pytest.fixture(scope="module")
def found(compared):
    rows = json.loads((compared / "mask-methods.json").read_text())["methods"]
    return {row["method"]: row for row in rows}


def accuracy(root, state) -> tuple[float, float]:
    """Percent of test images of the class, and of all others, that a state of the network recognises."""
    net = network(root / "net.py")
    net.load_state_dict(state)
    net.eval()
    shares = []
    for name in NAMES:
        files = sorted((root / "parted" / "test" / name).iterdir())
        with torch.no_grad():
            answers = net(torch.stack([prepared(Image.open(file)) for file in files])).argmax(1)
        shares.append(100 * float((answers == NAMES.index(name)).double().mean()))
    others = [share for place, share in enumerate(shares) if place != WANTED]
    return shares[WANTED], sum(others) / len(others)


def test_untouched_and_masked_scores_are_plain_torchs(compared, found):
    state = torch.load(compared / "net.pt", weights_only=True)
    row = found["default"]
    assert (row["forget_score"], row["retain_score"]) == pytest.approx(accuracy(compared, state))
    for name, flat in Mask.load(compared / "mask").positions.items():
        state[name].view(-1)[flat.long()] = 0
    row = found["mimu_refined"]
    assert (row["forget_score"], row["retain_score"]) == pytest.approx(accuracy(compared, state))
    assert row["weights_changed"] == KAPPA


def test_mimu_is_the_shipped_network_alone(compared, found, tmp_path):
    words = ["forget", spec_of(compared), "--images", str(compared / "parted"), *FLAGS, "--class", NAMES[WANTED]]
    words += ["--kappa", str(KAPPA), "--way", "network", "--out", str(tmp_path / "mask"), "--quiet"]
    assert main.main(words) == 0
    state = torch.load(compared / "net.pt", weights_only=True)
    for name, flat in Mask.load(tmp_path / "mask").positions.items():
        state[name].view(-1)[flat.long()] = 0
    row = found["mimu"]
    assert (row["forget_score"], row["retain_score"]) == pytest.approx(accuracy(compared, state))


def test_methods_differ_in_what_they_change(found):
    for name in ("random", "taylor_mask", "magnitude", "fisher_mask"):
        assert 0 < found[name]["weights_changed"] <= KAPPA
    assert found["finetune"]["weights_changed"] > 10 * KAPPA
    assert found["random"]["forget_score"] > found["mimu_refined"]["forget_score"]


def test_what_needs_more_than_the_model_says_so_and_no_value_is_made_up(found):
    assert set(found) == {"default", *METHODS, *NOT_HERE}
    for name in NOT_HERE:
        assert found[name]["why"]
        assert "forget_score" not in found[name]
    for row in found.values():
        assert "avg_gap" not in row
