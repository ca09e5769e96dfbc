"""Scores after BatchNorm statistics are computed anew, which may bring back a class that an edit had shifted away.

The statistics belong to the untouched network's activations; a user who goes on training, or who only lets retained
images pass in train mode, renews them (arXiv:2609.08901).
"""

import copy
from functools import partial

import torch
from torch import nn

from core.config import derive_seed
from hidden.heads import recall
from measure.metrics import Evidence, Undefined, metric
from measure.probes import CHUNK, drawn_of_all
from model import HookedModel

RENEWED_BY = 2000  # retained training images, at most
SOURCE = "2609.08901"


def norms_of(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The BatchNorm layers of a network that keep statistics."""
    found = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return [module for module in found if module.track_running_stats]


def renewed(e: Evidence) -> HookedModel:
    """A copy of the judged model, eval mode, with BatchNorm statistics of retained training images.

    Raises:
        Undefined: there is no such layer, or nothing to compute statistics of.
    """
    model = copy.deepcopy(e.model).eval()
    norms = norms_of(model)
    if not norms:
        raise Undefined("the network has no BatchNorm layer")
    choose = partial(drawn_of_all, most=RENEWED_BY, seed=derive_seed(e.seed, "BatchNorm"))
    images, _ = e.images("train", False, choose)
    if len(images) < 2:
        raise Undefined("there are no two retained training images to compute BatchNorm statistics of")
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over batches
        norm.train()
    with torch.no_grad():
        for part in images.split(CHUNK):
            if len(part) > 1:  # of a single row there are no statistics
                model(part.to(e.device))
    return model.eval()


def score_of_renewed(e: Evidence, is_forget_set: bool) -> float:
    """Accuracy of the renewed copy on T's forgotten or retained images, percent."""
    model = e.needed(renewed)
    count, said, true = len(e.outputs(e.split, is_forget_set).labels), [], []
    for places in torch.arange(count).split(CHUNK):  # a whole set of images may not fit into memory
        images, labels = e.images(e.split, is_forget_set, places)
        with torch.inference_mode():
            said.append(model(images.to(e.device)))
        true.append(labels)
    return recall(torch.cat(said), torch.cat(true))


@metric("forget_score_renewed", "%", "lower", group="features", target="as retrained, 0", source=SOURCE)
def forget_score_renewed(e: Evidence) -> float:
    """The forget score after all BatchNorm statistics are computed anew with up to 2,000 retained training images, a
    plain mean over batches of 256. Of a network without BatchNorm there is no such value.
    """
    return score_of_renewed(e, True)


@metric("retain_score_renewed", "%", "higher", group="features", target="as retrained", source=SOURCE)
def retain_score_renewed(e: Evidence) -> float:
    """The retain score of the same model."""
    return score_of_renewed(e, False)
