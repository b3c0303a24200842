"""Reports of stalls reach the driver through the run's storage: each event once, none of an earlier attempt."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from resnet_dist.runs import stalls
from resnet_dist.runs.stalls import STALLS_FOLDER, shown_stalls, write_stall
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.runs.storage.protocol import Storage, Unreachable

WAIT_SECONDS = 60.0  # limit


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setattr(stalls, "POLL_SECONDS", 0.01)
    if request.param == "folder":
        return open_storage(tmp_path)
    return open_storage(f"s3://{request.getfixturevalue('s3').new_bucket()}/runs/x")


class Screen:
    """The lines that a person sees."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.seen = threading.Event()

    def show(self, text: str) -> None:
        self.lines.append(text)
        self.seen.set()


def test_each_event_is_shown_once_with_its_file(storage: Storage) -> None:
    write_stall(storage, 1, "phase-1-all-begin", "an old stall", ["stack"])
    screen = Screen()
    with shown_stalls(storage, screen.show):
        write_stall(storage, 2, "phase-7-rank-3-begin", "rank 3 stands", ["rank 3:", "  wait"])
        write_stall(storage, 2, "phase-7-rank-3-begin", "rank 3 stands, by another rank", ["rank 3:"])
        write_stall(storage, 2, "phase-7-rank-3-end", "rank 3 moves", [])
    assert not [line for line in screen.lines if "old" in line or "another" in line]
    name = f"{STALLS_FOLDER}/attempt-0002-phase-7-rank-3-begin.txt"
    written = storage.read(name)
    assert written is not None
    assert written.decode().splitlines()[3:] == ["rank 3:", "  wait"]
    assert [found.name for found in storage.objects(STALLS_FOLDER)] == [
        f"{STALLS_FOLDER}/attempt-0001-phase-1-all-begin.txt",
        name,
        name.replace("begin", "end"),
    ]


def test_a_report_is_shown_while_the_run_goes_on(storage: Storage) -> None:
    write_stall(storage, 1, "phase-1-all-begin", "an old stall", ["stack"])
    screen, first_look = Screen(), threading.Event()
    objects = storage.objects

    def look(prefix: str = "") -> list[object]:
        found = list[object](objects(prefix))
        first_look.set()
        return found

    object.__setattr__(storage, "objects", look)
    with shown_stalls(storage, screen.show):
        assert first_look.wait(WAIT_SECONDS)
        write_stall(storage, 2, "phase-7-rank-3-begin", "rank 3 stands s3://key:secret@h/x", ["rank 3:"])
        assert screen.seen.wait(WAIT_SECONDS)
        name = f"{storage.location}/{STALLS_FOLDER}/attempt-0002-phase-7-rank-3-begin.txt"
        assert screen.lines == [f"rank 3 stands s3://***@h/x ({name})"]
        screen.seen.clear()
        write_stall(storage, 2, "phase-7-rank-3-end", "rank 3 moves", [])
        assert screen.seen.wait(WAIT_SECONDS)
    assert screen.lines[1:] == ["rank 3 moves"]


def test_a_storage_that_does_not_answer_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stalls, "POLL_SECONDS", 0.01)
    storage = open_storage(tmp_path)
    objects, answers, screen, looked = storage.objects, threading.Event(), Screen(), threading.Event()

    def look(prefix: str = "") -> list[object]:
        if not answers.is_set():
            raise Unreachable("no answer")
        found = list[object](objects(prefix))
        looked.set()
        return found

    object.__setattr__(storage, "objects", look)
    with shown_stalls(storage, screen.show):
        answers.set()
        assert looked.wait(WAIT_SECONDS)
        write_stall(storage, 1, "phase-7-all-begin", "all stand", [])
        assert screen.seen.wait(WAIT_SECONDS)
    assert screen.lines == ["all stand"]
