"""The explicit edge list of a graph of weights, for inspection, for export, and as an oracle for message passing.

It has m n (m + n - 2) edges for an m x n layer, 41.8 million for 128 x 512. Nothing that a run computes needs it.
"""

import torch
from torch import Tensor

from core.config import UserError
from graphs.layout import WeightGraph

MAX_EDGES = 200_000_000  # 3.2 GB of int64; 128 x 512 has 41.8 million


def _ordered_pairs(count: int) -> Tensor:
    """List all (a, b) in 0..count - 1 with a != b, [2, count (count - 1)]."""
    return (~torch.eye(count, dtype=torch.bool)).nonzero().T


def edge_index(graph: WeightGraph) -> Tensor:
    """List the directed edges [2, E] without self loops.

    Raises:
        UserError: there are more than MAX_EDGES; found before memory is taken.
    """
    if graph.num_edges > MAX_EDGES:
        layers = ", ".join(f"{m} x {n}" for m, n in graph.shapes)
        size = f"{graph.num_edges:,} edges ({graph.num_edges * 16 / 1e9:,.0f} GB) of {layers}"
        raise UserError(f"{size} do not fit: use MaskingGCN.forward, which needs no edges (limit {MAX_EDGES:,})")
    nodes = graph.split(torch.arange(graph.num_vertices).view(graph.shape))
    cliques = []
    for row in graph.neurons:
        touching = [] if row.below is None else [nodes[row.below]]
        touching += [] if row.above is None else [nodes[row.above].T]
        members = torch.cat(touching, 1)  # [neurons, weights of each]: every line is a clique
        cliques.append(members[:, _ordered_pairs(members.shape[1])].transpose(0, 1).flatten(1))
    return torch.cat(cliques, 1)
