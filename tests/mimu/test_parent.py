"""By what a parent is known, in which order a model is checked, and what each wrong model is told."""

import hashlib
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import mimu.parent
from mimu import Mask, MaskError, ParentWarning, describe_parent, state_sha256
from tests.helpers.foreign import CAT, Tied, bits, mask_on, mlp, mobilenet, quantised, resnet, vit

NETS = {"mlp": (mlp, "2.weight"), "resnet": (resnet, "layer4.0.conv2.weight"), "vit": (vit, "mlp.0.weight")}


def oracle(model: nn.Module) -> str:
    """The definition of the state's digest: names, types, shapes and bytes in the order of the names, by numpy."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("make", [mlp, resnet, mobilenet, vit, Tied])
def test_the_digest_of_a_state_is_the_same_in_every_layout_and_wrapper(make):
    model = make()
    expected = oracle(model)
    assert state_sha256(model) == expected
    assert state_sha256(nn.DataParallel(model)) == expected
    assert state_sha256(torch.compile(nn.DataParallel(model), backend="eager")) == expected
    assert state_sha256(model.to(memory_format=torch.channels_last)) == expected
    assert state_sha256(model.bfloat16()) != expected


def test_the_digest_sees_through_wrappers_inside_and_only_through_them():
    model = mlp()
    expected = state_sha256(model)
    model[0] = torch.compile(nn.DataParallel(model[0]), backend="eager")
    assert any("_orig_mod.module" in name for name in model.state_dict())
    assert state_sha256(model) == expected
    own = nn.ModuleDict({"module": nn.Linear(2, 2)})  # a layer that is only called so
    assert state_sha256(own) == oracle(own)


def test_the_digest_changes_with_any_bit():
    model = resnet()
    before = state_sha256(model)
    for name in ("fc.bias", "bn1.running_var", "bn1.num_batches_tracked"):
        value = model.state_dict()[name]
        kept = value.clone()
        with torch.no_grad():
            value.view(-1).view(torch.uint8)[0] ^= 1
        assert state_sha256(model) != before, name
        with torch.no_grad():
            value.copy_(kept)
    assert state_sha256(model) == before


# --- the order of the check -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_the_very_parent_is_applied_to_without_a_word(name):
    make, target = NETS[name]
    mask = mask_on(make(), target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = mask.apply(make())
    assert (fit.grade, fit.names, fit.note) == ("parent", {target: target}, "")


def test_other_tensors_that_differ_are_warned_of():
    mask, model = mask_on(mlp(), "2.weight"), mlp()
    with torch.no_grad():
        model[0].bias += 1
    with pytest.warns(ParentWarning, match="others differ"):
        fit = mask.apply(model)
    assert fit.grade == "targets"
    assert not model[2].weight.view(-1)[mask.positions["2.weight"].long()].any()


def test_a_buffer_that_differs_is_warned_of():
    mask, model = mask_on(resnet(), "fc.weight"), resnet()
    model.bn1.running_mean += 1
    with pytest.warns(ParentWarning, match="others differ"):
        mask.apply(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_of_the_parent_is_applied_to_with_a_note(dtype):
    mask, model = mask_on(mlp(), "2.weight"), mlp().to(dtype)
    before = bits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with mask.applied(model) as fit:
            assert (fit.grade, "change of their dtype" in fit.note) == ("cast", True)
            assert int((model[2].weight == 0).sum()) == 5
    assert bits(model) == before


def test_a_parent_that_was_rounded_on_its_way_is_one_after_a_cast():
    mask = mask_on(mlp(), "2.weight")
    assert mask.apply(mlp().bfloat16().float()).grade == "cast"
    half = mask_on(mlp().half(), "2.weight")
    assert half.apply(mlp().half().float()).grade == "cast"


def test_names_and_shapes_alone_are_refused_unless_asked_for():
    mask, other = mask_on(mlp(), "2.weight"), mlp(1)
    before = bits(other)
    with pytest.raises(MaskError, match="any_parent=True"):
        mask.apply(other)
    assert bits(other) == before
    with pytest.warns(ParentWarning, match="the positions mean nothing there"):
        fit = mask.apply(other, any_parent=True)
    assert fit.grade == "names"
    mask.lift(other)
    assert bits(other) == before


def test_another_model_is_told_its_nearest_parameters():
    mask = mask_on(resnet(), "layer4.0.conv2.weight")
    with pytest.raises(MaskError, match=r"layer4\.0\.conv2\.weight \[64x64x3x3\].*nearest here: .*2\.weight \[4x8\]"):
        mask.apply(mlp(), any_parent=True)


def test_content_goes_before_names():
    """Two layers of one shape have exchanged their names: the mask follows the values."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    mask = mask_on(model, "a.weight")
    moved = nn.ModuleDict({"a": model["b"], "b": model["a"], "c": model["c"]})
    with pytest.warns(ParentWarning, match=r"a\.weight is b\.weight"):
        fit = mask.apply(moved)
    assert fit.names == {"a.weight": "b.weight"}
    assert int((moved["b"].weight == 0).sum()) == 5
    assert int((moved["a"].weight == 0).sum()) == 0


def test_equal_layers_are_told_apart_by_name_or_not_at_all():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].load_state_dict(model["a"].state_dict())
    mask = mask_on(model, "b.weight")
    mask.apply(model)
    assert int((model["a"].weight == 0).sum()) == 0
    mask.lift(model)
    renamed = nn.ModuleDict({"x": model["a"], "y": model["b"]})
    with pytest.raises(MaskError, match=r"2 parameters hold the values of b\.weight \(x\.weight, y\.weight\)"):
        mask.apply(renamed)


def test_the_name_on_disk_and_aliases_are_recorded():
    parent = describe_parent(Tied(), ["first.weight"], "py:net.py:net@a.pt", {"first.weight": "encoder.weight"})
    target = parent.targets["first.weight"]
    assert (target.aliases, target.name_on_disk) == (("second.weight",), "encoder.weight")
    assert parent.load == "py:net.py:net@a.pt"
    assert parent.framework == f"torch {torch.__version__}"
    assert (target.shape, target.dtype) == ((6, 6), "float32")


def test_a_parent_is_described_from_its_state_dict_or_in_a_wrapper():
    model = resnet()
    expected = describe_parent(model, ["fc.weight"])
    assert describe_parent(model.state_dict(), ["fc.weight"]) == expected
    assert describe_parent(nn.DataParallel(model), ["module.fc.weight"]) == expected
    with pytest.raises(MaskError, match=r"no parameter fc\.wieght: .*fc\.weight"):
        describe_parent(model, ["fc.wieght"])
    with pytest.raises(MaskError, match="no floating-point weights"):
        describe_parent(model, ["bn1.num_batches_tracked"])


# --- what would undo a mask -------------------------------------------------------------------------------


def old_weight_norm(model: nn.Sequential) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model[2])


UNDOING = {
    old_weight_norm: "WeightNorm.*remove_weight_norm",
    lambda model: nn.utils.spectral_norm(model[2]): "SpectralNorm.*remove_spectral_norm",
    lambda model: parametrizations.weight_norm(model[2]): "ParametrizationList.*remove_parametrizations",
    lambda model: parametrizations.orthogonal(model[2]): "ParametrizationList.*remove_parametrizations",
    lambda model: prune.l1_unstructured(model[2], "weight", 3): r"prune\.remove",
}


@pytest.mark.parametrize(("change", "says"), UNDOING.items(), ids=["old", "spectral", "new", "orthogonal", "prune"])
def test_weights_that_are_computed_anew_are_refused(change, says):
    mask, model = mask_on(mlp(), "2.weight"), mlp()
    change(model)
    before = bits(model)
    with pytest.raises(MaskError, match=says):
        mask.apply(model)
    with pytest.raises(MaskError, match=says):
        mask.apply(nn.DataParallel(model), any_parent=True)
    assert bits(model) == before
    names = [name for name, value in model.named_parameters() if name.startswith("2.") and value.dim() == 2]
    assert names
    for name in names:
        with pytest.raises(MaskError, match=says):
            describe_parent(model, [name])


def test_the_parent_inside_a_norm_is_refused_though_its_bytes_are_there():
    """`weight_v` begins as the weight itself, so that the content is found under another name."""
    mask, model = mask_on(mlp(), "2.weight"), mlp()
    old_weight_norm(model)
    assert torch.equal(model[2].weight_v, mlp()[2].weight)
    moved = nn.ModuleDict({"deep": model})
    with pytest.raises(MaskError, match="WeightNorm"):
        mask.apply(moved)


def test_a_norm_is_seen_in_a_layer_that_has_two_names():
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": layer, "b": layer})
    mask = mask_on(model, "b.weight")
    parametrizations.weight_norm(layer)
    with pytest.raises(MaskError, match="ParametrizationList"):
        mask.apply(model)


def test_another_layers_norm_is_no_matter():
    model = mlp()
    nn.utils.spectral_norm(model[0])
    mask = mask_on(model, "2.weight")
    with mask.applied(model):
        assert int((model[2].weight == 0).sum()) == 5


def test_a_quantised_parent_is_refused():
    mask = mask_on(mlp(), "2.weight")
    with pytest.raises(MaskError, match="mask the float parent"):
        mask.apply(quantised())


def test_a_partly_quantised_model_is_not_described():
    """A layer that is a float still could be masked, but what it stands in is no float parent."""
    model = quantised()
    model.append(nn.Linear(4, 3))
    with pytest.raises(MaskError, match="mask the float parent"):
        describe_parent(model, ["3.weight"])


def test_integers_in_the_place_of_weights_are_called_quantised():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 8, dtype=torch.int8), requires_grad=False)

    model = nn.ModuleDict({"0": nn.Linear(6, 8), "2": Packed()})
    with pytest.raises(MaskError, match="mask the float parent"):
        mask_on(mlp(), "2.weight").apply(model)


class Elsewhere(torch.Tensor):
    """As packed and sharded weights are: a tensor whose values do not lie at its address, which is 0."""

    @staticmethod
    def __new__(cls, shape):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # ty: ignore[incompatible-method-override]
        return cls(next(iter(args)).shape) if func is torch.ops.aten.detach.default else NotImplemented


@pytest.mark.parametrize("place", [0, 2])
def test_weights_that_lie_elsewhere_are_refused(place):
    """In the masked layer, and in another one, which cannot be compared either."""
    mask, model = mask_on(mlp(), "2.weight"), mlp()
    model[place].weight = nn.Parameter(Elsewhere(model[place].weight.shape))
    with pytest.raises(MaskError, match=r"is a Elsewhere|float parent"):
        mask.apply(model)
    with pytest.raises(MaskError, match=r"is a Elsewhere|no floating-point weights"):
        describe_parent(model, [f"{place}.weight"])


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(MaskError):
        mask_on(mlp(), "2.weight").apply(empty)


def test_batch_norm_that_still_learns_is_warned_of():
    model = resnet()
    mask = mask_on(model, "fc.weight")
    model.train()
    with pytest.warns(ParentWarning, match=r"BatchNorm layers are in train mode.*model\.eval\(\)"):
        mask.apply(model)


def test_a_model_is_hashed_again_when_it_changed_and_only_then(monkeypatch):
    """What was found is kept, but neither a write nor one behind torch's back goes unseen."""
    model = mlp()
    mask = mask_on(model, "2.weight")
    hashed = []
    real = mimu.parent.sha256_of
    monkeypatch.setattr(mimu.parent, "sha256_of", lambda value: hashed.append(1) or real(value))
    for _ in range(3):
        with mask.applied(model):
            pass
    assert len(hashed) == 1
    with torch.no_grad():
        model[0].bias += 1
    with pytest.warns(ParentWarning), mask.applied(model):
        pass
    assert len(hashed) == 2
    model[2].weight.data[0, 0] += 1
    with pytest.raises(MaskError):
        mask.apply(model)
    model[2].weight.data = mlp()[2].weight.data
    with pytest.warns(ParentWarning):
        mask.apply(model)


def test_a_mask_made_for_a_wrapped_model_fits_the_plain_one():
    parent = describe_parent(nn.DataParallel(mlp()), ["module.2.weight"])
    mask = Mask({"2.weight": torch.tensor([3])}, {"forgotten": CAT, "parent": parent})
    assert mask.apply(mlp()).grade == "parent"
