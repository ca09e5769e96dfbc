"""How long does a mask take to apply and to lift, and how large is its file? A ResNet-50, 2,000 weights of one layer.

    uv run benchmarks/masks.py [--json PATH]

Random weights: neither depends on the values. The first time a model is met, all of its parameters are hashed, and from
then on only its masked layer is summed, unless something was written to the model: both are shown, beside a forward
pass over one image. Processor seconds stand beside wall seconds, because on a busy machine the second wait.
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import alternating, keep, line, parser

import torch
from torchvision.models import resnet50

from mimu import Mask, describe_parent

TARGET, WEIGHTS, REPEATS = "layer4.2.conv3.weight", 2_000, 31


def main() -> None:
    """Measure, print, keep."""
    given = parser(__doc__).parse_args()
    model = resnet50(weights=None).eval()
    parent = describe_parent(model, [TARGET])
    places = torch.randperm(parent.targets[TARGET].size)[:WEIGHTS].sort().values
    mask = Mask({TARGET: places}, {"forgotten": [{"index": 0, "name": "a class"}], "parent": parent})
    image = torch.zeros(1, 3, 224, 224)

    def both() -> None:
        mask.apply(model)
        mask.lift(model)

    begun = time.perf_counter()
    both()
    first = time.perf_counter() - begun
    with torch.no_grad():
        wall, forward = alternating([both, lambda: model(image)], REPEATS)
    begun = time.process_time()
    for _ in range(REPEATS):
        both()
    processor = (time.process_time() - begun) / REPEATS
    with tempfile.TemporaryDirectory() as name:
        mask.save(Path(name) / "mask")
        sizes = {path.name: path.stat().st_size for path in (Path(name) / "mask").iterdir()}
    line("apply and lift", wall)
    line("a forward pass over one image", forward)
    print(f"apply and lift, processor: {1e3 * processor:.2f} ms; the first time, with the check: {1e3 * first:.1f} ms")
    print(", ".join(f"{name}: {size:,} bytes" for name, size in sorted(sizes.items())))
    seconds = {"apply_and_lift": wall, "forward": forward, "processor": processor, "first": first}
    keep(given.json, seconds | {"bytes": sizes, "weights": WEIGHTS})


if __name__ == "__main__":
    main()
