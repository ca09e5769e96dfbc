"""Every registered method on a user's model, judged by the metrics that need no retrained model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.config import EvalConfig, PipelineConfig, UserError
from core.observe import log
from eval import Eval
from forgetting.answers import REFINE, Answer, Answering, shipped
from forgetting.pictures import Source
from measure.metrics import INSIDE, METRICS
from rivals.compared import METHODS, chosen_methods
from unlearn.registry import Context, NotApplicable, Point
from utils_data import Images, UnlearningDataset

MOST_BYTES = 4 * 2**30  # of prepared images, which rivals that train go over again and again


@dataclass(frozen=True)
class Prepared(Images):
    """Images as the model takes them, float32 [S, C, H, W]; mean and std tell what one level of 0 to 255 is."""

    def batch(self, indices: Tensor | list[int] | slice) -> tuple[Tensor, Tensor]:
        """Return images [B, C, H, W] and labels [B]."""
        return self.pixels[indices].clone(), self.labels[indices]


class _Dataset(UnlearningDataset):
    """A user's images in the shape that methods and metrics know."""

    def __init__(self, splits: dict[str, Images], classes: Sequence[str], forgotten: Sequence[int]):
        self.splits, self.classes, self.forget_class = splits, tuple(classes), tuple(forgotten)
        self.batch_size, self.seed, self.tree = 128, 0, None


def _splits(answering: Answering, source: Source, level: tuple[Tensor, Tensor]) -> dict[str, Images]:
    """Read all images again, this time to keep them.

    Raises:
        UserError: they are too large together.
    """
    images, labels, size = list[Tensor](), list[Tensor](), 0
    for batch in source:
        images.append(batch.images)
        labels.append(batch.labels)
        size += batch.images.nbytes
        if size > MOST_BYTES:
            raise UserError(f"rivals need all images in memory, which are more than {MOST_BYTES / 2**30:.0f} GB: use "
                            "fewer of each class, with --most")  # fmt: skip
    every, true = torch.cat(images), torch.cat(labels)
    parts = {name: getattr(answering.parts, name).places for name in ("train", "val", "test")}
    return {name: Prepared(every[places], true[places], *level) for name, places in parts.items()}


def _no_network(_: int) -> Tensor:
    raise NotApplicable("asks a graph network that weighs all classes of this classifier, and there is none")


def compare(
    answering: Answering,
    answer: Answer,
    source: Source,
    classes: Sequence[str],
    names: Sequence[str],
    level: tuple[Tensor, Tensor],
) -> Iterator[dict[str, Any]]:
    """Measure methods, one after the other, with as many weights as the answer has; `mimu_refined` is its method,
    and `mimu` the graph network that is shipped, alone.

    Args:
        classes: names of the outputs. names: of methods, or "all".
        level: mean and std [C, 1, 1] of the model's input, in levels of 0 to 255.

    Yields:
        `method`, `label`, `source`, and either `why`, of a method that has none, or its metrics on test
        images; those that need a retrained model are not there.
    """
    metrics = tuple(name for name, entry in METRICS.items() if entry.group not in INSIDE)
    evaluation = EvalConfig(metrics=metrics)
    config = PipelineConfig(forget_class=answer.classes, kappa_list=(answer.kappa,), refine=REFINE, eval=evaluation)
    data = _Dataset(_splits(answering, source, level), classes, answer.classes)
    chosen = dict.fromkeys(("default", *chosen_methods(names)))
    asks_network = "mimu" in chosen
    head, network = (answering.for_network, shipped()) if asks_network else (answering.head, None)
    context = Context(answering.model, data, config, head.device, _no_network, head, network)
    judge, point = Eval(context), Point(0, answer.kappa, config.seed)
    for name in chosen:
        log(f"{name} on test images")
        facts = {"method": name, "label": METHODS[name].label, "source": METHODS[name].source}
        values = judge.eval_unlearning(name, point)["test"]
        if lacking := judge.lacking.get(METHODS[name].key(context, point)):
            yield facts | {"why": lacking.sentence}
        else:
            yield facts | {metric: value for metric, value in values.items() if value is not None}


def levels_of(mean: Sequence[float], std: Sequence[float], scale: float) -> tuple[Tensor, Tensor]:
    """Mean and std [C, 1, 1] in levels of 0 to 255, of a preprocessing in units of scale * level."""
    return tuple(torch.tensor(np.array(one) / scale, dtype=torch.float32)[:, None, None] for one in (mean, std))  # ty: ignore
