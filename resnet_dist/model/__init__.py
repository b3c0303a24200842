"""Residual networks, written from scratch. The folder depends on PyTorch and on nothing else of this package.

In reading order (docs/learning.md walks the same way):

    blocks            the idea: output = F(x) + x, as basic block and as bottleneck
    shortcuts         the path of x around a block, and how x is made to fit where the shape changes
    resnet            the whole network: stem, stages of blocks, average, linear layer
    table             names: how many blocks of which kind "resnet56" or "wrn28_10" has; the options
    build             a network by its name, and the checks that explain what cannot work
    preactivation     blocks of version 2: norm and activation before each convolution
    layers            convolution, anti-aliasing blur, squeeze-and-excitation
    stochastic_depth  random skipping of blocks in training
    fast              a nine-layer network for training CIFAR-10 in seconds
    pretrained        weights from torchvision, and a report of what does not fit
    test_time         the mean of a net's answers over an image, its mirror image, and shifted images

Imports inside the folder are relative: a logged model carries a copy of the folder, named resnet_dist_model,
and loads where this package is not installed.
"""

from .blocks import BasicBlock, Bottleneck, ResidualBlock
from .build import build_model, check_batch_norm, check_model, count_parameters, has_whitening
from .fast import FastResNet, whitening_filters
from .preactivation import PreActBasicBlock, PreActBottleneck
from .pretrained import Match, from_torchvision, load_fitting, match, to_torchvision
from .resnet import ResNet
from .stochastic_depth import residual_scales
from .table import MODELS, Options
from .test_time import Variant, averaged_logits, variants

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
    "Variant",
    "averaged_logits",
    "build_model",
    "check_batch_norm",
    "check_model",
    "count_parameters",
    "from_torchvision",
    "has_whitening",
    "load_fitting",
    "match",
    "residual_scales",
    "to_torchvision",
    "variants",
    "whitening_filters",
]
