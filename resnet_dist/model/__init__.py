"""Residual networks from scratch. Knows torch and nothing else of this package.

Read blocks.py first (what a skip connection is and why it works), then shortcuts.py, resnet.py, and table.py
for the names; preactivation.py, layers.py and stochastic_depth.py are the variations, fast.py the speed run's.

Imports are relative: a logged model carries a copy of this folder, and loads without the package.
"""

from .blocks import BasicBlock, Bottleneck, ResidualBlock
from .build import build_model, check_batch_norm, check_model, count_parameters
from .fast import FastResNet, whitening_filters
from .preactivation import PreActBasicBlock, PreActBottleneck
from .pretrained import Match, from_torchvision, load_fitting, match, to_torchvision
from .resnet import ResNet
from .stochastic_depth import residual_scales
from .table import MODELS, Options

__all__ = [
    "MODELS",
    "BasicBlock",
    "Bottleneck",
    "FastResNet",
    "Match",
    "Options",
    "PreActBasicBlock",
    "PreActBottleneck",
    "ResNet",
    "ResidualBlock",
    "build_model",
    "check_batch_norm",
    "check_model",
    "count_parameters",
    "from_torchvision",
    "load_fitting",
    "match",
    "residual_scales",
    "to_torchvision",
    "whitening_filters",
]
