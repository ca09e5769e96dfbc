"""Estimate memory, and refuse a run that cannot fit before anything is allocated."""

import os
from pathlib import Path

import torch
from torch import nn

from core.choices import UserError
from core.config import Objectives, PipelineConfig
from graphs.layout import WeightGraph

GROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def machine_bytes() -> int:
    """Memory that this process may have: the machine's, or its container's limit."""
    here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = GROUP_LIMIT.read_text().strip() if GROUP_LIMIT.is_file() else ""
    return min(here, int(limit)) if limit.isdigit() else here


def check_fits(what: str, needed: int, there: int, change: str) -> None:
    """Raise `UserError` where something is larger than the memory for it.

    Args:
        what: it, with the settings that make it large. needed: bytes that it takes at the very least. there: bytes
            of the device. change: what to do.
    """
    if needed > there:
        found = f"{what} takes at least {needed / 1e9:,.1f} GB of memory, here are {there / 1e9:,.1f} GB"
        raise UserError(f"{found}: {change}")


def check_memory(config: PipelineConfig, fresh: nn.Module, graph: WeightGraph, device: torch.device) -> None:
    """Refuse what cannot fit before its memory is asked for, by the least that a training step takes.

    Args:
        fresh: the classifier without values (on the meta device).

    Raises:
        UserError: the classifier or the graph network is larger than the device's memory.
    """
    gcn, rounds = config.gcn, config.gcn.num_message_passing_rounds
    there = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else machine_bytes()
    weights = sum(parameter.numel() for parameter in fresh.parameters())
    copies = 1 if config.trained_vision_model_path else 4  # parameters, gradients, AdamW's two moments
    what = f"{config.model_architecture.value} of {weights:,} weights"
    check_fits(what, 4 * copies * weights, there, "use a smaller data.image_size")
    if not config.gcn_path:
        batch = gcn.batch_size if gcn.objective is Objectives.elbo else 1
        kept = batch * graph.num_vertices * gcn.hidden_dim * (rounds + 1)  # a round's output, each, and one more
        needed = 4 * (kept + 4 * 2 * (rounds - 1) * gcn.hidden_dim**2)
        what = f"the graph network over {graph.num_vertices:,} weights, gcn.hidden_dim {gcn.hidden_dim:,},"
        check_fits(what, needed, there, "lower gcn.hidden_dim, gcn.num_message_passing_rounds or gcn.batch_size")
