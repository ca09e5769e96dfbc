"""Forget and retain scores of written-out masks, with numpy alone: nothing of this project is used.

uv run benchmarks/unlearning.py --full --masks masks
uv run benchmarks/recompute.py masks/batch-128_seed-0 [folder of Fashion-MNIST's .gz files]
"""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

folder, images = Path(sys.argv[1]), Path([*sys.argv, "/usr/share/datasets/fashion-mnist"][2])
scale = json.loads((folder.parent / "normalisation.json").read_text())
x = np.frombuffer(gzip.decompress((images / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
y = np.frombuffer(gzip.decompress((images / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
x = (x.reshape(len(y), 784) - scale["mean"]) / scale["std"]
first, target, last = (load_file(folder / "classifier.safetensors")[f"linears.{i}.weight"] for i in range(3))
h = np.maximum(x @ first.T, 0)
for kappa in (64, 128, 200, 256, 400):
    forget, retain = [], []
    for c in range(10):
        mask = load_file(folder / f"refined_class-{c}_kappa-{kappa}.safetensors")["mask"]
        right = (np.maximum(h @ (target * mask).T, 0) @ last.T).argmax(1) == y
        forget.append(100 * right[y == c].mean())
        retain.append(100 * right[y != c].mean())
    print(f"kappa {kappa}: {(mask == 0).sum()} weights off, forget {np.mean(forget):.2f}, retain {np.mean(retain):.1f}")
