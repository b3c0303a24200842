"""The lease: one holder, told to others by name; a dead holder's ends, whatever the clocks say."""

from __future__ import annotations

import platform
import subprocess
import sys
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from resnet_dist.runs.storage import lease
from resnet_dist.runs.storage.holder import Holder, _identity
from resnet_dist.runs.storage.lease import LEASE_FILE, Heartbeat, LeaseHeld, held_lease
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.runs.storage.protocol import Storage


@pytest.fixture(params=["folder", "folder without locks", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lease, "WATCH_SECONDS", 0.02)
    if request.param == "bucket":
        return open_storage(f"s3://{request.getfixturevalue('s3').new_bucket()}/runs/x")
    if request.param == "folder without locks":
        monkeypatch.setattr("resnet_dist.runs.storage.folder.has_flock", lambda path: False)
    return open_storage(tmp_path / "x")


def elsewhere(**changes: object) -> Holder:
    """Return a holder on another host, of which this machine cannot know whether it lives."""
    return replace(Holder.this_process(), host="h2", process="another-boot 1 2", id="other", **changes)  # type: ignore[arg-type]


def test_the_second_is_told_who_holds_it(storage: Storage) -> None:
    notes: list[str] = []
    with held_lease(storage, notes.append) as first:
        with pytest.raises(LeaseHeld) as held, held_lease(storage, notes.append):
            pass
        assert held.value.holder is not None
        assert held.value.holder.id == first.holder.id
        assert platform.node() in str(held.value.holder)
        assert str(held.value.holder).endswith("UTC")
    with held_lease(storage, notes.append) as second:
        assert second.holder.id != first.holder.id
    assert notes == []


def test_a_living_holder_elsewhere_is_recognised_by_its_heartbeat(storage: Storage) -> None:
    holder = elsewhere(since="2020-01-01 00:00:00 UTC")  # its clock is years behind
    storage.write(LEASE_FILE, holder.encode())
    closed = threading.Event()

    def beat() -> None:
        for number in range(1, 10**6):
            if closed.wait(0.05):
                return
            storage.write(LEASE_FILE, replace(holder, beat=number).encode())

    thread = threading.Thread(target=beat)
    thread.start()
    notes: list[str] = []
    try:
        with pytest.raises(LeaseHeld, match="h2"), held_lease(storage, notes.append):
            pass
    finally:
        closed.set()
        thread.join()
    assert [note.split(";")[0] for note in notes] == [f"the run is held by {holder}"]


def test_the_lease_of_a_dead_holder_elsewhere_runs_out(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 0.2)
    holder = elsewhere(since="2099-01-01 00:00:00 UTC")  # its clock was years ahead
    storage.write(LEASE_FILE, holder.encode())
    notes: list[str] = []
    with held_lease(storage, notes.append) as mine:
        assert len(notes) == 1
        found = storage.read(LEASE_FILE)
        assert found is not None
        assert Holder.parse(found) is not None
        assert Holder.parse(found).id == mine.holder.id  # type: ignore[union-attr]


def test_a_holder_that_died_on_this_machine_ends_at_once(storage: Storage) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        identity = _identity(process.pid)
        assert identity
        holder = replace(Holder.this_process(), id="other", pid=process.pid, process=identity)
        assert holder.is_dead() is False
        storage.write(LEASE_FILE, holder.encode())
        process.kill()
    assert holder.is_dead() is True
    with held_lease(storage, lambda note: pytest.fail(note)):
        pass


def test_of_many_that_wait_one_takes_over(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 0.3)
    storage.write(LEASE_FILE, elsewhere().encode())
    results: list[str] = []
    done = threading.Event()

    def compete() -> None:
        try:
            with held_lease(storage, lambda note: None):
                results.append("holds")
                done.wait(60)
        except LeaseHeld:
            results.append("told")

    threads = [threading.Thread(target=compete) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3000):
            if len(results) == 4:
                break
            threading.Event().wait(0.02)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert sorted(results) == ["holds", "told", "told", "told"]


def test_a_holder_learns_that_it_was_taken_over(storage: Storage) -> None:
    lost, taken = [], threading.Event()

    def on_lost(holder: Holder | None) -> None:
        lost.append(holder)
        taken.set()

    with ExitStack() as stack:
        stack.enter_context(held_lease(storage, lambda note: None, on_lost))
        other = elsewhere()
        storage.write(LEASE_FILE, other.encode())
        assert taken.wait(60)
    assert lost == [other]
    found = storage.read(LEASE_FILE)
    assert found == other.encode()  # its release leaves the new holder's lease


def test_the_heartbeat_is_measured_on_the_clock_of_the_one_who_looks(storage: Storage) -> None:
    now = [100.0]
    watch = Heartbeat(storage, clock=lambda: now[0])
    assert watch.look() == (False, None)
    holder = elsewhere()
    storage.write(LEASE_FILE, holder.encode())
    now[0] = 110.0
    assert watch.look() == (True, holder.encode())
    assert watch.age_seconds() == 10.0  # The beat came after the look before.
    now[0] = 150.0
    assert watch.look() == (False, holder.encode())
    assert watch.age_seconds() == 50.0
    storage.write(LEASE_FILE, replace(holder, beat=1).encode())
    watch.look()
    assert watch.age_seconds() == 0.0
