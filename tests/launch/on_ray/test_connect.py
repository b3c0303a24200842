"""Several runs share the Ray that their process is connected to."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import ray

from resnet_dist.config import WorkerRange
from resnet_dist.launch.on_ray import connect, launcher
from resnet_dist.launch.on_ray.connect import connected


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the start and the end of Ray; return the calls of both."""
    calls: list[str] = []

    def record(name: str) -> Any:
        return lambda *arguments, **options: calls.append(name)

    monkeypatch.setattr(ray, "init", record("init"))
    monkeypatch.setattr(ray, "shutdown", record("shutdown"))
    monkeypatch.setattr(ray, "is_initialized", lambda: "init" in calls and "shutdown" not in calls)
    return calls


def test_runs_inside_a_connection_use_it_and_leave_it(calls: list[str]) -> None:
    notes: list[str] = []
    workers = WorkerRange.exactly(2)
    with launcher.shared_ray(workers, gpu=False, address=None, report=notes.append):
        for _ in range(2):  # Each run of a study asks for it again.
            with launcher.shared_ray(workers, gpu=False, address=None, report=notes.append):
                pass
        with connected("nowhere:1", workers=2):
            pass
        assert calls == ["init"]
    assert calls == ["init", "shutdown"]
    assert notes.count("starting Ray on this machine") == 1


def test_the_token_is_private_before_ray_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / ".ray/auth_token"
    monkeypatch.setattr(connect, "TOKEN_FILE", file)
    with connect.private_token():
        first = file.read_text()
        assert len(first) == 64
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with connect.private_token():
        assert file.read_text() == first
    assert [path.name for path in file.parent.iterdir()] == ["auth_token"]


@pytest.mark.parametrize(
    ("node", "is_own"), [(None, False), (Mock(head=False), False), (Mock(head=True), True)]
)
def test_a_cluster_is_our_own_where_this_process_has_its_head(
    monkeypatch: pytest.MonkeyPatch, node: Mock | None, is_own: bool
) -> None:
    """A process that is connected through Ray Client has no node at all."""
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray._private.worker, "_global_node", node)
    assert connect.is_own() is is_own
