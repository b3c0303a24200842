"""Variables that a torchrun has left behind are ignored; ranks that cannot meet are told so within seconds."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from resnet_dist.errors import UserError
from resnet_dist.system.environment import torchrun

UNKNOWN = "no-such-host.invalid"


@pytest.fixture
def port() -> Iterator[int]:
    """Yield a port on which a store would listen."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def set_variables(port: int, address: str = "127.0.0.1", num_hosts: str = "1") -> None:
    os.environ.update(
        RANK="1",
        LOCAL_RANK="1",
        WORLD_SIZE="2",
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
        GROUP_WORLD_SIZE=num_hosts,
        TORCHELASTIC_RUN_ID="x",
        TORCHELASTIC_USE_AGENT_STORE="True",
    )


def test_a_torchrun_that_runs_is_left_alone(port: int) -> None:
    set_variables(port)
    before = dict(os.environ)
    assert torchrun.check_torchrun() == []
    assert dict(os.environ) == before


@pytest.mark.parametrize("address", ["127.0.0.1", UNKNOWN])
def test_a_torchrun_that_has_ended_is_ignored(address: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        unused = server.getsockname()[1]
    set_variables(unused, address)
    (line,) = torchrun.check_torchrun()
    assert line.startswith("ignored: TORCHELASTIC_RUN_ID, RANK, ")
    assert line.endswith("since the torchrun that they name has ended")
    assert "RANK" not in os.environ
    assert "MASTER_ADDR" not in os.environ


def test_hosts_that_cannot_meet_are_one_sentence(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchrun, "TOTAL_SECONDS", 0.0)
    set_variables(port, UNKNOWN, num_hosts="2")
    with pytest.raises(
        UserError,
        match=rf"^the ranks meet at {UNKNOWN}:{port} .* cannot reach .*: start torchrun .*--local-addr",
    ):
        torchrun.check_torchrun()
    assert os.environ["RANK"] == "1"  # It stays one of them, and must not train alone.


def test_a_rank_that_serves_the_store_itself_is_left_alone() -> None:
    set_variables(1)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    assert torchrun.check_torchrun() == []
    assert os.environ["RANK"] == "1"


def test_variables_of_no_torchrun_are_ignored() -> None:
    os.environ.update(RANK="0", WORLD_SIZE="2")
    assert torchrun.check_torchrun() == [
        "ignored: RANK, WORLD_SIZE in the environment, since torchrun did not start this process"
    ]
