"""Augmentation: the effect of each field, and draws that depend on identity alone."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
import torch

from resnet_dist.config import Data, Recipe, check_world_size
from resnet_dist.data.images.augment import augmented, recolored
from resnet_dist.data.images.draws import randomness
from resnet_dist.data.images.mix import Mixed, beta, mix
from resnet_dist.data.images.pixels import erased, flip_, pixels_at, reflected_windows, windows
from resnet_dist.data.images.policy.apply import apply, jitter_color
from resnet_dist.data.images.policy.spaces import RAND_AUGMENT, TRIVIAL_AUGMENT
from resnet_dist.errors import RecipeError

SIZE = 12


def data(**changes: object) -> Data:
    fields: dict[str, object] = {"train": "", "eval": "", "image_size": SIZE, "global_batch_size": 8}
    return Data.model_validate(fields | changes)


def images(count: int, channels: int = 3) -> torch.Tensor:
    pixels = np.random.default_rng(count).integers(0, 256, (count, SIZE, SIZE, channels), np.uint8)
    return torch.from_numpy(pixels)


def padded_crop(image: np.ndarray, down: int, right: int, pad: int = 8) -> np.ndarray:
    wide = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    return wide[pad + down : pad + down + SIZE, pad + right : pad + right + SIZE]


@pytest.mark.parametrize("channels", [1, 3])
def test_shifting_is_padding_and_cropping(channels: int) -> None:
    source = images(5, channels)
    moves = np.array([(d, r) for d in range(-4, 5) for r in range(-4, 5)])
    for rows in (np.zeros(81, np.int64), np.full(81, 4), np.arange(81) % 5):
        found = windows(source, rows, moves[:, 0], moves[:, 1], SIZE)
        for image, row, (down, right) in zip(found.numpy(), rows, moves, strict=True):
            assert np.array_equal(image, padded_crop(source[row].numpy(), down, right))


@pytest.mark.parametrize("size", [1, 5, SIZE - 1])
def test_a_smaller_window_is_padding_and_cropping(size: int) -> None:
    source = images(5)
    moves = np.array([(d, r) for d in range(-3, SIZE - size + 4) for r in range(-3, SIZE - size + 4)])
    rows = np.arange(len(moves)) % 5
    found = windows(source, rows, moves[:, 0], moves[:, 1], size)
    for image, row, (down, right) in zip(found.numpy(), rows, moves, strict=True):
        assert np.array_equal(image, padded_crop(source[row].numpy(), down, right)[:size, :size])


@pytest.mark.parametrize("size", [5, SIZE, SIZE + 2])
def test_a_window_over_the_reflection_is_reflecting_and_cropping(size: int) -> None:
    source, pad = images(5), SIZE - 1
    moves = np.array([(d, r) for d in range(-pad, 3) for r in range(-2, SIZE - size + pad)])
    rows = np.arange(len(moves)) % 5
    found = reflected_windows(source, rows, moves[:, 0], moves[:, 1], size)
    for image, row, (down, right) in zip(found.numpy(), rows, moves, strict=True):
        wide = np.pad(source[row].numpy(), ((pad, pad), (pad, pad), (0, 0)), mode="reflect")
        assert np.array_equal(image, wide[pad + down :, pad + right :][:size, :size])


def test_pad_crop_reflects_where_the_recipe_says_so() -> None:
    fields = {
        "train": "",
        "eval": "",
        "image_size": SIZE,
        "global_batch_size": 8,
        "crop": "pad-crop",
        "pad": 3,
    }
    black, reflect = (Data.model_validate({**fields, "pad_fill": fill}) for fill in ("black", "reflect"))
    source, rows = images(8) // 2 + 100, np.arange(8)
    draws = randomness(rows, black, seed=0, epoch=0)
    shifted, whole = (augmented(source, rows, data, draws, SIZE) for data in (black, reflect))
    assert (shifted == 0).any()
    assert not (whole == 0).any()
    assert torch.equal(whole[shifted != 0], shifted[shifted != 0])
    with pytest.raises(
        ValueError, match=f"pad={SIZE} with pad_fill='reflect' needs an image of more than {SIZE} pixels"
    ):
        Data.model_validate({**fields, "pad": SIZE, "pad_fill": "reflect"})


def test_the_shifting_of_a_gpu_gives_the_same_pixels() -> None:
    """`pixels_at`, which `windows` uses on a GPU, runs on the CPU here."""
    source, rows = images(5), np.array([0, 4, 2, 2])
    down, right = np.array([-3, 0, 2, 1]), np.array([2, -1, 0, -4])
    expected = windows(source, rows, down, right, SIZE)

    size = SIZE
    down_BS, right_BS = down[:, None] + np.arange(size), right[:, None] + np.arange(size)
    found = pixels_at(source, rows, torch.from_numpy(down_BS), torch.from_numpy(right_BS))
    inside = ((down_BS >= 0) & (down_BS < size))[:, :, None] & ((right_BS >= 0) & (right_BS < size))[
        :, None, :
    ]
    assert torch.equal(found[torch.from_numpy(inside)], expected[torch.from_numpy(inside)])
    assert not expected[torch.from_numpy(~inside)].any()


def test_flipping_mirrors_only_the_marked_images() -> None:
    source = images(6)
    found, marked = source.clone(), np.array([True, False, False, True, True, False])
    flip_(found, marked)
    for before, after, mirrored in zip(source, found, marked, strict=True):
        assert torch.equal(after, before.flip(1) if mirrored else before)


def test_erasing_paints_one_rectangle_with_the_mean() -> None:
    source = torch.full((200, SIZE, SIZE, 3), 7, dtype=torch.uint8)
    draws = np.random.default_rng(0).random((200, 4))
    chosen = np.arange(200) % 2 == 0
    found = erased(source, chosen, draws, (0.5, 0.25, 1.0)).numpy()
    areas = []
    for image, erase in zip(found, chosen, strict=True):
        painted = (image == (128, 64, 255)).all(axis=-1)
        assert ((image == 7).all(axis=-1) | painted).all()
        assert painted.any() == erase
        if erase:
            rows, columns = np.nonzero(painted.any(axis=1))[0], np.nonzero(painted.any(axis=0))[0]
            assert painted.sum() == len(rows) * len(columns)
            assert painted[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            areas.append(painted.mean())
    assert 0.1 < np.mean(areas) < 0.25  # Areas are drawn between 2 and 33 %.


def test_draws_depend_on_the_sample_and_not_on_its_row() -> None:
    fields = data(crop="random-resized-crop", policy="rand-augment", color_jitter=0.4, erase=0.3, flip=True)
    ids = np.array([5, 900_000_000_000, 3, 77])
    both = randomness(ids, fields, seed=1, epoch=2)
    for row, sample_id in enumerate(ids):
        alone = randomness(np.array([sample_id]), fields, seed=1, epoch=2)
        for name in both.__dataclass_fields__:
            assert np.array_equal(getattr(alone, name)[0], getattr(both, name)[row])
    for seed, epoch in ((1, 3), (2, 2)):
        other = randomness(ids, fields, seed=seed, epoch=epoch)
        assert not np.array_equal(other.batch_N4, both.batch_N4)
    # A field does not change the draws of another one.
    plain = randomness(ids, data(crop="random-resized-crop"), seed=1, epoch=2)
    assert np.array_equal(plain.crop_NK, both.crop_NK)
    assert np.array_equal(plain.batch_N4, both.batch_N4)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_operation_of_the_policies(channels: int) -> None:
    pixels = images(1, channels)[0].numpy()
    for op in (*RAND_AUGMENT, *TRIVIAL_AUGMENT):
        before = pixels.copy()
        weak, strong = (apply(op, pixels, level=level, negative=False) for level in (0, 30))
        assert np.array_equal(pixels, before)
        assert weak.shape == strong.shape == pixels.shape
        assert weak.dtype == strong.dtype == np.uint8
        if op.high != op.low and not (channels == 1 and op.name == "color"):
            assert not np.array_equal(strong, pixels), op.name
        if op.signed:
            assert np.array_equal(weak, pixels), op.name
            if not (channels == 1 and op.name == "color"):
                assert not np.array_equal(apply(op, pixels, level=30, negative=True), strong), op.name


def test_policies_and_jitter_follow_their_draws() -> None:
    fields = data(policy="rand-augment", policy_ops=2, policy_magnitude=20, color_jitter=0.5)
    random = randomness(np.arange(64), fields, seed=0, epoch=0)
    pixels = images(1)[0].numpy()
    found = [recolored(pixels, fields, random, row) for row in range(64)]
    assert all(np.array_equal(recolored(pixels, fields, random, row), found[row]) for row in range(64))
    assert len({image.tobytes() for image in found}) > 60
    assert np.array_equal(jitter_color(pixels, np.full(4, 0.5), strength=0.0), pixels)
    brighter = jitter_color(pixels, np.array([1.0, 0.5, 0.5, 0.0]), strength=0.5)
    assert np.abs(brighter.astype(float) - np.minimum(255, pixels * 1.5)).max() <= 1


def test_mixup_and_cutmix() -> None:
    batch = torch.arange(6.0).reshape(6, 1, 1, 1).expand(6, 3, 8, 8).contiguous()
    before = batch.clone()
    shares = []
    for step in range(60):
        mixed = mix(batch, data(mixup=0.4), seed=0, step=step, micro_batch=0)
        expected = mixed.share * batch + (1 - mixed.share) * batch.roll(1, 0)
        torch.testing.assert_close(mixed.images_MCHW, expected)
        shares.append(mixed.share)
        cut = mix(batch, data(cutmix=1.0), seed=0, step=step, micro_batch=0)
        theirs = (cut.images_MCHW == batch.roll(1, 0)).float().mean(dim=(1, 2, 3))
        torch.testing.assert_close(theirs, torch.full((6,), 1 - cut.share))
        assert ((cut.images_MCHW == batch) | (cut.images_MCHW == batch.roll(1, 0))).all()
    assert torch.equal(batch, before)
    assert 0.3 < np.mean(shares) < 0.7
    # With alpha below 1, most of each mixed image comes from one of the two.
    assert np.mean([min(share, 1 - share) for share in shares]) < 0.25
    labels = torch.arange(6)
    assert Mixed.partner(labels).tolist() == [5, 0, 1, 2, 3, 4]
    untouched = mix(batch, data(), seed=0, step=0, micro_batch=0)
    assert untouched.images_MCHW is batch
    assert untouched.share == 1


def test_mixup_and_cutmix_alternate_at_random_and_micro_batches_differ() -> None:
    batch = torch.rand(4, 3, 8, 8)
    fields = data(mixup=0.2, cutmix=1.0)
    kinds = set()
    for step in range(20):
        mixed = mix(batch, fields, seed=0, step=step, micro_batch=1)
        again = mix(batch, fields, seed=0, step=step, micro_batch=1)
        assert torch.equal(mixed.images_MCHW, again.images_MCHW)
        assert not torch.equal(
            mixed.images_MCHW, mix(batch, fields, seed=0, step=step, micro_batch=2).images_MCHW
        )
        kept = (mixed.images_MCHW == batch) | (mixed.images_MCHW == batch.roll(1, 0))
        kinds.add(bool(kept.all()))
    assert kinds == {True, False}


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0, 2.0, 2.5, 4.0, 50.0])
def test_beta_has_its_moments(alpha: float) -> None:
    rng = np.random.default_rng(0)
    draws = np.array([beta(alpha, rng.random(64).tolist()) for _ in range(4000)])
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(draws.mean() - 0.5) < 0.03
    assert abs(draws.var() - variance) < 0.1 * variance
    assert 0 <= draws.min() <= draws.max() <= 1


def test_beta_up_to_2_draws_what_it_always_drew() -> None:
    """The digest is that of version 0.3.0: runs that began with it can be resumed."""
    rng, digest = np.random.default_rng(1), hashlib.sha256()
    for alpha in (0.1, 0.4, 1.0, 1.5, 2.0):
        for _ in range(50):
            digest.update(struct.pack("<d", beta(alpha, rng.random(64).tolist())))
    assert digest.hexdigest() == "25655c27a7f7b9b84c8022c13f116b7f788a76ab943e4007ee41c8d4309322d4"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache": "ram", "crop": "random-resized-crop"}, "cache='ram'.*crop='random-resized-crop'"),
        ({"cache": "device", "policy": "rand-augment"}, "cache='device'.*policy='rand-augment'"),
        ({"cache": "device", "color_jitter": 0.1}, "color_jitter=0.1"),
        ({"mixup": 0.2, "micro_batch_size": 1, "lanes": 128}, "mixup=0.2.*micro_batch_size=1"),
        ({"cutmix": 1.0, "global_batch_size": 1, "lanes": 1}, "cutmix=1.0.*global_batch_size=1"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(
    digits_recipe: Recipe, changes: dict[str, object], message: str
) -> None:
    overrides = [f"data.{name}={value}" for name, value in changes.items()]
    with pytest.raises(RecipeError, match=message):
        digits_recipe.with_overrides(["data.micro_batch_size=none", *overrides])


def test_mixing_with_one_image_per_rank_is_refused() -> None:
    fields = data(mixup=0.2, lanes=8)
    check_world_size(fields, 4)
    check_world_size(data(lanes=8), 8)
    with pytest.raises(
        RecipeError, match="--workers 8: data.mixup=0.2 and data.cutmix=0.0 .* which has one of"
    ):
        check_world_size(fields, 8)


def test_without_augmentation_images_are_copied_unchanged() -> None:
    source, rows = images(5), np.array([3, 0, 4])
    random = randomness(rows, data(), seed=0, epoch=0)
    assert torch.equal(augmented(source, rows, data(), random, SIZE), source[[3, 0, 4]])
    assert torch.equal(augmented(source, rows, data(), None, SIZE), source[[3, 0, 4]])
