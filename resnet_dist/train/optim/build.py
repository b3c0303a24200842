"""Build the recipe's optimizer and its parameter groups."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import nn

from resnet_dist.config import Optim
from resnet_dist.errors import UserError
from resnet_dist.model import FastResNet
from resnet_dist.train.optim.muon import Muon
from resnet_dist.train.optim.undecorated import SGD, AdamW

Group = dict[str, Any]


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """Return the recipe's optimizer over `parameter_groups`; `set_learning_rate` sets its rate before every step.

    Raises UserError where it comes from a library that is not installed.
    """
    groups = parameter_groups(model, optim)
    optimizer: torch.optim.Optimizer
    momentum: dict[str, Any] = {"momentum": optim.momentum, "nesterov": optim.nesterov}
    match optim.optimizer:
        case "sgd":
            optimizer = SGD(groups, lr=optim.lr, **momentum, fused=True)
            if optim.momentum:
                # Fill the buffers here: SGD leaves them uninitialized until its first step, which fp16 may skip.
                for parameter in (p for group in groups for p in group["params"]):
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            return optimizer
        case "adamw":
            return AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps or 1e-8, fused=True)
        case "muon":
            return Muon(_muon_groups(groups, optim), lr=optim.lr, **momentum, ns_steps=optim.ns_steps)
    # timm adapts the rate of a layer only if its weights decay: make it adapt in recipes without decay too.
    for group in groups:
        group["always_adapt"] = group["params"][0].ndim > 1
    library = _import_timm(optim.optimizer)
    if optim.optimizer == "lamb":
        # Switch off timm's own clipping to a norm of 1: optim.clip_norm is the one way to clip.
        optimizer = library.Lamb(
            groups, lr=optim.lr, betas=optim.betas, eps=optim.eps or 1e-6, max_grad_norm=None
        )
    else:
        trust = {"trust_coeff": optim.trust_coefficient, "eps": optim.eps or 1e-8}
        optimizer = library.Lars(groups, lr=optim.lr, **momentum, **trust)
    return optimizer


def parameter_groups(model: nn.Module, optim: Optim) -> list[Group]:
    """Return up to six groups: weights; scales of norms; biases; scales and biases that decay beside those that do not;
    the bias of a whitening layer, marked `whitening`, which may be frozen during a run.

    Frozen parameters are left out. Decay on a batch norm's scale or on a bias only shrinks the output (arXiv 1706.02677,
    section 5.3). `lr_scale` is the ratio of a group's rate to the schedule's.
    """
    weights: list[nn.Parameter] = []
    others: dict[tuple[bool, bool], list[nn.Parameter]] = {
        (bias, decays): [] for decays in (False, True) for bias in (False, True)
    }
    whitening = model.get_parameter("whitening.bias") if isinstance(model, FastResNet) else None
    for path, module in model.named_modules():
        decays = _decays(path, module, optim)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter is not whitening:
                bias = name == "bias" and not isinstance(module, nn.Conv2d)
                (weights if parameter.ndim > 1 else others[bias, decays]).append(parameter)
    groups = [_group(weights, optim.weight_decay)]
    for (bias, decays), parameters in others.items():
        decay = optim.weight_decay if decays or optim.decay_norms else 0.0
        groups.append(_group(parameters, decay, optim.bias_lr_scale if bias else 1.0))
    if whitening is not None and whitening.requires_grad:
        decay = optim.weight_decay if optim.decay_norms or optim.decay_biases else 0.0
        groups.append({**_group([whitening], decay, optim.whitening_bias_lr_scale), "whitening": True})
    return [group for group in groups if group["params"]]


def _decays(path: str, module: nn.Module, optim: Optim) -> bool:
    """Report whether the recipe lets the scale and the bias of a module decay although those of other modules do not."""
    if isinstance(module, nn.BatchNorm2d):
        return optim.decay_shortcut_norms and "shortcut" in path.split(".")
    return optim.decay_biases


def _group(parameters: list[nn.Parameter], decay: float, lr_scale: float = 1.0) -> Group:
    # A parameter shrinks by rate · decay: divide the decay, so that a higher rate does not shrink biases faster.
    return {"params": parameters, "weight_decay": decay / lr_scale, "lr_scale": lr_scale}


def set_learning_rate(
    optimizer: torch.optim.Optimizer, rate: float, of_whitening: float | None = None
) -> None:
    """Set the rate of every group; `of_whitening` is that for the bias of a whitening layer, where it has its own."""
    for group in optimizer.param_groups:
        own = of_whitening if group.get("whitening") else None
        group["lr"] = (rate if own is None else own) * group["lr_scale"]


def _muon_groups(groups: list[Group], optim: Optim) -> list[Group]:
    """Separate convolution weights from all others, which get SGD with a rate and a momentum of their own."""
    scale = (optim.sgd_lr or optim.lr) / optim.lr
    momentum = optim.momentum if optim.sgd_momentum is None else optim.sgd_momentum
    convolutions: list[Group] = []
    others: list[Group] = []
    for group in groups:
        filters = [p for p in group["params"] if p.ndim == 4]
        rest = [p for p in group["params"] if p.ndim != 4]
        if filters:
            own: Group = {"params": filters, "orthogonalize": True, "normalize": optim.normalize_weights}
            if optim.normalize_weights:
                own["weight_decay"] = 0.0
            convolutions.append({**group, **own})
        if rest:
            sgd = {"params": rest, "lr_scale": group["lr_scale"] * scale, "momentum": momentum}
            others.append({**group, **sgd})
    return convolutions + others


def _import_timm(optimizer: str) -> ModuleType:
    """Import timm.optim only for a recipe that needs it: the import takes 2 s."""
    try:
        import timm.optim
    except ImportError as error:
        raise UserError(
            f"optim.optimizer={optimizer!r} comes from timm, which is not installed ({error}): pip install timm"
        ) from None
    module: ModuleType = timm.optim
    return module
