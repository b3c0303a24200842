"""The maps are those of the paper: they follow the evidence, image by image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_dist.explain.grad_cam import averaged_grad_cam, grad_cam
from resnet_dist.model import build_model, variants


def net(name: str = "resnet8") -> nn.Module:
    return build_model(name, in_channels=3, num_classes=4, seed=3).eval()


class Spots(nn.Module):
    """A net whose two classes are the brightness of the first and of the second channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(nn.AvgPool2d(4))

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return self.stages(images_NCHW).mean(dim=(2, 3))  # type: ignore[no-any-return]


def test_it_finds_the_place_of_the_evidence() -> None:
    images = torch.zeros(1, 2, 32, 32)
    images[0, 0, 4:8, 20:24] = 1  # Class 0 speaks here,
    images[0, 1, 24:28, 0:4] = 1  # and class 1 there.
    for label, (row, column) in enumerate([(6, 22), (26, 2)]):
        (found,) = grad_cam(Spots(), images, torch.tensor([label]))
        assert found.shape == (32, 32)
        assert found.amax() == 1
        assert found[row, column] > 0.7
        assert found[16, 12] == 0


def test_what_speaks_against_a_class_is_cut() -> None:
    images = torch.zeros(1, 2, 32, 32)
    images[0, 0, 4:8, 20:24] = -1
    (found,) = grad_cam(Spots(), images, torch.tensor([0]))
    assert not found.any()
    assert found.isfinite().all()


def test_for_a_mean_and_a_linear_layer_the_weights_are_that_layers() -> None:
    """The older class-activation map (Zhou et al. 2016) is the special case of such nets."""
    model, images = net(), torch.randn(3, 3, 32, 32)
    labels = torch.tensor([0, 3, 1])
    kept: list[Tensor] = []
    handle = list(model.blocks())[-1].register_forward_hook(lambda module, given, output: kept.append(output))  # type: ignore[operator]
    with torch.no_grad():
        model(images)
    handle.remove()
    weights = model.fc.weight[labels]  # type: ignore[union-attr, index]
    plain = F.relu(torch.einsum("nc,nchw->nhw", weights, kept[0]))
    expected = F.interpolate(plain[:, None], (32, 32), mode="bilinear")[:, 0]
    expected = expected / expected.amax(dim=(1, 2), keepdim=True)
    found = grad_cam(model, images, labels)
    assert torch.allclose(found, expected.detach(), atol=1e-5)
    alone = torch.cat(
        [grad_cam(model, images[number : number + 1], labels[number : number + 1]) for number in range(3)]
    )
    assert torch.allclose(found, alone, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet10_tutorial", "resnet9_fast", "preresnet20", "preresnet50"])
def test_every_kind_of_net_has_maps(name: str) -> None:
    model, images = net(name), torch.randn(2, 3, 32, 32)
    found = grad_cam(model, images, torch.tensor([1, 2]))
    assert found.shape == (2, 32, 32)
    assert found.isfinite().all()
    assert ((found >= 0) & (found <= 1)).all()


def test_it_changes_nothing_in_the_model() -> None:
    model, images = net(), torch.randn(1, 3, 32, 32)
    before = model(images)
    grad_cam(model, images, torch.tensor([0]))
    assert torch.equal(model(images), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_with_the_mirror_image_the_map_is_mirrored_too() -> None:
    model, images, labels = net(), torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    for shift in (0, 2):
        seen = variants(flip=True, shift=shift)
        found = averaged_grad_cam(model, images, labels, seen)
        mirrored = averaged_grad_cam(model, images.flip(-1), labels, seen)
        if not shift:  # Mirrored, down and right becomes down and left.
            assert torch.allclose(mirrored, found.flip(-1), atol=1e-5)
        assert found.amax() == 1


def test_with_shifted_images_the_evidence_stays_at_its_place() -> None:
    images = torch.zeros(1, 2, 32, 32)
    images[0, 0, 4:8, 20:24] = 1
    seen = variants(flip=True, shift=4)
    found = averaged_grad_cam(Spots(), images, torch.tensor([0]), seen)[0]
    row, column = divmod(int(found.argmax()), 32)
    assert abs(row - 6) <= 4
    assert abs(column - 22) <= 4
    one = grad_cam(Spots(), images, torch.tensor([0]))
    assert torch.equal(
        averaged_grad_cam(Spots(), images, torch.tensor([0]), variants(flip=False, shift=0)), one
    )
