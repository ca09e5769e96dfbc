"""How fast is a device? Training, making graphs, and answering requests, at Fashion-MNIST's size with random images.

    uv run benchmarks/device.py [--device cuda] [--json PATH] [--docs]

A device finishes what it was given before a clock is read. float32 is float32, never TF32; bf16 is `train.bf16`, for a
GPU alone. Requests are those of the shipped graph network, on the MLP's target layer: alone, and refined by 30 steps.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import for_pages, keep, parser, publish_all, random_data, seconds

import torch

from core.config import PROJECT_ROOT, GraphConfig, RefineConfig, Trackers, TrainConfig
from core.observe import Tracker, be_quiet
from data import GraphDataset, GraphGenerator
from model import HookedMLPClassifier, HookedModel, HookedResnet
from trainer import VisionModelTrainer
from training.distributed import choose_device, prepare_process
from unlearn.requests import FrozenHead, Request, Unlearner, refine
from utils_data import UnlearningDataset

BATCH, GRAPHS, KAPPA, REPEATS = 128, 10_240, 200, 3
TRAINED = {"MLP": 25_600, "ResNet-18": 1_024}  # images of an epoch
GCN = PROJECT_ROOT / "pretrained" / "gcn_mlp.safetensors"


def finished(function: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """The function, and the wait until the device has done it."""

    def run() -> None:
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def epoch(model: HookedModel, data: UnlearningDataset, device: torch.device, **settings: bool) -> None:
    """Train for one epoch, from the weights that the model has."""
    trainer = VisionModelTrainer(
        model, data, TrainConfig(epochs=1, batch_size=BATCH, **settings), device, Tracker(Trackers.none, "", {})
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer.train(Path(folder))


def training(device: torch.device) -> dict[str, float]:
    """Images a second of an epoch, a judgement of as many images included, as each epoch has one."""
    found = {}
    for name, kind in (("MLP", HookedMLPClassifier), ("ResNet-18", HookedResnet)):
        data = random_data(TRAINED[name], BATCH)
        kinds = {"float32": {}, "bf16": {"bf16": True}} if device.type == "cuda" else {"float32": {}}
        for numbers, settings in kinds.items():
            model = kind(10, 1, 28).to(device)
            taken = seconds(finished(partial(epoch, model, data, device, **settings), device), REPEATS)
            found[f"training, {name}, {numbers}: images/s"] = TRAINED[name] / statistics.median(taken)
    return found


def requests(device: torch.device) -> dict[str, float]:
    """Graphs a second, reading images and writing files included; milliseconds of a request."""
    torch.manual_seed(0)
    model, data = HookedMLPClassifier(10, 1, 28).to(device).eval(), random_data(GRAPHS, 1024)
    generator = GraphGenerator(model, data, -2, GraphConfig(num_samples=GRAPHS, batch_size=1024), 0, device)
    with tempfile.TemporaryDirectory() as folder:
        made = finished(lambda: generator.generate(Path(folder)), device)
        found = {"graphs of the MLP: graphs/s": GRAPHS / statistics.median(seconds(made, REPEATS))}
        head = FrozenHead.of_graphs(model, GraphDataset(Path(folder)), -2, 10, device)
        unlearner, request = Unlearner.load(GCN)[0], Request((0,), KAPPA)
        unlearner.gcn.to(device).eval()

        def alone() -> torch.Tensor:
            with torch.no_grad():
                return unlearner.theta(head, request)

        theta = alone()
        for name, answer in {
            "by the network alone": alone,
            "refined from there": lambda: refine(head, theta, request, RefineConfig()),
        }.items():
            taken = seconds(finished(answer, device), 5 * REPEATS)
            found[f"a request {name}: ms"] = 1e3 * statistics.median(taken)
    return found


def main() -> None:
    """Measure, print, keep."""
    flags = parser(__doc__)
    for_pages(flags)
    flags.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    given = flags.parse_args()
    device = choose_device(given.device)
    prepare_process(device)
    be_quiet(True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    found = training(device) | requests(device)
    print(name)
    for what, value in found.items():
        print(f"{what:45} {value:12,.1f}")
    keep(given.json, {"device": name} | found)
    rows = [
        ["what", name],
        *([what, f"{value:,.0f}" if value >= 100 else f"{value:.1f}"] for what, value in found.items()),
    ]
    publish_all(given.docs, {"speed_device": (f"medians of {REPEATS} to {5 * REPEATS} repeats", rows)})


if __name__ == "__main__":
    main()
