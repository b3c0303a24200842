"""Residual networks from scratch. Knows torch and nothing else of this package."""

from resnet_dist.model.blocks import BasicBlock
from resnet_dist.model.resnet import MODELS, ResNet, build_model, count_parameters

__all__ = ["MODELS", "BasicBlock", "ResNet", "build_model", "count_parameters"]
