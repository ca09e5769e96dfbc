"""Masks of one parent become one, others are refused, and torch's pruning understands them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from mimu import Mask, MaskError, compose, describe_parent, from_prune
from tests.helpers.foreign import CAT, bits, mask_on, mlp, resnet

DOG = [{"index": 5, "name": "dog"}]


@pytest.mark.parametrize("values", [False, True], ids=["zeros", "values"])
def test_a_composed_mask_switches_off_what_any_of_its_parts_does(values):
    model = mlp()
    cat = mask_on(model, "2.weight", 12, values=values)
    dog = mask_on(model, ["0.weight", "2.weight"], 12, 1, DOG, values)
    both = compose(cat, dog)
    assert both.config.version == 1 + values
    assert bool(both.replaced) == values
    assert [part["weights"] for part in both.config.plain()["composition"]["parts"]] == [12, 24]
    sets = [{name: set(flat.tolist()) for name, flat in mask.positions.items()} for mask in (cat, dog, both)]
    assert sets[2] == {"0.weight": sets[1]["0.weight"], "2.weight": sets[0]["2.weight"] | sets[1]["2.weight"]}
    assert both.config.plain()["composition"]["shared"] == len(sets[0]["2.weight"] & sets[1]["2.weight"]) > 0
    assert both.forgotten == ("cat", "dog")
    assert [part["digest"] for part in both.config.plain()["composition"]["parts"]] == [cat.digest, dog.digest]
    with both.applied(model) as fit:
        together = bits(model)
        assert fit.grade == "parent"
    cat.apply(model)
    dog.apply(model)
    assert bits(model) == together


def test_scores_of_parts_are_not_said_of_the_whole(tmp_path):
    parent = describe_parent(mlp(), ["2.weight"])
    masks = [
        Mask({"2.weight": torch.tensor([n])}, {"forgotten": one, "parent": parent, "scores": {"forget": 0.5}})
        for n, one in enumerate((CAT, DOG))
    ]
    both = compose(*masks)
    both.save(tmp_path / "both")
    assert Mask.load(tmp_path / "both").config == both.config
    assert both.config.scores is None
    assert [part["scores"] for part in both.config.plain()["composition"]["parts"]] == [{"forget": 0.5}] * 2
    assert "Nothing was measured" in (tmp_path / "both" / "README.md").read_text()


def test_masks_of_different_parents_are_not_composed():
    with pytest.raises(MaskError, match="have different parents"):
        compose(mask_on(mlp(), "2.weight"), mask_on(mlp(1), "2.weight"))
    with pytest.raises(MaskError, match="class 3 is 'cat' in one mask and 'hat' in another"):
        compose(mask_on(mlp(), "2.weight"), mask_on(mlp(), "0.weight", classes=[{"index": 3, "name": "hat"}]))
    with pytest.raises(MaskError, match="at least one"):
        compose()


def pair(cat: list[float] | None, dog: list[float] | None, dtype: torch.dtype = torch.float32) -> list[Mask]:
    """Masks of 2.weight at places 1, 2, 3 and 2, 3, 4, with these values."""
    parent = describe_parent(mlp().to(dtype), ["2.weight"])
    return [
        Mask(
            {"2.weight": torch.arange(first, first + 3)},
            {"forgotten": classes, "parent": parent},
            {"2.weight": torch.tensor(values, dtype=dtype)} if values else None,
        )
        for first, classes, values in ((1, CAT, cat), (2, DOG, dog))
    ]


def test_values_are_composed_with_zeros_where_they_agree():
    cat, dog = pair([5, 0, 0], None, torch.bfloat16)
    for both in (compose(cat, dog), compose(dog, cat)):
        assert both.positions["2.weight"].tolist() == [1, 2, 3, 4]
        assert torch.equal(both.values["2.weight"], torch.tensor([5, 0, 0, 0], dtype=torch.bfloat16))
        assert both.config.plain()["composition"]["shared"] == 2


@pytest.mark.parametrize(("dog", "count"), [(None, 1), ([0.0, 8, 0], 1), ([3.0, 8, 0], 2)])
def test_masks_that_disagree_are_not_composed(dog, count):
    """At place 3 the one puts 7, the other zero or 8; at 2 the third pair disagrees, too."""
    masks = pair([6, 0, 7], dog)
    for some in (masks, masks[::-1]):
        says = rf"^{count} weights of 2\.weight would have to hold two different values: compose masks that agree"
        with pytest.raises(MaskError, match=says):
            compose(*some)


def test_a_mask_with_values_is_no_pair_of_torchs_pruning():
    model = mlp()
    mask, before = mask_on(model, ["0.weight", "2.weight"], values=True), bits(model)
    with pytest.raises(MaskError, match=r"replaces \d+ weights, and torch's pruning can only switch off: apply it, or"):
        mask.to_prune(model)
    assert bits(model) == before
    assert not [name for name in model.state_dict() if name.endswith("_orig")]


def test_order_and_repetition_do_not_matter_to_what_is_off():
    cat, dog = mask_on(mlp(), "2.weight", 9), mask_on(mlp(), "2.weight", 9, 1, DOG)
    one, other = compose(cat, dog), compose(dog, cat, cat)
    assert torch.equal(one.positions["2.weight"], other.positions["2.weight"])
    assert one.forgotten == other.forgotten


def test_a_mask_becomes_pairs_of_torchs_pruning_and_comes_back():
    model = resnet()
    mask = mask_on(model, ["layer4.0.conv2.weight", "fc.weight"], 40)
    twin = nn.DataParallel(copy.deepcopy(model))
    mask.to_prune(twin)
    inside = twin.get_submodule("module.layer4.0.conv2")
    assert torch.equal(inside.weight_mask.bool(), mask.keep()["layer4.0.conv2.weight"])
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), mask.applied(model):
        assert torch.equal(twin.module(images), model(images))
    back = from_prune(twin, {"forgotten": CAT})
    assert {name: flat.tolist() for name, flat in back.positions.items()} == {
        name: flat.tolist() for name, flat in mask.positions.items()
    }
    assert back.config.parent == mask.config.parent
    assert back.apply(model).grade == "parent"


def test_training_under_pruning_leaves_the_weights_off():
    """`prune.remove` then leaves plain zeros under the parent's own names."""
    model = mlp()
    mask = mask_on(model, "2.weight", 12)
    mask.to_prune(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.1)
    before = model[2].weight.detach().clone()
    for step in range(3):
        images = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(images), torch.arange(8) % model[2].out_features).backward()
        optimizer.step()
        optimizer.zero_grad()
    model(images)
    prune.remove(model[2], "weight")
    off = torch.zeros_like(before, dtype=torch.bool).flatten()
    off[mask.positions["2.weight"].long()] = True
    after = model[2].weight.detach().flatten()
    assert not after[off].any()
    assert (after[~off] != before.flatten()[~off]).all()
    assert "2.weight" in model.state_dict()
    assert "2.weight_orig" not in model.state_dict()


def test_a_pruned_layer_without_zeros_and_a_model_without_pruning():
    model = mlp()
    with pytest.raises(MaskError, match="no weight of the model is pruned"):
        from_prune(model, {"forgotten": CAT})
    prune.custom_from_mask(model[0], "weight", torch.ones(8, 6))
    prune.l1_unstructured(model[2], "weight", 3)
    mask = from_prune(model, {"forgotten": CAT})
    assert {name: len(flat) for name, flat in mask.positions.items()} == {"2.weight": 3}
    smallest = mlp()[2].weight.abs().flatten().argsort()[:3].sort().values
    assert mask.positions["2.weight"].tolist() == smallest.tolist()
    assert mask.apply(mlp()).grade == "parent"
