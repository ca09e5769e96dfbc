"""A small network takes one thread, and how many threads are allowed is not forgotten by that."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from core.config import PipelineConfig, SupportedVisionModels, TrainConfig
from stages.setup import Setup
from training import threads
from training.threads import WORTH, allowed_threads, choose_threads

CPU = torch.device("cpu")


@pytest.fixture
def three(monkeypatch) -> Iterator[None]:
    """A process that may use three threads."""
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "_allowed", [])
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_small_networks_take_one_thread_and_large_ones_all_again(three):
    for multiplications, taken in ((WORTH - 1, 1), (WORTH, 3), (0, 1), (math.inf, 3)):
        choose_threads(CPU, multiplications)
        assert (torch.get_num_threads(), allowed_threads()) == (taken, 3)
    choose_threads(torch.device("cuda"), 0)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (SupportedVisionModels.HookedMLPClassifier, 20 * (8 * 8 * 128 + 128 * 64 + 64 * 10)),
        (SupportedVisionModels.HookedResnet, math.inf),
    ],
)
def test_multiplications_are_known_of_linear_layers_alone(kind, found, tmp_path: Path):
    """By hand for DIGITS' perceptron: a weight meets each image once; a convolution uses its weights many times."""
    train = TrainConfig(batch_size=20)
    setup = Setup(PipelineConfig(output_dir=tmp_path, device="cpu", model_architecture=kind, train=train))
    assert setup.multiplications == found
