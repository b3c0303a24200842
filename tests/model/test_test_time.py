"""Test-time augmentation: the source's formula, what a confident answer keeps, and the batches that the net sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_dist.model import averaged_logits, build_model, variants
from resnet_dist.model.test_time import moved


class Net(nn.Module):
    """A net that gives other logits for every variant, in memory that its next call for as many images overwrites."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 10 * 10, 4)
        nn.init.normal_(self.head.weight, std=0.1, generator=torch.Generator().manual_seed(1))
        self.memory: dict[int, Tensor] = {}
        self.sizes: list[int] = []
        self.strides: set[tuple[int, ...]] = set()

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        self.strides.add(images.stride())
        logits = self.head(images.flatten(1))
        return self.memory.setdefault(len(images), torch.empty_like(logits)).copy_(logits)


def some_images(count: int = 9) -> Tensor:
    images = torch.randn(count, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    return images.contiguous(memory_format=torch.channels_last)


def plain(net: Net, images: Tensor) -> Tensor:
    return net.head(images.flatten(1))


def of_the_source(net: Net, images: Tensor) -> Tensor:
    """Return the logits of airbench94 at its `tta_level` 2."""

    def mirrored(one: Tensor) -> Tensor:
        return 0.5 * plain(net, one) + 0.5 * plain(net, one.flip(-1))

    padded = F.pad(images, (1, 1, 1, 1), "reflect")
    shifted = torch.stack([mirrored(padded[:, :, 0:10, 0:10]), mirrored(padded[:, :, 2:12, 2:12])]).mean(0)
    return 0.5 * mirrored(images) + 0.5 * shifted


@torch.no_grad()
def test_mirrored_and_shifted_logits_are_those_of_the_source() -> None:
    net, images = Net(), some_images()
    found = averaged_logits(net, images, flip=True, shift=1)
    torch.testing.assert_close(found, of_the_source(net, images))
    assert not torch.allclose(found, plain(net, images), atol=1e-2)
    assert net.sizes == [9] * 6
    assert net.strides == {images.stride()}  # Compiled code would compile once more for another layout.


@torch.no_grad()
def test_mirrors_alone_are_the_plain_mean_to_the_last_bit() -> None:
    net, images = Net(), some_images()
    mean = (plain(net, images) + plain(net, images.flip(-1))) / 2
    assert torch.equal(averaged_logits(net, images, flip=True, shift=0), mean)
    assert torch.equal(averaged_logits(net, images, flip=False, shift=0), plain(net, images))


@pytest.mark.parametrize("shift", [1, 3])
def test_a_shift_reads_the_reflection(shift: int) -> None:
    images = some_images(2)
    down = moved(images, shift)
    assert torch.equal(down[:, :, shift:, shift:], images[:, :, :-shift, :-shift])
    assert torch.equal(down[:, :, 0, shift:], images[:, :, shift, :-shift])
    up = moved(images, -shift)
    assert torch.equal(up[:, :, :-shift, :-shift], images[:, :, shift:, shift:])
    assert torch.equal(up[:, :, :-shift, -1], images[:, :, shift:, -1 - shift])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 2])
def test_maps_of_a_variant_go_back_to_the_places_of_the_image(flip: bool, shift: int) -> None:
    images = some_images(2)
    seen = variants(flip=flip, shift=shift)
    assert len(seen) == (2 if flip else 1) * (3 if shift else 1)
    assert sum(variant.weight for variant in seen) == 1
    for variant in seen:
        back = variant.undone(variant.of(images)[:, 0])
        assert torch.equal(back[:, 4:6, 4:6], images[:, 0, 4:6, 4:6])


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 3, 9, 16])
def test_a_confident_answer_is_kept_and_an_uncertain_one_is_averaged(count: int) -> None:
    net, images = Net(), some_images(count)
    alone, mean = plain(net, images), of_the_source(net, images)
    ordered = alone.softmax(dim=1).amax(dim=1).sort().values
    for number in {0, count // 2, count}:  # of uncertain images
        limit = float(ordered[number]) if number < count else 1.0
        net.sizes = []
        found = averaged_logits(net, images, flip=True, shift=1, confidence=limit)
        unsure = alone.softmax(dim=1).amax(dim=1) < limit
        assert int(unsure.sum()) == number
        assert torch.equal(found[~unsure], alone[~unsure])
        torch.testing.assert_close(found[unsure], mean[unsure])
        part = -(-count // 4)
        assert set(net.sizes) <= {count, part}
        assert len(net.sizes) == 1 + 5 * -(-number // part)


@torch.no_grad()
def test_an_answer_does_not_depend_on_the_other_images() -> None:
    net, images = build_model("resnet8", in_channels=3, num_classes=4, seed=0).eval(), some_images(8)
    how: dict[str, Any] = {"flip": True, "shift": 1, "confidence": 0.27}
    together = averaged_logits(net, images, **how)
    alone = torch.cat([averaged_logits(net, image[None], **how) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_exported_graph_gives_the_same_answers() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = build_model("resnet8", in_channels=3, num_classes=4, seed=0)

        def forward(self, images: Tensor) -> Tensor:
            return averaged_logits(self.net, images, flip=True, shift=1, confidence=0.27)

    graph, images = Graph().eval(), some_images(6).contiguous()
    shapes = ({0: torch.export.Dim("N", min=1)},)
    exported = torch.export.export(graph, (images[:2],), dynamic_shapes=shapes).module()
    torch.testing.assert_close(exported(images), graph(images), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_half_precision_is_averaged_in_fp32() -> None:
    net, images = Net(), some_images()
    halves = lambda one: net(one).bfloat16()  # noqa: E731
    found = averaged_logits(halves, images, flip=True, shift=0)
    expected = (plain(net, images).bfloat16().float() + plain(net, images.flip(-1)).bfloat16().float()) / 2
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
