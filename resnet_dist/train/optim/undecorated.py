"""torch's optimizers without the import of its compiler, which takes some 2 s of every start in one process.

Each method below is marked as one that compiled code leaves out, and the mark imports the compiler with the first call. Nothing
here compiles an optimizer's update: `train.compile` is for the network and its loss.
"""

from __future__ import annotations

from inspect import unwrap

import torch


class Undecorated(torch.optim.Optimizer):
    """To be derived from before torch's own class: `class SGD(Undecorated, torch.optim.SGD)`."""

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)


class SGD(Undecorated, torch.optim.SGD):
    step = torch.no_grad()(unwrap(torch.optim.SGD.step))


class AdamW(Undecorated, torch.optim.AdamW):
    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))
