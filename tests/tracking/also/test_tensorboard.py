"""TensorBoard beside MLflow: every value once, over restarts, kills and outages; a mistake is one sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from resnet_dist.cli.main import run_command
from resnet_dist.config import Recipe
from resnet_dist.driver import publish
from resnet_dist.driver.request import Request
from resnet_dist.driver.run import run_training
from resnet_dist.errors import UserError
from resnet_dist.runs.folder import RunFolder, read_run
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.also import choose, sending
from resnet_dist.tracking.also.choose import check_also
from resnet_dist.tracking.also.fan_out import with_others
from resnet_dist.tracking.also.sending import Sender
from resnet_dist.tracking.also.tensorboard import EventFiles
from resnet_dist.tracking.backlog import MetricPoint
from resnet_dist.tracking.console import ConsolePublisher
from resnet_dist.tracking.open import open_publisher
from resnet_dist.tracking.spool import Follower, Spool
from resnet_dist.tracking.store import URI_VARIABLE
from tests.reporter import RecordingReporter
from tests.s3_server import S3Server
from tests.tracking.mlflow.servers import unused_address

SOON = 60.0  # seconds; a timeout that is never reached

Value = tuple[str, int, float]


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(sending, "RETRY_SECONDS", 0.001)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(open_storage(tmp_path / "runs/x"), "x", None, 1, {}, also=("tensorboard",))


def write(run: RunFolder, steps: Sequence[int]) -> None:
    with Spool(run.spool) as spool:
        for step in steps:
            spool.log({"train/loss": 1 / step, "eval/top1": step / 64}, step)


def spooled(run: RunFolder) -> list[Value]:
    """Return the values of the spool as 32-bit floats, of each step the first."""
    first: dict[tuple[str, int], float] = {}
    for entry in Follower(run.spool).read():
        for name, value in entry.metrics.items():
            first.setdefault((name, entry.step or 0), float(np.float32(value)))
    return sorted((name, step, value) for (name, step), value in first.items())


def shown(folder: Path) -> list[Value]:
    """Return the values that TensorBoard shows of a folder, by its own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    scalars = [
        (tag, event.step, event.value) for tag in found.Tags()["scalars"] for event in found.Scalars(tag)
    ]
    tensors = [
        (tag, event.step, float(make_ndarray(event.tensor_proto)))
        for tag in found.Tags()["tensors"]
        for event in found.Tensors(tag)
    ]
    return sorted(scalars + tensors)


def assert_complete(run: RunFolder, folder: Path | None = None) -> None:
    assert shown(folder or Path(run.storage.location) / "tensorboard") == spooled(run)


def sent(run: RunFolder, seconds: float = SOON) -> tuple[str | None, list[str]]:
    notes: list[str] = []
    sender = Sender("TensorBoard", run, EventFiles, notes.append)
    sender.start()
    return sender.finish(seconds), notes


def test_a_restart_adds_a_file_and_repeats_nothing(run: RunFolder) -> None:
    write(run, range(1, 9))
    assert sent(run) == (None, [])
    assert_complete(run)
    write(run, range(5, 13))  # The checkpoint of step 4 was the newest.
    assert sent(run) == (None, [])
    assert_complete(run)
    folder = Path(run.storage.location) / "tensorboard"
    assert len(list(folder.iterdir())) == 2
    assert sent(run) == (None, [])  # There is nothing new, and so no file.
    assert len(list(folder.iterdir())) == 2


def test_what_a_killed_process_had_begun_to_write_is_written_again(run: RunFolder) -> None:
    write(run, range(1, 9))
    assert sent(run) == (None, [])
    (file,) = (Path(run.storage.location) / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-70])  # In the middle of the last value but one
    assert 0 < len(shown(file.parent)) < len(spooled(run))
    assert sent(run) == (None, [])
    assert_complete(run)


def test_a_store_that_fails_is_reported_once_and_gets_everything_once(run: RunFolder) -> None:
    class Store:
        place = "nowhere"
        rows: list[tuple[str, int]] = []  # noqa: RUF012
        calls = iter(range(100))

        def newest_steps(self) -> dict[str, int]:
            return {name: max(step for other, step in self.rows if other == name) for name, _ in self.rows}

        def log_metrics(self, metrics: Sequence[MetricPoint]) -> None:
            self.rows += [(one.key, one.step) for one in metrics[:3]]
            if next(self.calls) < 3:
                raise OSError("the disk is full")
            self.rows += [(one.key, one.step) for one in metrics[3:]]

        def close(self) -> None:
            pass

    write(run, range(1, 9))
    notes: list[str] = []
    sender = Sender("Files", run, lambda run: Store(), notes.append)
    sender.start()
    assert sender.finish(SOON) is None
    assert Counter(Store.rows) == Counter((name, step) for name, step, _ in spooled(run))
    assert notes == ["Files at nowhere: OSError: the disk is full; it is tried again"]


def test_what_was_not_sent_is_counted_and_sync_sends_it(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(run, range(1, 9))

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    notes: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(EventFiles, "log_metrics", full)
        publisher = with_others(lambda record, show: ConsolePublisher(run.spool, show))
        opened = publisher(Record(run), lambda entry: notes.append(entry.note or ""))  # type: ignore[arg-type]
        opened.start()
        opened.finish(0.2)
    assert opened.unsent == ("16 metrics to TensorBoard",)
    assert len([note for note in notes if "No space left" in note]) == 1
    from resnet_dist.tracking.also.fan_out import send_to_others

    assert send_to_others(run, notes.append) == []
    assert_complete(run)


class Record:
    def __init__(self, run: RunFolder) -> None:
        self.run = run


def test_a_run_at_a_url_has_its_files_when_it_ends(run: RunFolder, s3: S3Server, tmp_path: Path) -> None:
    far = replace(run, storage=open_storage(f"s3://{s3.new_bucket()}/runs/x"))
    write(far, range(1, 9))
    sender = Sender("TensorBoard", far, EventFiles, lambda text: None)
    sender.start()
    assert sender.finish(SOON) is None
    sender = Sender("TensorBoard", far, EventFiles, lambda text: None)  # It dies before it copies its file.
    write(far, range(7, 13))
    sender.start()
    sender.stop()
    assert sent(far) == (None, [])
    copied = tmp_path / "copied"
    copied.mkdir()
    place = far.storage.at("tensorboard")
    for found in place.objects():
        (copied / found.name).write_bytes(place.read(found.name) or b"")
    assert_complete(far, copied)


def test_a_training_has_both_also_while_mlflow_is_away(
    digits_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(URI_VARIABLE, unused_address())
    for name in ("LAST_UPLOAD_SECONDS", "CLOSE_SECONDS"):
        monkeypatch.setattr(publish, name, 0.5)
    recipe = digits_recipe.with_overrides(["train.length=4 steps", "train.log_every=1 steps"])
    monkeypatch.setattr("resnet_dist.tracking.mlflow.publisher.START_SECONDS", 0.1)
    request = Request(recipe, "x.py", tmp_path, local=True, name="x", also=("tensorboard",))
    ended = run_training(request, RecordingReporter(), with_others(open_publisher)).run
    assert ended.unsent[0].endswith(" metrics")
    assert not any("TensorBoard" in one for one in ended.unsent)
    assert_complete(ended)
    kept = read_run(ended.storage)
    assert kept is not None
    assert kept.also == ("tensorboard",)


@pytest.mark.parametrize(
    "command", [["train", "jobs/digits.py", "--local"], ["study", "jobs/plain_vs_residual.py"]]
)
def test_a_mistake_is_one_sentence(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["resnet-dist", *command, "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [*words, "--also", "wandb"])
    assert run_command() == 2
    assert "error: --also wandb: unknown; use tensorboard" in capsys.readouterr().err
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", [*words, "--also", "tensorboard"])
    assert run_command() == 2
    assert "uv pip install 'resnet-dist[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_also(["tensorboard", "tensorboard"]) == ("tensorboard",)
    with pytest.raises(UserError, match="--also aim: unknown"):
        check_also(["tensorboard", "aim"])


def test_a_run_that_is_resumed_where_it_is_missing_reports_that(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing: Callable[[str], None] = lambda name: None  # noqa: E731
    monkeypatch.setattr(choose, "find_spec", missing)
    notes: list[str] = []
    assert choose.senders_of(run, notes.append) == []
    assert notes == ["tensorboard: not installed here; what the run has of it stays as it is"]
