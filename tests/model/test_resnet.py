"""The networks against the paper, and the addition that makes them residual."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from resnet_dist.model import MODELS, BasicBlock, build_model, count_parameters


@pytest.mark.parametrize(
    ("name", "parameters"), [("resnet20", 269_722), ("resnet56", 853_018), ("resnet110", 1_727_962)]
)
def test_parameters_of_the_paper(name: str, parameters: int) -> None:
    residual = build_model(name, in_channels=3, num_classes=10, shortcut="zero-pad")
    plain = build_model(name, in_channels=3, num_classes=10, shortcut="none")
    assert count_parameters(residual) == count_parameters(plain) == parameters


@pytest.mark.parametrize("name", ["resnet10_tutorial", "resnet8", "resnet20"])
@pytest.mark.parametrize("shortcut", ["projection", "zero-pad", "none"])
def test_shapes(name: str, shortcut: str) -> None:
    model = build_model(name, in_channels=1, num_classes=7, shortcut=shortcut)  # type: ignore[arg-type]
    assert model(torch.randn(2, 1, 9, 9)).shape == (2, 7)


def test_the_tutorial_net() -> None:
    model = build_model("resnet10_tutorial", in_channels=3, num_classes=10)
    blocks = [block for stage in model.stages for block in stage]  # type: ignore[union-attr]
    assert [block.conv2.out_channels for block in blocks] == [16, 16, 32, 32]
    assert [block.conv1.stride[0] for block in blocks] == [1, 1, 2, 1]


def test_a_block_is_relu_of_f_plus_x() -> None:
    block = BasicBlock(4, 4).eval()
    x = torch.randn(2, 4, 6, 6)
    residual = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    torch.testing.assert_close(block(x), F.relu(residual + x))
    torch.nn.init.zeros_(block.bn2.weight)
    # F = 0 leaves the shortcut and the last ReLU.
    torch.testing.assert_close(block(x), F.relu(x))


def test_shortcuts_where_the_shape_changes() -> None:
    x = torch.randn(2, 4, 6, 6)
    projection = BasicBlock(4, 8, stride=2)
    kinds = [type(module) for module in projection.shortcut]  # type: ignore[union-attr]
    assert kinds == [torch.nn.Conv2d, torch.nn.BatchNorm2d]
    padded = BasicBlock(4, 8, stride=2, shortcut="zero-pad").shortcut(x)  # type: ignore[misc]
    assert torch.equal(padded[:, 2:6], x[:, :, ::2, ::2])
    assert not padded[:, :2].any()
    assert not padded[:, 6:].any()
    assert BasicBlock(4, 8, stride=2, shortcut="none").shortcut is None
    with pytest.raises(ValueError, match="use projection"):
        BasicBlock(8, 4, shortcut="zero-pad")


def test_the_skip_connection_carries_the_gradient() -> None:
    # With halved convolutions, each plain block shrinks the signal, and depth multiplies that; a sum keeps x.
    norms = {}
    for shortcut in ("zero-pad", "none"):
        model = build_model("resnet56", in_channels=3, num_classes=10, shortcut=shortcut, seed=0).eval()  # type: ignore[arg-type]
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.data.mul_(0.5)
        torch.manual_seed(0)
        model(torch.randn(8, 3, 8, 8)).logsumexp(dim=1).sum().backward()
        assert model.conv1.weight.grad is not None
        norms[shortcut] = model.conv1.weight.grad.norm().item()
    assert norms["zero-pad"] > 1000 * norms["none"]


def test_a_seed_fixes_weights_and_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    first = build_model("resnet8", in_channels=3, num_classes=10, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    second = build_model("resnet8", in_channels=3, num_classes=10, seed=5)
    other = build_model("resnet8", in_channels=3, num_classes=10, seed=6)
    assert torch.equal(first.conv1.weight, second.conv1.weight)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)
    assert {"resnet20", "resnet110", "resnet1202"} <= set(MODELS)
