"""Corruptions depend on the sample's id alone, keep the form of an image, and grow with their severity."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from resnet_dist.data.images.corruptions import noise, weather
from resnet_dist.data.images.corruptions.chance import Chance
from resnet_dist.data.images.corruptions.table import CORRUPTIONS, SEVERITIES, corrupt
from tests.data.images.pictures import photo

RANDOM = {"gaussian_noise", "shot_noise", "impulse_noise", "motion_blur", "snow", "fog"}
# The whole ladder of these is not monotone in mean difference: motion and haze saturate, as in the original.
SATURATE = {"fog", "snow"}


def image(size: int, channels: int) -> NDArray[np.uint8]:
    found = np.asarray(photo(size, size))[:, :, :channels]
    return np.ascontiguousarray(found)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (96, 3)])
def test_a_corruption_is_one_of_the_sample(name: str, size: int, channels: int) -> None:
    pixels = image(size, channels)
    before = pixels.copy()
    for severity in SEVERITIES:
        found = corrupt(pixels, 7, name, severity)
        assert (found.shape, found.dtype) == (pixels.shape, np.uint8)
        assert np.array_equal(found, corrupt(pixels, 7, name, severity))
    assert np.array_equal(pixels, before)
    others = [corrupt(pixels, number, name, 5) for number in range(8, 12)]
    assert any(not np.array_equal(other, found) for other in others) == (name in RANDOM)


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - SATURATE))
def test_it_grows_with_its_severity(name: str) -> None:
    pixels = image(96, 3)
    away = [np.abs(corrupt(pixels, 3, name, s).astype(int) - pixels).mean() for s in SEVERITIES]
    assert 0 < away[0] < away[-1]
    assert sorted(away) == pytest.approx(away, rel=0.1)


def test_photons_are_counted_as_poisson_has_them() -> None:
    gray = np.full((256, 256, 1), 0.4, np.float32)
    counts = noise.shot_noise(gray, (25.0,), Chance(1, 1)) * 25
    # A level of 8 bits is near 0.4: its mean, and its variance, are those of 25 · 102/255 photons.
    assert counts.mean() == pytest.approx(10, abs=0.05)
    assert counts.var() == pytest.approx(10, rel=0.03)
    assert np.all(noise.shot_noise(np.zeros_like(gray), (25.0,), Chance(1, 1)) == 0)


def test_draws_are_normal_and_uniform() -> None:
    normal = Chance(5, 9).normal(200, 200)
    assert abs(normal.mean()) < 0.02
    assert normal.std() == pytest.approx(1, abs=0.02)
    chance = Chance(5, 9)
    first, second = chance.uniform(1000), chance.uniform(1000)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1
    assert (first.min() >= 0, first.max() < 1) == (True, True)


@pytest.mark.parametrize("size", [1, 8, 33, 96])
def test_a_cloud_fills_the_image_from_0_to_1(size: int) -> None:
    cloud = weather.plasma(size, 2.0, Chance(3, 3))
    assert cloud.shape == (size, size)
    assert 0 <= cloud.min() <= cloud.max() <= 1
    if size == 96:
        # Neighbours are alike: it is a cloud, and no noise.
        steps = np.abs(np.diff(cloud, axis=0)).mean()
        assert steps < 0.2 * cloud.std()
