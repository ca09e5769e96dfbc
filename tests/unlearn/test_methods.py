"""The contract of every registered method, and the masks they are made of."""

import re
import subprocess
import sys
import time
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from core.config import (
    PROJECT_ROOT,
    DataConfig,
    EvalConfig,
    GCNConfig,
    MaskStrategies,
    Objectives,
    PipelineConfig,
    RefineConfig,
    SFTConfig,
    SFTModes,
    SupportedDatasets,
    SupportedVisionModels,
    UserError,
)
from data import GraphDataset, GraphGenerator
from graphs.layout import layer_graph
from graphs.subsets import hard_topk
from measure.integrity import changed_outside, extent, unchanged
from mimu import state_sha256
from model import vision_model_loader
from rivals import representations, subspaces
from rivals.compared import METHODS, MODULES, chosen_methods, mask_of
from stages.evaluation import footing
from unlearn import methods
from unlearn.finetuning import Finetuner
from unlearn.masks import Mask, feasibility_score, masked, random_mask, set_difference_mask, top_mask, weights_sha256
from unlearn.registry import Context, Edit, NotApplicable, Point, Shared, mask_method, method
from unlearn.requests import FrozenHead, Request, Unlearner
from utils_data import get_unlearning_dataset

POINT = Point(top_k=500, kappa=200, seed=0)


@pytest.fixture(scope="module", params=Objectives)
def context(request, tmp_path_factory) -> Context:
    torch.manual_seed(0)
    model = vision_model_loader(SupportedVisionModels.HookedMLPClassifier, 10, 1, 8).eval()
    data = get_unlearning_dataset(SupportedDatasets.DIGITS, 32, 4, data=DataConfig(max_train_samples=400))
    theta = torch.randn(10, 64, 128, generator=torch.Generator().manual_seed(1))
    config = PipelineConfig(forget_class=(4,), sft=SFTConfig(steps=3), refine=RefineConfig(steps=3))
    folder, device = tmp_path_factory.mktemp("graphs"), torch.device("cpu")
    GraphGenerator(model, data, -2, config.graph).generate(folder)
    head = FrozenHead.of_graphs(model, GraphDataset(folder), -2, 10, device)
    unlearner = Unlearner.fresh(GCNConfig(hidden_dim=4)) if request.param is Objectives.unlearning else None
    fresh = vision_model_loader(SupportedVisionModels.HookedMLPClassifier, 10, 1, 8).eval()
    others = (lambda index: fresh, lambda: fresh)
    return Context(model, data, config, device, lambda top_k: theta, head, unlearner, *others)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """The contract does not depend on how long a rival trains."""
    monkeypatch.setattr(representations, "EPOCHS", 2)
    monkeypatch.setattr(subspaces, "MASK_STEPS", 10)


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", METHODS)
def test_contract(context, name):
    before, images = bits(context.model), context.data.splits["test"].batch(slice(50))[0]
    untouched = {key: value.clone() for key, value in context.model.state_dict().items()}

    def once(point: Point) -> torch.Tensor:
        own = replace(context, shared=Shared())  # nothing is found that another point made
        with METHODS[name].enter(own, point, **METHODS[name].grid[0]) as edit, torch.inference_mode():
            assert not any(module.training for module in edit.model.modules())
            assert edit.allowed is None or changed_outside(edit.model, untouched, edit.allowed) == 0
            assert (edit.seconds or 0) > 0
            return edit.model(images)

    logits = once(POINT)
    assert logits.isfinite().all()
    assert bits(context.model) == before
    assert torch.equal(logits, once(POINT))
    axes = METHODS[name].axes_in(context)
    for axis, other in (("top_k", Point(400, 200, 0)), ("kappa", Point(500, 300, 0)), ("seed", Point(500, 200, 1))):
        assert (METHODS[name].key(context, other) != METHODS[name].key(context, POINT)) == (axis in axes)
        if axis not in axes:
            assert torch.equal(logits, once(other))


@pytest.mark.parametrize("name", METHODS)
def test_classifier_survives_an_error_inside(context, name):
    before = bits(context.model)

    def fails() -> None:
        with METHODS[name].enter(context, POINT, **METHODS[name].grid[0]):
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert bits(context.model) == before


def test_registering_and_unknown_names(context):
    @method("doubled", "doubled", axes=("kappa",))
    def doubled(context: Context, point: Point) -> Edit:
        return Edit(context.model)

    try:
        assert METHODS["doubled"].key(context, POINT) == ("doubled", 200)
        assert chosen_methods(("doubled", "mimu")) == ("doubled", "mimu")
        assert chosen_methods(("all",)) == tuple(METHODS)
    finally:
        del METHODS["doubled"]
    with pytest.raises(UserError, match=f"no method 'doubled': choose from all, {', '.join(METHODS)}$"):
        chosen_methods(("mimu", "doubled"))


def test_a_name_is_registered_once():
    """The first entry stays, whichever decorator comes second."""
    first = METHODS["random"]
    for register in (method, mask_method):
        with pytest.raises(
            ValueError,
            match=rf"{__name__} registers a second method 'random', unlearn\.methods registers one: choose another",
        ):
            register("random", "another")(lambda context, point: Edit(context.model))
    assert METHODS["random"] is first


@pytest.mark.slow
def test_methods_stand_in_the_order_of_their_modules():
    """In a fresh process that imports the last module first, and in this one."""
    code = "from rivals import trained; from rivals.compared import METHODS; print(*METHODS)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == list(METHODS)
    modules = [entry.module for entry in METHODS.values()]
    assert list(dict.fromkeys(modules)) == list(MODULES)


def test_every_module_that_registers_methods_is_listed():
    names = {*MODULES}
    for path in sorted([*(PROJECT_ROOT / "unlearn").glob("*.py"), *(PROJECT_ROOT / "rivals").glob("*.py")]):
        registers = bool(re.search(r"^@(mask_)?method\(", path.read_text(encoding="utf-8"), re.MULTILINE))
        assert registers == (f"{path.parent.name}.{path.stem}" in names), path.name


def test_nothing_is_assigned_in_a_context_or_an_edit(context):
    for frozen, name in ((context, "model"), (Edit(context.model), "allowed")):
        with pytest.raises(FrozenInstanceError):
            setattr(frozen, name, None)


def test_shared_work_is_charged_to_each_method_once(context):
    asked = []

    def learn(top_k: int) -> torch.Tensor:
        asked.append(top_k)
        time.sleep(0.05)
        return torch.zeros(10, 64, 128)

    fresh = Context(context.model, context.data, context.config, context.device, learn)
    first, again = (fresh.shared.timed(lambda: fresh.theta(5)) for _ in range(2))
    assert asked == [5]
    assert again.value is first.value
    cost = fresh.shared.once(("theta", 5), lambda: None).seconds
    assert 0.05 <= cost <= first.seconds < cost + 0.02  # on the clock, not charged on top of it
    assert cost <= again.seconds < cost + 0.02  # charged, not on the clock
    assert first.standing == again.standing == cost  # importances of all classes serve any request
    assert first.stages == again.stages == {"graphs"}


def test_a_mask_is_made_once_and_charged_to_those_who_take_it_again(context, monkeypatch):
    def slow(context: Context, point: Point) -> Mask:
        time.sleep(0.2)
        return random_mask(context.graph, point.kappa, torch.Generator().manual_seed(0))

    monkeypatch.setitem(METHODS, "random", replace(METHODS["random"], mask=slow))
    fresh, seconds = replace(context, shared=Shared()), []
    mask = mask_of("random", fresh, POINT)
    assert mask_of("random", fresh, POINT) is mask
    for point in (POINT, replace(POINT, seed=1)):
        with METHODS["random"].enter(fresh, point) as edit:
            seconds.append(edit.seconds)
    assert all(0.2 <= spent < 0.4 for spent in seconds)  # found, and made: never both


def test_extent_of_an_edit_by_hand():
    model = nn.Linear(40, 5)  # 200 weights, 5 biases
    nn.init.constant_(model.weight, 2.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flat, names = model.weight.data.view(-1), list(before)

    def after(first: int, value: float) -> tuple[int, int]:
        flat.fill_(2.0)[:first] = value
        return extent(model, before, names)

    assert after(0, 1.0) == (0, 0)
    assert after(3, 0.0) == (3, 3 * 4)  # places alone
    assert after(3, 1.0) == (3, 3 * 4 + 3 * 4)  # places and values
    assert after(10, 0.0) == (10, 25)  # 200 bits take less than 10 places
    assert after(10, 1.0) == (10, 25 + 10 * 4)
    assert after(199, 1.0) == (199, 200 * 4)  # all values, no places
    model.bias.data += 1
    assert after(3, 0.0) == (3 + 5, 12 + 20)
    assert extent(model, before, ["bias"]) == (5, 20)


def test_unchanged_sees_every_bit():
    model = nn.BatchNorm1d(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    digest = state_sha256(model)
    assert unchanged(model, before)
    assert not unchanged(model, {name: before[name] for name in list(before)[1:]})
    for name, change in (("bias", -0.0), ("running_var", 1.0000001), ("num_batches_tracked", 1)):
        model.state_dict()[name].fill_(change)
        assert not unchanged(model, before), name
        assert state_sha256(model) != digest
        model.load_state_dict(before)
    model.weight.data[1] = float("nan")
    assert unchanged(model, {name: value.clone() for name, value in model.state_dict().items()})


def test_a_retrained_model_costs_its_training_and_a_network_its_own(context):
    charged = replace(context, stage_seconds=STAGES, shared=Shared())
    assert costs("retrain", charged) == (50.0, 0.0, 50.0)
    seconds, _, _ = costs("retrain", replace(charged, stage_seconds={}))
    assert seconds is not None
    assert 0 < seconds < 1  # what the clock says
    assert {name for name, entry in METHODS.items() if entry.learned} == {"mimu", "mimu_refined"}


STAGES = {"retrained-0": 50.0, "gcn": 700.0, "gcn_top-500": 800.0, "graphs": 3000.0, "checkpoint": 20000.0}


def costs(name: str, context: Context) -> tuple[float | None, float | None, float | None]:
    """Per request, once per classifier, and one request alone."""
    with METHODS[name].enter(context, POINT) as edit:
        return edit.seconds, edit.seconds_offline, edit.seconds_alone


def test_graphs_and_statistics_are_charged_to_those_who_use_them(context):
    """Class statistics are made on the clock of the stage that trains a network for requests, and not counted twice."""
    charged = replace(context, stage_seconds=STAGES, shared=Shared())
    standing = 0.0
    if context.unlearner is None:  # importances of all classes are made once, by whoever comes first
        standing = charged.shared.timed(lambda: charged.theta(500)).standing
    network = 700 if context.unlearner else 800
    statistics = 0 if context.unlearner else 20000
    wanted = {
        "random": 0,
        "logit_drop": 0,
        "taylor_mask": 23000,
        "mimu": 3000 + network + standing,
        "mimu_refined": 3000 + network + statistics + standing,
    }
    for name, offline in wanted.items():
        for _ in range(2):  # a mask that is found costs as much as one that is made
            seconds, once, alone = costs(name, charged)
            assert once == pytest.approx(offline)
            assert seconds is not None
            assert alone == pytest.approx(seconds + offline)
            assert seconds < 10
    if context.unlearner:  # a network that was given serves many classifiers; class statistics are still this one's
        given = replace(charged, config=replace(charged.config, gcn_path=Path("gcn.safetensors")))
        assert costs("mimu", given)[1] == 23000
    del (unknown := dict(STAGES))["graphs"]
    assert costs("mimu", replace(charged, stage_seconds=unknown))[1:] == (None, None)  # their folder was given


def test_images_that_pass_the_last_layers_in_parts_are_judged_alike(context, monkeypatch):
    mask = mask_of("random", context, replace(POINT, kappa=4000))
    wanted = [context.score(mask, "val", side) for side in (True, False)], footing(context)
    assert 0 < wanted[0][1] < 100
    for name in ("unlearn.registry", "stages.evaluation"):
        monkeypatch.setattr(f"{name}.ROWS_AT_ONCE", 7)
    assert ([context.score(mask, "val", side) for side in (True, False)], footing(context)) == wanted


@pytest.fixture
def spend(monkeypatch):
    """A clock that goes on by whole seconds, as many as it is told to."""
    now = [0]
    monkeypatch.setattr("unlearn.registry.clock", lambda: now[0])

    def spend(seconds: int) -> None:
        now[0] += seconds

    return spend


def test_shared_values_are_charged_once_however_often_they_are_used(spend):
    """Nested, found and found again; the seconds of a value that serves any request are none of a request's."""
    shared = Shared()

    def asked() -> None:
        for _ in range(3):
            shared.once("outer", lambda: (shared.once("inner", lambda: spend(1)), spend(10)), standing=True)
            shared.once("request", lambda: (shared.once("inner", lambda: spend(1)), spend(100)))
            shared.once("judged", lambda: (shared.once("other", lambda: spend(5)), spend(50)), charged=False)
        spend(1000)

    for _ in range(2):
        found = shared.timed(asked)
        assert (found.own, found.standing, found.seconds) == (1000, 11, 1111)
        assert found.used == {"outer", "inner", "request"}
    assert shared.timed(lambda: shared.once("request", lambda: 0)).seconds == 101


def test_what_fails_charges_nobody(spend):
    shared = Shared()

    def fails() -> None:
        shared.uses("graphs")
        spend(5)
        raise NotApplicable("no")

    with pytest.raises(NotApplicable):
        shared.timed(lambda: shared.once("broken", fails))
    after = shared.timed(lambda: None)
    assert (after.seconds, after.used, after.stages) == (0, set(), set())


def test_strategies_of_mimu(context):
    if context.unlearner:
        with torch.no_grad():
            theta = context.unlearner.theta(context.head, Request((4,), 200))
        assert torch.equal(mask_of("mimu", context, POINT).keep, ~hard_topk(theta, 200))
        return
    theta = context.theta(500)
    q = theta.flatten(1).softmax(1).view_as(theta)
    score = q[4] - (q.sum(0) - q[4]) / 9
    assert torch.equal(mask_of("mimu", context, POINT).keep, ~hard_topk(score, 200))
    sets = PipelineConfig(forget_class=4, eval=EvalConfig(mask_strategy=MaskStrategies.set_difference))
    other = Context(context.model, context.data, sets, context.device, context.learn_importance)
    off = ~mask_of("mimu", other, POINT).keep
    tops = [set(scores.flatten().argsort(descending=True)[:500].tolist()) for scores in theta]
    wanted = tops[4].difference(*(tops[c] for c in range(10) if c != 4))
    assert set(off.flatten().nonzero().flatten().tolist()) == wanted


def test_masks_by_hand():
    graph = layer_graph(2, 2)
    importance = torch.tensor([[[4.0, 1.0], [3.0, 0.0]], [[4.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 1.0]]])
    assert feasibility_score(importance, 0).tolist() == [[1.0, 1.0], [3.0, -1.0]]
    assert top_mask(feasibility_score(importance, 0), 2, graph).keep.tolist() == [
        [False, True],
        [False, True],
    ]  # tie: lower index
    assert set_difference_mask(importance, 0, 2, graph).keep.tolist() == [[True, True], [False, True]]
    assert set_difference_mask(importance, 1, 1, graph).switched_off == 0  # its only weight is others' too


def test_hard_topk_ties_and_nan():
    assert hard_topk(torch.zeros(2, 3), 4).tolist() == [[True, True, True], [True, False, False]]
    with pytest.raises(UserError, match="not numbers"):
        hard_topk(torch.tensor([1.0, float("nan")]), 1)
    for k in (0, 7):
        with pytest.raises(UserError, match="have 6 weights: choose from 1 to 6"):
            hard_topk(torch.zeros(2, 3), k)


def test_mask_file_round_trip_and_wrong_shape(tmp_path):
    drawn = random_mask(layer_graph(4, 5), 7, torch.Generator().manual_seed(0))
    mask = replace(drawn, facts={"kappa": 7, "model": "x"})
    assert mask.switched_off == 7
    mask.save(tmp_path / "m.safetensors")
    again = Mask.load(tmp_path / "m.safetensors")
    assert torch.equal(again.keep, mask.keep)
    assert again.facts == mask.facts
    with (
        pytest.raises(UserError, match="the mask is for 4 x 5, the layers are 5 x 4"),
        masked(nn.Parameter(torch.zeros(5, 4)), mask),
    ):
        pass
    (tmp_path / "bad").write_bytes(b"no")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        Mask.load(tmp_path / "bad")


def test_a_mask_from_a_file_knows_its_weights(tmp_path):
    """Kinds of other weights: another classifier's, one changed bit, another type, the masked ones themselves."""
    torch.manual_seed(0)
    own = nn.Parameter(torch.randn(4, 5))
    before = own.detach().clone()
    facts = {"classifier_path": "c.safetensors", "classifier_sha256": "0" * 64, "weights_sha256": weights_sha256([own])}
    replace(random_mask(layer_graph(4, 5), 7, torch.Generator().manual_seed(0)), facts=facts).save(tmp_path / "m")
    mask = Mask.load(tmp_path / "m")
    touched = before.clone()
    touched[0, 0] = touched[0, 0].nextafter(torch.tensor(9.0))
    others = [torch.randn(4, 5), touched, before.half(), before * mask.keep]
    for other in map(nn.Parameter, others):
        kept = other.detach().clone()
        with (
            pytest.raises(UserError, match=r"of another classifier, c\.safetensors, .* any_weights=True"),
            masked(other, mask),
        ):
            pass
        assert torch.equal(other, kept)
        with masked(other, mask, any_weights=True):
            assert not other[~mask.keep].any()
        assert torch.equal(other, kept)
    with masked(own, mask):
        assert torch.equal(own, before * mask.keep)
    assert torch.equal(own, before)
    old = replace(mask, facts={"classifier_sha256": "0" * 64})  # of before masks said whose weights they are for
    with pytest.raises(UserError, match="whose weights its file does not name"), masked(own, old):
        pass


def test_the_hash_of_weights_covers_types_shapes_and_order():
    a, b = torch.zeros(2, 3), torch.zeros(3, 2)
    hashes = {weights_sha256(of) for of in ([a], [b], [a, b], [b, a], [a.half()], [-a])}
    assert len(hashes) == 6
    assert weights_sha256([a.T.contiguous().T]) == weights_sha256([a])  # how they lie in memory does not matter
    narrow = {weights_sha256([of.bfloat16()]) for of in (a, a + 1, b)}  # numpy has no such type
    assert len(narrow - hashes) == 3


@pytest.mark.parametrize("mode", list(SFTModes))
def test_sft_draws_what_its_mode_says(context, mode):
    engine = Finetuner("sft", context.model, context.data, 0, context.device, torch.optim.AdamW)
    forget = {
        image.numpy().tobytes() for image in context.data.splits["train"].only(engine.forget).batch(slice(None))[0]
    }
    drawn = [engine.mixed(32, mode) for _ in range(40)]
    from_forget = [sum(image.numpy().tobytes() in forget for image in images) for images, _ in drawn]
    share = {SFTModes.Randomize_Forget: 32, SFTModes.Finetune_Retain: 0}.get(mode, 16)
    assert set(from_forget) == {share}
    labels = torch.cat([labels[:share] for _, labels in drawn])
    if share:  # uniform over all classes: mean count 32 x 40 x share / 32 / 10, five standard deviations
        expected = len(labels) / 10
        assert ((torch.bincount(labels, minlength=10) - expected).abs() < 5 * expected**0.5).all()
    true = torch.cat([labels[share:] for _, labels in drawn])
    assert 4 not in true.tolist()


def test_sft_changes_the_target_layer_alone(context):
    free = context.within_targets([torch.ones_like(weight, dtype=torch.bool) for weight in context.weights])
    engine = Finetuner("sft", context.model, context.data, 0, context.device, torch.optim.AdamW, free=free)
    optimised = [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]
    assert list(map(id, optimised)) == list(map(id, engine.model.weights(-2)))
    tuned = engine.fit_targets(-2, SFTConfig(steps=3))
    changed = {n for n, v in tuned.state_dict().items() if not torch.equal(v, context.model.state_dict()[n])}
    assert changed == {"linears.1.weight"}


def test_the_network_of_small_classifiers_is_not_asked_about_large_ones(context, monkeypatch):
    monkeypatch.setattr(methods, "MANY", 1000)
    with (
        pytest.raises(NotApplicable, match="less than 1,000 weights"),
        METHODS["mimu_deep_network"].enter(context, POINT),
    ):
        raise AssertionError("it answered")
