"""Rivals that unlearn by training: fine-tuning, ascent, random labels, distillation from a teacher.

Each is a decorated function as in `methods`, with its source and the settings that it is tuned over. All have the
same budget, at most EPOCHS epochs: one is a pass over D_f, with RETAINED images of D_r, drawn anew, for each of its
images; methods that use one of the two sets alone see no more images (last layer anew: passes over all of D_r, as
cheap). A step takes 128 images of D_f or, where D_f is small, so few (8 at least) that an epoch has 20 steps.
Gradients have a norm of at most 1; SGD has momentum 0.9 unless it is called plain.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphs.subsets import hard_topk
from model import apply_linear, capture, inspecting
from training.optimisers import SGD, Adam
from unlearn.finetuning import RETAINED, Finetuner, Optimizing
from unlearn.registry import Context, Edit, NotApplicable, Point, method

EPOCHS = 3
SALUN_SHARE = 0.5  # of all parameters that SalUn may change
SALUN_DECAY = 5e-4
SCRUB_TEMPERATURE = 4.0
SCRUB_WEIGHTS = (0.99, 0.1)  # of cross-entropy and of distillation, on D_r
BOUNDARY_STEP = 0.1  # of the range of a pixel
GRADIENT_NORM = 1.0  # at most: ascent has no bound, and a ResNet whose BatchNorm statistics stand still diverges


def sgd(lr: float, weight_decay: float = 0.0) -> Optimizing:
    """SGD with momentum 0.9."""
    return partial(SGD, lr=lr, momentum=0.9, weight_decay=weight_decay)


def adam(lr: float) -> Optimizing:
    """Adam with its usual moments."""
    return partial(Adam, lr=lr)


def tuner(name: str, context: Context, point: Point, optimizing: Optimizing, **more: Any) -> Finetuner:
    """The engine on a context's classifier and images."""
    return Finetuner(
        name, context.model, context.data, point.seed, context.device, optimizing, clip=GRADIENT_NORM, **more
    )


# --- losses -----------------------------------------------------------------------------------------------


def distillation(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 mean KL(softmax(teacher / T) || softmax(student / T)), nats (1503.02531). Both logits [B, C]."""
    log_q, log_p = (teacher / temperature).log_softmax(1), (student / temperature).log_softmax(1)
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(1).mean()


def scrub_retain_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """SCRUB's gamma CE + alpha KL(teacher || student) on D_r. [B, C], [B, C], [B] -> nats."""
    gamma, alpha = SCRUB_WEIGHTS
    fit = functional.cross_entropy(student, labels)
    return gamma * fit + alpha * distillation(student, teacher, SCRUB_TEMPERATURE)


# --- labels alone -----------------------------------------------------------------------------------------


@method(
    "finetune",
    "fine-tuning on D_r",
    axes=("seed",),
    source="1911.04933",
    grid=[{"lr": lr} for lr in (0.02, 0.01, 0.05, 0.1)],
)
def finetune(context: Context, point: Point, lr: float) -> Edit:
    """FT: minimise CE on D_r alone, so that what is not rehearsed is forgotten; no image of D_f is ever used."""
    engine = tuner("finetune", context, point, sgd(lr))
    for _ in range(EPOCHS):
        for images, labels in engine.retained(RETAINED + 1):
            engine.descend(functional.cross_entropy(engine.model(images), labels))
    return Edit(engine.finished())


@method(
    "gradient_ascent",
    "gradient ascent",
    axes=("seed",),
    source="2109.13398",
    grid=[{"lr": lr} for lr in (5e-3, 1e-2, 7e-3, 3e-3, 1.5e-2)],
)
def gradient_ascent(context: Context, point: Point, lr: float) -> Edit:
    """GA: maximise CE in one pass over D_f, by plain SGD; nothing protects D_r."""
    engine = tuner("gradient_ascent", context, point, partial(SGD, lr=lr))
    for images, labels in engine.forgotten():
        engine.descend(-functional.cross_entropy(engine.model(images), labels))
    return Edit(engine.finished())


@method(
    "neg_grad_plus",
    "NegGrad+",
    axes=("seed",),
    source="2302.09880",
    grid=[
        {"lr": lr, "beta": beta}
        for lr, beta in ((3e-3, 0.99), (3e-3, 0.999), (1e-2, 0.999), (1e-3, 0.95), (1e-2, 0.95))
    ],
)
def neg_grad_plus(context: Context, point: Point, lr: float, beta: float) -> Edit:
    """Minimise beta CE(D_r) - (1 - beta) CE(D_f), by SGD."""
    engine = tuner("neg_grad_plus", context, point, sgd(lr))
    for _ in range(EPOCHS):
        for (forget, true), (retain, kept) in engine.paired():
            keep = functional.cross_entropy(engine.model(retain), kept)
            engine.descend(beta * keep - (1 - beta) * functional.cross_entropy(engine.model(forget), true))
    return Edit(engine.finished())


@method(
    "random_label",
    "random labels",
    axes=("seed",),
    source="2010.10981",
    grid=[{"lr": lr} for lr in (1e-3, 5e-4, 2e-3, 3e-3)],
)
def random_label(context: Context, point: Point, lr: float) -> Edit:
    """RL: minimise CE on batches of D_f with uniform labels, drawn anew, and of D_r with its own, by Adam."""
    engine = tuner("random_label", context, point, adam(lr))
    for _ in range(EPOCHS):
        for (forget, true), (retain, kept) in engine.paired():
            labels = torch.cat([engine.random_labels(true), kept])
            engine.descend(functional.cross_entropy(engine.model(torch.cat([forget, retain])), labels))
    return Edit(engine.finished())


def salient(engine: Finetuner) -> dict[str, Tensor]:
    """Which half of all parameters |sum over D_f of grad CE| is largest for, at the untouched weights, by name."""
    for images, labels in engine.forgotten():
        functional.cross_entropy(engine.model(images), labels, reduction="sum").backward()
    named = dict(engine.model.named_parameters())
    sizes = [torch.zeros_like(value) if value.grad is None else value.grad.abs() for value in named.values()]
    engine.optimizer.zero_grad(set_to_none=True)
    flat = torch.cat([size.flatten() for size in sizes])
    chosen = hard_topk(flat, max(1, round(SALUN_SHARE * len(flat)))).split([size.numel() for size in sizes])
    return {name: part.view_as(size) for name, part, size in zip(named, chosen, sizes, strict=True)}


@method(
    "salun",
    "SalUn",
    axes=("seed",),
    source="2310.12508",
    grid=[{"lr": lr} for lr in (0.005, 0.002, 0.013, 0.03)],
)
def salun(context: Context, point: Point, lr: float) -> Edit:
    """Random labels for the half of all parameters that |sum of gradients of CE over D_f| is largest for: each epoch a
    pass over D_f with random labels, then over D_r, by SGD with weight decay 5e-4; all other weights keep their bits.
    """
    optimizing = sgd(lr, SALUN_DECAY)
    allowed = salient(tuner("salun", context, point, optimizing))
    engine = tuner("salun", context, point, optimizing, free=allowed)
    for _ in range(EPOCHS):
        for images, labels in engine.forgotten():
            engine.descend(functional.cross_entropy(engine.model(images), engine.random_labels(labels)))
        for images, labels in engine.retained():
            engine.descend(functional.cross_entropy(engine.model(images), labels))
    return Edit(engine.finished(), allowed)


def boundary_labels(context: Context, images: Tensor, labels: Tensor) -> Tensor:
    """The nearest class that is to stay: the largest such logit after one step of 0.1 of the pixel range up the loss.

    x' = x + 0.1 sign(grad_x CE(f(x), y)), for images [B, C, H, W] and true labels [B] -> [B].
    """
    step = (BOUNDARY_STEP * 255 / context.data.splits["train"].std).to(images.device)
    with inspecting(context.model):
        moved = images.clone().requires_grad_()
        (slope,) = torch.autograd.grad(functional.cross_entropy(context.model(moved), labels, reduction="sum"), moved)
        with torch.no_grad():
            logits = context.model(images + step * slope.sign())
    logits[:, list(context.config.forget_labels)] = -math.inf
    return logits.argmax(1)


@method(
    "boundary_shrink",
    "boundary shrink",
    axes=("seed",),
    source="2303.11570",
    grid=[{"lr": lr} for lr in (3e-4, 2e-4, 5e-4, 1e-3)],
)
def boundary_shrink(context: Context, point: Point, lr: float) -> Edit:
    """Minimise CE on D_f alone, each image labelled with the nearest retained class, found by one adversarial step."""
    engine = tuner("boundary_shrink", context, point, sgd(lr))
    for _ in range(EPOCHS):
        for images, labels in engine.forgotten():
            nearest = boundary_labels(context, images, labels)
            engine.descend(functional.cross_entropy(engine.model(images), nearest))
    return Edit(engine.finished())


# --- teachers ---------------------------------------------------------------------------------------------


def answers(teacher: torch.nn.Module, images: Tensor) -> Tensor:
    """A teacher's logits [B, C], constant for the gradient."""
    with torch.no_grad():
        return teacher(images)


@method(
    "scrub",
    "SCRUB",
    axes=("seed",),
    source="2302.09880",
    grid=[{"lr": lr, "max_epochs": most} for lr, most in ((3e-3, 3), (3e-3, 2), (1e-3, 3), (1e-2, 3), (1e-2, 2))],
)
def scrub(context: Context, point: Point, lr: float, max_epochs: int) -> Edit:
    """The untouched classifier teaches, at temperature 4: each epoch a pass over D_f that maximises KL to it (the first
    `max_epochs` only), then one over D_r that minimises 0.99 CE + 0.1 KL, by SGD.
    """
    engine = tuner("scrub", context, point, sgd(lr))
    for epoch in range(EPOCHS):
        for images, _ in engine.forgotten() if epoch < max_epochs else ():
            student, teacher = engine.model(images), answers(context.model, images)
            engine.descend(-distillation(student, teacher, SCRUB_TEMPERATURE))
        for images, labels in engine.retained():
            engine.descend(scrub_retain_loss(engine.model(images), answers(context.model, images), labels))
    return Edit(engine.finished())


@method(
    "bad_teacher",
    "bad teacher",
    axes=("seed",),
    source="2205.08096",
    grid=[{"lr": lr} for lr in (3e-4, 1e-4, 1e-3, 3e-3)],
)
def bad_teacher(context: Context, point: Point, lr: float) -> Edit:
    """Minimise KL(teacher || student) by Adam: D_f's teacher has initial weights, D_r's is the untouched classifier."""
    if context.untrained is None:
        raise NotApplicable("needs the classifier with initial weights, which a trained model alone does not give")
    engine, incompetent = tuner("bad_teacher", context, point, adam(lr)), context.untrained()
    for _ in range(EPOCHS):
        for (forget, _), (retain, _) in engine.paired():
            teacher = torch.cat([answers(incompetent, forget), answers(context.model, retain)])
            engine.descend(distillation(engine.model(torch.cat([forget, retain])), teacher))
    return Edit(engine.finished())


# --- last layer -------------------------------------------------------------------------------------------


def last_inputs(context: Context) -> tuple[Tensor, Tensor]:
    """Input [S, n] of the last layer on D_r, and labels [S], from the activations that all methods share."""
    h, labels = context.activations("train", False)
    with inspecting(context.own), torch.inference_mode(), capture(context.own.linears[-1]) as record:
        context.model.head(h, context.config.mask_layer)
    features, _ = record.take()
    return features.clone(), labels


@method(
    "head_retrain",
    "last layer anew",
    axes=("seed",),
    source="control: head-only retraining",
    grid=[{"lr": lr} for lr in (3e-3, 1e-2, 3e-2)],
)
def head_retrain(context: Context, point: Point, lr: float) -> Edit:
    """The last layer trained from initial weights on D_r, by Adam, 8 times the batch, everything below it frozen."""
    name = f"linears.{len(context.own.linears) - 1}.weight"
    allowed = {name: torch.ones_like(context.own.target(-1).weight, dtype=torch.bool)}
    engine = tuner("head_retrain", context, point, adam(lr), free=allowed)
    weight, (h, labels) = dict(engine.model.named_parameters())[name], last_inputs(context)
    bound = 1 / math.sqrt(weight.shape[1])
    with torch.no_grad():
        weight.copy_(bound * (2 * torch.rand(weight.shape, generator=engine.generator) - 1))
    for _ in range(EPOCHS):
        for picks in torch.randperm(len(h), generator=engine.generator).split(8 * engine.batch):
            engine.descend(functional.cross_entropy(apply_linear(h[picks], weight), labels[picks]))
    return Edit(engine.finished(), allowed)
