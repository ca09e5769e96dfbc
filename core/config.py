"""The schema of a run: every field of every stage, the closed choices, and how YAML and flags are layered.

Layering: the defaults below < `--config FILE` (repeatable, later files win) < flags. No torch is imported
here, so that `uv run main.py --help` answers at once.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, ClassVar, TypeVar

import tyro

from core.choices import (
    Activations,
    Aggregations,
    FeatureSets,
    ForgetLosses,
    GCNPriorDistribution,
    Importances,
    KappaModes,
    MaskStrategies,
    Objectives,
    OpenChoice,
    Section,
    SFTModes,
    Starts,
    SupportedDatasets,
    SupportedVisionModels,
    TopKSamplers,
    Trackers,
    UserError,
    Within,
)

GIVEN = ("trained_vision_model_path", "graph_dir", "gcn_path")
"""Fields that hand a stage's product in instead of having it made."""
T = TypeVar("T", int, str, str | int)
# Ranges, wide enough for every use: beyond them a number overflows, or takes longer or more memory than there is.
Count = Annotated[int, Within(1, 10**9)]
Few = Annotated[int, Within(1, 1000)]
Seed = Annotated[int, Within(0, 2**63 - 1)]
Size = Annotated[int, Within(1, 4096)]
Positive = Annotated[float, Within(0, 1e30, above=True)]
Weight = Annotated[float, Within(0, 1e30)]
Temperature = Annotated[float, Within(1e-4, 1e4)]
Share = Annotated[float, Within(1e-6, 1 - 1e-6)]
PluginFiles = Annotated[
    tuple[Path, ...], tyro.conf.arg(aliases=("--plugin",), metavar="FILE"), tyro.conf.UseAppendAction
]
LABEL = "label:"  # before a number that is meant as a label, in texts that name a class
PROJECT_ROOT = Path(__file__).resolve().parent.parent


def _require(ok: bool, found: str, needed: str) -> None:
    if not ok:
        raise UserError(f"{found}: {needed}")


def as_tuple(value: T | Sequence[T]) -> tuple[T, ...]:
    """One number (or name) or several, as a tuple."""
    return (value,) if isinstance(value, int | str) else tuple(value)  # ty: ignore[invalid-explicit-return]


@dataclass(frozen=True)
class DataConfig(Section):
    """Which images take part."""

    SECTION: ClassVar[str] = "data"

    val_fraction: Share = 0.1
    """Share of the training data held out, stratified, for choosing (never for reporting)."""
    split_seed: Seed = 0
    """Seed of that split; apart from `seed`, so that runs with other seeds are judged on the same images."""
    max_train_samples: Count | None = None
    """Train on a stratified subset of this many images (None: all)."""
    max_test_samples: Count | None = None
    """Report on a stratified subset of this many test images (None: all)."""
    image_size: Size | None = None
    """Side that images of a folder tree are scaled to (None: that of the dataset's spec, 128)."""
    num_workers: Annotated[int, Within(0, 1000)] | None = None
    """Threads that decode images of a folder tree (None: two for each core, 0: none besides the caller's)."""
    cache_gb: Annotated[float, Within(0, 1e6)] = 20.0
    """Gigabytes of disk that the decoded pixels of folder trees may take (0: none, every epoch decodes them anew)."""
    max_pixels: Annotated[int, Within(1, 10**11)] = 178_956_970
    """An image file of more pixels gives no image: decoding it takes 4 bytes a pixel, once for each thread."""
    sample_bits: Annotated[int, Within(9, 16)] | None = None
    """Bits that grey levels of more than 8 bits take, such as 12 (None: those that the file says, or else 16)."""
    skip_bad_images: bool = False
    """Leave out the files of a folder tree that give no image; they are named in the log and in every record."""


@dataclass(frozen=True)
class TrainConfig(Section):
    """The classifier's training (AdamW)."""

    SECTION: ClassVar[str] = "train"

    epochs: Count = 30
    batch_size: Count = 32
    lr: Positive = 1e-3
    weight_decay: Weight = 0.01
    bf16: bool = False
    """bfloat16 autocast: for GPUs and CPUs with bfloat16 units (on others it is slower), no use for the MLP."""
    channels_last: bool = False
    use_ddp: bool = False
    """Train in several processes, each with its share of every batch (docs/scaling.md)."""
    num_workers: Few = 1
    """Processes that `use_ddp` starts on this machine (under torchrun, which starts them itself, ignored)."""
    ddp_timeout: Annotated[float, Within(0, 1e6, above=True)] = 300.0
    """Seconds that one exchange between those processes may take before it counts as failed."""
    ddp_restarts: Annotated[int, Within(0, 10**6)] = 3
    """How often they are all started again, from the last saved state, after one of them was killed."""
    save_seconds: Annotated[float, Within(0, 1e9)] = 10.0
    """Save the state that `resume` goes on from after an epoch if the last one is at least this old."""


@dataclass(frozen=True)
class GraphConfig(Section):
    """Graphs made from training images."""

    SECTION: ClassVar[str] = "graph"

    num_samples: Count = 10240
    """Graphs to make, spread evenly over the classes; refinement forgets a class as well as it knows its images."""
    min_per_class: Count = 64
    """At least this many of each class: a class's representative is their mean."""
    batch_size: Count = 256


@dataclass(frozen=True)
class GCNConfig(Section):
    """The mask-learning graph network and its training."""

    SECTION: ClassVar[str] = "gcn"

    objective: Objectives = Objectives.unlearning
    num_message_passing_rounds: Few = 3
    hidden_dim: Annotated[int, Within(1, 10**5)] = 32
    aggregation: Aggregations = Aggregations.mean
    activation: Activations = Activations.relu
    residual: bool = True
    """Add a round's input to its result, from the second round on."""
    features: FeatureSets = FeatureSets.taylor
    """Node features of the unlearning objective (the ELBO reads single samples, which have the basic ones alone)."""
    passes: Few = 3
    """Unlearning: how often the GCN corrects theta, each time seeing the network under its last soft mask."""
    taylor_prior: bool = True
    """Unlearning: theta starts at 2 * rank of the signed Taylor score instead of 0."""
    forget_loss: ForgetLosses = ForgetLosses.both
    """Unlearning: what is asked of the samples to forget."""
    lambda_retain: Weight = 2.0
    """Unlearning: weight of the retained samples' loss."""
    requests_per_step: Few = 4
    """Unlearning: random requests in each optimiser step."""
    train_classes: tuple[str | int, ...] = ()
    """Unlearning: classes that the random requests are drawn from (empty: all), written as in forget_class."""
    train_seeds: tuple[Seed, ...] = ()
    """Unlearning: learn on classifiers of these seeds (empty: on the run's own classifier) ..."""
    train_batch_sizes: tuple[Count, ...] = ()
    """... each trained with these batch sizes (empty: that of `train`)."""
    sampler: TopKSamplers = TopKSamplers.sinkhorn
    """gumbel draws masks at random, which the ELBO's expectation asks for and which saves a small top_k from a dead
    start; the shipped configs use it."""
    prior: GCNPriorDistribution = GCNPriorDistribution.WEIGHT
    beta: Weight = 0.1
    """ELBO: weight of KL(q || p)."""
    steps: Count = 100
    batch_size: Count = 32
    """ELBO: samples in each optimiser step."""
    lr: Positive = 1e-2
    weight_decay: Weight = 5e-4
    temperature_start: Temperature = 0.25
    """Sampler temperature in units of std(theta), annealed geometrically ..."""
    temperature_end: Temperature = 0.05
    """... to this."""


@dataclass(frozen=True)
class RefineConfig(Section):
    """Descent on theta for one request (method `mimu_refined`)."""

    SECTION: ClassVar[str] = "refine"

    start: Starts = Starts.gcn
    steps: Count = 30
    lr: Positive = 0.2
    forget_loss: ForgetLosses = ForgetLosses.both
    lambda_retain: Weight = 0.3
    """Weight of the retained samples' loss."""
    temperature_start: Temperature = 0.25
    temperature_end: Temperature = 0.05


@dataclass(frozen=True)
class AutoConfig(Section):
    """The target of `kappa: auto`, met when the 95 % intervals on validation images lie within it."""

    SECTION: ClassVar[str] = "auto"

    method: str = "mimu_refined"
    """Whose masks are searched."""
    tau: Weight = 2.0
    """Forget score at most, percent."""
    epsilon: Weight = 1.0
    """Loss of retain score at most, points."""
    smallest_share: Annotated[float, Within(1e-9, 1)] = 0.002
    """First kappa that is tried, as a share of the weights ..."""
    largest_share: Annotated[float, Within(1e-9, 1)] = 0.2
    """... and the last."""
    tries: Annotated[int, Within(1, 10**4)] = 24
    """Kappas between them, evenly spaced on a log scale."""

    def check(self) -> None:
        """The smallest share comes first."""
        ordered = self.smallest_share <= self.largest_share
        _require(ordered, f"auto.smallest_share is {self.smallest_share}", "give at most auto.largest_share")


@dataclass(frozen=True)
class SFTConfig(Section):
    """The fine-tuning baseline (AdamW on the target layer alone)."""

    SECTION: ClassVar[str] = "sft"

    mode: SFTModes = SFTModes.Randomize_Forget
    steps: Count = 50
    batch_size: Annotated[int, Within(1, 10**4)] = 32
    lr: Positive = 1e-2


@dataclass(frozen=True)
class EvalConfig(Section):
    """What is measured, and how masks are formed."""

    SECTION: ClassVar[str] = "eval"

    methods: tuple[str, ...] = (
        *("mimu", "mimu_refined", "taylor_mask", "random", "sft", "logit_drop", "retrain", "default"),
    )
    """Names from the registries (docs/methods.md), or all."""
    metrics: tuple[str, ...] = (
        *("core", "train", "attack", "retrain", "probe_gap", "forget_auroc", "constant_recall", "constant_recall_1"),
    )
    """Names of metrics or groups of them (docs/metrics.md), or all; forget_score and retain_score in any case."""
    references: Annotated[int, Within(0, 1000)] = 1
    """Classifiers retrained without the classes to forget, each with a training seed of its own; 0: no comparison,
    and no method `retrain`."""
    batch_size: Count = 256
    mask_strategy: MaskStrategies | None = None
    """None: direct for a GCN of the unlearning objective, feasibility for one of the ELBO."""
    importance: Importances = Importances.q
    """What the feasibility strategy ranks."""

    def check(self) -> None:
        """Something is measured."""
        _require(bool(self.metrics), "eval.metrics is empty", "name at least one metric or group, e.g. core")
        _require(bool(self.methods), "eval.methods is empty", "name at least one method, e.g. mimu")
        _require(len(set(self.methods)) == len(self.methods), f"eval.methods is {self.methods}", "name each once")


@dataclass(frozen=True)
class ReporterConfig(Section):
    """Figures and tables."""

    SECTION: ClassVar[str] = "reporter"

    formats: tuple[str, ...] = ("png", "svg")
    """Any of png, svg, pdf; with none, nothing is drawn, and tables and page are written alone."""
    dpi: Annotated[int, Within(10, 2400)] = 150

    def check(self) -> None:
        """Formats are known."""
        bad = sorted(set(self.formats) - {"png", "svg", "pdf"})
        _require(not bad, f"reporter.formats has {', '.join(bad)}", "choose from png, svg, pdf")


@dataclass(frozen=True)
class PipelineConfig(Section):
    """One run: a classifier, a dataset, a class to forget, and the sweep points."""

    model_architecture: SupportedVisionModels = SupportedVisionModels.HookedMLPClassifier
    vision_dataset: SupportedDatasets = SupportedDatasets.DIGITS
    forget_class: tuple[str | int, ...] = (0,)
    """The class to forget, or several at once: the name of a class, else a label; label:3 and name:3 say which.
    In Python an int is a label."""
    mask_layer: tuple[int, ...] | None = (-2,)
    """Which linear layers of the classifier's head are masked; -2 is the second to last, None means all of them."""
    topK_list: tuple[Count, ...] = (2000,)
    """How many weights a class mask keeps as important (the ELBO trains one GCN for each)."""
    kappa_list: tuple[Count, ...] = (25, 50, 100, 200, 400)
    """How many weights the unlearning mask switches off."""
    kappa: KappaModes = KappaModes.list
    seed: Seed = 0
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
    """Use this GCN, for every top_k, instead of training one."""
    plugins: PluginFiles = ()
    """Python files of your own that register a method, a metric, a dataset, a classifier, node features or a figure
    (docs/extending.md). A plugin is code: it runs with all your rights."""
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

    def check(self) -> None:
        """Lists hold something, each value once."""
        classes = self.forget_class
        for one in classes:
            fits = one != "" if isinstance(one, str) else one >= 0
            _require(fits, f"forget_class is {one}", "give a name or a label, a number >= 0")
        once = bool(classes) and len(set(classes)) == len(classes)
        _require(once, f"forget_class is {list(classes)}", "name one class or several, each once")
        for name in ("topK_list", "kappa_list"):
            values = getattr(self, name)
            _require(bool(values), f"{name} is empty", "give at least one number of weights, e.g. 200")
            _require(len(set(values)) == len(values), f"{name} is {list(values)}", "name each value once")
        paths = [str(path) for path in self.plugins]
        _require(len(set(paths)) == len(paths), f"plugins is {paths}", "name each file once")
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
        if isinstance(value, Enum | OpenChoice):
            return value.value
        return str(value) if isinstance(value, Path) else value

    result = convert(asdict(config))  # ty: ignore[invalid-argument-type]
    assert isinstance(result, dict)
    return result


def spelled(classes: Sequence[int | str]) -> tuple[str, ...]:
    """Labels as text that means the same wherever it is typed, whatever the classes are called; text stays."""
    return tuple(f"{LABEL}{one}" if isinstance(one, int) else one for one in classes)


def written(config: PipelineConfig) -> PipelineConfig:
    """A configuration as records keep it and people may type it: its labels are spelled out."""
    gcn = replace(config.gcn, train_classes=spelled(config.gcn.train_classes))
    return replace(config, forget_class=spelled(config.forget_class), gcn=gcn)


MOST_LETTERS = 40  # of a list of values in a name
UNTOLD = ("seed", "forget_class", "model_architecture", "vision_dataset", "topK_list", "kappa_list")
"""Fields that names of runs say in words of their own, or that are points of a run."""
NO_VALUES = ("output_dir", "tracker", "resume", "device", "reporter", "plugins")
"""Fields that no value depends on, or that say where and by which code it was made."""


def changed_settings(config: PipelineConfig) -> list[str]:
    """Name the settings of a run that are not the defaults, for people: "train.epochs-2"."""
    defaults, found = plain(PipelineConfig()), []
    for name, value in plain(config).items():
        if name in UNTOLD + NO_VALUES:
            continue
        known = defaults[name] if isinstance(value, dict) else {"": defaults[name]}
        for inner, one in (value if isinstance(value, dict) else {"": value}).items():
            if one != known[inner]:
                found.append(f"{name}{'.' * bool(inner)}{inner}-{_in_a_name(one)}")
    return found


def _in_a_name(value: object) -> str:
    """A setting's value as part of a name; a long list by its length and the first digits of its hash."""
    if not isinstance(value, list):
        return str(value).rpartition("/")[2]
    text = "+".join(map(str, value))
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
    return text.rpartition("/")[2] if len(text) <= MOST_LETTERS else f"{len(value)}-{digest[:4]}"


def derive_seed(root: int, *parts: object) -> int:
    """A seed of its own for one purpose: SHA-256 of (root, parts), 63 bits.

    Adding a method or a sweep point therefore moves no other point's numbers, and seed 0 works.
    """
    text = "\x1f".join(str(part) for part in (root, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
