"""What goes to a hub: nothing without --push, and then what was written and nothing else. The hub is a folder here."""

import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

import main
from mimu import Mask
from release.hub import check_repository
from tests.helpers.patterns import NAMES, spec_of, trained, words_for, write_folder

MASK = {"mask.safetensors", "mask_config.json", "README.md"}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("home")
    trained(root)
    write_folder(root / "photos", 60)
    return root


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder in which each repository is a folder, and the hub's client copies."""
    root = tmp_path / "hub"
    root.mkdir()

    class Api:
        def create_repo(self, repo_id: str, *, exist_ok: bool) -> str:
            (root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
            return f"https://hub/{repo_id}"

        def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: Any, commit_message: str) -> None:
            assert commit_message
            for path in Path(folder_path).rglob("*"):
                name = str(path.relative_to(folder_path))
                if path.is_file() and (allow_patterns is None or any(fnmatch(name, one) for one in allow_patterns)):
                    (root / repo_id / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, root / repo_id / name)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return root


@pytest.fixture
def refusing(monkeypatch) -> None:
    class Api:
        def create_repo(self, *_: object, **__: object) -> str:
            raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required,\nbut no token found.")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)


@pytest.fixture
def no_hub(monkeypatch) -> None:
    def asked(*_: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "HfApi", asked)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def forget(home: Path, out: Path, name: str, *more: str) -> int:
    return main.main(["forget", *words_for(home), "--class", name, "--kappa", "70", "--out", str(out), *more])


def test_a_mask_that_is_pushed_loads_from_there(home, hub, tmp_path, capsys):
    assert forget(home, tmp_path / "m", NAMES[2], "--push", "me/dots") == 0
    assert "pushed: https://hub/me/dots" in capsys.readouterr().out
    assert files(hub) == {f"me/dots/{name}" for name in MASK}
    there, here = Mask.load(hub / "me/dots"), Mask.load(tmp_path / "m")
    assert there.digest == here.digest
    assert forget(home, tmp_path / "other", NAMES[1], "--push", "me/dots") == 0  # a repository that is there already
    assert Mask.load(hub / "me/dots").forgotten == (NAMES[1],)


def test_a_mask_is_a_card_of_the_hub(home, no_hub, tmp_path):
    """Read by the hub's own client."""
    assert forget(home, tmp_path / "m", NAMES[2]) == 0
    card = huggingface_hub.ModelCard.load(tmp_path / "m/README.md")
    assert card.data.library_name == "mimu"
    assert "machine-unlearning" in card.data.tags
    assert card.text.strip().startswith(f"# Mask: forgets {NAMES[2]}")


def test_a_joint_mask_and_a_sealed_checkpoint_are_pushed_alone(home, hub, tmp_path):
    """The removed values lie beside the sealed file, and stay there."""
    for label in (1, 2):
        assert forget(home, tmp_path / f"{label}", NAMES[label]) == 0
    masks = [str(tmp_path / "1"), str(tmp_path / "2")]
    assert main.main(["compose", *masks, "--out", str(tmp_path / "both"), "--push", "both"]) == 0
    assert set(Mask.load(hub / "both").forgotten) == {NAMES[1], NAMES[2]}
    out, removed = tmp_path / "safe/sealed[1].pt", tmp_path / "safe/sealed1.pt"
    out.parent.mkdir()
    words = [spec_of(home), masks[0], "--out", str(out), "--removed", str(removed), "--push", "me/sealed"]
    assert main.main(["seal", *words]) == 0
    assert removed.exists()
    assert files(hub / "me/sealed") == {"sealed[1].pt"}
    theirs, ours = (torch.load(path, weights_only=True) for path in (hub / "me/sealed/sealed[1].pt", out))
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_nothing_is_pushed_unless_it_is_asked_for(home, no_hub, tmp_path):
    assert forget(home, tmp_path / "m", NAMES[2]) == 0
    assert main.main(["compose", *[str(tmp_path / "m")] * 2, "--out", str(tmp_path / "both")]) in (0, 2)
    assert main.main(["seal", spec_of(home), str(tmp_path / "m"), "--out", str(tmp_path / "sealed.pt")]) == 0
    assert main.main(["library", *words_for(home), "--kappa", "9", "--out", str(tmp_path / "all")]) == 0


def test_a_mask_that_misses_its_target_is_not_pushed(home, no_hub, tmp_path, capsys):
    words = ["--kappa", "auto", "--tau", "20", "--epsilon", "25", "--push", "me/dots"]
    assert forget(home, tmp_path / "m", NAMES[2], *words) == 1
    assert "not pushed: the target is not met" in capsys.readouterr().out
    assert Mask.load(tmp_path / "m").forgotten == (NAMES[2],)


def test_a_refusal_is_one_sentence_and_the_mask_is_on_disk(home, refusing, tmp_path, capsys):
    assert forget(home, tmp_path / "m", NAMES[2], "--push", "me/dots") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"the hub did not take {tmp_path / 'm'} as me/dots (Token is required, but no token found)" in line
    assert "it is whole on disk" in line
    assert Mask.load(tmp_path / "m").switched_off == 70


@pytest.mark.parametrize("name", ["", "a/b/c", "bad name", "-x"])
def test_a_name_that_no_repository_can_have_is_refused_before_anything_is_made(name, home, no_hub, tmp_path, capsys):
    assert forget(home, tmp_path / "m", NAMES[2], f"--push={name}") == 2
    assert "which no repository can be called" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
    check_repository("me/dots")


def test_removed_values_inside_of_what_is_pushed_are_refused(home, no_hub, tmp_path, capsys):
    words = [spec_of(home), str(tmp_path / "m"), "--out", str(tmp_path / "s"), "--removed", str(tmp_path / "s/k")]
    assert main.main(["seal", *words, "--push", "me/sealed"]) == 2
    assert "lies in what is to be pushed" in capsys.readouterr().err
