"""Thumbnails of text: the colors of an image beside its rows, in the table alone."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from resnet_dist.predict.thumbnails import BLOCK, LINES, SIDE, thumbnail
from tests.data.images.pictures import jpeg, photo
from tests.predict.conftest import Command


def test_the_halves_of_a_picture_are_those_of_its_text() -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16, :, 0] = 200  # red above, and black below
    lines = thumbnail(pixels)
    assert len(lines) == LINES
    assert all(line.count(BLOCK) == SIDE and line.endswith("\x1b[0m") for line in lines)
    assert "\x1b[38;2;200;0;0;48;2;200;0;0m" in lines[0]
    assert "\x1b[38;2;0;0;0;48;2;0;0;0m" in lines[-1]
    gray = thumbnail(np.full((8, 8, 1), 77, np.uint8))
    assert set(re.findall(r"2;(\d+;\d+;\d+)", gray[0])) == {"77;77;77"}


@pytest.mark.parametrize("top", [1, 5])
def test_the_table_has_a_picture_beside_each_row(
    command: Command, model: str, tmp_path: Path, top: int
) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(jpeg(photo(50, 60)))
    code, out, err = command("predict", model, "a.jpg", "b.jpg", "--thumbnails", "--top", top)
    assert (code, err) == (0, "")
    plain = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in out.splitlines()]
    height = max(LINES, top + 1)
    assert len(plain) == 2 * height
    assert plain[0] == f"{BLOCK * SIDE}  a.jpg"
    assert plain[height] == f"{BLOCK * SIDE}  b.jpg"
    assert sum("%" in line for line in plain) == 2 * top
    assert command("predict", model, "a.jpg", "--thumbnails", "--json")[::2] == (
        2,
        "error: --thumbnails are in the table alone; leave out --json, --csv and --to\n",
    )
