"""The scene, which takes long to build, and the undisturbed run: once for all tests of a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import why_not
from tests.cluster.scene import Scene, scene
from tests.cluster.services import require_servers


@pytest.fixture(scope="session")
def whole_scene(digits_data: Path) -> Iterator[Scene]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    require_servers()
    with scene(digits_data) as made:
        yield made
