"""Folders of small images for the tests of prepare."""

from __future__ import annotations

from pathlib import Path

from tests.data.conftest import encoded, picture


def image(number: int = 0, form: str = "png", size: int = 4) -> bytes:
    return encoded(picture(number, size), form)


def write(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_classes(folder: Path, **counts: int) -> Path:
    """Write as many images into each class; return the folder."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            write(folder / name / f"{number}.png", image(number))
    return folder
