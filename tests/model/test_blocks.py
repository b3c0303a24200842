"""The blocks against their formulas: the sum, the shortcuts, and the path of the gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_dist.model import (
    BasicBlock,
    Bottleneck,
    PreActBasicBlock,
    PreActBottleneck,
    ResidualBlock,
    build_model,
)

BLOCKS = [BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck]


def random_block(kind: Any, in_channels: int = 8, channels: int = 8, stride: int = 1, **options: Any) -> Any:
    """Return a block in evaluation mode whose norms differ from the identity."""
    torch.manual_seed(0)
    block = kind(in_channels, channels, stride, **options)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return block.eval()


def residual_of(block: Any, x: Tensor) -> Tensor:
    """Return F(x), written out layer by layer."""
    number = 3 if hasattr(block, "conv3") else 2
    layers = [(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in range(1, number + 1)]
    for i, (conv, bn) in enumerate(layers):
        if isinstance(block, PreActBasicBlock | PreActBottleneck):
            x = conv(F.relu(bn(x)))
        else:
            x = bn(conv(x))
            x = F.relu(x) if i < number - 1 else x
    return x


def activation_of(block: ResidualBlock) -> Any:
    return (lambda x: x) if isinstance(block, PreActBasicBlock | PreActBottleneck) else F.relu


@pytest.mark.parametrize("kind", BLOCKS)
def test_output_is_f_plus_x(kind: Any) -> None:
    block = random_block(kind, in_channels=8 * kind.expansion)
    x = torch.randn(2, 8 * kind.expansion, 6, 6)
    torch.testing.assert_close(block(x), activation_of(block)(residual_of(block, x) + x))


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_plain_block_is_f_alone(kind: Any) -> None:
    block = random_block(kind, in_channels=8 * kind.expansion, shortcut="none")
    x = torch.randn(2, 8 * kind.expansion, 6, 6)
    torch.testing.assert_close(block(x), activation_of(block)(residual_of(block, x)))
    assert not torch.allclose(block(x), activation_of(block)(residual_of(block, x) + x))


@pytest.mark.parametrize("kind", BLOCKS)
def test_projections_of_v2_take_the_activated_input(kind: Any) -> None:
    block = random_block(kind, in_channels=4, channels=8, stride=2)
    x = torch.randn(2, 4, 7, 7)
    preactivation = isinstance(block, PreActBasicBlock | PreActBottleneck)
    skipped = F.relu(block.bn1(x)) if preactivation else x
    assert len(block.shortcut) == (1 if preactivation else 2)
    expected = activation_of(block)(residual_of(block, x) + block.shortcut(skipped))
    torch.testing.assert_close(block(x), expected)
    assert expected.shape == (2, 8 * kind.expansion, 4, 4)
    padded = random_block(kind, in_channels=4, channels=8, stride=2, shortcut="zero-pad")
    expected = activation_of(padded)(residual_of(padded, x) + padded.shortcut(x))
    torch.testing.assert_close(padded(x), expected)


def test_the_3x3_of_a_bottleneck_has_the_stride() -> None:
    block = Bottleneck(64, 64, 2)
    assert [c.stride[0] for c in (block.conv1, block.conv2, block.conv3)] == [1, 2, 1]
    resnext = Bottleneck(64, 64, groups=32, width_per_group=4)
    assert (resnext.conv2.groups, resnext.conv2.in_channels) == (32, 128)
    assert Bottleneck(64, 64, width_per_group=128).conv2.in_channels == 128


@pytest.mark.parametrize("kind", BLOCKS)
def test_zero_in_the_last_layer_makes_the_identity_that_still_learns(kind: Any) -> None:
    block = random_block(kind, in_channels=8 * kind.expansion).train()
    if isinstance(block.last, nn.BatchNorm2d):
        nn.init.zeros_(block.last.bias)
    nn.init.zeros_(block.last.weight)
    x = torch.randn(4, 8 * kind.expansion, 6, 6)
    torch.testing.assert_close(block(x), activation_of(block)(x))
    block(x).square().sum().backward()
    assert block.last.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["resnet20", "resnet50", "preresnet20", "preresnet50"])
def test_zero_init_makes_every_block_its_shortcut(name: str) -> None:
    model = build_model(name, in_channels=3, num_classes=10, stem="cifar", zero_init=True, seed=0)
    seen = []
    for block in model.blocks():  # type: ignore[operator]
        if isinstance(block.shortcut, nn.Identity):
            block.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    model(torch.randn(2, 3, 8, 8))
    assert len(seen) >= 6
    assert all(torch.equal(before, after) for before, after in seen)


def test_the_gradient_passes_blocks_without_residual_unchanged() -> None:
    # dLoss/dx_l = dLoss/dx_L · (1 + d/dx_l ΣF), and zero_init makes F = 0 in every block.
    model = build_model("preresnet110", in_channels=3, num_classes=10, zero_init=True, seed=0)
    stage = model.stages[2][1:]  # type: ignore[index]
    x = torch.randn(2, 64, 4, 4, requires_grad=True)
    upstream = torch.randn(2, 64, 4, 4)
    stage(x).backward(upstream)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, upstream)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("shortcut", ["projection", "pool-projection", "zero-pad"])
def test_the_gradient_reaches_the_input_past_dead_convolutions(kind: Any, shortcut: str) -> None:
    block = random_block(kind, in_channels=8, channels=8, stride=2, shortcut=shortcut)
    for name in ("conv1", "conv2", "conv3"):
        if hasattr(block, name):
            nn.init.zeros_(getattr(block, name).weight)
    x = torch.rand(2, 8, 6, 6, requires_grad=True)
    block(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_pool_projection_uses_every_pixel() -> None:
    x = torch.randn(1, 4, 5, 5, requires_grad=True)
    for shortcut, num_used in (("projection", 9), ("pool-projection", 25)):
        x.grad = None
        BasicBlock(4, 8, 2, shortcut=shortcut).shortcut(x).square().sum().backward()  # type: ignore[arg-type, misc]
        assert x.grad is not None
        assert int((x.grad[0, 0] != 0).sum()) == num_used
    pool = BasicBlock(4, 8, 2, shortcut="pool-projection").shortcut.pool  # type: ignore[union-attr]
    # Averages at an odd edge are over the pixels that exist: padding must not darken them.
    torch.testing.assert_close(pool(torch.ones(1, 4, 5, 5)), torch.ones(1, 4, 3, 3))  # type: ignore[operator]


def test_stems() -> None:
    images = torch.randn(2, 3, 32, 32)
    sizes = {}
    for stem in ("cifar", "imagenet", "deep"):
        model = build_model("resnet18", in_channels=3, num_classes=10, stem=stem)
        model.stages[0].register_forward_pre_hook(  # type: ignore[index, union-attr]
            lambda _, inputs, stem=stem: sizes.update({stem: inputs[0].shape})
        )
        model.stages[0][0].register_forward_pre_hook(  # type: ignore[index, union-attr]
            lambda _, inputs, stem=stem: sizes.update({stem: tuple(inputs[0].shape)})
        )
        model(images)
    assert sizes == {"cifar": (2, 64, 32, 32), "imagenet": (2, 64, 8, 8), "deep": (2, 64, 8, 8)}
