"""Seekable JPEGs: a part has the pixels of the whole, bit for bit, and a file that is not what it claims is noticed."""

from __future__ import annotations

import struct
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_dist.data.images.decode import open_image
from resnet_dist.data.images.jpeg import crops, scales
from resnet_dist.data.images.jpeg.header import parse_header
from resnet_dist.data.images.jpeg.seekable import (
    choose_interval,
    cut_part,
    read_frame,
    read_layout,
    with_table,
)
from resnet_dist.data.images.opened import Box, Pixels, scale_for
from tests.data.images.pictures import jpeg, photo

# Color sampling: what Pillow writes, and the byte that makes it another one. The codes of a block are in the same
# order for 4:2:2 and 4:4:0, and for 4:2:0, 4:1:1 and its like along the other axis.
SAMPLINGS = {
    "4:4:4": ("4:4:4", 0x11),
    "4:2:2": ("4:2:2", 0x21),
    "4:4:0": ("4:2:2", 0x12),
    "4:2:0": ("4:2:0", 0x22),
    "4:1:1": ("4:2:0", 0x41),
}


class Seekable(NamedTuple):
    data: bytes
    height: int
    width: int

    @property
    def table_at(self) -> int:
        return parse_header(self.data)[0].table_at  # type: ignore[union-attr]


def seekable(
    rows: int, columns: int, sampling: str, *, interval: int, off: tuple[int, int] = (0, 0), **options: object
) -> Seekable:
    """Return a JPEG of blocks. interval: the blocks between two markers. off: pixels that its edges lack of a whole block."""
    written, byte = SAMPLINGS.get(sampling, ("4:4:4", 0x11))
    across, down = (8 * (int(digit, 16)) for digit in f"{SAMPLINGS.get(written, ('', 0x11))[1]:02x}")
    picture = photo(rows * down, columns * across)
    if sampling == "gray":
        picture = picture.convert("L")
    # Pillow takes the distance of markers in blocks, like the standard.
    data = bytearray(
        jpeg(picture, restart_marker_blocks=interval, optimize=True, subsampling=written, **options)
    )
    at = frame_of(data)
    height, width = rows * 8 * (byte & 15) - off[0], columns * 8 * (byte >> 4) - off[1]
    struct.pack_into(">HH", data, at + 5, height, width)
    if sampling != "gray":
        data[at + 11] = byte
    marked = with_table(bytes(data), first_table(data))
    assert marked is not None
    return Seekable(marked, height, width)


def frame_of(data: bytes | bytearray) -> int:
    return next(at for at in range(len(data)) if data[at : at + 2] in (b"\xff\xc0", b"\xff\xc1"))


def first_table(data: bytes | bytearray) -> int:
    return data.index(b"\xff\xdb")


def whole_way(data: bytes, channels: int, box: Box) -> Pixels | None:
    """Return the pixels of a box of the image without its table, or None where it cannot be decoded."""
    return pixels_of(without_table(data), channels, box)


def without_table(data: bytes) -> bytes:
    """Return an ordinary JPEG of the same length: the table is another program's."""
    at = data.find(b"resnet-dist seek")
    return data[:at] + b"another program" + data[at + 15 :] if at >= 0 else data


def pixels_of(data: bytes, channels: int, box: Box) -> Pixels | None:
    try:
        return np.array(open_image(data, channels).pixels(box, 4096))
    except ValueError:
        return None


@st.composite
def boxes(draw: st.DrawFn, height: int, width: int) -> Box:
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    return Box(top, left, draw(st.integers(1, height - top)), draw(st.integers(1, width - left)))


@settings(max_examples=60)
@given(st.data())
def test_a_part_equals_that_part_of_the_whole(data: st.DataObject) -> None:
    sampling = data.draw(st.sampled_from([*SAMPLINGS, "gray"]))
    rows, columns = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    interval = data.draw(st.sampled_from([n for n in range(1, columns + 1) if columns % n == 0]))
    off = data.draw(st.tuples(st.integers(0, 7), st.integers(0, 7)))
    image = seekable(rows, columns, sampling, interval=interval, off=off)
    space = data.draw(st.sampled_from(["RGB", "GRAY"]))
    everything = simplejpeg.decode_jpeg(image.data, space)
    assert everything.shape[:2] == (image.height, image.width)
    for _ in range(4):
        box = data.draw(boxes(image.height, image.width))
        part = cut_part(image.data, image.table_at, *box)
        assert part is not None
        found = simplejpeg.decode_jpeg(bytes(part.jpeg), space)
        assert found.shape[:2] == (part.height, part.width)
        expected = everything[box.top : box.top + box.height, box.left : box.left + box.width]
        assert np.array_equal(
            found[part.top : part.top + box.height, part.left : part.left + box.width], expected
        )


@settings(max_examples=60)
@given(st.data())
def test_a_part_at_a_reduced_scale_equals_that_part_of_the_whole_at_it(data: st.DataObject) -> None:
    sampling = data.draw(st.sampled_from([*SAMPLINGS, "gray"]))
    off = data.draw(st.tuples(st.integers(0, 7), st.integers(0, 7)))
    columns = data.draw(st.sampled_from([16, 20, 24]))
    image = seekable(20, columns, sampling, interval=data.draw(st.sampled_from([2, 4])), off=off)
    channels, scale = data.draw(st.sampled_from([1, 3])), data.draw(st.sampled_from([2, 4, 8]))
    ordinary = open_image(without_table(image.data), channels)
    top, left, height, width = data.draw(boxes(image.height // scale, image.width // scale))
    box = Box(top * scale, left * scale, height * scale, width * scale)
    size = min(height, width)
    expected = ordinary.pixels(box, size).copy()
    assert expected.shape[:2] != box[2:] or scale_for(box.height, box.width, size) == 1
    assert np.array_equal(open_image(image.data, channels).pixels(box, size), expected)


@pytest.mark.parametrize("sampling", [*SAMPLINGS, "gray"])
def test_the_decoder_of_crops_decodes_no_more_than_a_part(
    sampling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = seekable(20, 24, sampling, interval=4, off=(3, 5))
    everything = open_image(image.data, 3).pixels(Box(0, 0, image.height, image.width), 4096).copy()
    shapes = []

    def record(encoded: bytes, *arguments: object, **options: object) -> Pixels:
        pixels: Pixels = simplejpeg.decode_jpeg(encoded, *arguments, **options)
        shapes.append(pixels.shape)
        return pixels

    class Recorded:
        is_jpeg, decode_jpeg = staticmethod(simplejpeg.is_jpeg), staticmethod(record)

    for module in (crops, scales):
        monkeypatch.setattr(module, "simplejpeg", Recorded)
    box = Box(image.height // 2, image.width // 2, image.height // 8, image.width // 8)
    found = open_image(image.data, 3).pixels(box, 4096)
    assert np.array_equal(found, everything[box.top : box.top + box.height, box.left : box.left + box.width])
    ((height, width, channels),) = shapes
    assert channels == 3
    assert height * width < image.height * image.width / 4


def test_a_part_that_waits_for_its_decoding_is_counted_with_the_file() -> None:
    data = seekable(20, 24, "4:4:4", interval=4).data
    image, ordinary = (open_image(one, 3) for one in (data, without_table(data)))
    for one in (image, ordinary):
        assert one.held_bytes == len(data)
        one.prepare(Box(40, 40, 60, 60), 224)
    assert len(data) + 1000 < image.held_bytes < 2 * len(data)
    assert ordinary.held_bytes == len(data)


@settings(max_examples=80)
@given(st.data())
def test_damage_in_any_byte_gives_the_right_pixels_or_the_outcome_of_the_whole_way(
    data: st.DataObject,
) -> None:
    sampling = data.draw(st.sampled_from(["4:4:4", "4:2:0", "gray"]))
    image = seekable(18, 20, sampling, interval=data.draw(st.sampled_from([2, 5, 20])))
    channels = data.draw(st.sampled_from([1, 3]))
    box = data.draw(boxes(image.height, image.width))
    right = pixels_of(image.data, channels, box)
    damaged = bytearray(image.data)
    # Damage the header and the markers as often as the codes, which have most of the bytes.
    layout = read_layout(image.data, image.table_at)
    assert layout is not None
    marks = [at + offset for at in layout.ends_N.tolist() for offset in (0, 1)]
    place = st.one_of(
        st.integers(2, layout.scan_at - 1),
        st.sampled_from(marks),
        st.integers(layout.scan_at, len(damaged) - 1),
    )
    for at in data.draw(st.lists(place, min_size=1, max_size=3)):
        damaged[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        cut = data.draw(place)
        damaged = damaged[:cut] + damaged[cut + data.draw(st.integers(1, 400)) :]
    found, other = pixels_of(bytes(damaged), channels, box), whole_way(bytes(damaged), channels, box)
    # Damage of a marker may make the table one too many for Pillow, which tolerates the same file without it.
    with patch.object(crops, "cut_part", lambda *arguments, **options: None):
        unused = pixels_of(bytes(damaged), channels, box)
    assert same(found, other) or same(found, right) or same(found, unused)


def same(one: Pixels | None, other: Pixels | None) -> bool:
    return (one is None) == (other is None) and (one is None or np.array_equal(one, other))


def table(image: Seekable, change: dict[int, int]) -> bytes:
    """Return the image with some numbers of its table changed, by their place."""
    layout = read_layout(image.data, image.table_at)
    assert layout is not None
    lengths = layout.lengths_N.copy()
    for place, by in change.items():
        lengths[place] += by
    start = image.data.index(b"resnet-dist seek\0") + 17
    return image.data[:start] + lengths.astype(">u2").tobytes() + image.data[start + 2 * len(lengths) :]


def lies() -> dict[str, bytes]:
    image = seekable(18, 20, "4:4:4", interval=5)
    layout = read_layout(image.data, image.table_at)
    assert layout is not None
    first, second = layout.ends_N[:2].tolist()
    swapped = bytearray(image.data)
    swapped[first + 1], swapped[second + 1] = swapped[second + 1], swapped[first + 1]
    restarts = image.data.index(b"\xff\xdd")
    return {
        "a length is another": table(image, {3: 1}),
        "two lengths are others": table(image, {3: 1, 4: -1}),
        "two markers are exchanged": bytes(swapped),
        "an interval is missing": image.data[: first + 2] + image.data[second + 2 :],
        "the markers' distance is another": image.data[: restarts + 5] + b"\4" + image.data[restarts + 6 :],
        "the image is taller": image.data.replace(struct.pack(">HH", 144, 160), struct.pack(">HH", 152, 160)),
        "the codes go on behind the end": image.data[:-2] + b"\0\xff\xd9",
        "the table is cut": image.data[: image.table_at + 40] + image.data[image.table_at + 60 :],
    }


@pytest.mark.parametrize("lie", lies())
def test_a_file_that_is_not_what_its_table_says_has_no_part(lie: str) -> None:
    data = lies()[lie]
    header, _ = parse_header(data)
    box = Box(40, 40, 60, 60)
    assert header is None or not header.table_at or cut_part(data, header.table_at, *box) is None
    assert same(pixels_of(data, 3, box), whole_way(data, 3, box))


@pytest.mark.parametrize("kind", ["progressive", "rows of unequal intervals", "no restart markers"])
def test_a_jpeg_of_another_kind_gets_no_table(kind: str) -> None:
    options = {
        "progressive": {"progressive": True, "restart_marker_blocks": 4},
        "rows of unequal intervals": {"restart_marker_blocks": 7},
        "no restart markers": {},
    }[kind]
    data = jpeg(photo(160, 160), subsampling="4:4:4", **options)
    assert with_table(data, first_table(data)) is None


@settings(max_examples=100)
@given(st.binary(max_size=200), st.integers(0, 200))
def test_random_bytes_have_no_layout(data: bytes, at: int) -> None:
    start = b"\xff\xd8\xff\xe9" + data
    assert read_layout(start, 2) is None
    assert with_table(start, 2) is None


@pytest.mark.parametrize(
    ("height", "width", "sampling", "interval"),
    [
        (375, 500, "4:4:4", 3),  # 63 blocks in a row
        (375, 500, "4:2:0", 2),  # 32
        (500, 375, "4:4:4", 47),  # 47, a prime
        (16, 16, "4:4:4", 2),
        (8, 2000, "4:2:2", 1),
        (20_000, 9_000, "4:4:4", 125),  # The table has no room for more.
    ],
)
def test_an_interval_divides_the_row_and_is_about_as_wide_as_wanted(
    height: int, width: int, sampling: str, interval: int
) -> None:
    data = jpeg(photo(16, 16), subsampling=sampling)
    frame = read_frame(data, frame_of(data))
    assert frame is not None
    assert choose_interval(frame._replace(height=height, width=width)) == interval
