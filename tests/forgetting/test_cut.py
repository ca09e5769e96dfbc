"""Masks on the stages that nothing goes around, of a network whose blocks add to what they read."""

import pytest
import torch
from torch import Tensor, nn

import main
from forgetting.answers import DRAWN, FORGOTTEN, RETAINED, Answering, RequestHead, Ways
from forgetting.pictures import Loader
from forgetting.python import forget
from forgetting.samples import read_samples
from measure.auto_kappa import Attempt
from models.foreign import ForeignClassifier
from tests.helpers.foreign import bits
from tests.helpers.patterns import trained, words_for, write_folder
from unlearn.requests import Request

CLASSES, WIDTH = 4, 16


class Around(nn.Module):
    """Blocks of which each adds a little to what it reads; what comes first goes around all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, WIDTH)) for _ in range(3)
        )
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)
        self.stem = nn.ModuleList([nn.Linear(48, WIDTH)])

    def forward(self, images: Tensor) -> Tensor:
        h = self.stem[0](images.flatten(1)).relu()
        for block in self.blocks:
            h = h + block(h)
        return self.head(self.norm(h))


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    """150 images of each class: one of four patterns, and noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(CLASSES).repeat(150)
    patterns = torch.randn(CLASSES, 3, 4, 4, generator=generator)
    return patterns[labels] + 0.7 * torch.randn(len(labels), 3, 4, 4, generator=generator), labels


@pytest.fixture(scope="module")
def net(images) -> nn.Module:
    torch.manual_seed(0)
    net = Around()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(60):
        loss = nn.functional.cross_entropy(net(images[0]), images[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


def asking(net: nn.Module, images: tuple[Tensor, Tensor], layers: tuple[str, ...]) -> Answering:
    classifier = ForeignClassifier(net, lambda said: said, images[0][:4], CLASSES, layers)
    return Answering(classifier, read_samples(classifier, Loader([images], CLASSES)))


def attempt(found: Answering, label: int, kappa: int, way: Ways) -> Attempt:
    return found.attempt(found.answer((label,), kappa, way), found.predictions(found.parts.val), None)


@pytest.mark.parametrize("label", range(CLASSES))
def test_a_class_that_goes_around_the_last_layer_does_not_go_around_a_cut(label, net, images):
    """Even with every useful weight of the last layer off; with a third of that many weights of the cut it is gone."""
    before, last, cut = bits(net), asking(net, images, ("auto",)), asking(net, images, ("cut",))
    assert [target.name for target in last.model.targets] == ["blocks.2.2.weight"]
    assert cut.model.targets[0].name == "stem.0.weight"
    assert attempt(last, label, 400, Ways.refined).forget_score > 50
    found = attempt(cut, label, 130, Ways.refined)
    assert found.forget_score < 5
    assert found.retain_drop < 5
    first = attempt(cut, label, 130, Ways.first_order)
    assert found.forget_score + max(0, found.retain_drop) <= first.forget_score + max(0, first.retain_drop)
    assert bits(net) == before


def test_an_answer_does_not_depend_on_what_was_asked_before(net, images):
    one, other = asking(net, images, ("cut",)), asking(net, images, ("cut",))
    for label in (0, 1):
        one.answer((label,), 80)
    assert torch.equal(one.answer((2,), 80).off, other.answer((2,), 80).off)


def test_descent_from_the_networks_answer_draws_its_samples_too(net, images):
    found = asking(net, images, ("cut",))
    head, theta = found.searching(Request((1,), 130), Ways.network_refined)
    assert isinstance(head, RequestHead)
    assert head.drawn is not None
    assert torch.equal(theta, found.by_network(Request((1,), 130)))
    assert attempt(found, 1, 130, Ways.network_refined).forget_score < 5


def test_drawn_samples_are_the_requests_own(net, images):
    found = asking(net, images, ("cut",))
    whole, generator = found.head.sides((1,)), torch.Generator().manual_seed(0)
    head = RequestHead(found.head, [], generator)
    rows = {tuple(row.tolist()): place for place, row in enumerate(whole.h)}
    drawn = [head.sides((1,)) for _ in range(20)]
    seen = set()
    for sides in drawn:
        assert (sides.forget, len(sides.h)) == (FORGOTTEN, FORGOTTEN + RETAINED)
        places = torch.tensor([rows[tuple(row.tolist())] for row in sides.h])
        seen |= set(places.tolist())
        assert torch.equal(whole.labels[places], sides.labels)
        assert torch.equal(whole.target[places[:FORGOTTEN]], sides.target)
        assert (sides.labels == 1).tolist() == [True] * FORGOTTEN + [False] * RETAINED
    assert seen == set(range(len(whole.h))), "none is left out for ever"


def test_losses_and_start_of_drawn_samples_are_on_average_those_of_all(net, images):
    """The oracle is the head that nothing is drawn for."""
    found, classes = asking(net, images, ("cut",)), (1,)
    whole = RequestHead(found.head, [], None)
    drawn = RequestHead(found.head, [], torch.Generator().manual_seed(0))
    degrees = torch.rand(found.head.weight.shape, generator=torch.Generator().manual_seed(1)) / 10
    how = DRAWN.forget_loss
    every = torch.tensor([[float(one) for one in drawn.losses(degrees, classes, how)] for _ in range(60)])
    expected = torch.tensor([float(one) for one in whole.losses(degrees, classes, how)])
    error = every.std(0) / len(every) ** 0.5
    assert ((every.mean(0) - expected).abs() < 4 * error + 1e-4).all()
    pair = torch.stack([whole.start(classes).flatten(), drawn.start(classes).flatten()])
    assert float(torch.corrcoef(pair)[0, 1]) > 0.9


def test_forget_in_python_takes_the_word(net, images):
    mask = forget(net, [images], [1], layers=["cut"], kappa=80)
    assert mask.switched_off == 80
    assert {name.partition(".")[0] for name in mask.positions} <= {"stem", "blocks"}
    assert (mask.config.scores or {})["forget"] < 5


def test_inspect_says_which_weights_the_words_mean(tmp_path, capsys):
    """Of two convolutions and a head, nothing goes around the second; nine tenths of the weights begin there, too."""
    trained(tmp_path, steps=1)
    write_folder(tmp_path / "photos", 2)
    assert main.main(["inspect", *words_for(tmp_path)]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--layer")]
    assert said == [
        "--layer auto: conv2.weight, 5,184 weights in 1 tensor",
        "--layer cut: conv2.weight, 5,184 weights in 1 tensor",
        "--layer deep: conv1.weight to fc.weight, 5,928 weights in 3 tensors",
    ]
