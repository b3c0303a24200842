"""The last lines about a run that failed: its own message, the file with the rest, and the line that continues it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from resnet_dist.config import Recipe
from resnet_dist.driver import launcher as launchers
from resnet_dist.driver.request import Request
from resnet_dist.driver.run import run_training
from resnet_dist.errors import Diverged, ExplainedError, RankFailed, TrainingError
from resnet_dist.train.loop import Outcome
from tests.driver.test_interrupts import SignallingPublisher
from tests.reporter import RecordingReporter

LINE = "this continues it:\n  resnet-dist train digits.py --name x"


def failure(
    error: ExplainedError, recipe: Recipe, output: Path, monkeypatch: pytest.MonkeyPatch
) -> ExplainedError:
    """Return what a person reads where the ranks of a run end with `error`."""

    def launcher(*arguments: object, **options: object) -> Callable[..., Outcome]:
        def launch(run: object) -> Outcome:
            raise error

        return launch

    monkeypatch.setattr(launchers, "local_launcher", launcher)
    monkeypatch.setattr(sys, "argv", ["", "train", "digits.py"])
    request = Request(recipe, "digits.py", output, gpu=False, local=True, name="x")
    with pytest.raises(type(error)) as raised:
        run_training(request, RecordingReporter(), lambda *arguments: SignallingPublisher("nothing"))
    return raised.value


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TrainingError("rank 1 ran out of memory"), f"rank 1 ran out of memory\nonce that is mended, {LINE}"),
        (Diverged("the loss is not finite"), "the loss is not finite"),
        (RankFailed("rank 1 failed: ValueError: x"), f"rank 1 failed: ValueError: x\n{LINE}"),
    ],
)
def test_a_failure_ends_with_the_line_that_continues(
    error: ExplainedError,
    words: str,
    digits_recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert str(failure(error, digits_recipe, tmp_path, monkeypatch)) == words


def test_what_ray_says_is_in_the_file_that_is_named(
    digits_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    details = "\n".join(f"line {number} of Ray" for number in range(200))
    error = failure(RankFailed("rank 1 failed", details), digits_recipe, tmp_path, monkeypatch)
    file = tmp_path / "runs/x/failures/attempt-0001.txt"
    assert str(error) == f"rank 1 failed\ndetails are in {file}\n{LINE}"
    assert "line 199 of Ray" in file.read_text()
