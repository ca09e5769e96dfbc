"""How many threads torch takes: a single one for networks so small that two would wait for each other most of the time.

Threads meet after every operation. While other processes are busy, one of them waits for its turn, and the other one
for it, as long as the system's time slice, which is a thousand times as long as the operation.
"""

import torch

WORTH = 2**23  # multiplications for a batch from which on several threads save a tenth of a step or more
_allowed: list[int] = []


def allowed_threads() -> int:
    """Return how many threads this process may use, whether or not torch takes them for a single operation."""
    return max(torch.get_num_threads(), *_allowed, 1)


def choose_threads(device: torch.device, multiplications: float) -> None:
    """Let torch take one thread for a small network on a CPU, and else as many as it may, process-wide.

    Args:
        device: where the network is.
        multiplications: of a forward pass, for one batch.
    """
    _allowed[:] = [allowed_threads()]
    torch.set_num_threads(1 if device.type == "cpu" and multiplications < WORTH else _allowed[0])
