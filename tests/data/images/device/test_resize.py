"""Resizing on any device gives the bytes of torch's kernel for CPUs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from resnet_dist.data.images.device import resize
from resnet_dist.data.images.device.resize import resize_exactly

LENGTHS = st.integers(1, 70)


def noise(count: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(0, 256, (count, height, width, channels), generator=generator, dtype=torch.uint8)


@settings(max_examples=80)
@given(LENGTHS, LENGTHS, LENGTHS, LENGTHS)
def test_the_bytes_are_those_of_the_cpu(height: int, width: int, new_height: int, new_width: int) -> None:
    images = noise(2, height, width)
    expected = F.interpolate(
        images.permute(0, 3, 1, 2), (new_height, new_width), mode="bilinear", antialias=True
    )
    assert torch.equal(resize_exactly(images, new_height, new_width), expected.permute(0, 2, 3, 1))


@pytest.mark.parametrize("channels", [1, 3])
def test_images_in_parts_are_the_same(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images = noise(5, 32, 32, channels)
    whole = resize_exactly(images, 24, 24)
    monkeypatch.setattr(resize, "CHUNK_BYTES", 2 * 8 * images[0].numel())
    assert torch.equal(resize_exactly(images, 24, 24), whole)
    assert whole.is_contiguous()
