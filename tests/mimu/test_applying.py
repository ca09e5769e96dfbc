"""Applied, a mask is what numpy makes of its file; lifted, the model is the parent bit for bit, whatever came first."""

import copy
import io
import itertools
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from torch import nn
from torch.func import functional_call

from mimu import Mask, MaskError, ParentWarning, describe_parent, state_sha256, status
from tests.helpers.foreign import CAT, Tied, bits, mask_on, mlp, mobilenet, put, resnet, some_values, vit

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
VECTORS = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
NETS = {
    "mlp": (mlp, ("2.weight",), VECTORS),
    "two layers": (mlp, ("0.weight", "2.weight"), VECTORS),
    "head and bias": (mlp, ("2.weight", "2.bias"), VECTORS),
    "resnet": (resnet, ("layer4.0.conv2.weight",), IMAGES),
    "grouped convolution": (mobilenet, ("features.11.block.1.0.weight", "classifier.0.weight"), IMAGES),
    "vit": (vit, ("patches.weight", "mlp.2.weight"), IMAGES),
    "attention": (vit, ("block.0.attention.in_proj_weight", "block.0.attention.out_proj.weight"), IMAGES),
    "tied": (Tied, ("first.weight",), VECTORS),
}


def by_numpy(model: nn.Module, folder) -> dict[str, np.ndarray]:
    """What a state is under a mask, from the mask's file alone."""
    state = {name: value.detach().contiguous().numpy().copy() for name, value in model.state_dict().items()}
    file = load_file(folder / "mask.safetensors")
    for name, flat in file.items():
        if not name.startswith("."):
            state[name].reshape(-1)[flat] = file.get(f".values.{name}", 0)
    return state


both_kinds = pytest.mark.parametrize("values", [False, True], ids=["zeros", "values"])


@both_kinds
@pytest.mark.parametrize("name", NETS)
def test_a_masked_model_is_what_numpy_makes_of_the_file(name, values, tmp_path):
    """Its state, and its answers, which are those of a fresh model filled with numpy's state."""
    make, targets, inputs = NETS[name]
    torch.manual_seed(0)
    model = make().eval()
    mask = mask_on(model, targets, 4 if "2.bias" in targets else 9, values=values)
    assert bool(mask.replaced) == values
    mask.save(tmp_path / "m")
    before, expected = bits(model), by_numpy(model, tmp_path / "m")
    if name == "tied":
        expected["second.weight"] = expected["first.weight"]
    other = copy.deepcopy(model)
    other.load_state_dict({key: torch.from_numpy(value) for key, value in expected.items()})
    with torch.no_grad(), mask.applied(model):
        state = {key: value.detach().contiguous().numpy() for key, value in model.state_dict().items()}
        assert {key: value.tobytes() for key, value in state.items()} == {k: v.tobytes() for k, v in expected.items()}
        assert torch.equal(model(inputs), other(inputs))
        assert all(bits(model)[target] != before[target] for target in targets)
    assert bits(model) == before
    assert "_mimu_ledger" not in model.__dict__


LAYOUTS = {
    "plain": lambda model: model,
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "DataParallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled DataParallel": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    "bfloat16": lambda model: model.bfloat16(),
    "frozen": lambda model: model.requires_grad_(False),
}


@both_kinds
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", ["layer4.0.conv2.weight", "fc.weight"])
def test_every_layout_and_wrapper_is_masked_in_the_same_places(layout, target, values):
    mask = mask_on(resnet(), target, 50, values=values)
    model = LAYOUTS[layout](resnet())
    (weight,) = [value for key, value in model.state_dict().items() if key.endswith(target)]
    before, keep, expected = bits(model), mask.keep()[target], put(weight, mask, target)
    with mask.applied(model):
        assert torch.equal(weight, expected)
        if not values:
            assert torch.equal(weight == 0, ~keep)
        assert not weight[~keep].signbit().any()
    assert bits(model) == before


@both_kinds
def test_a_compiled_model_sees_the_mask_without_compiling_again(values):
    compiled = []

    def backend(graph, _):
        compiled.append(1)
        return graph.forward

    plain, model = mlp(), torch.compile(mlp(), backend=backend)
    mask = mask_on(plain, "2.weight", 9, values=values)
    with torch.no_grad():
        whole = model(VECTORS)
        with mask.applied(model), mask.applied(plain):
            assert torch.equal(model(VECTORS), plain(VECTORS))
            assert not torch.equal(model(VECTORS), whole)
        assert torch.equal(model(VECTORS), whole)
    assert len(compiled) == 1


def traced(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model, VECTORS)


@both_kinds
@pytest.mark.parametrize("kind", [traced, lambda model: torch.export.export(model, (VECTORS,)).module()])
def test_programs_are_masked_as_the_models_they_are_of(kind, values):
    """TorchScript and exported programs, whose parameters are found by content whatever their names are."""
    plain = mlp()
    mask, program = mask_on(plain, "2.weight", 9, values=values), kind(mlp())
    with torch.no_grad():
        whole = program(VECTORS)
        with mask.applied(program), mask.applied(plain):
            assert torch.equal(program(VECTORS), plain(VECTORS))
            assert not torch.equal(program(VECTORS), whole)
        assert torch.equal(program(VECTORS), whole)


@both_kinds
def test_minus_zero_and_every_nan_come_back_as_they_were(values):
    model = mlp()
    strange = torch.tensor([-(2**31), 0x7FC00001, -(2**22) + 5, 0x7F800000, 1], dtype=torch.int32)
    with torch.no_grad():
        model[2].weight.view(torch.int32).view(-1)[:5] = strange
    parent = describe_parent(model, ["2.weight"])
    new = [0, 1.5, 0, 2, 3] if values else [0, 0, 0, 0, 0]
    config = {"forgotten": CAT, "parent": parent}
    mask, before = Mask({"2.weight": torch.arange(5)}, config, {"2.weight": torch.tensor(new).float()}), bits(model)
    with mask.applied(model):
        assert model[2].weight.view(-1)[:5].tolist() == new
        assert not model[2].weight.view(-1)[:5].signbit().any()
    assert bits(model) == before
    assert torch.equal(model[2].weight.detach().view(torch.int32).view(-1)[:5], strange)


@both_kinds
def test_tensors_made_under_inference_mode_are_masked_too(values):
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    mask, before = mask_on(model, "2.weight", values=values), bits(model)
    assert model[2].weight.is_inference()
    expected = put(model[2].weight, mask, "2.weight")
    with mask.applied(model):
        assert torch.equal(model[2].weight, expected)
        assert int((model[2].weight == 0).sum()) == mask.switched_off
        with torch.inference_mode():
            masked = model(VECTORS)
    assert bits(model) == before
    state = mask.state(model)
    assert bits(model) == before
    with torch.inference_mode():
        assert torch.equal(functional_call(model, state, VECTORS), masked)
        assert not torch.equal(model(VECTORS), masked)
    ordinary = mlp()  # and an ordinary model stays ordinary if the mask is applied inside that mode
    with torch.inference_mode(), mask_on(ordinary, "2.weight").applied(ordinary):
        pass
    ordinary(VECTORS).sum().backward()


@pytest.mark.parametrize("wrap", [LAYOUTS["plain"], LAYOUTS["compiled"]], ids=["plain", "compiled"])
@pytest.mark.parametrize("make", [mlp, Tied])
@both_kinds
def test_masked_copies_serve_functional_calls(make, wrap, values):
    torch.manual_seed(0)
    model = wrap(make().eval())
    target = "first.weight" if make is Tied else "2.weight"
    mask, before = mask_on(model, target, values=values), bits(model)
    state = mask.state(model)
    with torch.no_grad():
        answers = functional_call(model, state, VECTORS)
        assert bits(model) == before
        with mask.applied(model):
            assert torch.equal(answers, model(VECTORS))


@both_kinds
def test_tied_weights_are_one(values):
    torch.manual_seed(0)
    model = Tied()
    parent = describe_parent(model, ["first.weight", "second.weight"])
    both = {"first.weight": torch.tensor([1, 2]), "second.weight": torch.tensor([2, 3])}
    new = {name: some_values(places) for name, places in both.items()} if values else None
    mask, before = Mask(both, {"forgotten": CAT, "parent": parent}, new), bits(model)
    other = mask_on(model, "second.weight", 9, values=values)
    mask.apply(model, "a")
    other.apply(model, "b")
    assert model.first.weight is model.second.weight
    expected = some_values(torch.tensor([1, 2, 3])) if values else torch.zeros(3)
    assert torch.equal(model.first.weight.view(-1)[[1, 2, 3]], expected)
    assert status(model)[0].weights == {"first.weight": 3}
    mask.lift(model, "a")
    other.lift(model, "b")
    assert bits(model) == before
    assert model.first.weight is model.second.weight


def test_tied_weights_that_would_get_two_values_are_refused():
    torch.manual_seed(0)
    model = Tied()
    parent = describe_parent(model, ["first.weight", "second.weight"])
    both = {"first.weight": torch.tensor([1, 2, 3]), "second.weight": torch.tensor([1, 2, 3])}
    new = {"first.weight": torch.tensor([1.0, 0, 4])}
    mask, before = Mask(both, {"forgotten": CAT, "parent": parent}, new), bits(model)
    for act in (mask.apply, mask.state):
        with pytest.raises(MaskError, match=r"2 weights of first\.weight would have to hold two.*tied weights twice"):
            act(model)
    assert bits(model) == before
    assert status(model) == []


# --- several masks, in any order --------------------------------------------------------------------------

SIZES = {"0.weight": 48, "2.weight": 32}
PLACES = st.fixed_dictionaries({name: st.sets(st.integers(0, size - 1), max_size=size) for name, size in SIZES.items()})
STEPS = st.lists(st.tuples(st.sampled_from(["apply", "lift"]), st.integers(0, 3)), max_size=10)


@settings(max_examples=40, deadline=None, database=None)
@given(
    st.lists(PLACES.filter(lambda one: any(one.values())), min_size=4, max_size=4),
    STEPS,
    st.permutations(range(4)),
    st.booleans(),
)
def test_any_order_of_applying_and_lifting(places, steps, ending, values):
    """A weight is zero (or has its new value) exactly while some mask that is on holds it; at the end all bits are the
    parent's.
    """
    model = mlp()
    before, parent = bits(model), describe_parent(model, SIZES)
    whole = {name: model.state_dict()[name].clone() for name in SIZES}
    masks = [
        Mask(
            {name: torch.tensor(sorted(one[name]), dtype=torch.int32) for name in SIZES},
            {"forgotten": CAT, "parent": parent},
            {name: some_values(torch.tensor(sorted(one[name]))) for name in SIZES} if values else None,
        )
        for one in places
    ]
    on: list[int] = []
    for step, number in [*steps, *(("lift", number) for number in ending)]:
        if step == "apply":
            masks[number].apply(model, str(number))
            on += [number] if number not in on else []
        else:
            assert masks[number].lift(model, str(number)) == (number in on)
            on = [other for other in on if other != number]
        for name in SIZES:
            off = sorted(set().union(*(places[other][name] for other in on)))
            expected = whole[name].clone()
            expected.view(-1)[off] = some_values(torch.tensor(off)) if values else 0.0
            assert torch.equal(model.state_dict()[name].view(torch.int32), expected.view(torch.int32))
        standing = {one.name: one for one in status(model)}
        assert list(standing) == [str(number) for number in on]
        for number in on:
            others = [other for other in on if other != number]
            elsewhere = {name: set().union(*(places[other][name] for other in others)) for name in SIZES}
            shared = sum(len(places[number][name] & elsewhere[name]) for name in SIZES)
            assert standing[str(number)].shared == shared
            counts = {name: len(places[number][name]) for name in SIZES if places[number][name]}
            assert standing[str(number)].weights == counts
    assert bits(model) == before
    assert "_mimu_ledger" not in model.__dict__


def head_mask(model: nn.Module, places: list[int], values: list[float] | None = None) -> Mask:
    """A mask of 2.weight alone."""
    new = None if values is None else {"2.weight": torch.tensor(values)}
    config = {"forgotten": CAT, "parent": describe_parent(model, ["2.weight"])}
    return Mask({"2.weight": torch.tensor(places)}, config, new)


@pytest.mark.parametrize(("values", "count"), [(None, 2), ([0.0, 5, 2, 3], 1)], ids=["zeros", "another value"])
def test_masks_that_disagree_are_not_on_together(values, count):
    """They share three places: at 1 both put a zero, at 3 the same value or not, at 4 never the same."""
    model = mlp()
    first, second = head_mask(model, [1, 2, 3, 4], [0.0, 7, 5, 1]), head_mask(model, [1, 3, 4, 9], values)
    before = bits(model)
    first.apply(model, "first")
    masked = bits(model)
    for act in (second.apply, second.state):
        with pytest.raises(MaskError, match=rf"^{count} weights of 2\.weight would have to hold two .*: lift the mask"):
            act(model)
    assert bits(model) == masked
    assert [one.name for one in status(model)] == ["first"]
    first.lift(model, "first")
    second.apply(model, "second")
    with pytest.raises(MaskError, match=rf"^{count} weights of 2\.weight"):
        first.apply(model, "first")
    second.lift(model, "second")
    assert bits(model) == before


def test_a_disagreement_in_the_second_layer_leaves_the_first_alone():
    model = mlp()
    parent = describe_parent(model, ["0.weight", "2.weight"])
    both = {"0.weight": torch.tensor([1]), "2.weight": torch.tensor([2])}
    mask = Mask(both, {"forgotten": CAT, "parent": parent}, {"2.weight": torch.tensor([3.0])})
    head_mask(model, [2]).apply(model, "head")
    before = bits(model)
    with pytest.raises(MaskError, match=r"1 weights of 2\.weight"):
        mask.apply(model)
    assert bits(model) == before


def test_a_value_that_masks_share_stays_until_the_last_is_lifted():
    model = mlp()
    first, second = head_mask(model, [2, 3], [0.0, 4]), head_mask(model, [1, 3], [6.0, 4])
    before, old = bits(model), model[2].weight.detach().clone().view(-1)
    first.apply(model, "first")
    second.apply(model, "second")
    assert [one.shared for one in status(model)] == [1, 1]
    assert [one.weights for one in status(model)] == [{"2.weight": 2}] * 2
    first.lift(model, "first")
    assert model[2].weight.view(-1)[1:4].tolist() == [6, old[2], 4]
    second.lift(model, "second")
    assert bits(model) == before


@both_kinds
def test_the_second_mask_knows_its_parent_under_the_first(values):
    """The check looks at the weights as they are without any mask."""
    model = mlp()
    classes = [[{"index": seed, "name": f"class {seed}"}] for seed in range(3)]
    masks = [mask_on(model, "2.weight", 20, seed, one, values) for seed, one in enumerate(classes)]
    for mask in masks:
        assert mask.apply(model).grade == "parent"
    assert [one.name for one in status(model)] == ["class 0", "class 1", "class 2"]
    assert [one.forgotten for one in status(model)] == [("class 0",), ("class 1",), ("class 2",)]
    before = bits(mlp())
    for mask in (masks[1], masks[0], masks[2]):
        assert mask.lift(model)
    assert bits(model) == before


def test_applying_and_lifting_twice_does_nothing_more():
    model = mlp()
    mask, before = mask_on(model, "2.weight"), bits(model)
    first = mask.apply(model)
    masked = bits(model)
    assert mask.apply(model) == first
    assert bits(model) == masked
    assert mask.lift(model) is True
    assert mask.lift(model) is False
    assert bits(model) == before


def test_an_inner_block_leaves_the_outer_mask_on():
    model = mlp()
    mask, before = mask_on(model, "2.weight"), bits(model)
    with mask.applied(model):
        masked = bits(model)
        with mask.applied(model):
            assert bits(model) == masked
        assert bits(model) == masked
    assert bits(model) == before


def test_a_name_is_one_masks():
    model = mlp()
    mask, other = mask_on(model, "2.weight"), mask_on(model, "2.weight", seed=1)
    mask.apply(model)
    masked = bits(model)
    with pytest.raises(MaskError, match="another mask is on under the name 'cat'"):
        other.apply(model)
    with pytest.raises(MaskError, match="is another one"):
        other.lift(model)
    assert bits(model) == masked
    other.apply(model, "second cat")
    assert [one.name for one in status(model)] == ["cat", "second cat"]


def test_an_error_inside_the_block_still_lifts():
    model = mlp()
    mask, before = mask_on(model, "2.weight"), bits(model)
    with pytest.raises(KeyboardInterrupt), mask.applied(model):
        raise KeyboardInterrupt
    assert bits(model) == before


def test_an_error_while_applying_changes_nothing(monkeypatch):
    """The second of two layers cannot be written: the first is put back."""
    model = mlp()
    mask, before = mask_on(model, ["0.weight", "2.weight"]), bits(model)
    write = sys.modules["mimu.applying"].write_bits
    calls = itertools.count()

    def fails_once(value, places, new):
        if next(calls) == 1:
            raise RuntimeError("out of memory")
        write(value, places, new)

    monkeypatch.setattr("mimu.applying.write_bits", fails_once)
    with pytest.raises(RuntimeError, match="out of memory"):
        mask.apply(model)
    assert bits(model) == before
    assert status(model) == []
    with mask.applied(model):
        assert bits(model) != before
    assert bits(model) == before


def test_weights_that_lie_in_one_place_cannot_be_written():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.randn(4, 1).expand(4, 4))
    mask = mask_on(model, "0.weight")
    with pytest.raises(MaskError, match=r"cannot be written in place.*mask\.state"):
        mask.apply(model)


# --- weights that change meanwhile ------------------------------------------------------------------------


def step(model: nn.Module) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(VECTORS).square().sum().backward()
    optimiser.step()


@both_kinds
def test_a_training_step_under_the_mask_is_not_overwritten_in_silence(values):
    model = mlp()
    mask = mask_on(model, "2.weight", values=values)
    mask.apply(model)
    step(model)
    trained = bits(model)
    with pytest.raises(MaskError, match=r"of 2\.weight were written while the mask 'cat' held them.*changed='restore'"):
        mask.lift(model)
    assert bits(model) == trained
    assert [one.name for one in status(model)] == ["cat"]
    with pytest.raises(MaskError, match="choose from refuse, restore, keep"):
        mask.lift(model, changed="what")
    kept, restored = copy.deepcopy(model), copy.deepcopy(model)
    with pytest.warns(ParentWarning, match="not the parent"):
        mask.lift(kept, changed="keep")
    with pytest.warns(ParentWarning, match="not the parent"):
        mask.lift(restored, changed="restore")
    places = mask.positions["2.weight"].long()
    assert bits(kept) == trained
    assert torch.equal(restored[2].weight.view(-1)[places], mlp()[2].weight.view(-1)[places])
    rest = mask.keep()["2.weight"]
    assert torch.equal(restored[2].weight[rest], model[2].weight[rest])


def test_a_training_step_inside_the_block_is_told():
    model = mlp()
    with pytest.raises(MaskError, match="were written"), mask_on(model, "2.weight").applied(model):
        step(model)


def test_values_that_were_written_are_counted_and_others_are_lifted_all_the_same():
    """`keep`: what was written stays, what the mask put there goes."""
    model = mlp()
    mask, old = head_mask(model, [1, 2, 3], [4.0, 0, 6]), model[2].weight.detach().clone().view(-1)
    mask.apply(model)
    with torch.no_grad():
        model[2].weight.view(-1)[1] = 9
        model[2].weight.view(-1)[2] = -0.0  # another zero than the mask's
    with pytest.raises(MaskError, match=r"^2 weights"):
        mask.lift(model)
    with pytest.warns(ParentWarning, match="not the parent"):
        mask.lift(model, changed="keep")
    assert model[2].weight.view(-1)[:4].tolist() == [old[0], 9, 0, old[3]]


def test_training_that_kept_the_zeros_is_lifted_with_a_warning():
    model = mlp()
    mask = mask_on(model, "2.weight")
    mask.apply(model)
    with torch.no_grad():
        model[2].weight.mul_(2)
    with pytest.warns(ParentWarning, match="changed outside of the mask"):
        assert mask.lift(model)
    with torch.no_grad():
        expected = mlp()[2].weight.mul_(2)
    off = ~mask.keep()["2.weight"]
    expected.data[off] /= 2
    assert torch.equal(model[2].weight, expected)


def test_a_state_that_was_loaded_meanwhile_is_told():
    model = mlp()
    mask = mask_on(model, "2.weight")
    mask.apply(model)
    model.load_state_dict(mlp().state_dict())
    with pytest.raises(MaskError, match="were written"):
        mask.lift(model)
    mask.lift(model, changed="keep")
    assert bits(model) == bits(mlp())


@both_kinds
def test_moving_a_masked_model_to_another_layout_or_type(values):
    model = resnet()
    mask = mask_on(model, "layer4.0.conv2.weight", 20, values=values)
    mask.apply(model)
    mask.lift(model.to(memory_format=torch.channels_last))
    assert bits(model) == bits(resnet())
    small = mlp()
    mask = mask_on(small, "2.weight", values=values)
    mask.apply(small)
    mask.lift(small.bfloat16())
    assert bits(small) == bits(mlp().bfloat16())


def test_a_value_that_is_too_large_for_the_models_type_is_refused():
    """65,520 is the first number that float16 rounds to infinity."""
    mask, model = head_mask(mlp(), [1, 2, 3], [65_519.0, 65_520, -1e30]), mlp().half()
    before = bits(model)
    for act in (mask.apply, mask.state):
        with pytest.raises(MaskError, match=r"2 of the mask's values in 2\.weight are too large for float16.*float32"):
            act(model)
    assert mask.lift(model) is False
    assert bits(model) == before
    with mask.applied(mlp()), head_mask(mlp(), [1], [65_519.0]).applied(model):
        assert model[2].weight.view(-1)[1] == 65_504


@both_kinds
def test_a_second_mask_after_a_change_of_type(values):
    """The first mask's removed values are then of another type than the second's."""
    model = mlp()
    first, second = mask_on(model, "2.weight", values=values), mask_on(model, "2.weight", 9, 1, values=values)
    first.apply(model, "first")
    second.apply(model.bfloat16(), "second")
    for name, mask in (("first", first), ("second", second)):
        mask.lift(model, name)
    assert bits(model) == bits(mlp().bfloat16())


# --- copies -----------------------------------------------------------------------------------------------


@both_kinds
def test_a_deep_copy_is_masked_and_can_be_lifted_by_itself(values):
    model = mlp()
    mask, before = mask_on(model, "2.weight", values=values), bits(model)
    mask.apply(model)
    masked, twin = bits(model), copy.deepcopy(model)
    assert bits(twin) == masked
    mask.lift(twin)
    assert bits(twin) == before
    assert bits(model) == masked
    mask.lift(model)
    assert bits(model) == before


def test_a_masked_models_state_dict_has_the_parents_keys_and_loads_anywhere():
    model, plain = mlp(), mlp(1)
    mask_on(model, "2.weight").apply(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(model.state_dict())
    assert bits(plain) == bits(model)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not model[2]._forward_pre_hooks


@pytest.mark.slow
def test_a_pickled_masked_model_has_no_removed_value_and_needs_no_mimu(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    mask = mask_on(model, "weight", 60)
    removed = [model.weight.view(-1)[place].detach().numpy().tobytes() for place in mask.positions["weight"].long()]
    mask.apply(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    for data in (pickle.dumps(model), buffer.getvalue()):
        assert not [value for value in removed if value in data]
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    code = "import pickle, sys; m = pickle.load(open('model.pickle', 'rb')); "
    code += "print(int((m.weight == 0).sum()), 'mimu' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["60", "False"]
    again = pickle.loads(pickle.dumps(model))
    assert status(again) == []
    with pytest.raises(MaskError, match="weights are zero, but the old ones are not kept here: load the parent"):
        mask.lift(again)


def test_a_loaded_masked_state_cannot_be_lifted_but_another_one_is_not_masked():
    model, mask = mlp(), mask_on(mlp(), "2.weight", values=True)
    mask.apply(model)
    again = mlp(1)
    again.load_state_dict(model.state_dict())
    with pytest.raises(MaskError, match="weights are what it puts there, but the old ones are not kept here"):
        mask.lift(again)
    with torch.no_grad():
        again[2].weight.view(-1)[mask.positions["2.weight"][0].long()] = 8
    assert mask.lift(again) is False


def test_a_masked_model_trains_and_its_copy_too():
    """No wrapper and no hook stands between the optimiser and the weights."""
    model = mlp()
    mask_on(model, "2.weight").apply(model)
    twin = copy.deepcopy(model)
    step(model)
    step(twin)
    assert state_sha256(model) == state_sha256(twin)
