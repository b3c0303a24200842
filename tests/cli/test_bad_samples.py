"""`evaluate` and `bench loader` over sets of which some images are cut off: what they print, and how they end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from resnet_dist.bench import loader as bench
from resnet_dist.cli.main import run_command
from resnet_dist.config import Recipe
from resnet_dist.data.shards.build import build_index
from resnet_dist.data.shards.names import expand
from resnet_dist.data.storage.cache.folder import CacheLimits
from resnet_dist.model import build_model
from resnet_dist.train.checkpoint.load import TrainedModel
from tests.data.conftest import encoded, picture

NUM_SAMPLES = 40
Command = Callable[..., tuple[int, str, str]]


def write_set(folder: Path, is_bad: Callable[[int], bool]) -> Path:
    """Write a shard of small PNGs, of which some are cut off, and index it."""
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "0.tar")) as writer:
        for number in range(NUM_SAMPLES):
            image = encoded(picture(number, 16))
            image = image[:50] if is_bad(number) else image
            writer.write({"__key__": f"{number:04}", "png": image, "cls": number % 10})
    build_index(expand([str(folder / "0.tar")]), folder, CacheLimits(folder / "cache", 2**30, 30.0))
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process; return its exit code, standard output and standard error."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["resnet-dist", *words])
        code = run_command()
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def evaluate(
    command: Command, digits_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path, float], tuple[int, str, str]]:
    """Evaluate an untrained net on a set, by a recipe with the given limit on bad samples."""

    def run(shards: Path, limit: float) -> tuple[int, str, str]:
        recipe = digits_recipe.with_overrides([f"data.max_bad_fraction={limit}"])
        model = build_model(**recipe.model.options(), in_channels=recipe.data.channels, num_classes=10).eval()
        trained = TrainedModel(model, recipe, tuple(str(label) for label in range(10)), 1, tmp_path)
        monkeypatch.setattr(
            "resnet_dist.train.checkpoint.load.load_model", lambda *arguments, **options: trained
        )
        return command("evaluate", str(tmp_path), str(shards), "--cpu")

    return run


Evaluate = Callable[[Path, float], tuple[int, str, str]]


def test_evaluate_refuses_a_set_of_which_half_is_bad(evaluate: Evaluate, tmp_path: Path) -> None:
    code, out, err = evaluate(write_set(tmp_path / "half", lambda number: number % 2 == 1), 0.001)
    assert (code, out) == (1, "")
    lines = err.splitlines()
    named = [line.split(": ")[0] for line in lines[:-1]]
    assert named == [f"bad sample 0.tar/{number:04}" for number in range(1, NUM_SAMPLES, 2)]
    assert len(lines) == NUM_SAMPLES // 2 + 1
    assert all("not a readable image: damaged PNG" in line for line in lines)
    assert (
        "20 of 40 samples (50.00%) are bad, more than data.max_bad_fraction=0.001 allows; the first is 0"
        in lines[-1]
    )


def test_evaluate_names_what_it_leaves_out_below_the_limit(evaluate: Evaluate, tmp_path: Path) -> None:
    code, out, err = evaluate(write_set(tmp_path / "one", lambda number: number == 7), 0.05)
    assert code == 0
    assert out.splitlines()[-1].split() == ["eval/top5", out.split()[-1]]
    assert "eval/samples  39\n" in out
    assert "eval/bad_samples 1\n" in out
    named, summary = err.splitlines()
    assert named.startswith("bad sample 0")
    assert "0007: not a readable image: damaged PNG" in named
    assert summary == "1 of 40 samples are bad and not counted in the metrics"


def test_evaluate_of_a_good_set_prints_nothing_else(evaluate: Evaluate, tmp_path: Path) -> None:
    code, out, err = evaluate(write_set(tmp_path / "good", lambda number: False), 0.0)
    assert (code, err) == (0, "")
    assert "eval/samples  40\n" in out


def test_evaluate_of_a_set_without_a_good_sample_ends_with_1(evaluate: Evaluate, tmp_path: Path) -> None:
    code, out, err = evaluate(write_set(tmp_path / "none", lambda number: True), 1.0)
    assert (code, out) == (1, "")
    lines = err.splitlines()
    assert len(lines) == 20 + 2  # names, the number of the others, and the error
    assert lines[20].startswith("and 20 more; `resnet-dist index ")
    assert "error: none of the 40 samples of " in lines[-1]


@pytest.fixture
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "MIN_SECONDS", 0.02)
    monkeypatch.setattr(bench, "WARM_UP_SECONDS", 0.0)


@pytest.mark.usefixtures("short_rounds")
@pytest.mark.parametrize("words", [[], ["--against", "raw"], ["--cache", "ram", "--crop", "none"]])
@pytest.mark.parametrize("num_bad", [NUM_SAMPLES, NUM_SAMPLES // 2])
def test_no_speed_is_printed_for_images_that_are_not_decoded(
    command: Command, tmp_path: Path, words: list[str], num_bad: int
) -> None:
    shards = write_set(tmp_path / "bad", lambda number: number < num_bad)
    options = ["--batch-size", "8", "--image-size", "16", "--rounds", "2", *words]
    code, out, err = command("bench", "loader", str(shards), *options)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "samples (100.00%) are bad" in err or num_bad < NUM_SAMPLES
    assert "data.max_bad_fraction=0.001 allows; the first is 0" in err
    assert "not a readable image: damaged PNG" in err


@pytest.mark.usefixtures("short_rounds")
def test_the_speed_of_good_images_is_printed(command: Command, tmp_path: Path) -> None:
    shards = write_set(tmp_path / "good", lambda number: False)
    code, out, err = command(
        "bench",
        "loader",
        str(shards),
        "--batch-size",
        "8",
        "--image-size",
        "16",
        "--rounds",
        "2",
        "--against",
        "raw",
    )
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["loader", "raw", "memory"]


@pytest.mark.usefixtures("short_rounds")
def test_a_few_bad_samples_are_named_and_not_counted(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_set(tmp_path / "one", lambda number: number == 7)
    monkeypatch.setattr(bench, "check_bad_fraction", lambda *arguments: None)
    speed_of = bench.bench_loader
    found = []
    monkeypatch.setattr(bench, "bench_loader", lambda *a, **b: found.append(speed_of(*a, **b)) or found[-1])
    code, out, _ = command(
        "bench", "loader", str(shards), "--batch-size", "8", "--image-size", "16", "--rounds", "1"
    )
    assert code == 0
    [speed] = found
    # One sample of an epoch is bad; how much of the next epoch is read depends on the machine.
    assert 0 < len(speed.bad) <= speed.num_samples // NUM_SAMPLES + 1
    assert (
        f"bad        {len(speed.bad):,} of {speed.num_samples:,} samples, not counted; the first is 0" in out
    )
