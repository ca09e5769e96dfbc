"""How well, and at what cost, are classes of somebody else's model forgotten? Models of four libraries, real images.

    uv run --extra timm --extra hf benchmarks/your_model.py [--only NAME ...] [--seeds N] [--classes N ...]

`fashion`: a torchvision ResNet-18 with its ordinary head, a MobileNet and a ConvNeXt of torchvision, a ViT of timm and
one of transformers, trained here on 15,000 images of Fashion-MNIST for two epochs from random weights; one class after
the other is forgotten, and judged on test images. `cost`: a request over 500 images of 224 x 224 px, in forward passes
over the same images. `library`: seconds for each class of ten and of a thousand. `robust`: masks that are refined with
both statistics of BatchNorm beside those that are refined with the model's own, on the ResNet-18. `network`: masks
of the graph network that is shipped, alone and refined, beside those of first order, there too.

Which number of weights is used is chosen on validation images: of KAPPAS the smallest that leaves LEFT % of the class.
"""

import importlib
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import keep, parser

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from core.choices import SupportedDatasets
from forgetting.answers import Answer, Answering, Ways
from forgetting.pictures import Batch
from forgetting.samples import read_samples
from forgetting.scores import judge
from images.names import TEST, TRAIN, VAL
from images.specs import dataset_root, read_arrays
from models.foreign import ForeignClassifier
from models.specs import logits_of
from models.targets import AUTO, CUT

TRAINED, EPOCHS, RATE, BATCH = 15_000, 2, 2e-3, 128
FOR_MASKS, FOR_CHOICE = 300, 100  # images of each class
HEADINGS = "class  kappa  forget: untouched  masked  first-order  BatchNorm anew   retain change  first-order  seconds"
JUDGED = 3_000  # test images of a model whose passes are dear
KAPPAS, LEFT = (2_000, 4_000, 8_000), 0.5
MEAN, STD = 0.286, 0.353
REQUEST, SIDE, REPEATS = 500, 224, 3
PRICED = (Ways.first_order, Ways.refined, Ways.network)
COMPARED = {
    "robust": ((0, 3, 6, 8), (4_000, 8_000, 16_000), (Ways.refined, Ways.robust)),
    "network": (range(10), KAPPAS[-1:], (Ways.first_order, Ways.network, Ways.refined, Ways.network_refined)),
}
"""Classes, numbers of weights, and ways that are compared."""
Make = Callable[[], nn.Module]


def timm_vit() -> nn.Module:
    """A tiny ViT of timm with patches of 4 pixels."""
    timm = importlib.import_module("timm")

    return timm.create_model("vit_tiny_patch16_224", img_size=28, patch_size=4, num_classes=10, depth=6)


def hf_vit() -> nn.Module:
    """A small ViT of transformers."""
    transformers = importlib.import_module("transformers")

    shape = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768}
    config = transformers.ViTConfig.from_dict({"image_size": 28, "patch_size": 4, "num_labels": 10, **shape})
    return transformers.ViTForImageClassification(config)


def mobilenet() -> nn.Module:
    """MobileNetV3-Small of torchvision; as published, its BatchNorm statistics follow a long training alone."""
    norms = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.1)
    return torchvision.models.mobilenet_v3_small(num_classes=10, norm_layer=norms)


def convnext() -> nn.Module:
    """A ConvNeXt of torchvision, narrow, with a stem of 2 x 2 pixels."""
    block = torchvision.models.convnext.CNBlockConfig
    net = torchvision.models.ConvNeXt([block(48, 96, 2), block(96, 192, 2), block(192, None, 2)], num_classes=10)
    stem = net.get_submodule("features.0")
    stem.add_module("0", nn.Conv2d(3, 48, 2, 2))
    return net


MODELS: dict[str, Make] = {
    "torchvision resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "torchvision mobilenet_v3_small": mobilenet,
    "torchvision convnext": convnext,
    "timm vit_tiny, patch 4": timm_vit,
    "transformers ViT, patch 4": hf_vit,
}


SEVERAL = ("torchvision resnet18",)
"""Models that are trained with more than one seed, and first asked for a mask on the last layer alone."""
BLOCKS = ("timm vit_tiny, patch 4", "transformers ViT, patch 4")
"""Models all of whose blocks are the cut, so that a pass through it is dear: asked for the largest mask at once."""


class Fashion:
    """Fashion-MNIST as a source of images: some to seek masks with, some to choose by, all test images to judge by."""

    def __init__(self, seed: int, judged: int = 10_000) -> None:
        root = dataset_root(SupportedDatasets.FASHION_MNIST, None, Path("datasets"))
        (x, y), (tx, ty) = (read_arrays(SupportedDatasets.FASHION_MNIST, root, train=train) for train in (True, False))
        tx, ty = tx[:judged], ty[:judged]
        order = np.random.default_rng(seed).permutation(len(y))
        self.training = x[order[:TRAINED]], y[order[:TRAINED]]
        place, codes, rows = np.zeros(10, int), [], []
        for row in order:
            code = TRAIN if place[y[row]] < FOR_MASKS else VAL
            if place[y[row]] < FOR_MASKS + FOR_CHOICE:
                rows.append(row)
                codes.append(code)
            place[y[row]] += 1
        self.x, self.y = np.concatenate([x[rows], tx]), np.concatenate([y[rows], ty])
        self.splits = np.array([*codes, *([TEST] * len(ty))], np.uint8)

    def __iter__(self) -> Iterator[Batch]:
        for part in np.array_split(np.arange(len(self.y)), len(self.y) // BATCH):
            labels = torch.from_numpy(self.y[part].astype(np.int64))
            yield Batch(prepared(self.x[part]), labels, part.astype(np.uint64), self.splits[part])

    def digest(self) -> str:
        """Not needed: no mask is written."""
        return ""


def prepared(pixels: np.ndarray) -> Tensor:
    """Grey levels [B, 1, H, W] uint8 -> [B, 3, H, W] float32."""
    return ((torch.from_numpy(np.array(pixels)).float() / 255 - MEAN) / STD).expand(-1, 3, -1, -1).contiguous()


def trained(make: Make, images: tuple[np.ndarray, np.ndarray], seed: int) -> nn.Module:
    """Train from random weights with AdamW at a one-cycle rate."""
    torch.manual_seed(seed)  # of layers' initial weights, which have no argument for it
    model, (x, y) = make().train(), images
    labels = torch.from_numpy(y.astype(np.int64))
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    steps = EPOCHS * -(-len(y) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in range(EPOCHS):
        for part in torch.randperm(len(y)).split(BATCH):
            loss = nn.functional.cross_entropy(logits_of(model(prepared(x[part.numpy()]))), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def opened(model: nn.Module, source: Any, outputs: int = 10, layers: tuple[str, ...] = (AUTO,)) -> Answering:
    """The model with its images as rows."""
    first = next(iter(source)).images[:4]
    classifier = ForeignClassifier(model, logits_of, first, outputs, layers)
    return Answering(classifier, read_samples(classifier, source))


def smallest(answering: Answering, label: int, kappas: Sequence[int], most: float = LEFT) -> tuple[Answer, float]:
    """The answer with the first kappa that leaves at most so many percent of a class on validation images, and how many
    it leaves there; the last kappa where none does.
    """
    val = answering.parts.val
    mine, left = val.labels == label, 100.0
    for kappa in kappas:
        answer = answering.answer((label,), kappa)
        left = 100 * float((answering.predictions(val, answer.off) == val.labels)[mine].double().mean())
        if left <= most:
            break
    return answer, left


def forgotten(answering: Answering, label: int, kappas: Sequence[int] = KAPPAS) -> dict[str, Any]:
    """Forget one class, and judge the mask beside that of first order, on test images."""
    begun = time.perf_counter()
    answer, left = smallest(answering, label, kappas)
    spent, scores = time.perf_counter() - begun, judge(answering, answer)
    first = judge(answering, answering.answer((label,), answer.kappa, Ways.first_order))
    more = {"first_order_forget": first["forget"], "first_order_change": first["retain_change"], "left": left}
    more |= {"class": label, "kappa": answer.kappa, "seconds": spent}
    plain = {name: value for name, value in scores.items() if isinstance(value, float)}
    return plain | more | {"targets": [target.name for target in answering.model.targets]}


def show(row: dict[str, Any], mark: str = "") -> None:
    """Print one class."""
    again = row.get("forget_recalibrated")
    print(
        f"{row['class']:5} {row['kappa']:6,} {row['clean_forget']:17.1f} {row['forget']:7.1f} "
        f"{row['first_order_forget']:12.1f} {'-' if again is None else f'{again:.1f}':>15} "
        f"{row['retain_change']:+15.1f} {row['first_order_change']:+12.1f}  {mark}",
        flush=True,
    )


def fashion(seeds: int, names: list[str], classes: Sequence[int]) -> list[dict[str, Any]]:
    """Every class of every model, with masks on the stages that nothing goes around; of some on one layer before."""
    rows: list[dict[str, Any]] = []
    for name in names:
        for seed in range(seeds if name in SEVERAL else 1):
            source, begun = Fashion(seed, JUDGED if name in BLOCKS else 10_000), time.perf_counter()
            model = trained(MODELS[name], source.training, seed)
            print(f"\n{name}, seed {seed}: trained in {time.perf_counter() - begun:.0f} s")
            labels = classes
            for layers in ((AUTO,), (CUT,)) if name in SEVERAL else ((CUT,),):
                answering = opened(model, source, layers=layers)
                targets = [target.name for target in answering.model.targets]
                size = answering.model.weight_graph().num_vertices
                resumed = "resumed" if answering.model.plan else "full passes"
                print(f"{layers[0]}: {len(targets)} layers from {targets[0]} on, {size:,} weights, {resumed}")
                print(HEADINGS)
                for label in labels:
                    row = forgotten(answering, label, KAPPAS[-1:] if name in BLOCKS else KAPPAS)
                    show(row, f"{row['seconds']:.0f} s")
                    rows.append(row | {"model": name, "seed": seed, "layers": layers[0]})
                labels = [row["class"] for row in rows[-len(labels) :] if row["left"] > LEFT]
    return rows


def ways(labels: Sequence[int], kappas: Sequence[int], compared: Sequence[Ways]) -> list[dict[str, Any]]:
    """What is left of some classes of the ResNet-18, with either statistics, by how a mask is found."""
    source, rows = Fashion(0), []
    answering = opened(trained(MODELS["torchvision resnet18"], source.training, 0), source)
    print("class  kappa  way              masked  BatchNorm anew  retain change  BatchNorm anew  seconds")
    for label in labels:
        for kappa in kappas:
            for way in compared:
                begun = time.perf_counter()
                answer = answering.answer((label,), kappa, way)
                spent, scores = time.perf_counter() - begun, judge(answering, answer)
                again = scores["retain_recalibrated"] - scores["clean_retain"]
                print(
                    f"{label:5} {kappa:6,}  {way:15} {scores['forget']:7.1f} {scores['forget_recalibrated']:15.1f} "
                    f"{scores['retain_change']:+14.1f} {again:+15.1f} {spent:8.1f}",
                    flush=True,
                )
                facts = {"class": label, "kappa": kappa, "way": way.value, "seconds": spent}
                rows.append(facts | {name: value for name, value in scores.items() if isinstance(value, float)})
    return rows


# --- cost -------------------------------------------------------------------------------------------------


class Noise:
    """Images of noise with labels in turn: what a request costs does not depend on the values."""

    def __init__(self, images: int, classes: int, side: int = SIDE) -> None:
        self.images, self.classes, self.side = images, classes, side

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(0)
        for part in np.array_split(np.arange(self.images), -(-self.images // 64)):
            images = torch.randn(len(part), 3, self.side, self.side, generator=generator)
            labels = torch.from_numpy(part % self.classes)
            yield Batch(images, labels, part.astype(np.uint64), np.full(len(part), TRAIN, np.uint8))

    def digest(self) -> str:
        """Not needed: no mask is written."""
        return ""


def seconds(what: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    begun = time.perf_counter()
    what()
    return time.perf_counter() - begun


def efficientnet() -> nn.Module:
    """EfficientNet-Lite0 of timm."""
    timm = importlib.import_module("timm")

    return timm.create_model("tf_efficientnet_lite0")


def cost(make: Make, name: str, outputs: int, ways: Sequence[Ways], classes: int = 10) -> dict[str, float]:
    """A request and a further one, in forward passes over the same images; images are prepared in neither."""
    model, source = make().eval(), Noise(REQUEST, classes)
    batches = list(source)
    first = batches[0].images[:4]
    kappa = 2_000

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch.images)

    found: dict[str, list[float]] = {}
    for _ in range(REPEATS):
        whole = seconds(forward)
        for way in ways:
            classifier = ForeignClassifier(model, logits_of, first, outputs)
            _ = classifier.plan
            begun = time.perf_counter()
            answering = Answering(classifier, read_samples(classifier, source))
            answering.answer((0,), kappa, way)
            found.setdefault(f"{way}", []).append((time.perf_counter() - begun) / whole)
            again = seconds(lambda answering=answering, way=way: answering.answer((1,), kappa, way))
            found.setdefault(f"{way}, further class", []).append(again / whole)
    medians = {what: float(np.median(values)) for what, values in found.items()}
    for what, value in medians.items():
        print(f"{name}: {what}: {value:.2f} forward passes over {REQUEST} images of {SIDE} px")
    return medians


def library(classes: int) -> dict[str, float]:
    """Seconds of each class of a library, after the images were read; EfficientNet-Lite0, 5,000 images of 64 px."""
    import resource

    model = efficientnet().eval()
    answering = opened(model, Noise(5_000, classes, 64), 1000)
    begun = time.perf_counter()
    answering.answer((0,), 2_000)
    first = time.perf_counter() - begun
    asked = range(1, min(classes, 6))
    begun = time.perf_counter()
    for label in asked:
        answering.answer((label,), 2_000)
    each, most = (time.perf_counter() - begun) / len(asked), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"library of {classes:,}: the first {first:.1f} s, each further {each:.2f} s; peak memory {most:.1f} GB")
    return {"first": first, "each": each, "peak_gb": most}


def alone(what: Callable[[int], dict[str, float]], argument: int) -> dict[str, float]:
    """Measure in a process of its own, whose peak memory holds nothing of what ran before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(what, argument).result()


def main() -> None:
    """Measure, print, keep."""
    asked = parser(__doc__)
    asked.add_argument("--only", nargs="*", default=[*MODELS, *COMPARED, "cost", "library"], help="what is measured")
    asked.add_argument("--seeds", type=int, default=2, help="of the ResNet-18")
    asked.add_argument("--classes", nargs="+", type=int, default=range(10), help="of Fashion-MNIST, forgotten in turn")
    given = asked.parse_args()
    names = [name for name in given.only if name in MODELS]
    values: dict[str, Any] = {"fashion": fashion(given.seeds, names, given.classes)}
    values |= {name: ways(*asked) for name, asked in COMPARED.items() if name in given.only}
    if "cost" in given.only:
        values["cost"] = {
            "resnet18": cost(lambda: torchvision.models.resnet18(num_classes=10), "ResNet-18", 10, PRICED),
            "lite0": cost(efficientnet, "EfficientNet-Lite0", 1000, PRICED[:2]),
        }
    if "library" in given.only:
        values["library"] = {classes: alone(library, classes) for classes in (10, 1000)}
    keep(given.json, values)


if __name__ == "__main__":
    main()
