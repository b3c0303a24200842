"""The choice of the error to report: a rank that only lost a peer leaves the report to the one that failed."""

from __future__ import annotations

import pytest

from resnet_dist.errors import TrainingError
from resnet_dist.launch.rank import is_echo, lost_peer


@pytest.mark.parametrize(
    ("error", "may_be_echo", "is_plain"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:1"), True, True),
        (RuntimeError("NCCL error: remote process exited or there was a network error"), True, True),
        (RuntimeError("[gloo/transport/tcp/device.cc:84] Unable to find address for: eth7"), True, False),
        (TrainingError("the checkpoint could not be written to /data/igloo: disk full"), False, False),
        (ValueError("a shape"), False, False),
    ],
)
def test_echoes(error: Exception, may_be_echo: bool, is_plain: bool) -> None:
    assert is_echo(error) == may_be_echo
    assert lost_peer(error) == is_plain
