"""An environment that a test may change as it likes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest import mock

import pytest

# Variables of the person who runs the tests that the checks read.
READ = (
    "TMPDIR",
    "RAY_TMPDIR",
    "XDG_CACHE_HOME",
    "XDG_RUNTIME_DIR",
    "MPLCONFIGDIR",
    "TORCH_HOME",
    "TORCHINDUCTOR_CACHE_DIR",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
    "TORCHELASTIC_RUN_ID",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "CUDA_VISIBLE_DEVICES",
)


@pytest.fixture(autouse=True)
def environment() -> Iterator[os._Environ[str]]:
    """Restore the environment after the test."""
    with mock.patch.dict(os.environ):
        for name in READ:
            os.environ.pop(name, None)
        yield os.environ
