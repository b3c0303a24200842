"""Decoding: the part that a crop needs equals that part of a whole decode, and agrees with Pillow in every format."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from resnet_dist.config import Data
from resnet_dist.data.images.crop import random_box, to_sizes
from resnet_dist.data.images.decode import open_image
from resnet_dist.data.images.draws import randomness
from resnet_dist.data.images.jpeg import crops
from resnet_dist.data.images.jpeg import header as jpeg_header
from resnet_dist.data.images.opened import Box, scale_for
from resnet_dist.data.images.view import middle, resize
from tests.data.conftest import decode_image
from tests.data.images.pictures import jpeg, photo, saved

needs_region_decoder = pytest.mark.skipif(
    find_spec("nvidia") is None or find_spec("nvidia.nvimgcodec") is None,
    reason="nvImageCodec is not installed: JPEGs are decoded whole",
)
IMAGENET_SAMPLE = Path(__file__).parents[3] / "shared/data/imagenet-sample-200.tar"


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30}, {"restart_marker_rows": 2}])
def test_the_part_that_is_decoded_equals_that_part_of_the_whole(
    subsampling: str, options: dict[str, object]
) -> None:
    data = jpeg(photo(203, 301), subsampling=subsampling, **options)
    for channels in (1, 3):
        everything = decode_image(data, channels)
        image = open_image(data, channels)
        for box in (Box(0, 0, 50, 50), Box(3, 7, 99, 200), Box(100, 50, 86, 100), Box(120, 0, 83, 301)):
            expected = everything[box.top : box.top + box.height, box.left : box.left + box.width]
            assert np.array_equal(image.pixels(box, 224), expected)


def sampled(pixels: Image.Image, subsampling: str) -> bytes:
    return bytes(simplejpeg.encode_jpeg(np.array(pixels), 90, colorsubsampling=subsampling))


RARE = {
    "4:4:0": lambda image: sampled(image, "440"),
    "4:1:1": lambda image: sampled(image, "411"),
    "stored as RGB": lambda image: jpeg(image, keep_rgb=True),
    "restart markers within rows": lambda image: jpeg(image, restart_marker_blocks=5, subsampling="4:2:0"),
}


@pytest.mark.parametrize("kind", RARE)
def test_rare_kinds_of_jpeg_have_the_same_pixels_in_part_and_whole(
    kind: str,
) -> None:
    data = RARE[kind](photo(211, 307))
    rng = np.random.default_rng(0)
    boxes = [random_box(211, 307, 224, draws) for draws in rng.random((40, 40))]
    for channels in (1, 3):
        everything = decode_image(data, channels)
        image = open_image(data, channels)
        for box in boxes:
            expected = everything[box.top : box.top + box.height, box.left : box.left + box.width]
            assert np.array_equal(image.pixels(box, 224), expected)


@needs_region_decoder
def test_only_the_part_that_a_crop_needs_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        def record(*arguments: object, **options: object) -> Any:
            pixels = function(*arguments, **options)
            shapes.append(pixels.shape)
            return pixels

        return record

    monkeypatch.setattr(crops.simplejpeg, "decode_jpeg", recorded(crops.simplejpeg.decode_jpeg))
    monkeypatch.setattr(crops, "decode_region", recorded(crops.decode_region))
    image = open_image(jpeg(photo(496, 304)), 3)
    for box, size in ((Box(5, 9, 16, 200), 224), (Box(0, 0, 496, 304), 224), (Box(0, 0, 304, 304), 76)):
        image.pixels(box, size)
    # The last one is decoded at a quarter of the scale: 304 / 76 = 4.
    assert shapes == [(16, 200, 3), (496, 304, 3), (124, 76, 3)]


@needs_region_decoder
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_machine_without_the_region_decoder_gets_the_same_pixels(
    subsampling: str, progressive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = jpeg(photo(211, 307), subsampling=subsampling, progressive=progressive)
    rng = np.random.default_rng(0)
    boxes = [random_box(211, 307, 224, draws) for draws in rng.random((40, 40))]
    ours = [open_image(data, 3).pixels(box, 224).copy() for box in boxes]
    monkeypatch.setattr(crops, "decode_region", lambda *arguments: None)
    for box, pixels in zip(boxes, ours, strict=True):
        assert np.array_equal(open_image(data, 3).pixels(box, 224), pixels)


@pytest.mark.parametrize("cut", [10, 500, 2000])
def test_a_truncated_file_is_bad_wherever_the_crop_lies(cut: int) -> None:
    data = jpeg(photo(400, 300))[:-cut]
    for box in (Box(0, 0, 30, 30), Box(200, 100, 200, 200)):
        with pytest.raises(ValueError, match="not a readable image"):
            open_image(data, 3).pixels(box, 224)


def is_refused(data: bytes) -> bool:
    try:
        decode_image(data, 3)
    except ValueError:
        return True
    return False


def test_a_file_damaged_in_its_middle_is_bad_as_a_whole_and_may_be_good_for_a_crop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The region decoder makes a difference here alone: without it, the sample is bad for every crop."""
    good = jpeg(photo(400, 300))
    above, plain = Box(0, 0, 60, 60), decode_image(good, 3)[:60, :60]
    half = len(good) // 2
    # Try several: libjpeg tolerates most of them.
    noise = (random.Random(seed).randbytes(20) for seed in range(1000))
    data = next(filter(is_refused, (good[:half] + some + good[half + 20 :] for some in noise)))
    image = open_image(data, 3)
    if find_spec("nvidia") is not None and find_spec("nvidia.nvimgcodec") is not None:
        assert np.array_equal(image.pixels(above, 224), plain)
    monkeypatch.setattr(crops, "decode_region", lambda *arguments: None)
    for box in (above, Box(300, 200, 90, 90)):
        with pytest.raises(ValueError, match="not a readable image"):
            image.pixels(box, 224)


def test_a_shrunk_crop_agrees_with_pillow() -> None:
    picture = photo(1024, 1536, grain=24)
    data = jpeg(picture, quality=95)
    rng = np.random.default_rng(0)
    for draws in rng.random((20, 40)):
        box = random_box(1024, 1536, 96, draws)
        assert all(edge % scale_for(box.height, box.width, 96) == 0 for edge in box)
        ours = resize(open_image(data, 3).pixels(box, 96), 96, 96)
        assert difference(ours, data, box, 96) < 2


def difference(ours: np.ndarray, data: bytes, box: Box, size: int) -> float:
    """Return the mean absolute difference from Pillow's antialiased crop, in levels of 255."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    corners = (box.left, box.top, box.left + box.width, box.top + box.height)
    theirs = np.asarray(image.crop(corners).resize((size, size), Image.Resampling.BILINEAR))
    return float(np.abs(ours.astype(int) - theirs).mean())


@pytest.mark.skipif(not IMAGENET_SAMPLE.exists(), reason="needs the ImageNet sample, which is not public")
def test_crops_of_real_photographs_agree_with_pillow() -> None:
    data = Data(
        train="", eval="", image_size=224, global_batch_size=8, crop="random-resized-crop", loader_workers=1
    )
    with tarfile.open(IMAGENET_SAMPLE) as tar:
        images = [tar.extractfile(member).read() for member in tar if member.isfile()]  # type: ignore[union-attr]
    assert len(images) == 200
    found = []
    for epoch in range(2):
        random = randomness(np.arange(200), data, seed=0, epoch=epoch)
        for encoded, draws in zip(images, random.crop_NK, strict=True):
            image = open_image(encoded, 3)
            box = random_box(image.height, image.width, 224, draws)
            found.append(difference(to_sizes(image, data, [draws], [False], 224)[0], encoded, box, 224))
    print(f"mean {np.mean(found):.3f}, largest {np.max(found):.3f}")
    assert np.mean(found) <= 2
    assert np.max(found) <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["jpeg", "png", "webp"])
def test_exif_orientation(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if form == "jpeg" else {"lossless": True} if form == "webp" else {}
    data = saved(photo(40, 61), form, exif=exif, **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(decode_image(data, 3), expected)
    image = open_image(data, 3)
    assert (image.height, image.width) == expected.shape[:2]
    assert np.array_equal(image.pixels(Box(3, 5, 20, 11), 224), expected[3:23, 5:16])


def test_a_turned_image_of_the_wanted_size_is_mirrored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    fields = Data(train="", eval="", image_size=40, global_batch_size=8)
    image = open_image(jpeg(photo(40, 40), exif=exif), 3)
    [plain] = to_sizes(image, fields, [None], [False], 40)
    plain = plain.copy()
    [mirrored] = to_sizes(image, fields, [None], [True], 40)
    assert np.array_equal(mirrored, plain[:, ::-1])


def test_a_remembered_header_is_used_only_for_images_that_begin_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The images differ in one thing alone (size, quality, EXIF, colors), or end inside their header."""
    exif = Image.Exif()
    exif[0x0112] = 6
    images = [
        jpeg(photo(24, 32)),
        jpeg(photo(24, 33)),
        jpeg(photo(23, 32)),
        jpeg(photo(24, 32), quality=50),
        jpeg(photo(24, 32), exif=exif.tobytes()),
        jpeg(photo(24, 32).convert("L")),
        jpeg(photo(24, 32).convert("CMYK")),
    ]
    images += [image[:size] for image in images[:1] for size in range(100, 200)]

    def parsed(data: bytes) -> object:
        monkeypatch.setattr(jpeg_header, "_newest", (b"\0", None))
        return jpeg_header.read_header(data)

    alone = [parsed(data) for data in images]
    # Six headers, of which one belongs to two qualities, and None for the images that end inside theirs.
    assert len(set(alone)) == 7
    generator = random.Random(0)
    for number in generator.choices(range(len(images)), k=2000):
        assert jpeg_header.read_header(images[number]) == alone[number]
        assert (
            jpeg_header.read_header(images[number]) == alone[number]
        )  # The second call finds it remembered.


def test_an_image_of_the_wanted_size_is_unchanged_unless_it_is_cropped_or_mirrored() -> None:
    data = jpeg(photo(32, 32))
    fields = Data(train="", eval="", image_size=32, global_batch_size=8)
    [plain] = to_sizes(open_image(data, 3), fields, [None], [False], 32)
    assert np.array_equal(plain, decode_image(data, 3))
    cut = fields.model_copy(update={"eval_crop": 0.875})
    expected = resize(decode_image(data, 3)[2:30, 2:30], 32, 32)
    [enlarged] = to_sizes(open_image(data, 3), cut, [None], [False], 32)
    assert np.array_equal(enlarged, expected)
    [mirrored] = to_sizes(open_image(data, 3), fields, [None], [True], 32)
    assert np.array_equal(mirrored, decode_image(data, 3)[:, ::-1])


def ramp() -> np.ndarray:
    return np.tile(np.arange(256, dtype=np.uint8), (4, 1))


def test_gray_and_color() -> None:
    gray = saved(Image.fromarray(ramp()), "png")
    assert np.array_equal(decode_image(gray, 1)[..., 0], ramp())
    assert np.array_equal(decode_image(gray, 3), np.repeat(ramp()[..., None], 3, axis=2))
    gray_jpeg = jpeg(Image.fromarray(ramp()), quality=100)
    assert np.abs(decode_image(gray_jpeg, 3)[..., 1].astype(int) - ramp()).max() <= 2
    color = photo(20, 30)
    luma = np.asarray(color.convert("L")).astype(int)
    assert np.abs(decode_image(saved(color, "png"), 1)[..., 0] - luma).max() == 0
    assert np.abs(decode_image(jpeg(color, quality=100, subsampling=0), 1)[..., 0] - luma).max() <= 3


def test_16_bits_keep_their_upper_half() -> None:
    wide = np.tile(np.arange(0, 65536, 256, dtype=np.uint16) + 128, (4, 1))
    data = saved(Image.fromarray(wide), "png")
    assert Image.open(io.BytesIO(data)).mode.startswith("I")
    assert np.array_equal(decode_image(data, 1)[..., 0], ramp())
    assert np.array_equal(decode_image(data, 3)[..., 2], ramp())


def test_cmyk_has_the_colors_that_pillow_shows() -> None:
    data = jpeg(photo(30, 40).convert("CMYK"), quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.abs(decode_image(data, 3).astype(int) - expected).max() <= 2
    assert np.abs(expected.astype(int) - np.asarray(photo(30, 40))).mean() < 12


@pytest.mark.parametrize("form", ["png", "webp"])
def test_transparent_pixels_are_white(form: str) -> None:
    rgba = np.zeros((4, 6, 4), np.uint8)
    rgba[:, :2] = (255, 0, 0, 255)
    rgba[:, 2:4] = (0, 0, 255, 0)
    rgba[:, 4:] = (0, 0, 0, 128)
    found = decode_image(
        saved(Image.fromarray(rgba), form, **({"lossless": True, "exact": True} if form == "webp" else {})), 3
    )
    assert (found[:, :2] == (255, 0, 0)).all()
    assert (found[:, 2:4] == 255).all()
    assert np.abs(found[:, 4:].astype(int) - 127).max() <= 1


def test_palette_with_and_without_transparency() -> None:
    picture = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
    picture.putpalette([10, 20, 30, 200, 100, 50])
    expected = np.array([[[10, 20, 30], [200, 100, 50]], [[200, 100, 50], [10, 20, 30]]])
    assert np.array_equal(decode_image(saved(picture, "png"), 3), expected)
    expected[expected[..., 0] == 200] = 255
    assert np.array_equal(decode_image(saved(picture, "png", transparency=1), 3), expected)


def test_bmp_and_one_bit() -> None:
    picture = photo(9, 7)
    assert np.array_equal(decode_image(saved(picture, "bmp"), 3), np.asarray(picture))
    bits = Image.fromarray(np.eye(8, dtype=bool))
    assert np.array_equal(decode_image(saved(bits, "png"), 1)[..., 0], np.eye(8) * 255)


def test_middle_is_the_central_square() -> None:
    assert middle(500, 375, 400, 1.0) == Box(62, 0, 375, 375)
    assert middle(256, 256, 224, 0.875) == Box(16, 16, 224, 224)
    assert middle(1, 1, 224, 0.1) == Box(0, 0, 1, 1)
