"""Residual networks, written from scratch. The folder depends on PyTorch and on nothing else of this package.

In reading order (docs/learning.md walks the same way):

    blocks.py            the idea: output = F(x) + x, as basic block and as bottleneck
    shortcuts.py         the path of x around a block, and how x is made to fit where the shape changes
    resnet.py            the whole network: stem, stages of blocks, average, linear layer
    table.py             names: how many blocks of which kind "resnet56" or "wrn28_10" has; the options
    build.py             a network by its name, and the checks that explain what cannot work
    preactivation.py     blocks of version 2: norm and activation before each convolution
    layers.py            convolution, anti-aliasing blur, squeeze-and-excitation
    stochastic_depth.py  random skipping of blocks in training
    fast.py              a nine-layer network for training CIFAR-10 in seconds
    pretrained.py        weights from torchvision, and a report of what does not fit

Imports inside the folder are relative: a logged model carries a copy of the folder, named resnet_dist_model,
and loads where this package is not installed.
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
