"""What several test files use: a tiny run, the shape of a log line, small graphs over several layers."""

import re

from graph import WeightGraph

LOG_LINE = re.compile(r"\[ *\d+\.\d s\] \S")
TINY = """
device: cpu
topK_list: [300]
kappa_list: [100, 400]
train: {epochs: 2, batch_size: 64}
graph: {num_samples: 640}
gcn: {objective: elbo, steps: 3, batch_size: 4, hidden_dim: 8}
refine: {steps: 2}
sft: {steps: 3}
eval: {methods: [mimu, mimu_refined, taylor_mask, random, sft, default], metrics: [core], references: 0}
reporter: {dpi: 40}
"""
NET_5432 = WeightGraph(((4, 5), (3, 4), (2, 3)), (True, True))
APART = WeightGraph(((4, 5), (2, 3)), (False,))
MIXED = WeightGraph(((4, 5), (7, 6), (3, 7)), (False, True))
