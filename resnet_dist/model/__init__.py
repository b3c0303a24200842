"""Residual networks from scratch. Knows torch and nothing else of this package.

Imports are relative: a logged model carries a copy of this folder, and loads without the package.
"""

from .blocks import BasicBlock
from .resnet import MODELS, ResNet, build_model, count_parameters

__all__ = ["MODELS", "BasicBlock", "ResNet", "build_model", "count_parameters"]
