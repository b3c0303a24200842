"""The storage as a rank sees it: another one than the driver's is found before training, and so is a stop request."""

from __future__ import annotations

import threading
import time
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resnet_dist.config import Recipe
from resnet_dist.errors import StorageError, TrainingError
from resnet_dist.launch import run_storage
from resnet_dist.launch.attempt import Attempt
from resnet_dist.launch.run_storage import StallWriter, StopWatch, check_shared, report_notes
from resnet_dist.runs.choose import choose_run
from resnet_dist.runs.folder import STOP_FILE, RunFolder
from resnet_dist.runs.stalls import STALLS_FOLDER, _new_reports
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.runs.storage.protocol import Unreachable
from resnet_dist.train.watch.watchdog import StallReport
from resnet_dist.world import World
from tests.launch.preload.test_preload import wait_until


@pytest.fixture(params=["folder", "bucket"])
def written(request: pytest.FixtureRequest, digits_recipe: Recipe, tmp_path: Path) -> RunFolder:
    """Return a run that the driver has written, in either kind of storage."""
    output: Path | str = tmp_path / "output"
    if request.param == "bucket":
        output = f"s3://{request.getfixturevalue('s3').new_bucket()}/output"
    made = choose_run(output, digits_recipe, "x", resume=False)
    made.write()
    return made


def world_of(problems: list[Any], rank: int) -> World:
    """Return rank `rank` of a world whose other ranks have reported `problems`."""

    class Others(World):
        def gather(self, value: Any) -> list[Any]:
            return [*problems[:rank], value, *problems[rank:]]

    return Others(rank, 0, len(problems) + 1, World.single().device)


def test_ranks_that_see_the_token_train(written: RunFolder, digits_recipe: Recipe) -> None:
    attempt = Attempt.of(digits_recipe, written, cpus=1)
    check_shared(attempt, World.single())
    again = replace(written, attempt=2)
    again.write()
    check_shared(Attempt.of(digits_recipe, again, cpus=1), World.single())


@pytest.mark.parametrize("own", [False, True])
def test_a_rank_with_a_storage_of_its_own_is_named(
    written: RunFolder, digits_recipe: Recipe, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank sees nothing, or a run of the same name that an earlier driver has written there."""
    monkeypatch.setattr(run_storage, "TOKEN_SECONDS", 0.0)
    monkeypatch.setattr(run_storage.platform, "node", lambda: "h2")
    theirs = replace(written, token="of another driver")
    if not own:
        written.storage.delete_all()
    attempt = replace(Attempt.of(digits_recipe, theirs, cpus=1), host="h1")
    words = rf"^rank 1 on h2: {written.location} is not the one that the driver on h1 writes to; --output must be a folder"
    with pytest.raises(TrainingError, match=words):
        check_shared(attempt, world_of([("h1", None)], rank=1))


def test_the_problem_of_one_rank_ends_all(written: RunFolder, digits_recipe: Recipe) -> None:
    attempt = Attempt.of(digits_recipe, written, cpus=1)
    with pytest.raises(TrainingError, match="^rank 1 on h3: no such place"):
        check_shared(attempt, world_of([("h3", "no such place")], rank=0))


def test_a_mistake_of_one_rank_wins_over_a_storage_that_does_not_answer_another(
    written: RunFolder, digits_recipe: Recipe
) -> None:
    attempt = Attempt.of(digits_recipe, written, cpus=1)
    away = ("h2", Unreachable("s3://b: it does not answer in time"))
    with pytest.raises(TrainingError, match="^rank 2 on h3: no such place"):
        check_shared(attempt, world_of([away, ("h3", "no such place")], rank=0))
    with pytest.raises(Unreachable, match="^rank 1 on h2: s3://b: it does not answer"):
        check_shared(attempt, world_of([away], rank=0))


@pytest.mark.parametrize("seconds", [60.0, 0.0])
def test_ranks_wait_for_a_storage_that_does_not_answer_when_they_start(
    tmp_path: Path, digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """It is no mistake: the ranks of a run that was struck start while the storage is struck, too."""
    run = choose_run(tmp_path / "output", digits_recipe, "x", resume=False)
    run.write()
    storage, tries = open_storage(run.location), list[str]()

    class Away:
        def read(self, name: str) -> bytes | None:
            tries.append(name)
            if len(tries) < 4:
                raise Unreachable("s3://b: it does not answer in time")
            return storage.read(name)

    attempt = Attempt.of(digits_recipe, run, cpus=1)
    monkeypatch.setattr(run_storage, "open_storage", lambda location: Away())
    monkeypatch.setattr(run_storage, "TOKEN_POLL_SECONDS", 0.0)
    monkeypatch.setattr(run_storage, "TOKEN_SECONDS", 0.0)
    monkeypatch.setattr(run_storage, "PERMIT_WAIT_SECONDS", seconds)
    with nullcontext() if seconds else pytest.raises(Unreachable, match="does not answer in time"):
        check_shared(attempt, World.single())
    assert len(tries) == (4 if seconds else 1)


def test_a_stop_request_reaches_the_ranks(written: RunFolder) -> None:
    with closing(StopWatch(written.storage)) as watch:
        assert not watch.requested()
        written.request_stop()
        deadline = time.monotonic() + 60
        while not watch.requested():
            assert time.monotonic() < deadline
            time.sleep(0.02)
    written.write()
    assert written.storage.read(STOP_FILE) is None  # The next attempt is not stopped by it.


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stall_is_written_as_soon_as_the_storage_answers(
    written: RunFolder,
    digits_recipe: Recipe,
    rank: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The storage may be what the ranks wait for. Where rank 0 does not answer, the terminal has the line too."""
    write, calls, done = run_storage.write_stall, list[str](), threading.Event()

    def write_at_third(*arguments: Any) -> None:
        calls.append(arguments[2])
        if len(calls) < 3:
            raise StorageError("no answer")
        write(*arguments)
        done.set()

    monkeypatch.setattr(run_storage, "write_stall", write_at_third)
    monkeypatch.setattr(run_storage, "STALL_RETRY_SECONDS", 0.01)
    attempt = Attempt.of(digits_recipe, written, cpus=1)
    with closing(StallWriter(attempt, echoes=rank > 0)) as writer:
        writer.write(StallReport("phase-1-all-begin", "all stand", ("stack",)))
        assert done.wait(60)
    content = written.storage.read(f"{STALLS_FOLDER}/attempt-0001-phase-1-all-begin.txt")
    assert content is not None
    assert content.startswith(b"all stand\n")
    assert capsys.readouterr().err == ("all stand\n" if rank else "")


def test_a_note_of_a_rank_is_shown_by_its_driver_once(written: RunFolder, digits_recipe: Recipe) -> None:
    attempt, shown = Attempt.of(digits_recipe, written, cpus=1), list[str]()
    for rank in (0, 1):  # of one node
        report_notes(attempt, {"unended-7": f"process 7 has not ended, says rank {rank}"})
        wait_until(lambda: written.storage.objects(STALLS_FOLDER) != [])
    report_notes(attempt, {"imports-ab": "rank 3 imports for itself"})
    wait_until(lambda: len(written.storage.objects(STALLS_FOLDER)) == 2)
    assert _new_reports(written.storage, set(), shown.append)
    assert shown == ["rank 3 imports for itself", "process 7 has not ended, says rank 0"]
