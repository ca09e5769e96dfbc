"""The closed choices of a run, and the errors that are said in one sentence. No torch here."""

from enum import StrEnum
from pathlib import Path


class UserError(ValueError):
    """Something the user can put right. Its text is one sentence: found, needed, what to do. Exit code 2."""


class MachineError(RuntimeError):
    """A failure of the machine, such as a full disk. Its text is one sentence: what failed, why, what to do. Exit 1."""


class Diverged(UserError):
    """A training whose loss or weights are no longer finite, with these settings."""


class NoHomeError(UserError):
    """The home folder is needed, and nobody knows it."""


def at_home(path: Path) -> Path:
    """A path with a leading `~` replaced by the home folder.

    Raises:
        NoHomeError: there is no home folder to be found.
    """
    try:
        return path.expanduser()
    except RuntimeError:
        raise NoHomeError(
            f"{path} needs the home folder, of which neither HOME nor the password file knows: set HOME, or give a "
            "path without ~"
        ) from None


class Choice(StrEnum):
    """A closed choice whose NAME equals its VALUE, so that YAML, flags, file names and README agree."""


class SupportedVisionModels(Choice):
    """Classifier architectures; each has one entry in `model.py`."""

    HookedMLPClassifier = "HookedMLPClassifier"
    HookedResnet = "HookedResnet"


class SupportedDatasets(Choice):
    """Image datasets; each has one spec in `images/specs.py`. FOLDER is any tree of class folders with images."""

    DIGITS = "DIGITS"
    FASHION_MNIST = "FASHION_MNIST"
    MNIST = "MNIST"
    CIFAR10 = "CIFAR10"
    CIFAR100 = "CIFAR100"
    SVHN = "SVHN"
    IMAGENET_SMALL = "IMAGENET_SMALL"
    PLANT_CLASSIFICATION = "PLANT_CLASSIFICATION"
    POKEMON_CLASSIFICATION = "POKEMON_CLASSIFICATION"
    FOLDER = "FOLDER"


class SFTModes(Choice):
    """What the supervised fine-tuning baseline trains the target layer on."""

    Randomize_Forget = "Randomize_Forget"
    Finetune_Retain = "Finetune_Retain"
    Randomize_Forget_Finetune_Retain = "Randomize_Forget_Finetune_Retain"


class GCNPriorDistribution(Choice):
    """Prior p over the weights in the ELBO's KL term: proportional to |W|, |g|, |W g|, or flat."""

    WEIGHT = "WEIGHT"
    GRADIENT = "GRADIENT"
    SALIENCY = "SALIENCY"
    UNIFORM = "UNIFORM"


class TopKSamplers(Choice):
    """Relaxed k-subset samplers (gumbel arXiv:1903.06059, sinkhorn arXiv:2002.06504)."""

    sinkhorn = "sinkhorn"
    threshold = "threshold"
    gumbel = "gumbel"


class MaskStrategies(Choice):
    """How theta becomes one unlearning mask.

    direct: the answer to the request itself. The others weigh the theta of every class.
    """

    direct = "direct"
    feasibility = "feasibility"
    set_difference = "set_difference"


class Objectives(Choice):
    """What the GCN is trained for: to forget on request, or to find each class's mask prior."""

    unlearning = "unlearning"
    elbo = "elbo"


class ForgetLosses(Choice):
    """What is asked of the samples to forget.

    margin: that another class leads. match: the classifier's own probabilities without the classes to forget,
    renormalised, which is what retraining comes close to. both: the margin and a tenth of the match.
    """

    margin = "margin"
    match = "match"
    both = "both"


class FeatureSets(Choice):
    """Node features of the unlearning objective, each set with the ones before it; columns: `unlearn/features.py`.

    basic: h, z, W, g. contrast: the forgotten classes against the retained. taylor: signed first-order importances.
    """

    basic = "basic"
    contrast = "contrast"
    taylor = "taylor"


class KappaModes(Choice):
    """Which kappas are run: those of `kappa_list`, or the smallest that meets the target of `auto`."""

    list = "list"
    auto = "auto"


class Starts(Choice):
    """What refinement starts from."""

    gcn = "gcn"
    taylor = "taylor"
    noise = "noise"


class Importances(Choice):
    """What `feasibility` ranks: the GCN's logits, or the mask prior q = softmax(theta)."""

    theta = "theta"
    q = "q"


class Aggregations(Choice):
    """How a node of the graph sums up its neighbours."""

    mean = "mean"
    gcn = "gcn"


class Activations(Choice):
    """Non-linearity of a round of message passing."""

    sigmoid = "sigmoid"
    relu = "relu"


class Trackers(Choice):
    """Where training curves go besides the JSON history that every stage writes."""

    trackio = "trackio"
    none = "none"
