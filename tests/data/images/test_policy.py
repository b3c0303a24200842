"""Policies against the operations of their sources: torchvision's own on Pillow's images, and timm's formulas."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import InterpolationMode, RandAugment, TrivialAugmentWide
from torchvision.transforms.autoaugment import _apply_op

from resnet_dist.config import Data
from resnet_dist.data.images.augment import recolored
from resnet_dist.data.images.draws import randomness
from resnet_dist.data.images.opened import Pixels
from resnet_dist.data.images.policy.apply import apply, rand_augment, trivial_augment
from resnet_dist.data.images.policy.operations import Canvas, operate
from resnet_dist.data.images.policy.spaces import (
    RAND_AUGMENT,
    TIMM_RAND_AUGMENT,
    TRIVIAL_AUGMENT_PIXELS,
    Op,
    Space,
)

SIZE = 37
MEAN = (0.485, 0.456, 0.406)
FILL = (124, 116, 104)  # the mean color in bytes
# torchvision's names of our operations.
TORCHVISION = {
    "identity": "Identity",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "rotate": "Rotate",
    "brightness": "Brightness",
    "color": "Color",
    "contrast": "Contrast",
    "sharpness": "Sharpness",
    "posterize": "Posterize",
    "solarize": "Solarize",
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
}


def data(**changes: object) -> Data:
    fields: dict[str, object] = {"train": "", "eval": "", "image_size": SIZE, "global_batch_size": 8}
    return Data.model_validate(fields | changes)


def picture(channels: int = 3) -> Pixels:
    """Return a smooth picture with noise: interpolations differ on it, and equalizing changes it."""
    down, right = np.mgrid[:SIZE, :SIZE]
    waves = [127 + 90 * np.sin(down / (5 + c) + right / (7 - c)) for c in range(channels)]
    noise = np.random.default_rng(0).integers(-20, 20, (SIZE, SIZE, channels))
    return np.clip(np.stack(waves, axis=-1) + noise, 0, 255).astype(np.uint8)


def torchvision_name(op: Op) -> str:
    axis = op.name[-1].upper()
    return f"Translate{axis}" if op.name.startswith("translate") else TORCHVISION[op.name]


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize(
    ("space", "theirs"),
    [
        (TRIVIAL_AUGMENT_PIXELS, TrivialAugmentWide()._augmentation_space(31)),
        (RAND_AUGMENT, RandAugment()._augmentation_space(31, (SIZE, SIZE))),
    ],
    ids=["trivial-augment", "rand-augment"],
)
def test_operations_are_those_of_torchvision_on_pillow(
    space: Space, theirs: dict[str, tuple[object, bool]], interpolation: str
) -> None:
    assert [torchvision_name(op) for op in space] == list(theirs)
    pixels, canvas = picture(), Canvas(True, interpolation)  # type: ignore[arg-type]
    for op in space:
        magnitudes, signed = theirs[torchvision_name(op)]
        assert op.signed == signed
        for level in (0, 1, 7, 16, 29, 30):
            magnitude = magnitudes[level].item() if magnitudes.ndim else 0.0  # type: ignore[attr-defined,index]
            for sign in (1, -1) if signed else (1,):
                strength = strength_of(op, level, negative=sign < 0)
                # torchvision keeps magnitudes in float32: compare them first, then what the operation does with them.
                assert strength == pytest.approx(sign * magnitude, rel=1e-6)
                ours = sign * magnitude / (SIZE if op.name.startswith("translate_") and op.high < 1 else 1)
                found = canvas.change(pixels, lambda image, op=op, m=ours: operate(op.name, image, m, canvas))
                options = (sign * magnitude, InterpolationMode(interpolation), None)
                expected = np.asarray(_apply_op(Image.fromarray(pixels), torchvision_name(op), *options))
                assert np.array_equal(found, expected), (op.name, level, sign)


def strength_of(op: Op, level: int, *, negative: bool) -> float:
    """Return a strength in torchvision's unit: translations in pixels, posterizing in whole bits."""
    strength = op.strength(level, negative=negative)
    if op.name.startswith("translate_") and op.high < 1:  # a share of the image
        return strength * SIZE
    return round(strength) if op.name == "posterize" else strength


def timm_operation(name: str, x: float, sign: int) -> Callable[[Image.Image, object], Image.Image]:
    """Return timm's operation at a magnitude of `x` of its largest, by Pillow alone; it takes a resampling filter."""

    def affine(*matrix: float) -> Callable[[Image.Image, object], Image.Image]:
        return lambda image, resample: image.transform(
            image.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=FILL
        )

    def enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Callable[..., Image.Image]:
        return lambda image, _: kind(image).enhance(max(0.1, 1 + sign * 0.9 * x))

    def lighten(value: int) -> int:
        return min(255, value + min(128, int(x * 110))) if value < 128 else value

    shear, moved = sign * 0.3 * x, sign * 0.45 * x * SIZE
    operations: dict[str, Callable[..., Image.Image]] = {
        "autocontrast": lambda image, _: ImageOps.autocontrast(image),
        "equalize": lambda image, _: ImageOps.equalize(image),
        "invert": lambda image, _: ImageOps.invert(image),
        "rotate": lambda image, resample: image.rotate(sign * 30 * x, resample, fillcolor=FILL),
        "posterize": lambda image, _: image.point([i & ~(2 ** (4 + int(x * 4)) - 1) for i in range(256)] * 3),
        "solarize": lambda image, _: ImageOps.solarize(image, 256 - min(256, int(x * 256))),
        "solarize_add": lambda image, _: image.point([lighten(value) for value in range(256)] * 3),
        "color": enhance(ImageEnhance.Color),
        "contrast": enhance(ImageEnhance.Contrast),
        "brightness": enhance(ImageEnhance.Brightness),
        "sharpness": enhance(ImageEnhance.Sharpness),
        "shear_x": affine(1, shear, 0, 0, 1, 0),
        "shear_y": affine(1, 0, 0, shear, 1, 0),
        "translate_part_x": affine(1, 0, moved, 0, 1, 0),
        "translate_part_y": affine(1, 0, 0, 0, 1, moved),
    }
    return operations[name]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_operations_of_timm_are_its_formulas_on_pillow(interpolation: str) -> None:
    pixels, canvas = picture(), Canvas(True, interpolation, FILL)  # type: ignore[arg-type]
    resample = Image.Resampling[interpolation.upper()]
    assert len(TIMM_RAND_AUGMENT) == 15
    for op in TIMM_RAND_AUGMENT:
        for level in (0, 6, 13.7, 18, 30):
            for sign in (1, -1) if op.signed else (1,):
                # Pillow's matrix leads from the result to the source: translations have the other sign.
                turned = -sign if op.name.startswith("translate") else sign
                expected = timm_operation(op.name, level / 30, turned)(Image.fromarray(pixels), resample)
                found = apply(op, pixels, level=level, negative=sign < 0, canvas=canvas)
                difference = np.abs(found.astype(int) - np.asarray(expected))
                # Shears go through an angle and back, which rounds a pixel in some ten thousand differently.
                allowed = (1, 0.001) if op.name.startswith("shear") else (0, 0)
                assert (difference.max(), difference.mean()) <= allowed, (op.name, level, sign)


def test_a_magnitude_of_6_in_timm_is_18_here() -> None:
    strengths = {op.name: op.strength(18, negative=False) for op in TIMM_RAND_AUGMENT}
    assert strengths["rotate"] == pytest.approx(18)
    assert strengths["shear_x"] == pytest.approx(0.18)
    assert strengths["translate_part_x"] == pytest.approx(0.27)
    assert (strengths["posterize"], strengths["solarize"], strengths["solarize_add"]) == (2, 103, 66)


def timm(**changes: object) -> Data:
    fields: dict[str, object] = {
        "policy": "rand-augment",
        "policy_space": "timm",
        "policy_magnitude": 18,
        "policy_probability": 0.5,
        "policy_backend": "pillow",
        "policy_interpolation": "random",
        "policy_fill": "mean",
    }
    return data(**(fields | changes))


def draws(
    op: Op, space: Space, *, coins: float = 0.6, level: float = 0.5, probability: float = 0.0
) -> np.ndarray:
    """Return the four draws that choose an operation. coins: 0.6 is positive and bilinear, 0.8 positive and bicubic."""
    return np.array([(space.index(op) + 0.5) / len(space), coins, level, probability])


def named(name: str, space: Space) -> Op:
    return next(op for op in space if op.name == name)


def test_an_operation_is_applied_with_its_probability() -> None:
    pixels, invert = picture(), named("invert", TIMM_RAND_AUGMENT)
    for probability, expected in ((0.49, 255 - pixels), (0.51, pixels)):
        found = rand_augment(pixels, draws(invert, TIMM_RAND_AUGMENT, probability=probability)[None], timm())
        assert np.array_equal(found, expected)
    fields = timm(policy_ops=2)
    random = randomness(np.arange(400), fields, seed=0, epoch=0)
    same = [np.array_equal(recolored(pixels, fields, random, row), pixels) for row in range(400)]
    # Both operations are left out in a quarter of the images, or change nothing.
    assert 0.2 < np.mean(same) < 0.32


@pytest.mark.parametrize(
    ("coins", "name"), [(0.1, "bilinear"), (0.3, "bicubic"), (0.6, "bilinear"), (0.8, "bicubic")]
)
def test_the_interpolation_is_random_and_apart_from_the_sign(coins: float, name: str) -> None:
    pixels, rotate = picture(), named("rotate", TIMM_RAND_AUGMENT)
    found = rand_augment(pixels, draws(rotate, TIMM_RAND_AUGMENT, coins=coins)[None], timm())
    degrees = -18 if coins < 0.5 else 18
    expected = Image.fromarray(pixels).rotate(degrees, Image.Resampling[name.upper()], fillcolor=FILL)
    assert np.array_equal(found, np.asarray(expected))


def test_noise_is_normal_around_the_magnitude_and_limited() -> None:
    """A rotation of level x is one of x degrees: read the level back from the draw of the noise."""
    pixels, rotate = picture(), named("rotate", TIMM_RAND_AUGMENT)
    for draw, level in ((0.5, 18.0), (0.841344746, 19.5), (0.158655254, 16.5), (0.0, 18 - 1.5 * 6.3375)):
        fields = timm(policy_noise=1.5)
        found = rand_augment(pixels, draws(rotate, TIMM_RAND_AUGMENT, level=draw)[None], fields)
        expected = Image.fromarray(pixels).rotate(level, Image.Resampling.BILINEAR, fillcolor=FILL)
        assert (found != np.asarray(expected)).mean() < 0.01, draw
    for draw, level in ((0.001, 0.0), (1 - 2**-32, 30.0)):
        fields = timm(policy_noise=30.0)
        found = rand_augment(pixels, draws(rotate, TIMM_RAND_AUGMENT, level=draw)[None], fields)
        expected = Image.fromarray(pixels).rotate(level, Image.Resampling.BILINEAR, fillcolor=FILL)
        assert np.array_equal(found, np.asarray(expected)), draw


@pytest.mark.parametrize("size", [37, 176])
def test_trivial_augment_moves_by_pixels_or_by_a_share(size: int) -> None:
    pixels = np.random.default_rng(0).integers(1, 256, (size, size, 3), np.uint8)
    translate = named("translate_pixels_x", TRIVIAL_AUGMENT_PIXELS)
    row = draws(translate, TRIVIAL_AUGMENT_PIXELS, level=0.999)
    for unit, moved in (("pixels", 32), ("share", int(size * 32 / 224))):
        fields = data(policy="trivial-augment", policy_translation=unit)
        found = trivial_augment(pixels, row, fields)
        assert np.array_equal(found[:, moved:], pixels[:, : size - moved])
        assert not found[:, :moved].any()


def test_gray_images_pass_every_operation_on_pillow() -> None:
    pixels = picture(1)
    for op in (*TIMM_RAND_AUGMENT, *TRIVIAL_AUGMENT_PIXELS):
        found = apply(op, pixels, level=20, negative=True, canvas=Canvas(True, "bilinear", (7,)))
        assert (found.shape, found.dtype) == (pixels.shape, np.uint8), op.name


@pytest.mark.parametrize(
    ("channels", "policy", "expected"),
    [
        (1, "rand-augment", "671ea92052f2e4d2"),
        (3, "rand-augment", "63d912118acc9f3e"),
        (1, "trivial-augment", "4e674e7169deb257"),
        (3, "trivial-augment", "332dae76f4944273"),
    ],
)
def test_policies_with_the_fields_of_0_3_0_give_its_pixels(channels: int, policy: str, expected: str) -> None:
    """The digests are those of version 0.3.0: runs that began with it can be resumed."""
    changes: dict[str, object] = {"channels": channels, "mean": (0.5,) * channels, "std": (0.5,) * channels}
    strength = {"policy_magnitude": 17} if policy == "rand-augment" else {}
    fields = data(image_size=24, policy=policy, **changes, **strength)
    random = randomness(np.arange(200), fields, seed=3, epoch=1)
    pixels = np.random.default_rng(channels).integers(0, 256, (24, 24, channels), np.uint8)
    digest = hashlib.sha256()
    for row in range(200):
        digest.update(np.ascontiguousarray(recolored(pixels.copy(), fields, random, row)).tobytes())
    assert digest.hexdigest()[:16] == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy_probability": 0.5}, "policy_probability=0.5 is not read with policy='none'"),
        ({"policy": "trivial-augment", "policy_space": "timm"}, "policy_space='timm' is not read with"),
        (
            {"policy": "rand-augment", "policy_translation": "pixels"},
            "policy_translation='pixels' is not read",
        ),
        (
            {"policy": "rand-augment", "policy_space": "timm"},
            "policy_space='timm' .* policy_backend='tensor'",
        ),
        ({"policy": "trivial-augment", "policy_interpolation": "bilinear"}, "only with 'pillow'"),
        ({"policy": "trivial-augment", "policy_fill": "mean"}, "only with 'pillow'"),
        ({"policy_backend": "pillow"}, "policy_backend='pillow' is not read with policy='none'"),
        ({"resize": "random"}, "resize='random' is not read with crop='none'"),
    ],
)
def test_fields_that_nothing_reads_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data(**changes)
