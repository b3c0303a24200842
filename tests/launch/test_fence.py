"""The fence of a rank on a clock of its own: who may write, who waits, and who ends, in either kind of storage."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resnet_dist.errors import StorageError, Superseded
from resnet_dist.launch.fence import CUT_OFF_SECONDS, END_SECONDS, LOOK_SECONDS, Fence
from resnet_dist.runs.folder import RunFolder
from resnet_dist.runs.storage.holder import Holder
from resnet_dist.runs.storage.lease import BEAT_SECONDS, EXPIRY_SECONDS, FRESH_SECONDS, LEASE_FILE
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.runs.storage.protocol import Permit, Storage, Unreachable
from resnet_dist.tracking.spool import Follower, Spool

DRIVER = replace(Holder.this_process(), id="driver")
LONG = 600.0


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "bucket":
        return open_storage(f"s3://{request.getfixturevalue('s3').new_bucket()}/runs/x")
    return open_storage(tmp_path / "x")


class Faulty:
    """A storage whose reads or writes fail while `fails` names them."""

    def __init__(self, storage: Storage) -> None:
        self._storage, self.fails = storage, ""

    def __getattr__(self, name: str) -> Any:
        if name == self.fails:
            raise Unreachable(f"{name} fails")
        return getattr(self._storage, name)


class Rank:
    """A rank of attempt 2 with its clock, its driver, and the number of times that it was made to exit."""

    def __init__(self, storage: Storage, *, with_driver: bool = False) -> None:
        self.storage = Faulty(storage)
        self.now, self.exits, self.beats = 1e6, 0, itertools.count(1)
        self.write_attempt(2)
        self.beat()
        self.fence = Fence(
            self.storage,  # type: ignore[arg-type]
            2,
            DRIVER.id,
            clock=lambda: self.now,
            exit_soon=None if with_driver else self.exit_soon,
        )

    def exit_soon(self) -> None:
        self.exits += 1

    def write_attempt(self, number: int) -> None:
        RunFolder(self.storage, "x", None, number, {}).write()  # type: ignore[arg-type]

    def beat(self) -> None:
        self.storage.write(LEASE_FILE, replace(DRIVER, beat=next(self.beats)).encode())

    def wait(self, seconds: float, *, driver_lives: bool, moves: Callable[[], int] = lambda: 0) -> None:
        """Let time pass as a rank spends it: it looks every LOOK_SECONDS, and polls each second."""
        for second in range(1, int(seconds) + 1):
            self.now += 1.0
            if driver_lives and second % BEAT_SECONDS == 0:
                self.beat()
            if second % LOOK_SECONDS == 0:
                with suppress(Unreachable):
                    self.fence.look()
            self.fence.raise_if_over(moves())


@pytest.fixture
def rank(storage: Storage) -> Rank:
    return Rank(storage)


def test_a_rank_whose_driver_lives_writes(rank: Rank) -> None:
    rank.fence.check()
    rank.wait(200, driver_lives=True)
    rank.fence.check()
    assert rank.exits == 0


def test_a_newer_attempt_ends_the_rank_at_once(rank: Rank) -> None:
    rank.fence.check()
    rank.write_attempt(3)
    with pytest.raises(Superseded, match="attempt 3 of the run has begun: attempt 2 ends"):
        rank.fence.check()
    with pytest.raises(Superseded):
        rank.fence.raise_if_over(0)
    rank.storage.fails = "read"
    with pytest.raises(Superseded):
        rank.fence.check()  # It stays so, whatever the storage does.
    assert rank.exits == 1


@pytest.mark.parametrize(
    ("lease", "words"),
    [
        (replace(DRIVER, id="next", host="h9").encode(), "another driver trains the run now .* on h9"),
        (b"{}\n", "the driver has given the run up"),
    ],
)
def test_another_holder_or_none_ends_the_rank_at_once(rank: Rank, lease: bytes, words: str) -> None:
    rank.fence.check()
    rank.storage.write(LEASE_FILE, lease)
    with pytest.raises(Superseded, match=words):
        rank.fence.check()
    assert rank.exits == 1


def test_a_dead_driver_stops_the_writing_and_then_the_rank_before_its_lease_ends(rank: Rank) -> None:
    rank.wait(60, driver_lives=True)
    rank.wait(FRESH_SECONDS - LOOK_SECONDS, driver_lives=False)
    rank.fence.check()
    rank.wait(LOOK_SECONDS + 1, driver_lives=False)
    with pytest.raises(Unreachable, match="nothing is written"):
        rank.fence.check()
    assert rank.exits == 0
    begin = rank.now
    with pytest.raises(Superseded, match="the driver has not renewed its lease for"):
        rank.wait(LONG, driver_lives=False)
    died = begin - FRESH_SECONDS - 1
    assert END_SECONDS <= rank.now - died <= EXPIRY_SECONDS - BEAT_SECONDS
    assert rank.storage.objects("tokens")[1:] == []  # The probe is gone.


def test_storage_that_does_not_answer_stops_the_writing_alone(rank: Rank) -> None:
    rank.wait(20, driver_lives=True)
    rank.storage.fails = "read"
    rank.wait(LONG, driver_lives=True, moves=itertools.count().__next__)
    with pytest.raises(Unreachable):
        rank.fence.check()
    rank.storage.fails = ""
    with pytest.raises(Unreachable):
        rank.fence.check()  # The newest beat may be as old as the outage: wait for the next one.
    rank.now += BEAT_SECONDS
    rank.beat()
    rank.fence.check()


def test_a_rank_that_was_away_reads_again_before_it_writes(rank: Rank) -> None:
    rank.wait(20, driver_lives=True)
    rank.storage.fails = "read"
    rank.wait(LONG, driver_lives=True, moves=itertools.count().__next__)
    rank.write_attempt(3)
    rank.storage.fails = ""
    with pytest.raises(Superseded):
        rank.fence.check(recent_seconds=1.0)


def test_a_rank_that_is_cut_off_and_stands_still_ends(rank: Rank) -> None:
    rank.wait(20, driver_lives=True)
    rank.storage.fails = "read"
    begin = rank.now
    with pytest.raises(Superseded, match="has not answered for 300 s, and nothing has moved"):
        rank.wait(LONG, driver_lives=False)
    assert rank.now - begin <= CUT_OFF_SECONDS + LOOK_SECONDS
    assert rank.exits == 1


def test_the_process_of_a_driver_is_never_cut_off(storage: Storage) -> None:
    rank = Rank(storage, with_driver=True)
    rank.storage.fails = "read"
    rank.wait(LONG, driver_lives=False)
    assert not rank.fence.is_over


def test_a_machine_that_slept_waits_for_its_driver(rank: Rank) -> None:
    """Both wake up at the same time, and another driver may have trained the run meanwhile."""
    rank.wait(20, driver_lives=True)
    rank.now += LONG
    with pytest.raises(Unreachable):
        rank.fence.check()
    rank.fence.raise_if_over(0)
    rank.wait(10, driver_lives=True)
    rank.fence.check()
    rank.beat()
    rank.now += LONG
    with pytest.raises(Unreachable):
        rank.fence.check()  # That beat may have come before the machine slept.
    rank.wait(10, driver_lives=True)
    rank.fence.check()
    assert rank.exits == 0


def test_a_full_disk_is_no_dead_driver(rank: Rank) -> None:
    """No driver can renew its lease there, and no other one can take it."""
    rank.wait(20, driver_lives=True)
    rank.storage.fails = "write"
    rank.wait(LONG, driver_lives=False)
    rank.storage.fails = ""
    rank.wait(20, driver_lives=True)
    rank.fence.check()
    assert rank.exits == 0


class Revoked:
    """A permit that ends after a number of checks."""

    decides = True

    def __init__(self, checks: int, error: StorageError) -> None:
        self.left, self.error = checks, error

    def check(self, recent_seconds: float = 0.0) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error


@pytest.mark.parametrize("after_upload", [False, True])
def test_no_checkpoint_appears_after_the_permit(storage: Storage, after_upload: bool) -> None:
    """The permit ends before the upload, or between the upload and the commit."""
    bundles = storage.at("checkpoints").bundles("checkpoint.json")
    bundles.clean_up()
    checks = (
        1 if after_upload and storage.location.startswith("s3:") else 0
    )  # A folder asks once: it renames.
    permit: Permit = Revoked(checks, Superseded("attempt 3 has begun"))

    def write() -> None:
        with bundles.write("step-1", permit) as folder:
            (folder / "model").write_bytes(b"of attempt 2")
            (folder / "checkpoint.json").write_bytes(b"{}")

    with pytest.raises(Superseded):
        write()
    assert bundles.names() == []


def test_lines_wait_while_it_is_not_known_who_writes(storage: Storage) -> None:
    log, permit = storage.log("spool.jsonl"), Revoked(10**9, Unreachable("the driver was not seen"))
    writer = log.open(permit)
    permit.left = 0
    writer.write(b"1\n")
    writer.write(b"2\n")
    with pytest.raises(Unreachable):
        writer.flush()  # So a checkpoint waits for them.
    assert log.read()[0] == b""
    permit.left = 10**9
    writer.write(b"3\n")
    writer.close()
    assert log.read()[0] == b"1\n2\n3\n"


def test_the_metrics_of_an_attempt_that_is_over_are_not_recorded(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    rank = Rank(storage)
    spool = Spool(storage.log("spool.jsonl"), rank.fence)
    spool.log({"train/loss": 1.0}, 1)
    spool.flush()
    rank.now += 2.0
    rank.write_attempt(3)
    spool.log({"train/loss": 2.0}, 2)
    spool.close()
    steps = [entry.step for entry in Follower(storage.log("spool.jsonl")).read() if entry.metrics]
    assert steps == [1]
    assert "attempt 3 of the run has begun" in caplog.text


def test_an_old_attempt_cannot_end_the_log_of_the_new_one(storage: Storage) -> None:
    """A segment of the old one arrives between two of the new one."""
    log = storage.log("spool.jsonl")
    new = log.open(Revoked(10**9, Superseded("never")))
    new.write(b"new 1\n")
    new.flush()
    storage.create("spool/00000002.jsonl", b"old\n")
    new.write(b"new 2\n")
    new.close()
    assert log.read()[0].replace(b"old\n", b"") == b"new 1\nnew 2\n"
