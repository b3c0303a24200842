"""Corruptions depend on the sample's id alone, keep the form of an image, and grow with their severity."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from resnet_dist.data.images.corruptions import noise, warp, weather
from resnet_dist.data.images.corruptions.chance import Chance
from resnet_dist.data.images.corruptions.table import CORRUPTIONS, SEVERITIES, corrupt
from tests.data.images.pictures import photo

RANDOM = {"gaussian_noise", "shot_noise", "impulse_noise", "motion_blur", "snow", "fog"}
RANDOM |= {"glass_blur", "elastic_transform"}
# The whole ladder of these is not monotone in mean difference, as in the original: motion and haze saturate, and warps
# trade rounds for distance, and wide fields for steep ones.
SATURATE = {"fog", "snow", "glass_blur", "elastic_transform"}


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


@pytest.mark.parametrize(("reach", "rounds"), [(1, 1), (1, 2), (2, 3)])
def test_glass_swaps_pixels_with_neighbours_one_after_the_other(reach: int, rounds: int) -> None:
    size = 12
    order = warp.shuffled(size, reach, rounds, Chance(4, 4))
    assert sorted(order) == list(range(size**2))  # Every pixel is still there.
    draws, grid = Chance(4, 4), [[(row, column) for column in range(size)] for row in range(size)]
    inside = range(size - reach, reach, -1)
    for _ in range(rounds):
        moves = (np.floor(2 * reach * draws.uniform(2, len(inside) ** 2)).astype(int) - reach).reshape(2, -1)
        for number, (row, column) in enumerate((row, column) for row in inside for column in inside):
            down, right = row + moves[0, number], column + moves[1, number]
            grid[row][column], grid[down][right] = grid[down][right], grid[row][column]
    assert [row * size + column for line in grid for row, column in line] == order.tolist()


def test_a_bell_curve_is_scipys() -> None:
    gaussian_filter = pytest.importorskip("scipy.ndimage").gaussian_filter
    image = np.random.default_rng(0).random((20, 20, 3), np.float32)
    for deviation, cut in ((0.4, 4), (1.5, 4), (6.4, 3), (40.0, 3)):
        expected = gaussian_filter(image, (deviation, deviation, 0), mode="reflect", truncate=cut)
        np.testing.assert_allclose(warp.smoothed(image, deviation, cut), expected, rtol=1e-4, atol=1e-5)
    assert np.array_equal(warp.smoothed(image, 0.0, 3), image)


def test_an_elastic_field_moves_pixels_by_the_definition() -> None:
    """Without a field the map is affine: corners of the square in the middle move to their places."""
    size = 33
    image = np.zeros((size, size, 1), np.float32)
    image[5, 27] = 1  # the second corner: middle 16, half 11
    strength = (0.0, 0.0, 3.0)
    found = warp.elastic_transform(image, strength, Chance(1, 1))
    moves = 3 * (2 * Chance(1, 1).uniform(3, 2) - 1)
    down, right = np.unravel_index(int(found[:, :, 0].argmax()), (size, size))
    assert abs(right - (27 + moves[1, 0])) <= 1
    assert abs(down - (5 + moves[1, 1])) <= 1
    # Without an affine map, each pixel comes from where the smoothed field points.
    ramp = np.broadcast_to(np.arange(size, dtype=np.float32)[None, :, None], (size, size, 1)).copy()
    found = warp.elastic_transform(ramp, (8.0, 2.0, 0.0), Chance(2, 2))
    chance = Chance(2, 2)
    chance.uniform(3, 2)
    field = 8 * warp.smoothed((2 * chance.uniform(size, size, 2) - 1).astype(np.float32), 2.0, 3)
    inner = slice(6, -6)
    np.testing.assert_allclose(
        found[inner, inner, 0], (ramp[:, :, 0] + field[:, :, 0])[inner, inner], atol=1e-3
    )
    assert np.abs(field).max() > 1
