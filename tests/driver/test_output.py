"""The output folder is refused in one sentence before anything starts, or everything of a run lies in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch

from resnet_dist.config import Recipe
from resnet_dist.data.shards.index import read_index
from resnet_dist.driver.output import check_output
from resnet_dist.driver.request import Request
from resnet_dist.driver.run import run_training
from resnet_dist.errors import TrainingError, UserError
from resnet_dist.predict.find import find_model
from resnet_dist.runs.storage.protocol import Storage
from resnet_dist.system.command import joined, quoted
from resnet_dist.tracking.open import open_publisher
from resnet_dist.tracking.spool import Entry
from resnet_dist.tracking.store import tracking_uri
from resnet_dist.train.checkpoint import store
from resnet_dist.train.checkpoint.load import load_model
from tests.paths import ROOT
from tests.reporter import RecordingReporter


@pytest.fixture(autouse=True)
def _embedded_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """Return a folder with a file, a broken link, and a link in a circle."""
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to("/nowhere/at/all")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "half").mkdir()
    (tmp_path / "half/runs").symlink_to("/proc")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("file", "is a file"),
        ("file/deeper", "is a file"),
        ("broken", "is a broken link"),
        ("broken/deeper", "is a broken link"),
        ("circle", "is a broken link"),
        ("half", "cannot be written"),
        ("two\nlines", "has a line break or another control character"),
        (os.fsdecode(b"byte-\xff"), "has a name that is not UTF-8"),
        ("what?/out", "its path contains '?'"),
        ("100%20done", "its path contains '%20'"),
        ("x" * 256, "has 256 bytes, at most 255 are possible"),
        ("größe" * 51, "has 357 bytes, at most 255"),
        ("/".join("x" * 250 for _ in range(15)), "its path is too long"),
        ("/proc/out", "cannot be written"),
    ],
)
def test_places_that_are_refused(name: str, words: str, places: Path, digits_recipe: Recipe) -> None:
    before = contents(places)
    request = Request(digits_recipe, "digits.py", places / name, local=True, name="a")
    with pytest.raises(UserError) as caught:
        run_training(request, None, None)  # type: ignore[arg-type]  # Nothing of both is needed before.
    assert str(caught.value).startswith("--output ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(places) == before


def test_a_server_holds_what_a_file_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    check_output(tmp_path / "what?/100%20")
    assert contents(tmp_path) == []


def test_a_place_without_rights(tmp_path: Path) -> None:
    """Root writes anywhere, so another user checks."""
    folders = [tmp_path / "read only", tmp_path / "store"]
    for folder in folders:
        folder.mkdir()
    (folders[1] / "mlflow.db").touch(mode=0o444)
    folders[0].chmod(0o555)
    folders[1].chmod(0o777)
    program = (
        "import os, sys; from pathlib import Path; from resnet_dist.driver.output import check_output\n"
        # Before the rights go: Python itself may lie where only root can read.
        "import resnet_dist.runs.storage.folder\n"
        "if os.geteuid() == 0: os.setgid(12345); os.setuid(12345)\n"
        "try: check_output(Path(sys.argv[1]))\n"
        "except ValueError as error: print(error)"
    )
    for folder in (tmp_path, *tmp_path.parents[:-2]):  # so that this user can reach it
        folder.chmod(folder.stat().st_mode | 0o055)
    said = [
        subprocess.run(
            [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout
        for folder in folders
    ]
    assert said[0] == f"--output '{folders[0]}': cannot be written (Permission denied)\n"
    assert (
        said[1]
        == f"--output {folders[1]}: {folders[1]}/mlflow.db cannot be written (no permission); give another folder\n"
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a file system of 12 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("this container cannot mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path, leave_bytes: int) -> Path:
    space = os.statvfs(disk)
    filler = disk / "filler"
    filler.write_bytes(b"\0" * (space.f_bavail * space.f_frsize - leave_bytes))
    return filler


def test_a_full_disk(small_disk: Path, digits_recipe: Recipe) -> None:
    fill(small_disk, 512 * 1024)
    with pytest.raises(UserError, match=r"has 0\.5 MiB free, a run needs at least 8"):
        check_output(small_disk / "out")
    assert contents(small_disk) == ["filler"]


def test_a_read_only_disk(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\)"):
        check_output(small_disk / "out")


class Quiet(RecordingReporter):
    """A Reporter that calls a function at the first metrics."""

    def __init__(self, at_metrics: object = None) -> None:
        super().__init__()
        self.at_metrics = at_metrics

    def entry(self, entry: Entry) -> None:
        super().entry(entry)
        if entry.metrics and callable(self.at_metrics):
            self.at_metrics()
            self.at_metrics = None


SHORT = [
    "train.length=4 steps",
    "train.log_every=1 steps",
    "train.eval_every=4 steps",
    "train.checkpoint_every=2 steps",
]


@pytest.mark.long
def test_a_disk_that_fills_keeps_the_checkpoint_before(
    small_disk: Path, digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = digits_recipe.with_overrides([*SHORT, "train.length=6 steps", "train.eval_every=6 steps"])
    request = Request(recipe, "digits.py", small_disk / "out", local=True, name="a")
    write = store.write_checkpoint

    def write_on_a_disk_that_fills(checkpoints: Storage, step: int, *arguments: Any) -> Any:
        if step == 4:
            fill(small_disk, 0)
        return write(checkpoints, step, *arguments)

    monkeypatch.setattr(store, "write_checkpoint", write_on_a_disk_that_fills)
    words = r"step 6 could not be written .*No space left on device.*; the last that is kept is step-00000002"
    with pytest.raises(TrainingError, match=words):
        run_training(request, Quiet(), open_publisher)
    assert [path.name for path in (small_disk / "out/runs/a/checkpoints").iterdir()] == ["step-00000002"]
    (small_disk / "filler").unlink()
    monkeypatch.setattr(store, "write_checkpoint", write)
    reporter = Quiet()
    run_training(request, reporter, open_publisher)
    assert "resumed at step 2 of 6" in reporter.notes


def test_an_output_that_goes_ends_the_run_soon(tmp_path: Path, digits_recipe: Recipe) -> None:
    recipe = digits_recipe.with_overrides(
        [*SHORT, "train.length=100000 steps", "train.eval_every=100000 steps"]
    )
    run_folder = tmp_path / "out/runs/a"
    request = Request(recipe, "digits.py", tmp_path / "out", local=True, name="a")

    def move() -> None:
        run_folder.rename(tmp_path / "moved")

    with pytest.raises(TrainingError, match=r"runs/a has been removed or renamed while the run was trained"):
        run_training(request, Quiet(move), open_publisher)
    assert not run_folder.exists()  # It would be in the way of the one that is moved back.
    assert (tmp_path / "moved/run.json").exists()
    shutil.rmtree(tmp_path / "moved")


NAMES = "a b #%;&+=,é e\u0301 [x] @:'\"\\ $HOME {output} -x ~ 100%done" + "x" * 180


def test_everything_lies_in_a_folder_of_any_name(
    tmp_path: Path,
    digits_recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Meanwhile git hangs, which MLflow would wait for."""
    commands = tmp_path_factory.mktemp("commands")
    (commands / "git").write_text(f'#!/bin/sh\necho "$1" >> {commands}/calls\nexec sleep 600\n')
    (commands / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    output = tmp_path / NAMES
    request = Request(digits_recipe.with_overrides(SHORT), "digits.py", output, local=True, name="a")
    summary = run_training(request, Quiet(), open_publisher)
    assert [path.name for path in tmp_path.iterdir()] == [NAMES]
    assert sorted(path.name for path in output.iterdir()) == [
        ".mlflow.db.lock",
        "artifacts",
        "mlflow.db",
        "runs",
    ]
    client = mlflow.MlflowClient(tracking_uri(output))
    assert summary.run.run_id is not None
    found = client.get_run(summary.run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.metrics["eval/samples"] == 360
    assert len(list(output.rglob("MLmodel"))) == 1
    assert (commands / "calls").read_text() == "-C\n"  # ours, which has a limit
    model = load_model(find_model(summary.run.run_id, output), torch.device("cpu"))
    assert model.classes == read_index(digits_recipe.data.eval).classes


def test_arguments_are_quoted_as_a_shell_reads_them() -> None:
    arguments = [NAMES, "", "a\nb", os.fsdecode(b"\xff'\\"), "plain", "tab\there"]
    program = "import os, sys; sys.stdout.buffer.write(b'\\0'.join(map(os.fsencode, sys.argv[1:])))"
    line = joined([sys.executable, "-c", program, *arguments])
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    assert done.stdout.split(b"\0") == [os.fsencode(argument) for argument in arguments]
    assert quoted("plain") == "plain"
