"""The run that nothing strikes, once for all tests of faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.results import Result
from tests.driver.commands import Runner


@pytest.fixture(scope="session")
def undisturbed(digits_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("undisturbed")
    runner = Runner(folder, digits_data)
    code, output = runner.train(str(folder)).end()
    assert code == 0, output
    return runner.result(str(folder))
