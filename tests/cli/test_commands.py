"""The commands as users type them: which mistakes they refuse, and what an interruption leaves."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest

from resnet_dist.cli.main import run_command
from tests.data.servers import file_server
from tests.paths import ROOT

DIGITS = str(ROOT / "jobs/digits.py")


def start(*words: str, cwd: Path) -> subprocess.Popen[str]:
    environment = {
        key: value for key, value in os.environ.items() if key not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")
    }
    code = "from resnet_dist.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*words: str, cwd: Path) -> tuple[int, str, str]:
    process = start(*words, cwd=cwd)
    out, err = process.communicate(timeout=280)
    return process.returncode, out, err


@pytest.fixture
def folder(tmp_path: Path, digits_data: Path) -> Path:
    """A working folder whose output holds the digits already."""
    shutil.copytree(digits_data, tmp_path / "output/data/digits")
    return tmp_path


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Return a function that runs a command in this process and in `folder`: a process imports for seconds."""
    monkeypatch.chdir(folder)
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)

    def run_here(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["resnet-dist", *words])
        code = run_command()
        out, err = capsys.readouterr()
        return code, out, err

    return run_here


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "data.batch=1"], "data.batch is not a field|--set data.batch: not a field"),
        (["--workers", "3"], "--workers 3: the recipe has 2 micro-batches"),
        (["--set", "model.name=resnet21"], "model.name='resnet21': use one of"),
        (
            ["--set", "data.global_batch_size=4096", "--set", "data.micro_batch_size=2048"],
            "more than the 1437",
        ),
        (["--name", "a/b"], "--name 'a/b'"),
        (["--resume"], "no run of 'digits'"),
        (["--local", "--address", "auto"], "--address auto: --local trains in this process"),
        (["--local", "--workers", "2"], "--workers 2: --local trains as one rank"),
        (["--set", "data.train=/nowhere"], "data.source='digits'"),
        (["--set", "data.train=/nowhere", "--set", "data.source=none"], "/nowhere/index.json: no such index"),
    ],
)
def test_a_mistake_ends_with_2_and_one_sentence(
    command: Command, folder: Path, words: list[str], message: str
) -> None:
    before = files(folder)
    code, out, err = command("train", DIGITS, *words)
    assert code == 2, err
    assert any(part in err for part in message.split("|"))
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert out == ""  # The command prints a line when it starts Ray.
    assert files(folder) == before


def test_damaged_shards_are_refused_before_anything_starts(command: Command, folder: Path) -> None:
    path = next((folder / "output/data/digits/train").glob("*3.tar"))
    path.rename(path.with_suffix(".away"))
    code, out, err = command("train", DIGITS)
    assert (code, out) == (2, "")
    assert f"{path.name}: missing" in err
    path.with_suffix(".away").rename(path)
    path.write_bytes(path.read_bytes()[:-512])
    code, out, err = command("train", DIGITS)
    assert (code, out) == (2, "")
    assert f"{path.name}: has" in err
    assert not (folder / "output/runs").exists()


def test_a_recipe_that_raises(command: Command, folder: Path) -> None:
    (folder / "bad.py").write_text("def recipe():\n    return 1 / 0\n")
    code, out, err = command("train", "bad.py")
    assert (code, out) == (2, "")
    assert err == "error: bad.py, line 2: ZeroDivisionError: division by zero\n"


SHORT = [
    "--set",
    "model.name=resnet8",
    "--set",
    "train.length=30 steps",
    "--set",
    "train.checkpoint_every=5 steps",
]


def test_local_train_evaluate_and_the_run_in_mlflow(folder: Path, command: Command) -> None:
    code, out, err = command("train", DIGITS, "--local", "--name", "first", *SHORT)
    assert code == 0, err
    assert "top-1" in out
    assert out.endswith("browse     resnet-dist ui\n")
    client = mlflow.MlflowClient(f"sqlite:///{folder}/output/mlflow.db")
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.status, found.info.run_name) == ("FINISHED", "first")
    assert found.data.params["optim.lr"] == "0.1"
    assert found.data.params["model.name"] == "resnet8"
    assert len(found.data.tags["mlflow.source.git.commit"]) >= 40
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [metric.step for metric in history] == [10, 20, 30]
    top1 = found.data.metrics["eval/top1"]
    for model in (str(folder / "output/runs/first"), found.info.run_id):
        code, out, err = command("evaluate", model, "output/data/digits/eval")
        assert code == 0, err
        printed = dict(line.split() for line in out.splitlines())
        assert float(printed["eval/top1"]) == pytest.approx(top1, rel=1e-5)
        assert printed["eval/samples"] == "360"
    code, out, err = command("evaluate", "nothing", "output/data/digits/eval")
    assert code == 2
    assert "neither a folder nor a run with a model" in err


LOAD = """
import sys
sys.modules["resnet_dist"] = None  # A machine that serves a model does not have the package.
import mlflow, numpy as np
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(f"runs:/{sys.argv[2]}/model")
print(model.predict(np.zeros((3, 8, 8, 1), np.uint8)).shape)
"""


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_data_are_prepared(tmp_path: Path, number: signal.Signals) -> None:
    process = start("train", DIGITS, "--local", cwd=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("preparing digits")
    process.send_signal(number)
    _, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (
        130,
        "interrupted before training began; the same command begins it\n",
    )
    assert not (tmp_path / "output/runs").exists()
    code, _, err = run("train", DIGITS, "--local", *SHORT, cwd=tmp_path)
    assert code == 0, err


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_interrupted_leaves_a_checkpoint_and_a_line_that_resumes(
    folder: Path, command: Command, number: signal.Signals
) -> None:
    words = [*SHORT, "--set", "train.length=6000 steps"]
    process = start("train", DIGITS, "--local", "--name", "first", *words, cwd=folder)
    assert process.stdout is not None
    while "step 20/6000" not in (line := process.stdout.readline()):
        assert line, process.communicate()
    process.send_signal(number)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    assert "--name first" in err.splitlines()[-1]
    uri = f"sqlite:///{folder}/output/mlflow.db"
    client = mlflow.MlflowClient(uri)
    (found,) = client.search_runs(["1"])
    assert found.info.status == "KILLED"
    code, _, err = command("train", DIGITS, "--local", "--name", "first", *words, "--set", "optim.lr=0.3")
    assert code == 2
    assert "optim.lr was 0.1, is 0.3" in err


@pytest.mark.long
def test_kill_9_and_the_same_command_finish_the_run(folder: Path) -> None:
    words = ["train", DIGITS, "--local", "--name", "first", *SHORT, "--set", "train.length=300 steps"]
    process = start(*words, cwd=folder)
    assert process.stdout is not None
    while "step 50/300" not in (line := process.stdout.readline()):
        assert line, process.communicate()
    process.kill()
    process.communicate()
    code, out, err = run(*words, cwd=folder)
    assert code == 0, err
    assert "resumed at step" in out
    uri = f"sqlite:///{folder}/output/mlflow.db"
    client = mlflow.MlflowClient(uri)
    (found,) = client.search_runs(["1"])
    assert found.info.status == "FINISHED"
    steps = [metric.step for metric in client.get_metric_history(found.info.run_id, "train/loss")]
    assert steps == list(range(10, 301, 10))  # No step is lost or logged twice.
    command = [sys.executable, "-c", LOAD, uri, found.info.run_id]
    loaded = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, check=False)
    assert loaded.stdout.strip() == "(3, 2)", loaded.stderr  # classes, probabilities


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prepare", "nowhere", "out"], "source 'nowhere' is neither a known data set (digits, cifar10,"),
        (["prepare", "digits", "out", "--shards", "3", "--shard-size", "9"], "--shards 3 and --shard-size 9"),
        (
            ["prepare", "digits", "output/data/digits", "--seed", "4"],
            "prepared with seed=0, other images; give another folder",
        ),
        (["index", "nowhere.tar"], "nowhere.tar: missing"),
        (["index", "output/data"], "no shards in this folder"),
        (["index", "pipe:true", "--out", "x.json"], "--allow-commands"),
        (["index", "https://127.0.0.1:9/a.tar"], "--out is missing"),
        (["index", "--verify", "output/data/digits/train/index.jsn"], "index.jsn: missing"),
        (["bench", "loader", "nowhere"], "nowhere/index.json: no such index"),
        (
            ["bench", "loader", "output/data/digits/eval", "--batch-size", "512"],
            "360 samples are less than one batch of 512; use a smaller --global-batch-size",
        ),
        (["bench", "loader", "output/data/digits/eval", "--cache", "ram"], "use cache='none', or crop="),
        (
            ["evaluate", "output", "output/data/digits/eval", "--gpu"],
            "error: --gpu: this machine has no CUDA",
        ),
        (["bench", "loader", "output/data/digits/eval", "--cache", "ram"], "error: cache='ram' keeps images"),
        (["bench", "loader", "output/data"], "output/data/index.json: no such index"),
    ],
)
def test_mistakes_about_data(command: Command, folder: Path, words: list[str], message: str) -> None:
    before = files(folder)
    code, _, err = command(*words)
    assert code == 2, err
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert files(folder) == before


def test_a_missing_shard_is_one_sentence(folder: Path, command: Command) -> None:
    next((folder / "output/data/digits/eval").glob("*000003.tar")).unlink()
    code, _, err = command("bench", "loader", "output/data/digits/eval", "--crop", "none")
    assert code == 1
    assert err.startswith("error: ")
    assert err.endswith("digits-eval-000003.tar: missing\n")
    assert err.count("\n") == 1


def test_index_and_verify(folder: Path, command: Command) -> None:
    digits = folder / "output/data/digits/eval"
    names = str(digits / "digits-eval-{000000..000007}.tar")
    code, out, err = command("index", names, "--out", "own", "--verify")
    assert (code, err) == (0, "")
    assert "360 samples of 10 classes in 8 shards" in out
    assert "every checksum agrees, every image can be decoded" in out
    path = digits / "digits-eval-000003.tar"
    content = bytearray(path.read_bytes())
    at = content.index(b"\x89PNG", 20_000)
    content[at : at + 4] = b"JUNK"
    path.write_bytes(content)
    code, out, err = command("index", str(digits), "--verify")
    assert code == 1
    assert "digits-eval-000003.tar: has sha256:" in err
    assert err.endswith("1 problems\n")
    code, out, err = command("index", names, "--out", "again", "--verify")
    assert code == 1
    assert "digits-eval-000003.tar/" in err
    assert "not a readable image" in err


@pytest.mark.long
def test_training_from_a_web_server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    data = folder / "output/data/digits"
    with file_server(data) as server:
        places = ["--set", f"data.train={server.url}/train", "--set", f"data.eval={server.url}/eval"]
        cache = [
            "--set",
            f"data.shard_cache={tmp_path_factory.mktemp('cache')}",
            "--set",
            "data.fetch_timeout_seconds=3",
        ]
        short = ["--set", "train.length=12 steps", "--local"]
        code, out, err = run("train", DIGITS, *places, *cache, *short, cwd=folder)
        assert code == 0, err
        assert "of 360 held-out samples" in out
        next((data / "train").glob("*5.tar")).unlink()
        code, out, err = run(
            "train", DIGITS, *places, *cache[2:], "--set", "data.shard_cache=c", *short, cwd=folder
        )
    assert code == 1
    problem, advice, command = err.splitlines()
    assert "digits-train-000005.tar: 404 Not Found" in problem
    assert advice == "once that is mended, this continues it:"
    assert "--name" in command


def test_bench_prints_its_figures(folder: Path, command: Command) -> None:
    words = ["--image-size", "8", "--crop", "pad-crop", "--rounds", "1", "--against", "raw"]
    code, out, err = command("bench", "loader", "output/data/digits/train", *words)
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["loader", "raw", "memory"]


STUDY = str(ROOT / "jobs/plain_vs_residual.py")


@pytest.mark.long
def test_study_trains_all_its_runs_and_prints_its_conclusion(folder: Path) -> None:
    words = ["study", STUDY, "--with", "depths=[8,14]", "--with", "seeds=1", "--name", "small"]
    short = ["--set", "train.length=6 steps", "--set", "schedule.warmup=0 steps"]
    code, out, err = run(*words, *short, cwd=folder)
    assert code == 0, err
    lines = out.splitlines()
    trained = [line for line in lines if line.startswith("run small-")]
    names = [f"{net}-{depth}-seed-0" for depth in (8, 14) for net in ("plain", "residual")]
    assert trained == [f"run small-{name}: 6 steps, 1 rank(s)" for name in names]
    assert [line.split()[0] for line in lines if "eval top-1" in line and "training loss" in line] == names
    assert "step 5/6" not in out  # The step lines of twelve runs would hide the conclusion.
    assert "training loss" in lines[-4]
    assert "with 14 plain layers" in lines[-4]
    assert lines[-3] == "figure     output/studies/small/figure.png"
    assert (folder / "output/studies/small/figure.png").stat().st_size > 10_000
    code, out, _ = run(*words, *short, cwd=folder)
    assert code == 0
    assert out.count("finished before") == 4
    code, out, err = run(*words, cwd=folder)
    assert (code, out) == (2, "")
    assert (
        "trial plain-8-seed-0: run small-plain-8-seed-0 would not continue what it began: train.length" in err
    )
    code, out, err = run(*words, *short[:3], "schedule.warmup=3 steps", cwd=folder)
    assert (code, out) == (2, "")  # Not "finished before": those runs had another warm-up.
    assert (
        "run small-plain-8-seed-0 was started with another recipe (schedule.warmup from 0 steps to 3" in err
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([DIGITS], "defines no function study() -> Study"),
        ([STUDY, "--with", "sets=2"], "sets is no argument of study()"),
        ([STUDY, "--set", "optim.lrr=2"], "did you mean optim.lr?"),
        ([STUDY, "--workers", "3"], "trial plain-20-seed-0: --workers 3: the recipe has 2 micro-batches"),
    ],
)
def test_mistakes_about_studies(command: Command, folder: Path, words: list[str], message: str) -> None:
    before = files(folder)
    code, out, err = command("study", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert files(folder) == before


@pytest.mark.long
def test_an_interrupted_study_prints_the_command_that_continues_it(folder: Path) -> None:
    words = ["study", STUDY, "--with", "depths=[8,14]", "--set", "train.length=6000 steps"]
    process = start(*words, cwd=folder)
    assert process.stdout is not None
    while "run plain_vs_residual-digits-plain-8-seed-0" not in (line := process.stdout.readline()):
        assert line, process.communicate()
    spool = folder / "output/runs/plain_vs_residual-digits-plain-8-seed-0/spool.jsonl"
    while not spool.exists() or not spool.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    assert "interrupted after 0 of 12 runs; this continues it:" in err
    assert err.splitlines()[-1].strip().startswith("resnet-dist study")
    statuses = {
        found.info.run_name: found.info.status
        for found in mlflow.MlflowClient(f"sqlite:///{folder}/output/mlflow.db").search_runs(["1"])
    }
    assert set(statuses.values()) == {"KILLED"}
    assert len(statuses) == 2
