"""The schema of a run: every field of every stage, the closed choices, and how YAML and flags are layered.

Layering: the defaults below < `--config FILE` (repeatable, later files win) < flags. No torch is imported
here, so that `uv run main.py --help` answers at once.
"""

import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import TypeVar

from choices import (
    Activations,
    Aggregations,
    FeatureSets,
    ForgetLosses,
    GCNPriorDistribution,
    Importances,
    KappaModes,
    MaskStrategies,
    Objectives,
    SFTModes,
    Starts,
    SupportedDatasets,
    SupportedVisionModels,
    TopKSamplers,
    Trackers,
    UserError,
)

T = TypeVar("T", int, str, str | int)
PROJECT_ROOT = Path(__file__).resolve().parent


def _require(ok: bool, found: str, needed: str) -> None:
    if not ok:
        raise UserError(f"{found}: {needed}")


def _positive(config: object, *names: str, zero_ok: bool = False) -> None:
    """Raise `UserError` unless each named field is > 0 (>= 0 with `zero_ok`)."""
    for name in names:
        value = getattr(config, name)
        ok = value >= 0 if zero_ok else value > 0
        _require(ok, f"{name} is {value}", f"give a number {'>=' if zero_ok else '>'} 0")


def as_tuple(value: T | Sequence[T]) -> tuple[T, ...]:
    """One number (or name) or several, as a tuple."""
    return (value,) if isinstance(value, int | str) else tuple(value)  # ty: ignore[invalid-explicit-return]


@dataclass(frozen=True)
class DataConfig:
    """Which images take part."""

    val_fraction: float = 0.1
    """Share of the training data held out, stratified, for choosing (never for reporting)."""
    split_seed: int = 0
    """Seed of that split; apart from `seed`, so that runs with other seeds are judged on the same images."""
    max_train_samples: int | None = None
    """Train on a stratified subset of this many images (None: all)."""
    max_test_samples: int | None = None
    """Report on a stratified subset of this many test images (None: all)."""
    image_size: int | None = None
    """Side that images of a folder tree are scaled to (None: that of the dataset's spec, 128)."""
    num_workers: int | None = None
    """Threads that decode images of a folder tree (None: two for each core, 0: none besides the caller's)."""
    cache_gb: float = 20.0
    """Gigabytes of disk that the decoded pixels of folder trees may take (0: none, every epoch decodes them anew)."""
    max_pixels: int = 178_956_970
    """An image file of more pixels gives no image: decoding it takes 4 bytes a pixel, once for each thread."""
    sample_bits: int | None = None
    """Bits that grey levels of more than 8 bits take, such as 12 (None: those that the file says, or else 16)."""
    skip_bad_images: bool = False
    """Leave out the files of a folder tree that give no image; they are named in the log and in every record."""

    def __post_init__(self) -> None:
        _require(0 < self.val_fraction < 1, f"val_fraction is {self.val_fraction}", "give a share between 0 and 1")
        for name in ("max_train_samples", "max_test_samples", "image_size", "max_pixels"):
            if getattr(self, name) is not None:
                _positive(self, name)
        _positive(self, "cache_gb", zero_ok=True)
        _require(self.cache_gb < float("inf"), f"cache_gb is {self.cache_gb}", "give a number of gigabytes")
        bits = self.sample_bits
        _require(bits is None or 8 < bits <= 16, f"sample_bits is {bits}", "give a number from 9 to 16")
        if self.num_workers is not None:
            _positive(self, "num_workers", zero_ok=True)


@dataclass(frozen=True)
class TrainConfig:
    """The classifier's training (AdamW)."""

    epochs: int = 30
    batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.01
    bf16: bool = False
    """bfloat16 autocast: for GPUs and CPUs with bfloat16 units (on others it is slower), no use for the MLP."""
    channels_last: bool = False
    use_ddp: bool = False
    """Train in several processes, each with its share of every batch (docs/scaling.md)."""
    num_workers: int = 1
    """Processes that `use_ddp` starts on this machine (under torchrun, which starts them itself, ignored)."""
    ddp_timeout: float = 300.0
    """Seconds that one exchange between those processes may take before it counts as failed."""
    ddp_restarts: int = 3
    """How often they are all started again, from the last saved state, after one of them was killed."""
    save_seconds: float = 10.0
    """Save the state that `resume` goes on from after an epoch if the last one is at least this old."""

    def __post_init__(self) -> None:
        _positive(self, "epochs", "batch_size", "lr", "num_workers")
        _positive(self, "ddp_timeout")
        _positive(self, "weight_decay", "ddp_restarts", "save_seconds", zero_ok=True)
        if self.num_workers != 1 and not self.use_ddp:
            warnings.warn("train.num_workers is ignored without train.use_ddp", stacklevel=2)


@dataclass(frozen=True)
class GraphConfig:
    """Graphs made from training images."""

    num_samples: int = 10240
    """Graphs to make, spread evenly over the classes; refinement forgets a class as well as it knows its images."""
    min_per_class: int = 64
    """At least this many of each class: a class's representative is their mean."""
    batch_size: int = 256

    def __post_init__(self) -> None:
        _positive(self, "num_samples", "min_per_class", "batch_size")


@dataclass(frozen=True)
class GCNConfig:
    """The mask-learning graph network and its training."""

    objective: Objectives = Objectives.unlearning
    num_message_passing_rounds: int = 3
    hidden_dim: int = 32
    aggregation: Aggregations = Aggregations.mean
    activation: Activations = Activations.relu
    residual: bool = True
    """Add a round's input to its result, from the second round on."""
    features: FeatureSets = FeatureSets.taylor
    """Node features of the unlearning objective (the ELBO reads single samples, which have the basic ones alone)."""
    passes: int = 3
    """Unlearning: how often the GCN corrects theta, each time seeing the network under its last soft mask."""
    taylor_prior: bool = True
    """Unlearning: theta starts at 2 * rank of the signed Taylor score instead of 0."""
    forget_loss: ForgetLosses = ForgetLosses.both
    """Unlearning: what is asked of the samples to forget."""
    lambda_retain: float = 2.0
    """Unlearning: weight of the retained samples' loss."""
    requests_per_step: int = 4
    """Unlearning: random requests in each optimiser step."""
    train_classes: tuple[str | int, ...] = ()
    """Unlearning: classes that the random requests are drawn from (empty: all), written as in forget_class."""
    train_seeds: tuple[int, ...] = ()
    """Unlearning: learn on classifiers of these seeds (empty: on the run's own classifier) ..."""
    train_batch_sizes: tuple[int, ...] = ()
    """... each trained with these batch sizes (empty: that of `train`)."""
    sampler: TopKSamplers = TopKSamplers.sinkhorn
    """gumbel draws masks at random, which the ELBO's expectation asks for and which saves small topK from a dead start;
    the shipped configs use it."""
    prior: GCNPriorDistribution = GCNPriorDistribution.WEIGHT
    beta: float = 0.1
    """ELBO: weight of KL(q || p)."""
    steps: int = 100
    batch_size: int = 32
    """ELBO: samples in each optimiser step."""
    lr: float = 1e-2
    weight_decay: float = 5e-4
    temperature_start: float = 0.25
    """Sampler temperature in units of std(theta), annealed geometrically ..."""
    temperature_end: float = 0.05
    """... to this."""

    def __post_init__(self) -> None:
        _positive(self, "num_message_passing_rounds", "hidden_dim", "steps", "batch_size", "lr")
        _positive(self, "passes", "requests_per_step")
        _positive(self, "temperature_start", "temperature_end")
        _positive(self, "beta", "weight_decay", "lambda_retain", zero_ok=True)


@dataclass(frozen=True)
class RefineConfig:
    """Descent on theta for one request (method `mimu_refined`)."""

    start: Starts = Starts.gcn
    steps: int = 30
    lr: float = 0.2
    forget_loss: ForgetLosses = ForgetLosses.both
    lambda_retain: float = 0.3
    """Weight of the retained samples' loss."""
    temperature_start: float = 0.25
    temperature_end: float = 0.05

    def __post_init__(self) -> None:
        _positive(self, "steps", "lr", "temperature_start", "temperature_end")
        _positive(self, "lambda_retain", zero_ok=True)


@dataclass(frozen=True)
class AutoConfig:
    """The target of `kappa: auto`, met when the 95 % intervals on validation images lie within it."""

    method: str = "mimu_refined"
    """Whose masks are searched."""
    tau: float = 2.0
    """Forget score at most, percent."""
    epsilon: float = 1.0
    """Loss of retain score at most, points."""
    smallest_share: float = 0.002
    """First kappa that is tried, as a share of the weights ..."""
    largest_share: float = 0.2
    """... and the last."""
    tries: int = 24
    """Kappas between them, evenly spaced on a log scale."""

    def __post_init__(self) -> None:
        _positive(self, "tries", "smallest_share", "largest_share")
        _positive(self, "tau", "epsilon", zero_ok=True)
        _require(self.largest_share <= 1, f"auto.largest_share is {self.largest_share}", "give a share up to 1")
        ordered = self.smallest_share <= self.largest_share
        _require(ordered, f"auto.smallest_share is {self.smallest_share}", "give at most auto.largest_share")


@dataclass(frozen=True)
class SFTConfig:
    """The fine-tuning baseline (AdamW on the target layer alone)."""

    mode: SFTModes = SFTModes.Randomize_Forget
    steps: int = 50
    batch_size: int = 32
    lr: float = 1e-2

    def __post_init__(self) -> None:
        _positive(self, "steps", "batch_size", "lr")


@dataclass(frozen=True)
class EvalConfig:
    """What is measured, and how masks are formed."""

    methods: tuple[str, ...] = (
        *("mimu", "mimu_refined", "taylor_mask", "random", "sft", "logit_drop", "retrain", "default"),
    )
    """Names from the registries (docs/methods.md), or all."""
    metrics: tuple[str, ...] = ("core", "train", "attack", "retrain")
    """Names of metrics or groups of them (docs/metrics.md), or all; forget_score and retain_score in any case."""
    references: int = 1
    """Classifiers retrained without the classes to forget, each with a training seed of its own; 0: no comparison,
    and no method `retrain`."""
    batch_size: int = 256
    mask_strategy: MaskStrategies | None = None
    """None: direct for a GCN of the unlearning objective, feasibility for one of the ELBO."""
    importance: Importances = Importances.q
    """What the feasibility strategy ranks."""

    def __post_init__(self) -> None:
        _positive(self, "batch_size")
        _positive(self, "references", zero_ok=True)
        _require(bool(self.metrics), "eval.metrics is empty", "name at least one metric or group, e.g. core")
        _require(bool(self.methods), "eval.methods is empty", "name at least one method, e.g. mimu")
        _require(len(set(self.methods)) == len(self.methods), f"eval.methods is {self.methods}", "name each once")


@dataclass(frozen=True)
class ReporterConfig:
    """Figures and tables."""

    formats: tuple[str, ...] = ("png", "svg", "pdf")
    """Any of png, svg, pdf."""
    dpi: int = 150

    def __post_init__(self) -> None:
        _require(self.dpi >= 10, f"reporter.dpi is {self.dpi}", "give at least 10, below which no letter can be drawn")
        bad = sorted(set(self.formats) - {"png", "svg", "pdf"})
        _require(not bad, f"reporter.formats has {', '.join(bad)}", "choose from png, svg, pdf")


@dataclass(frozen=True)
class PipelineConfig:
    """One run: a classifier, a dataset, a class to forget, and the sweep points."""

    model_architecture: SupportedVisionModels = SupportedVisionModels.HookedMLPClassifier
    vision_dataset: SupportedDatasets = SupportedDatasets.DIGITS
    forget_class: tuple[str | int, ...] = (0,)
    """The class to forget, or several at once: the name of a class, else a label; label:3 and name:3 say which.
    In Python an int is a label."""
    mask_layer: tuple[int, ...] | None = (-2,)
    """Which linear layers of the classifier's head are masked; -2 is the second to last, None means all of them."""
    topK_list: tuple[int, ...] = (2000,)
    """How many weights a class mask keeps as important (the ELBO trains one GCN for each)."""
    kappa_list: tuple[int, ...] = (25, 50, 100, 200, 400)
    """How many weights the unlearning mask switches off."""
    kappa: KappaModes = KappaModes.list
    seed: int = 0
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dataset_path: Path | None = None
    """Where the dataset lies, if not at its usual place."""
    output_dir: Path = Path()
    """Everything the run writes lies below this folder (datasets/, checkpoints/, eval/, reports/, ...)."""
    trained_vision_model_path: Path | None = None
    """Use this classifier instead of training one."""
    graph_dir: Path | None = None
    """Use these graphs instead of making them."""
    gcn_path: Path | None = None
    """Use this GCN, for every topK, instead of training one."""
    resume: bool = False
    """Go on within the classifier's training where an interrupted run saved its state."""
    tracker: Trackers = Trackers.none
    """trackio shows training curves live; from Python, set TRACKIO_DIR before its first import."""
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    graph: GraphConfig = field(default_factory=GraphConfig)
    gcn: GCNConfig = field(default_factory=GCNConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    auto: AutoConfig = field(default_factory=AutoConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    reporter: ReporterConfig = field(default_factory=ReporterConfig)

    def __post_init__(self) -> None:
        for name in ("dataset_path", "output_dir", "trained_vision_model_path", "graph_dir", "gcn_path"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, Path(value).expanduser())
        if self.mask_layer is not None:
            object.__setattr__(self, "mask_layer", as_tuple(self.mask_layer))
        classes = as_tuple(self.forget_class)
        object.__setattr__(self, "forget_class", classes)
        for one in classes:
            fits = isinstance(one, str) or (isinstance(one, int) and not isinstance(one, bool) and one >= 0)
            _require(fits, f"forget_class is {one}", "give a name or a label, a number >= 0")
        once = bool(classes) and len(set(classes)) == len(classes)
        _require(once, f"forget_class is {list(classes)}", "name one class or several, each once")
        for name in ("topK_list", "kappa_list"):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            _require(bool(values), f"{name} is empty", "give at least one number of weights, e.g. 200")
            _require(min(values) >= 1, f"{name} holds {min(values)}", "every entry must be at least 1")
            _require(len(set(values)) == len(values), f"{name} is {list(values)}", "name each value once")
        _positive(self, "seed", zero_ok=True)
        known = re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", self.device) is not None
        _require(known, f"device is {self.device!r}", "choose auto, cpu, cuda or cuda:N")

    @property
    def forget_labels(self) -> tuple[int, ...]:
        """`forget_class` by number; a run has looked the names up before anything asks."""
        assert all(isinstance(one, int) for one in self.forget_class)
        return tuple(int(one) for one in self.forget_class)


def plain(config: object) -> dict:
    """A config as JSON types: enums by value, paths as strings, tuples as lists."""

    def convert(value: object) -> object:
        if isinstance(value, dict):
            return {key: convert(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [convert(item) for item in value]
        if isinstance(value, Enum):
            return value.value
        return str(value) if isinstance(value, Path) else value

    result = convert(asdict(config))  # ty: ignore[invalid-argument-type]
    assert isinstance(result, dict)
    return result


def derive_seed(root: int, *parts: object) -> int:
    """A seed of its own for one purpose: SHA-256 of (root, parts), 63 bits.

    Adding a method or a sweep point therefore moves no other point's numbers, and seed 0 works.
    """
    text = "\x1f".join(str(part) for part in (root, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
