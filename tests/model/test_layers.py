"""Squeeze-and-excitation, blur, and stochastic depth."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from resnet_dist.model import BasicBlock, build_model, residual_scales
from resnet_dist.model.layers import BlurConv2d, BlurPool, SqueezeExcite, conv


def test_squeeze_and_excitation_scales_whole_channels() -> None:
    torch.manual_seed(0)
    layer, x = SqueezeExcite(32), torch.randn(3, 32, 5, 5)
    gates = layer(x) / x
    assert torch.allclose(gates, gates[:, :, :1, :1].expand_as(gates), atol=1e-5)
    assert 0 < gates.min() < gates.max() < 1
    assert (layer.fc1.out_features, SqueezeExcite(8).fc1.out_features) == (2, 1)
    # The gates of an image depend on that image, and on no other of the batch.
    brighter = torch.cat([x[:1] + 1, x[1:]])
    assert not torch.allclose(layer(brighter)[0] / brighter[0], gates[0])
    torch.testing.assert_close(layer(brighter)[1:], layer(x)[1:])


def test_squeeze_and_excitation_acts_before_the_addition() -> None:
    torch.manual_seed(0)
    block, x = BasicBlock(16, 16, se=True).eval(), torch.randn(2, 16, 4, 4)
    residual = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    torch.testing.assert_close(block(x), F.relu(block.se(residual) + x))


def test_blur_precedes_the_strided_convolutions_of_blocks_and_no_other() -> None:
    model = build_model("resnet50", in_channels=3, num_classes=10, blurpool=True)
    blurred = {name for name, module in model.named_modules() if isinstance(module, BlurConv2d)}
    assert blurred == {f"stages.{stage}.0.{name}" for stage in (1, 2, 3) for name in ("conv2", "shortcut.0")}
    without = build_model("resnet50", in_channels=3, num_classes=10)
    assert model.state_dict().keys() == without.state_dict().keys()


def test_blur_before_a_1x1_equals_blur_everywhere() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 7, 9)
    for kernel_size in (1, 3):
        layer = conv(4, 6, kernel_size, stride=2, blurpool=True)
        expected = F.conv2d(BlurPool(4, 1)(x), layer.weight, stride=2, padding=kernel_size // 2)
        torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(
        BlurPool(4, 1)(torch.ones(1, 4, 5, 5))[:, :, 1:-1, 1:-1], torch.ones(1, 4, 3, 3)
    )


@pytest.mark.parametrize("shortcut", ["projection", "zero-pad"])
def test_blur_makes_features_move_with_the_image(shortcut: str) -> None:
    def change(blurpool: bool) -> float:
        """Return how far the logits move with an image that moves by a pixel, relative to another image."""
        model = build_model(
            "resnet20", in_channels=3, num_classes=10, shortcut=shortcut, blurpool=blurpool, seed=0
        ).eval()
        images, others = torch.randn(2, 16, 3, 34, 34, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            here, moved, other = (
                model(part)
                for part in (images[..., :-2, :-2], images[..., 1:-1, 1:-1], others[..., 1:-1, 1:-1])
            )
        return ((here - moved).norm() / (here - other).norm()).item()

    assert change(blurpool=True) < 0.75 * change(blurpool=False)


def test_scales_drop_by_the_linear_rule_and_keep_the_expectation() -> None:
    draws = torch.rand(200_000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scales = residual_scales(draws, 0.5)
    assert scales.dtype == torch.float32
    for block in range(5):
        keep = 1 - 0.5 * (block + 1) / 5
        kinds = scales[:, block].unique().tolist()
        assert kinds == [0, pytest.approx(1 / keep)]
        assert (scales[:, block] > 0).float().mean().item() == pytest.approx(keep, abs=0.005)
    torch.testing.assert_close(scales.mean(dim=0), torch.ones(5), atol=0.01, rtol=0)


@pytest.mark.parametrize("name", ["resnet8", "resnet50", "preresnet20", "wrn16_4"])
def test_a_dropped_block_is_its_shortcut_for_that_sample_alone(name: str) -> None:
    model = build_model(name, in_channels=3, num_classes=10, stem="cifar", stochastic_depth=0.5, seed=0)
    model.eval()
    images = torch.randn(2, 3, 8, 8)
    ones = torch.ones(2, model.num_blocks)  # type: ignore[call-overload]
    torch.testing.assert_close(model(images, ones), model(images))
    block = model.stages[0][-1]  # type: ignore[index]
    seen = []
    block.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))  # type: ignore[union-attr]
    scales = ones.clone()
    scales[1, len(model.stages[0]) - 1] = 0  # type: ignore[index, arg-type]
    logits = model(images, scales)
    before, after = seen[0]
    assert torch.equal(after[1], before[1] if "pre" in name or "wrn" in name else F.relu(before[1]))
    assert not torch.equal(after[0], before[0])
    torch.testing.assert_close(logits[0], model(images)[0])
    assert not torch.allclose(logits[1], model(images)[1])


def test_a_training_forward_needs_the_scales() -> None:
    model = build_model("resnet8", in_channels=3, num_classes=10, stochastic_depth=0.5)
    with pytest.raises(ValueError, match="needs scales_NL"):
        model(torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("name", ["resnet8", "preresnet20", "resnet9_fast"])
def test_one_graph_for_the_compiler(name: str) -> None:
    fast = name == "resnet9_fast"
    options = {} if fast else {"stochastic_depth": 0.2, "se": True, "blurpool": True}
    model = build_model(name, in_channels=3, num_classes=10, seed=0, **options)
    images = torch.randn(4, 3, 16, 16)
    extra = () if fast else (residual_scales(torch.rand(4, model.num_blocks), 0.2),)  # type: ignore[call-overload]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, *extra), model(images, *extra))
