"""Atomically written files: on the disk before they have their names. conftest.py takes os.fsync from other tests."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from resnet_dist.runs.storage.folder_bundles import FolderBundles
from resnet_dist.system.files import expanded, write_bytes_atomically
from tests.paths import ROOT


def write_file(folder: Path) -> None:
    write_bytes_atomically(folder / "a", b"content")


def write_bundle(folder: Path) -> None:
    with FolderBundles(folder).write("a") as partial:
        (partial / "b").write_bytes(b"content")


@pytest.mark.parametrize(("write", "synced"), [(write_file, {"a"}), (write_bundle, {"a", "b"})])
def test_all_is_flushed_to_disk_before_it_gets_its_name(
    tmp_path: Path, write: Callable[[Path], None], synced: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before: set[str] = set()

    def sync(descriptor: int) -> None:
        if not (tmp_path / "a").exists():
            # A file that is not whole yet is called .a.SOMETHING.partial.
            name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
            before.add("a" if name.startswith(".a.") else name)

    monkeypatch.setattr(os, "fsync", sync)
    write(tmp_path)
    assert before == synced
    assert (tmp_path / "a").exists()


def test_the_home_folder_of_an_unknown_user_is_a_plain_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    assert expanded("~/a b") == Path("/home/anna/a b")
    assert expanded(Path("~no-such-user/x")) == Path("~no-such-user/x")


def test_no_module_asks_pathlib_for_a_home_folder() -> None:
    """It raises RuntimeError where there is none."""
    sources = {path: path.read_text() for path in (ROOT / "resnet_dist").rglob("*.py")}
    assert [path for path, text in sources.items() if re.search(r"(?<!os\.path)\.expanduser\(", text)] == []
    assert any("os.path.expanduser(" in text for text in sources.values())
