"""The fast net: its whitening, its frozen weights, its residual blocks, its image sizes."""

from __future__ import annotations

import torch
from torch import nn

from resnet_dist.model import FastResNet, build_model, count_parameters, whitening_filters


def correlated_images(count: int = 64) -> torch.Tensor:
    """Return smooth images whose channels correlate, as in photographs: (N, 3, 16, 16)."""
    noise = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.avg_pool2d(noise, 3, stride=1, padding=1)
    return smooth + smooth.mean(dim=1, keepdim=True) + 0.5


def fast_net() -> FastResNet:
    model = build_model("resnet9_fast", in_channels=3, num_classes=10, seed=0)
    assert isinstance(model, FastResNet)
    return model


def test_whitened_patches_are_uncorrelated_with_variance_one() -> None:
    images = correlated_images()
    filters = whitening_filters([images])
    assert filters.shape == (24, 3, 2, 2)
    assert torch.equal(filters[12:], -filters[:12])
    outputs = nn.functional.conv2d(images, filters[:12]).permute(1, 0, 2, 3).flatten(1).double()
    covariance = outputs.cov()
    variances = covariance.diagonal()
    torch.testing.assert_close(covariance, torch.diag(variances), atol=1e-3, rtol=0)
    # WHITENING_EPS keeps the smallest variance below one.
    assert 0.9 < variances.min() <= variances.max() <= 1.001


def test_whitening_does_not_depend_on_how_images_are_batched() -> None:
    images = correlated_images(200)
    torch.testing.assert_close(whitening_filters(images.split(50)), whitening_filters([images]))


def test_filters_of_the_second_moment_are_those_of_the_source() -> None:
    """airbench94 takes the mean product of patches, not centered: its eigenvectors, divided by the roots of its values."""
    images = correlated_images()
    patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12).double()
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    scaled = vectors.T / (values + 5e-4).sqrt()[:, None]
    found = whitening_filters(images.split(7), "second-moment").double().flatten(1)
    for ours, theirs in zip(found[:12], scaled, strict=True):
        torch.testing.assert_close(ours * (ours @ theirs).sign(), theirs, rtol=1e-4, atol=1e-6)
    assert torch.equal(found[12:], -found[:12])
    centered = whitening_filters([images]).double().flatten(1)
    assert not torch.allclose(found, centered, rtol=1e-2)  # The images have a mean of 0.5.


def test_half_precision_adds_no_noise_to_whitened_images() -> None:
    model, images = fast_net().eval(), correlated_images()
    model.whiten(whitening_filters([images], "second-moment"))
    seen: list[torch.Tensor] = []
    model.whitening.register_forward_hook(lambda module, given, output: seen.append(output))
    with torch.no_grad():
        model(images)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
    assert logits.dtype == torch.bfloat16  # The rest of the net is in half precision.
    assert torch.equal(seen[0], seen[1])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(images), logits)


def test_norm_eps_reaches_every_norm() -> None:
    for name, number in (("resnet9_fast", 7), ("resnet8", 9), ("preresnet20", 19)):
        for eps, options in ((1e-5, {}), (1e-12, {"norm_eps": 1e-12})):
            model = build_model(name, in_channels=3, num_classes=10, seed=0, **options)
            norms = [module.eps for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
            assert norms == [eps] * len(norms), name
            assert len(norms) == number


def test_weights_of_whitening_and_scales_of_norms_do_not_train() -> None:
    model = fast_net()
    filters = whitening_filters([correlated_images()])
    model.whiten(filters)
    model(torch.randn(8, 3, 32, 32)).square().sum().backward()
    assert torch.equal(model.whitening.weight, filters)
    frozen = {name for name, p in model.named_parameters() if p.grad is None}
    norms = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert frozen == {"whitening.weight"} | norms
    assert model.whitening.bias.grad is not None
    assert count_parameters(model) == 2_008_280
    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == 9


def test_it_is_residual() -> None:
    block = fast_net().stages[0].block.eval()
    x = torch.randn(2, 64, 8, 8)
    nn.init.zeros_(block.conv2.weight)
    torch.testing.assert_close(block(x), x)


def test_it_takes_images_of_any_size() -> None:
    model = fast_net()
    for size in (9, 24, 28, 32):
        assert model(torch.randn(2, 3, size, size)).shape == (2, 10)
