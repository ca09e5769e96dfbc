"""`inspect` shows what a user's classifier consists of, or says in one sentence what it lacks."""

import torch
import torchvision

import main


def test_a_checkpoint_is_shown(tmp_path, capsys):
    module = torchvision.models.squeezenet1_1(weights=None, num_classes=3)
    torch.save({"state_dict": {f"module.{name}": value for name, value in module.state_dict().items()}}, tmp_path / "x")
    (tmp_path / "names").write_text("cat\ndog\ncow\n")
    words = ["inspect", f"torchvision:squeezenet1_1@{tmp_path}/x", "--classes", str(tmp_path / "names")]
    assert main.main(words) == 2
    assert "give --size, --mean and --std" in capsys.readouterr().err
    assert main.main([*words, "--size", "64", "--mean", "0.5", "--std", "0.25"]) == 0
    said = capsys.readouterr().out
    assert "module.classifier.1.weight" in said
    assert f"classes: cat, dog, cow; from {tmp_path}/names" in said
    assert "head: classifier.1.weight, with a bias for each class" in said
    assert "taking its 'state_dict'" in said
