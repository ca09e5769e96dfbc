"""What waits for who brings a checkpoint: averages, prefixes, folded weights, types, answers, from file to file.

The oracle is the user's own module, filled by torch alone.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

import main
from core.choices import UserError
from forgetting.python import _asked, forget
from mimu import Mask, describe_parent, state_sha256
from tests.helpers.foreign import bits
from tests.helpers.patterns import FLAGS, NAMES, network, prepared, spec_of, trained, words_for, write_folder

LABEL = 3  # rings
FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("home")
    trained(root)
    write_folder(root / "photos", 40)
    return root


@pytest.fixture
def state(home) -> dict[str, Tensor]:
    return torch.load(home / "net.pt", weights_only=True)


@pytest.fixture(scope="module")
def images(home) -> Tensor:
    return torch.stack([prepared(Image.open(path)) for path in sorted((home / "photos").rglob("*.png"))])


@pytest.fixture(scope="module")
def labels(home) -> Tensor:
    names = [path.parent.name for path in sorted((home / "photos").rglob("*.png"))]
    return torch.tensor([NAMES.index(name) for name in names])


def filled(home: Path, state: dict[str, Tensor], kind: torch.dtype = torch.float32) -> nn.Module:
    net = network(home / "net.py").to(kind)
    net.load_state_dict(state)
    return net.eval()


def answers(net: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return net(images.to(next(net.parameters()).dtype))


def masked(state: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """A state with the weights of a mask's file at zero."""
    new = {name: value.clone() for name, value in state.items()}
    for name, flat in load_file(folder / "mask.safetensors").items():
        new[name].view(-1)[flat.long()] = 0
    return new


def made(home: Path, place: Path, *more: str, file: str, **settings: str) -> Mask:
    words = ["forget", *words_for(home, file=file, **settings), "--class", "rings", "--kappa", "70"]
    assert main.main([*words, "--out", str(place), *more]) == 0
    return Mask.load(place)


def sealed(home: Path, mask: Path, out: Path, *more: str, file: str) -> Any:
    assert main.main(["seal", spec_of(home, file=file), str(mask), "--out", str(out), *more]) == 0
    return torch.load(out, weights_only=True)


# --- what is in a checkpoint ------------------------------------------------------------------------------


@pytest.mark.parametrize("container", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "net."])
def test_prefixes_and_containers_stay_in_the_sealed_file(prefix, container, home, state, images, tmp_path):
    stored = {prefix + name: value for name, value in state.items()}
    net = filled(home, state)
    optimizer = torch.optim.SGD(net.parameters(), momentum=0.9).state_dict()
    torch.save({container: stored, "optimizer": optimizer, "epoch": 3} if container else stored, home / "x.pt")
    mask = made(home, tmp_path / "m", file="x.pt")
    assert mask.config.parent.state_sha256 == state_sha256(net)
    found = sealed(home, tmp_path / "m", tmp_path / "sealed.pt", file="x.pt")
    assert set(found) == ({container, "epoch"} if container else set(stored))
    found = found[container] if container else found
    assert list(found) == list(stored)
    expected = answers(filled(home, masked(state, tmp_path / "m")), images)
    assert torch.equal(answers(filled(home, {name[len(prefix) :]: value for name, value in found.items()}), images),
                       expected)  # fmt: skip


@pytest.mark.parametrize(("chosen", "copies"), [("ema", "seal"), ("plain", "seal"), ("plain", "drop")])
def test_of_an_average_and_the_weights_each_is_sealed_or_dropped(chosen, copies, home, state, images, tmp_path, capsys):
    """A loader that prefers the average would else give back what was to be forgotten."""
    average = {name: value * 1.01 if value.is_floating_point() else value for name, value in state.items()}
    both = {"plain": state, "ema": average}
    torch.save({"state_dict": state, "state_dict_ema": average}, home / "x.pt")
    words = ["forget", *words_for(home, file="x.pt"), "--class", "rings", "--out", str(tmp_path / "m")]
    assert main.main(words) == 2
    assert "holds several models (state_dict, state_dict_ema)" in capsys.readouterr().err
    mask = made(home, tmp_path / "m", "--ema", chosen, file="x.pt")
    assert mask.config.parent.state_sha256 == state_sha256(filled(home, both[chosen]))
    assert main.main(["seal", spec_of(home, file="x.pt"), str(tmp_path / "m"), "--out", str(tmp_path / "no.pt")]) == 2
    assert "say --copies seal to seal both, or --copies drop" in capsys.readouterr().err
    assert not (tmp_path / "no.pt").exists()
    found = sealed(home, tmp_path / "m", tmp_path / "s.pt", "--copies", copies, file="x.pt")
    for name, key in (("plain", "state_dict"), ("ema", "state_dict_ema")):
        if name != chosen and copies == "drop":
            assert key not in found
            continue
        expected = answers(filled(home, masked(both[name], tmp_path / "m")), images)
        assert torch.equal(answers(filled(home, found[key]), images), expected)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, weight_norm], ids=["parametrised", "old"])
def test_a_weight_in_parts_is_folded_for_a_mask_and_refused_by_seal(wrap, home, state, images, tmp_path, capsys):
    """A loader of the sealed file would make the weight anew; as plain weights it can be sealed."""
    net = filled(home, state)
    wrap(net.conv2)
    torch.save(net.state_dict(), home / "x.pt")
    mask = made(home, tmp_path / "m", file="x.pt")
    assert main.main(["verify", *words_for(home, tmp_path / "m", file="x.pt")]) == 0
    capsys.readouterr()
    assert main.main(["seal", spec_of(home, file="x.pt"), str(tmp_path / "m"), "--out", str(tmp_path / "s.pt")]) == 2
    assert re.search(r"x\.pt has conv2\.weight in parts .*save the model with plain weights", capsys.readouterr().err)
    assert not (tmp_path / "s.pt").exists()
    assert mask.switched_off == 70
    with torch.no_grad():
        weight = net.conv2.weight.detach().clone()
    torch.save({**state, "conv2.weight": weight}, home / "plain.pt")
    found = sealed(home, tmp_path / "m", tmp_path / "s.pt", file="plain.pt")
    assert int((found["conv2.weight"] == 0).sum()) == 70


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_python_masks_no_weight_that_is_made_anew(home, state, images, labels):
    net = filled(home, state)
    weight_norm(net.conv2)
    with pytest.raises(UserError, match=r"cannot be copied: fold .*remove_weight_norm"):
        forget(net, [(images, labels)], [LABEL], kappa=9)
    torch.nn.utils.remove_weight_norm(net.conv2)
    parametrizations.weight_norm(net.conv2)
    assert list(forget(net, [(images, labels)], [LABEL], kappa=9).positions) == ["conv1.weight"]
    with pytest.raises(UserError, match="no Linear or Conv2d weight 'conv2'"):
        forget(net, [(images, labels)], [LABEL], kappa=9, layers=["conv2"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_python_refuses_a_quantised_model_before_it_runs_over_the_images(home, state, images, labels):
    """Its convolutions are floats still, but what would be sealed is not its parent."""
    net = torch.ao.quantization.quantize_dynamic(filled(home, state), {nn.Linear})  # ty: ignore[deprecated]

    def pairs():
        yield images[:8], labels[:8]
        for _ in range(3):
            yield images[:8], labels[:8]
        raise AssertionError("the model ran over the images")

    with pytest.raises(UserError, match=r"is quantised.*mask the float parent"):
        forget(net, pairs(), [LABEL], kappa=9)


@pytest.mark.parametrize("kind", FLOATS)
def test_a_model_of_other_floats_keeps_them(kind, home, state, images, labels, tmp_path):
    """Computed with in float32, described, verified and sealed as it is; scores hold for it as it answers itself."""
    cast = {name: value.to(FLOATS[kind]) if value.is_floating_point() else value for name, value in state.items()}
    torch.save(cast, home / "x.pt")
    mask = made(home, tmp_path / "m", file="x.pt")
    assert mask.config.parent.targets["conv2.weight"].dtype == kind
    assert main.main(["verify", *words_for(home, tmp_path / "m", file="x.pt")]) == 0
    found = sealed(home, tmp_path / "m", tmp_path / "s.pt", file="x.pt")
    assert {name: value.dtype for name, value in found.items()} == {name: value.dtype for name, value in cast.items()}
    net = filled(home, found, FLOATS[kind])
    assert torch.equal(answers(net, images), answers(filled(home, masked(cast, tmp_path / "m"), FLOATS[kind]), images))
    recognised = (answers(net, images).argmax(1) == labels)[labels == LABEL].float().mean()
    assert recognised < 0.5 < (answers(filled(home, state), images).argmax(1) == labels)[labels == LABEL].float().mean()


def test_safetensors_are_sealed_as_they_are(home, state, images, tmp_path):
    save_model(filled(home, state), str(home / "x.safetensors"))
    made(home, tmp_path / "m", file="x.safetensors")
    words = ["seal", spec_of(home, file="x.safetensors"), str(tmp_path / "m"), "--out", str(tmp_path / "s.safetensors")]
    assert main.main(words) == 0
    found = load_file(tmp_path / "s.safetensors")
    assert torch.equal(
        answers(filled(home, found), images), answers(filled(home, masked(state, tmp_path / "m")), images)
    )


def test_noise_and_removed_values(home, state, tmp_path, capsys):
    """In place of zeros, noise of the layer's scale; what was removed is in its own file and in no other."""
    made(home, tmp_path / "m", file="net.pt")
    more = ("--fill", "noise", "--seed", "3", "--removed", str(tmp_path / "removed"))
    found = sealed(home, tmp_path / "m", tmp_path / "s.pt", *more, file="net.pt")
    flat = load_file(tmp_path / "m/mask.safetensors")["conv2.weight"].long()
    old, new = (one["conv2.weight"].view(-1)[flat] for one in (state, found))
    assert not (old == new).any()
    assert not (new == 0).any()
    assert 0.5 < float(new.std() / state["conv2.weight"].std()) < 2
    assert f"the removed values are in {tmp_path}/removed" in capsys.readouterr().out
    held = (tmp_path / "removed").read_bytes()
    assert all(value.numpy().tobytes() in held for value in old[:1])


def test_names_that_moved(home, state, images, tmp_path, capsys):
    """A mask of a program's module, in which the user's stands inside of another: content finds the weights."""
    net = nn.Sequential(filled(home, state))
    forget(net, home / "photos", ["rings"], prepare=prepared, kappa=70).save(tmp_path / "m")
    assert list(load_file(tmp_path / "m/mask.safetensors")) == ["0.conv2.weight"]
    assert main.main(["verify", *words_for(home, tmp_path / "m")]) == 0
    said = capsys.readouterr()
    assert "0.conv2.weight is conv2.weight" in said.out
    assert "bit for bit" in said.out
    assert said.err == ""
    (flat,) = load_file(tmp_path / "m/mask.safetensors").values()
    found = sealed(home, tmp_path / "m", tmp_path / "s.pt", file="net.pt")
    assert (found["conv2.weight"].view(-1) == 0).nonzero().flatten().tolist() == flat.tolist()


# --- what a model answers, and what is said of it ---------------------------------------------------------


def test_probabilities_are_answers_too(home, state, images, labels, tmp_path):
    """The same mask as for logits: a softmax's logarithm differs from them by one number an image."""
    plain = made(home, tmp_path / "a", file="net.pt")
    soft = made(home, tmp_path / "b", file="net.pt", end="softmax")
    ours, theirs = (set(mask.positions["conv2.weight"].tolist()) for mask in (plain, soft))
    assert len(ours & theirs) >= 65
    assert soft.config.scores is not None
    assert plain.config.scores is not None
    assert soft.config.scores["forget"] == plain.config.scores["forget"]
    net = network(home / "net.py", end="softmax")
    net.load_state_dict(state)
    python = forget(net.eval(), [(images, labels)], [LABEL], kappa=70)
    assert len(ours & set(python.positions["conv2.weight"].tolist())) > 35
    outputs, logits = _asked(net, images[:4])
    assert outputs == len(NAMES)
    assert torch.equal(logits(answers(net, images)), answers(net, images).log())


class Answering(nn.Module):
    """The model, answering as frameworks do."""

    def __init__(self, net: nn.Module, form: Callable[[Tensor], object]):
        super().__init__()
        self.net, self.form = net, form

    def forward(self, images: Tensor) -> object:
        return self.form(self.net(images))


class Named:
    def __init__(self, logits: Tensor):
        self.logits = logits


@pytest.mark.parametrize("form", [Named, lambda out: {"logits": out}, lambda out: (out, out * 2)])
def test_python_finds_the_logits_in_an_answer(form, home, state, images, labels):
    usual = forget(filled(home, state), [(images, labels)], [LABEL], kappa=70)
    mask = forget(Answering(filled(home, state), form), [(images, labels)], [LABEL], kappa=70)
    assert mask.positions["net.conv2.weight"].tolist() == usual.positions["conv2.weight"].tolist()


def test_batch_norm_stays_as_it_is(home, state, images, labels):
    """Scores with statistics made anew are on the card; the model's own are not touched, nor is its mode."""
    net = filled(home, state).train()
    before = bits(net)
    mask = forget(net, [(images, labels)], [LABEL], kappa=70)
    assert bits(net) == before
    assert net.training
    assert net.bn2.training
    assert mask.config.scores is not None
    assert {"forget_recalibrated", "retain_recalibrated"} <= set(mask.config.scores)
    assert mask.config.parent.state_sha256 == describe_parent(net, ["conv2.weight"]).state_sha256
    with torch.no_grad():
        net.get_buffer("bn2.running_mean")[0] += 1
    assert describe_parent(net, ["conv2.weight"]).state_sha256 != mask.config.parent.state_sha256


def test_what_was_taken_and_from_where_is_said(home, tmp_path, capsys):
    """Before anything is asked of the model, so that a wrong guess is seen beside its refusal."""
    (tmp_path / "names").write_text("\n".join(NAMES))
    words = [word for word in words_for(home) if word != "--quiet"]
    more = ["--classes", str(tmp_path / "names"), "--class", "rings", "--kappa", "9", "--out", str(tmp_path / "m")]
    assert main.main(["forget", *words, *more]) == 0
    said = capsys.readouterr().err
    assert f"classes: bars, checks, dots, rings (4); from {tmp_path}/names" in said
    assert "from the flags --size, --mean, --std" in said
    assert "note: " in said
    at = words.index("--std")
    assert main.main(["forget", *words[:at], "--std", "90", *words[at + 4 :], *more]) == 2
    assert "std 90" in capsys.readouterr().err


def test_how_many_classes_the_scores_rest_on_is_said(home, state, images, labels, tmp_path, capsys):
    few = labels != 0
    mask = forget(filled(home, state), [(images[few], labels[few])], [LABEL], kappa=70)
    assert mask.config.scores is not None
    assert (mask.config.scores["classes_retained"], mask.config.scores["classes_without_images"]) == (2, 1)
    mask.save(tmp_path / "m")
    assert re.search(r"classes_without_images \| 1\b", (tmp_path / "m/README.md").read_text())


def test_a_folder_of_a_mask_is_no_adapter_of_another_library(home, tmp_path):
    made(home, tmp_path / "m", file="net.pt")
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        "README.md",
        "mask.safetensors",
        "mask_config.json",
    ]
    assert FLAGS[0] == "--size"
