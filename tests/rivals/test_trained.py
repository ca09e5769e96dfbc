"""Rivals that train: what they may change, which images they see, which way their losses go."""

import copy
import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from core.config import PipelineConfig, SupportedDatasets, SupportedVisionModels, UserError
from measure.integrity import changed_outside
from model import HookedModel, vision_model_loader
from rivals import trained as baselines
from rivals.compared import METHODS
from rivals.trained import RETAINED, boundary_labels, distillation, last_inputs, salient, scrub_retain_loss, sgd
from tests.helpers.knowing import CPU, Flat, digits, knowing
from unlearn.finetuning import Finetuner
from unlearn.registry import Context, Edit, NotApplicable, Point, Shared
from utils_data import Images, UnlearningDataset

POINT = Point(top_k=1, kappa=1, seed=0)
TRAINED = [name for name, entry in METHODS.items() if entry.module == baselines.__name__]
GENTLE = {"gradient_ascent": {"lr": 1e-3}, "scrub": {"lr": 1e-3, "max_epochs": 3}, "bad_teacher": {"lr": 1e-3}}


@pytest.fixture(scope="module")
def data() -> UnlearningDataset:
    return digits()


@pytest.fixture(scope="module")
def context(data) -> Context:
    return knowing(data)


def engine_of(context: Context, model: HookedModel | None = None, optimizing=None, **more) -> Finetuner:
    return Finetuner("test", model or context.model, context.data, 0, CPU, optimizing or sgd(0.1), **more)


def edited(context: Context, name: str, seed: int = 0, **settings) -> Edit:
    with METHODS[name].enter(context, Point(1, 1, seed), **(settings or METHODS[name].grid[0])) as edit:
        return edit


def unlearned(context: Context, name: str, seed: int = 0, **settings) -> HookedModel:
    model = edited(context, name, seed, **settings).model
    assert isinstance(model, HookedModel)
    return model


def part(context: Context, is_forget_set: bool) -> tuple[Tensor, Tensor]:
    images = context.data.splits["train"]
    return images.batch(context.data.is_forgotten(images.labels) == is_forget_set)


def loss_on(model: HookedModel, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float(functional.cross_entropy(model(images), labels))


# --- the engine -------------------------------------------------------------------------------------------


def test_held_weights_keep_their_bits_against_momentum_and_decay(context):
    draw = torch.Generator().manual_seed(3)
    free = {name: torch.rand(value.shape, generator=draw) < 0.5 for name, value in context.model.named_parameters()}
    del free["linears.2.weight"]  # not named: may not change at all
    before, optimizing = context.model.state_dict(), sgd(0.1, weight_decay=0.1)
    models = {}
    for name, allowed in (("held", free), ("all", None)):
        engine = engine_of(context, optimizing=optimizing, free=allowed)
        for images, labels in [*engine.forgotten(), *engine.retained()]:
            engine.descend(functional.cross_entropy(engine.model(images), labels))
        models[name] = engine.finished()
    assert changed_outside(models["held"], before, free) == 0
    assert changed_outside(models["all"], before, free) > 5000  # what would have moved
    moved = {name: models["held"].state_dict()[name] != before[name] for name in free}
    assert all((moved[name] == free[name]).double().mean() > 0.99 for name in free)  # decay moves every free weight


def test_steps_by_hand(context):
    """x = (1, 2), W = 0, true class 0: grad CE = (p - e_0) x^T = [[-.5, -1], [.5, 1]], of norm sqrt(2.5)."""
    model, x, slope = Flat((2, 2)), torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[-0.5, -1.0], [0.5, 1.0]])
    torch.nn.init.zeros_(model.linears[0].weight)
    for sign, clip, factor in ((1, None, -0.1), (-1, None, 0.1), (-1, 1.0, 0.1 / 2.5**0.5)):
        engine = engine_of(context, model, partial(torch.optim.SGD, lr=0.1), clip=clip)
        engine.descend(sign * functional.cross_entropy(engine.model(x), torch.tensor([0])))
        torch.testing.assert_close(engine.finished().get_parameter("linears.0.weight").data, factor * slope)
    assert not model.linears[0].weight.any()


def test_loss_without_end_is_refused(context):
    engine = engine_of(context)
    with pytest.raises(UserError, match=r"test's loss is no longer finite: leave it out of eval\.methods"):
        engine.descend(functional.cross_entropy(engine.model(torch.full((1, 1, 8, 8), math.inf)), torch.tensor([0])))


def test_an_epoch_is_one_pass_over_the_forget_set_with_twice_as_many_others(context):
    engine = engine_of(context)
    pairs = list(engine.paired())
    forget, true = (torch.cat(values) for values in zip(*(pair[0] for pair in pairs), strict=True))
    retain, kept = (torch.cat(values) for values in zip(*(pair[1] for pair in pairs), strict=True))
    every, _ = part(context, True)
    assert sorted(map(bytes, forget.numpy())) == sorted(map(bytes, every.numpy()))
    assert set(true.tolist()) == {4, 7}
    assert len(retain) == RETAINED * len(forget)
    assert set(kept.tolist()) == {0, 1, 2, 3, 5, 6, 8, 9}
    assert not torch.equal(torch.cat([x for x, _ in engine.forgotten()]), forget)  # another order next time


@pytest.mark.parametrize(("forget", "batch"), [(30, 8), (161, 8), (400, 20), (2559, 127), (5400, 128)])
def test_batches_shrink_with_the_forget_set(forget, batch):
    """DIGITS' 161 images once made two batches, and every rival ended where it began."""
    labels = torch.arange(forget + 9) // forget
    images = Images(torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8), labels, torch.zeros(1), torch.ones(1))
    data = UnlearningDataset(SupportedDatasets.DIGITS, dict.fromkeys(("train", "val", "test"), images), 32, (0,), 0)
    engine = Finetuner("test", Flat((64, 2)), data, 0, CPU, sgd(0.1))
    sizes = [len(labels) for _, labels in engine.forgotten()]
    assert (engine.batch, sum(sizes)) == (batch, forget)
    assert all(size == batch for size in sizes[:-1])
    assert next(len(labels) for _, labels in engine.retained(batches=2)) == min(2 * batch, 2 * forget)


def test_random_labels_are_uniform_whatever_the_true_one(context):
    drawn = engine_of(context).random_labels(torch.full((20_000,), 4))
    counts = torch.bincount(drawn, minlength=10)
    assert ((counts - 2000).abs() < 5 * (20_000 * 0.09) ** 0.5).all(), counts  # five standard deviations


def test_batch_norm_keeps_its_statistics(context):
    torch.manual_seed(0)
    model = vision_model_loader(SupportedVisionModels.HookedResnet, 10, 1, 8)
    engine = engine_of(context, model)
    images, labels = next(engine.forgotten())
    engine.descend(functional.cross_entropy(engine.model(images[:4]), labels[:4]))
    tuned = engine.finished()
    assert all(torch.equal(value, dict(tuned.named_buffers())[name]) for name, value in model.named_buffers())
    scale = "backbone.bn1.weight"
    assert not torch.equal(tuned.state_dict()[scale], model.state_dict()[scale])  # its parameters do learn


def test_settings_that_diverge_are_not_chosen(context, monkeypatch):
    from eval import Eval

    judge = Eval(replace(context, retrain=lambda index: context.untrained()))
    monkeypatch.setattr(
        "measure.snapshots.reference_fault", lambda *_: None
    )  # what it is held against does not matter here
    diverging = replace(METHODS["finetune"], grid=({"lr": 1e30}, {"lr": 0.01}))
    monkeypatch.setitem(METHODS, "finetune", diverging)
    assert judge.tuned("finetune", POINT) == {"lr": 0.01}
    gaps = [tried["avg_gap"] for tried in judge.about["finetune", 0]["tuning"]]
    assert gaps[0] is None  # what JSON can hold
    assert gaps[1] >= 0


@pytest.mark.parametrize("grid", [({"lr": 1e30},), ({"lr": 1e30}, {"lr": 1e35})])
def test_a_rival_whose_every_setting_diverges_is_recorded_and_stops_nobody(context, monkeypatch, grid):
    from eval import COSTS, Eval

    judged = replace(context.config.eval, methods=("finetune", "random", "default"), metrics=("core", "avg_gap"))
    config = replace(context.config, eval=replace(judged, references=1))
    monkeypatch.setattr("measure.snapshots.reference_fault", lambda *_: None)
    monkeypatch.setitem(METHODS, "finetune", replace(METHODS["finetune"], grid=grid))
    made = {"retrain": lambda index: context.untrained(), "learn_importance": lambda top_k: torch.rand(10, 64, 128)}
    judge = Eval(replace(context, config=config, **made))
    record, masks = judge.eval(POINT.top_k, POINT.kappa)
    json.dumps(record, allow_nan=False)
    for part in ("methods", "validation"):
        lost = record[part]["finetune"]
        assert set(lost) == {*judge.metrics, *COSTS}
        assert set(lost.values()) == {None}
        assert record[part]["random"]["avg_gap"] is not None
    assert [one["key"] for one in record["verdicts"]["finetune"]] == ["diverged"]
    assert "no longer finite" in record["verdicts"]["finetune"][0]["sentence"]
    assert record["intervals"]["finetune"] is None
    assert "random" in masks


def test_a_method_that_cannot_be_used_here_is_recorded_and_stops_nobody(context, monkeypatch):
    """A mask among them: no mask of its own is written, and the answer's is."""
    from eval import COSTS, Eval

    def elsewhere(context: Context, point: Point, **_: object) -> Edit:
        raise NotApplicable("works on other models")

    for name in ("finetune", "magnitude"):  # one with settings to tune, and one of masks
        monkeypatch.setitem(METHODS, name, replace(METHODS[name], function=elsewhere))
    judged = replace(context.config.eval, methods=("finetune", "magnitude", "random", "default"), metrics=("core",))
    config = replace(context.config, eval=replace(judged, references=1))
    monkeypatch.setattr("measure.snapshots.reference_fault", lambda *_: None)
    made = {"retrain": lambda index: context.untrained(), "learn_importance": lambda top_k: torch.rand(10, 64, 128)}
    judge = Eval(replace(context, config=config, **made))
    record, masks = judge.eval(POINT.top_k, POINT.kappa)
    for name in ("finetune", "magnitude"):
        assert set(record["methods"][name]) == {*judge.metrics, *COSTS}
        assert set(record["methods"][name].values()) == {None}
        assert record["verdicts"][name] == [{"key": "not applicable", "sentence": "it works on other models"}]
    assert set(masks) == {"random", judge.answer}
    assert record["methods"]["random"]["retain_score"] is not None


def test_weights_that_end_as_no_numbers_have_diverged(context, monkeypatch):
    """The last step can do it: no loss follows that would show it."""
    from eval import Eval

    def spoilt(context: Context, point: Point) -> Edit:
        model = copy.deepcopy(context.model)
        with torch.no_grad():
            model.target(-1).weight[0, 0] = math.inf
        return Edit(model)

    monkeypatch.setitem(METHODS, "spoilt", replace(METHODS["finetune"], grid=({},), function=spoilt))
    judge = Eval(replace(context, retrain=None))
    assert judge.eval_unlearning("spoilt", POINT)["test"]["forget_score"] is None


def test_only_a_method_that_could_be_asked_is_said_to_be_untuned(context, monkeypatch, capsys):
    from eval import Eval

    def elsewhere(context: Context, point: Point, **_: float) -> Edit:
        raise NotApplicable("works on other models")

    monkeypatch.setitem(METHODS, "elsewhere", replace(METHODS["finetune"], name="elsewhere", function=elsewhere))
    judge = Eval(replace(context, retrain=None))
    judge.eval_unlearning("elsewhere", POINT)
    assert "not tuned" not in capsys.readouterr().err
    judge.eval_unlearning("finetune", POINT)
    judge.eval_unlearning("finetune", POINT)
    assert capsys.readouterr().err.count("finetune: not tuned, its first settings are used") == 1


# --- every method -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINED)
def test_seed_alone_decides(context, name):
    def weights(seed: int) -> Tensor:
        return torch.cat([value.flatten() for value in unlearned(context, name, seed).parameters()])

    first = weights(0)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


@pytest.mark.parametrize("name", TRAINED)
def test_images_that_each_method_sees(context, name, monkeypatch):
    seen, load = [], Finetuner._load

    def recording(engine: Finetuner, indices: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(indices)
        return load(engine, indices)

    monkeypatch.setattr(Finetuner, "_load", recording)
    unlearned(context, name)
    labels = context.data.splits["train"].labels[torch.cat([*seen, torch.empty(0, dtype=torch.long)])]
    sides = {bool(side) for side in context.data.is_forgotten(labels)}
    alone = {"finetune": {False}, "gradient_ascent": {True}, "boundary_shrink": {True}, "head_retrain": set()}
    assert sides == alone.get(name, {True, False})
    forget = len(part(context, True)[0])
    assert len(labels) <= forget * (1 + RETAINED) * baselines.EPOCHS + forget * (name == "salun")


@pytest.mark.parametrize("name", TRAINED)
def test_settings_differ_and_are_few(name):
    grid = METHODS[name].grid
    assert 2 <= len({tuple(settings.items()) for settings in grid}) == len(grid) <= 5


# --- directions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gradient_ascent", "neg_grad_plus", "random_label", "salun", "boundary_shrink"])
def test_loss_on_the_forget_set_rises(context, name):
    images, labels = part(context, True)
    tuned = unlearned(context, name, **GENTLE.get(name, {}))
    assert loss_on(tuned, images, labels) > loss_on(context.model, images, labels)


@pytest.mark.parametrize("name", ["finetune", "head_retrain"])
def test_loss_on_the_retain_set_falls(context, name):
    images, labels = part(context, False)
    start = replace(context, model=context.untrained(), shared=Shared())  # all is still to be learned
    still, moved = (loss_on(unlearned(start, name, lr=lr), images, labels) for lr in (0.0, 0.03))
    assert moved < still - 0.1


def test_students_leave_and_join_their_teachers(context):
    (forget, _), (retain, _) = part(context, True), part(context, False)
    untrained = context.untrained
    assert untrained is not None

    def divergence(student: HookedModel, teacher: HookedModel, images: Tensor) -> float:
        with torch.no_grad():
            return float(distillation(student(images), teacher(images)))

    scrubbed, confused = (unlearned(context, name, **GENTLE[name]) for name in ("scrub", "bad_teacher"))
    assert divergence(scrubbed, context.model, forget) > 3 * divergence(scrubbed, context.model, retain)
    assert divergence(confused, untrained(), forget) < divergence(context.model, untrained(), forget)
    assert divergence(confused, untrained(), retain) > divergence(confused, untrained(), forget)


# --- losses, labels, masks --------------------------------------------------------------------------------


def naive_kl(student: Tensor, teacher: Tensor, temperature: float) -> float:
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = ([math.exp(v / temperature) for v in row] for row in (s, t))
        p, q = ([v / sum(row) for v in row] for row in (p, q))
        total += sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_as_naive(temperature):
    student, teacher = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    value = float(distillation(student, teacher, temperature))
    assert value == pytest.approx(naive_kl(student, teacher, temperature), rel=1e-12)
    assert value != pytest.approx(naive_kl(teacher, student, temperature), rel=0.01)  # its direction matters
    assert float(distillation(teacher, teacher, temperature)) == 0


def test_scrub_loss_as_naive():
    student, teacher = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.tensor([0, 4, 2, 2, 1, 3])
    fit = sum(math.log(sum(math.exp(v) for v in row)) - row[y] for row, y in zip(student.tolist(), labels, strict=True))
    wanted = 0.99 * fit / 6 + 0.1 * naive_kl(student, teacher, 4.0)
    assert float(scrub_retain_loss(student, teacher, labels)) == pytest.approx(wanted, rel=1e-12)


def test_boundary_labels_are_the_nearest_of_the_classes_that_stay(context):
    images, labels = part(context, True)
    found = boundary_labels(context, images, labels)
    assert not set(found.tolist()) & {4, 7}
    assert len(set(found.tolist())) > 2
    assert not any(parameter.grad is not None for parameter in context.model.parameters())


def test_boundary_labels_of_a_linear_classifier_by_hand(data):
    """One step along sign(W^T (p - e_y)); the step, not the image itself, decides for some."""
    torch.manual_seed(0)
    model = Flat((64, 10))
    context = Context(model, data, PipelineConfig(forget_class=(4, 7)), CPU, lambda top_k: torch.zeros(1))
    (images, labels), weight = part(context, True), model.linears[0].weight.detach()
    step = 0.1 * 255 / float(data.splits["train"].std)
    wanted, still = [], []
    for image, label in zip(images.flatten(1), labels, strict=True):
        p = (weight @ image).softmax(0)
        p[label] -= 1
        moved = weight @ (image + step * torch.sign(weight.T @ p))
        allowed = [c for c in range(10) if c not in (4, 7)]
        wanted.append(max(allowed, key=lambda c: float(moved[c])))
        still.append(max(allowed, key=lambda c: float((weight @ image)[c])))
    assert boundary_labels(context, images, labels).tolist() == wanted != still


def test_salun_may_change_the_half_that_the_forget_set_depends_on_most(context):
    images, labels = part(context, True)
    chosen = salient(engine_of(context))
    loss = functional.cross_entropy(context.model(images), labels, reduction="sum")
    slopes = torch.autograd.grad(loss, list(context.model.parameters()))
    flat = torch.cat([slope.abs().flatten() for slope in slopes])
    mask = torch.cat([chosen[name].flatten() for name, _ in context.model.named_parameters()])
    assert int(mask.sum()) == len(flat) // 2
    assert flat[mask].min() >= flat[~mask].max() * (1 - 1e-3)  # summed in another order
    before = context.model.state_dict()
    edit = edited(context, "salun")
    assert edit.allowed is not None
    assert all(torch.equal(edit.allowed[name], chosen[name]) for name in chosen)
    assert changed_outside(edit.model, before, chosen) == 0
    assert changed_outside(edit.model, before, {}) > 0.9 * int(mask.sum())


@pytest.mark.parametrize("mask_layer", [-3, -2, -1, (0, 1), None])
def test_last_layer_is_trained_on_its_own_inputs(context, mask_layer):
    config = PipelineConfig(forget_class=(4, 7), mask_layer=mask_layer)
    other = Context(context.model, context.data, config, CPU, context.learn_importance)
    h, labels = last_inputs(other)
    images, true = part(context, False)
    with torch.no_grad():
        a, b, _ = (layer.weight for layer in context.model.linears)
        torch.testing.assert_close(h, torch.relu(torch.relu(images.flatten(1) @ a.T) @ b.T))
    assert torch.equal(labels, true)
    edit = edited(other, "head_retrain")
    assert edit.allowed is not None
    assert changed_outside(edit.model, context.model.state_dict(), edit.allowed) == 0
    assert set(edit.allowed) == {"linears.2.weight"}
    last = edit.model.get_parameter("linears.2.weight")
    assert (last != context.model.get_parameter("linears.2.weight")).all()
