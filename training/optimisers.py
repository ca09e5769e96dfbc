"""torch's optimisers without torch's compiler.

torch marks the methods of its optimisers as not to be compiled. The first call of such a method imports the compiler
(`torch._dynamo`, with sympy: two seconds), although nothing here compiles. These classes call the methods themselves.
The numbers are computed by torch's own code: results, states and files are the same to the bit.
"""

from inspect import unwrap

import torch
from torch.optim import Optimizer

__all__ = ["SGD", "Adam", "AdamW"]


class _Plain(Optimizer):
    """The methods of every optimiser, without their marks. A version of torch that sets no marks keeps its methods."""

    add_param_group = unwrap(Optimizer.add_param_group)
    zero_grad = unwrap(Optimizer.zero_grad)
    state_dict = unwrap(Optimizer.state_dict)
    load_state_dict = unwrap(Optimizer.load_state_dict)


class Adam(_Plain, torch.optim.Adam):
    """Adam (arXiv:1412.6980), as `torch.optim.Adam`."""

    step = torch.no_grad()(unwrap(torch.optim.Adam.step))


class AdamW(_Plain, torch.optim.AdamW):
    """Adam with decoupled weight decay (arXiv:1711.05101), as `torch.optim.AdamW`."""

    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


class SGD(_Plain, torch.optim.SGD):
    """Stochastic gradient descent with momentum, as `torch.optim.SGD`."""

    step = torch.no_grad()(unwrap(torch.optim.SGD.step))
