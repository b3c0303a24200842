"""Progressive resizing: the image size of every step, and batches of that size from every kind of loader."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_dist.config import Data, Recipe, Train, steps_of
from resnet_dist.data.batches.loader import Batch, Loader
from resnet_dist.data.images.crop import to_sizes
from resnet_dist.data.images.decode import open_image
from resnet_dist.data.images.pixels import resize_batch
from resnet_dist.data.images.view import resize
from resnet_dist.data.shards.build import build_index
from resnet_dist.data.shards.index import Index, read_index
from resnet_dist.data.shards.names import expand
from resnet_dist.data.storage.cache.folder import CacheLimits
from resnet_dist.errors import RecipeError
from resnet_dist.order.samples import PADDING, Order
from resnet_dist.order.sizes import Sizes
from resnet_dist.train.evaluate import evaluation_loader
from resnet_dist.train.plan import Plan, order_of
from resnet_dist.world import World
from tests.data.conftest import SIZE, data_of, encoded, picture, write_shards

COUNTS = (61, 0, 40, 77, 30)
STEPS = sum(COUNTS) // 48
MOVING = Sizes(((0, 4), (2, 6), (5, 8)))  # for images of 8 pixels


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("sizes")
    return build_index(expand(write_shards(folder, COUNTS)), folder, CacheLimits(folder / "cache", 1, 1.0))[0]


def batches(
    index: Index, data: Data, steps: range, *, sizes: Sizes | None = MOVING, world_size: int = 1
) -> list[torch.Tensor]:
    """Return the images of every step, of all ranks in order."""
    ranks = [
        loader(index, data, World(r, 0, world_size, torch.device("cpu")), sizes) for r in range(world_size)
    ]
    found = [torch.cat([rank.batch_at(step).images_BSSC for rank in ranks]) for step in steps]
    for rank in ranks:
        rank.close()
    return found


def loader(index: Index, data: Data, world: World, sizes: Sizes | None = MOVING) -> Loader:
    order = Order(index.counts, data.global_batch_size, data.lanes, data.window, 5, training=True)
    return Loader(index, order, data, world, seed=5, sizes=sizes)


@given(
    st.lists(st.tuples(st.integers(1, 500), st.integers(1, 9)), min_size=1, max_size=5), st.integers(0, 3000)
)
def test_linear_sizes_are_interpolated_and_rounded(gaps: list[tuple[int, int]], step: int) -> None:
    at = np.cumsum([gap for gap, _ in gaps]).tolist()
    sizes = Sizes(tuple(zip(at, [32 * size for _, size in gaps], strict=True)), multiple=32)
    exact = np.interp(step, at, [32 * size for _, size in gaps])
    assert sizes.at(step) % 32 == 0
    assert abs(sizes.at(step) - exact) <= 16 + 1e-6
    assert sizes.at(at[0] - 1) == sizes.at(0) == 32 * gaps[0][1]
    assert sizes.at(at[-1]) == 32 * gaps[-1][1]
    assert sizes.largest == max(32 * size for _, size in gaps)


def test_ffcvs_sizes() -> None:
    """From 160 to 192 in multiples of 32, the size changes half way."""
    sizes = Sizes(((100, 160), (200, 192)), multiple=32)
    assert [sizes.at(step) for step in (0, 100, 149, 151, 200, 10_000)] == [160, 160, 160, 192, 192, 192]


def test_plain_steps_hold_until_the_next_point() -> None:
    assert [MOVING.at(step) for step in (0, 1, 2, 4, 5, 99)] == [4, 4, 6, 6, 8, 8]
    assert Sizes.constant(224).at(10**9) == 224


def test_lengths_become_steps_once(digits_recipe: Recipe) -> None:
    points = 'data.train_sizes=[["0 epochs", 4], ["1 epoch", 6], ["1500 samples", 8]]'
    moving = digits_recipe.with_overrides([points])
    index = read_index(digits_recipe.data.train)
    assert Plan.of(moving, order_of(moving, index)).sizes == Sizes(((0, 4), (11, 6), (12, 8)))
    assert Plan.of(digits_recipe, order_of(digits_recipe, index)).sizes == Sizes.constant(8)
    linear = ["data.train_size_curve=linear", "data.train_size_multiple=2"]
    assert (
        Plan.of(moving.with_overrides(linear), order_of(moving.with_overrides(linear), index)).sizes.multiple
        == 2
    )
    back = digits_recipe.with_overrides(['data.train_sizes=[["2 epochs", 4], ["22 steps", 8]]'])
    with pytest.raises(
        RecipeError, match="data.train_sizes: '22 steps' is step 22, which is not after '2 epochs'"
    ):
        Plan.of(back, order_of(back, index))
    assert Recipe.from_json(moving.to_json()) == moving


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (['data.train_sizes=[["0 epochs", 9]]'], "train_sizes goes to 9, but image_size=8"),
        (['data.train_sizes=[["0 epochs", 0]]'], "data.train_sizes.0.1=0"),
        (['data.train_sizes=[["soon", 8]]'], "data.train_sizes.0.0='soon'"),
        (
            ['data.train_sizes=[["0 epochs", 6], ["1 epochs", 8]]', "data.train_size_curve=linear"],
            "train_sizes has 6, which is not a multiple of train_size_multiple=32",
        ),
    ],
)
def test_impossible_sizes_are_refused(digits_recipe: Recipe, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        digits_recipe.with_overrides(overrides)
    assert message in str(caught.value)


class Compiled(Train):
    compile: str = "default"


def test_compiling_for_a_moving_size_is_refused(digits_recipe: Recipe) -> None:
    fields = {name: getattr(digits_recipe, name) for name in Recipe.model_fields} | {
        "train": Compiled(length="2 epochs")
    }
    assert Recipe(**fields).data.train_sizes == ()
    for points, fits in (([("0 steps", 4), ("9 steps", 8)], False), ([("0 steps", 4), ("9 steps", 4)], True)):
        moving = fields | {"data": digits_recipe.data.model_copy(update={"train_sizes": tuple(points)})}
        if fits:
            Recipe(**moving)
            continue
        with pytest.raises(
            ValueError, match=r"train.compile='default' .* data.train_sizes moves over \[4, 8\]"
        ):
            Recipe(**moving)
        Recipe(**moving | {"train": Compiled(length="2 epochs", compile="none")})


@pytest.mark.parametrize("crop", ["pad-crop", "none", "random-resized-crop"])
def test_batches_have_the_size_of_their_step_on_any_ranks_and_after_any_restart(
    index: Index, crop: str
) -> None:
    data = data_of(index, crop=crop, prefetch_batches=3, erase=0.3)
    whole = batches(index, data, range(STEPS + 3))
    assert [images.shape[1] for images in whole] == [MOVING.at(step) for step in range(STEPS + 3)]
    for world_size in (2, 6, 24):
        for ours, theirs in zip(
            batches(index, data, range(STEPS + 3), world_size=world_size), whole, strict=True
        ):
            assert torch.equal(ours, theirs)
    for start in (1, 2, 4, 5, 6):
        for ours, theirs in zip(batches(index, data, range(start, STEPS + 3)), whole[start:], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("cache", ["ram", "device"])
@pytest.mark.parametrize("changes", [{"crop": "pad-crop"}, {"crop": "pad-crop", "pad": 0}, {"crop": "none"}])
def test_a_cached_set_gives_the_same_sizes(index: Index, cache: str, changes: dict[str, object]) -> None:
    expected = batches(index, data_of(index, **changes), range(7))
    for world_size in (1, 3):
        found = batches(index, data_of(index, cache=cache, **changes), range(7), world_size=world_size)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_a_smaller_size_is_a_smaller_window_anywhere_in_the_padded_image(index: Index) -> None:
    data = data_of(index, crop="pad-crop", pad=2, flip=False)
    with loader(index, data, World.single(), Sizes.constant(6)) as loading:
        found = [loading.batch_at(step) for step in range(3 * STEPS)]
    corners = set()
    for batch in found:
        for image, sample_id in zip(batch.images_BSSC.numpy(), batch.ids_B.tolist(), strict=True):
            padded = np.pad(picture(sample_id), ((2, 2), (2, 2), (0, 0)))
            places = [
                (down, right)
                for down in range(7)
                for right in range(7)
                if np.array_equal(padded[down : down + 6, right : right + 6], image)
            ]
            assert places
            corners |= set(places)
    assert corners == {(down, right) for down in range(7) for right in range(7)}


def test_without_a_crop_a_smaller_size_is_the_image_shrunk(index: Index) -> None:
    with loader(index, data_of(index, crop="none", flip=False), World.single()) as loading:
        for step in (0, 2, 5):
            batch: Batch = loading.batch_at(step)
            size = MOVING.at(step)
            for image, sample_id in zip(batch.images_BSSC.numpy(), batch.ids_B.tolist(), strict=True):
                assert np.array_equal(image, resize(picture(sample_id), size, size))


def test_shrinking_on_a_device_differs_by_rounding() -> None:
    """The arithmetic of `resize_batch` on a GPU is repeated here on the CPU."""
    images = torch.from_numpy(np.stack([picture(number, 32) for number in range(5)]))
    ours = resize_batch(images, 24)
    scaled = torch.nn.functional.interpolate(
        images.permute(0, 3, 1, 2).float(), (24, 24), mode="bilinear", antialias=True
    )
    theirs = scaled.round().clamp(0, 255).permute(0, 2, 3, 1)
    assert ours.shape == (5, 24, 24, 3)
    assert (ours.float() - theirs).abs().max() <= 1
    for image, alone in zip(ours, images, strict=True):
        assert np.array_equal(image.numpy(), resize(alone.numpy(), 24, 24))


def test_random_crops_have_the_size_asked_for(index: Index) -> None:
    data = data_of(index, crop="random-resized-crop", flip=False)
    image = open_image(encoded(picture(3, 40)), 3)
    draws = np.random.default_rng(0).random(40)
    for size in (8, 24):
        [view] = to_sizes(image, data, [draws], [False], size)
        assert view.shape == (size, size, 3)


@pytest.mark.parametrize(("largest", "ahead"), [(4, 5), (8, 3)])
def test_batches_in_flight_count_the_largest_size(index: Index, largest: int, ahead: int) -> None:
    """Four batches of 48 images of 8 x 8 x 3 fit, with the one in use; at a quarter of the area, all five do."""
    data = data_of(index, prefetch_batches=5, prefetch_bytes=4 * 48 * 8 * 8 * 3)
    with loader(index, data, World.single(), Sizes(((0, 4), (10**6, largest)))) as loading:
        loading.batch_at(0)
        assert len(loading._ahead) == ahead


def test_evaluation_has_its_own_size(index: Index) -> None:
    assert data_of(index).evaluation_size == SIZE
    for cache in ("none", "ram"):
        data = data_of(index, eval_size=6, eval_crop=0.75, cache=cache)
        with evaluation_loader(index, data, World.single()) as loading:
            batch = loading.batch_at(0)
        for image, sample_id in zip(batch.images_BSSC.numpy(), batch.ids_B.tolist(), strict=True):
            seen = picture(sample_id)[1:7, 1:7] if sample_id != PADDING else np.zeros((6, 6, 3))
            assert np.array_equal(image, seen)


def test_a_length_in_samples_counts_draws() -> None:
    assert steps_of("480 samples", steps_per_epoch=7, global_batch_size=48) == 10
