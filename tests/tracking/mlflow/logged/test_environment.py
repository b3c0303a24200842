"""A trained model in environments that are made from its own requirements, by uv and by pip: its accuracy is that of the
run, and MLflow serves it, from the folder of a foreign project, with pickles refused."""

from __future__ import annotations

import base64
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError

import mlflow
import numpy as np
import pytest
from mlflow.models import Model

from resnet_dist.config import load_recipe
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.mlflow.logged.write import write_model
from resnet_dist.tracking.spool import Spool
from resnet_dist.train.loop import train
from resnet_dist.world import World
from tests.paths import ROOT, list_checkpoints

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),  # An index may take minutes to send torch.
    pytest.mark.skipif(
        shutil.which("uv") is None, reason="uv, which restores the environment, is not installed"
    ),
    pytest.mark.filterwarnings("ignore::UserWarning:mlflow", "ignore::FutureWarning:mlflow"),
]
START_SECONDS = 600.0
# Ends with the accuracy on the images of a folder, whose names begin with their class.
ACCURACY = """
import pathlib, sys
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
files = sorted(pathlib.Path(sys.argv[2]).iterdir())
rows = model.predict([file.read_bytes() for file in files], params={"top_k": 1})
correct = sum(row[0] == file.name.partition("-")[0] for row, file in zip(rows["classes"], files, strict=True))
print(correct, len(files))
"""
PACKAGES = """
import importlib.metadata, json
print(json.dumps({found.name.lower(): found.version for found in importlib.metadata.distributions()}))
"""


@dataclass(frozen=True)
class Trained:
    """A logged model, the held-out images as files named by their class, and the accuracy of its run on them."""

    model: Path
    images: Path
    top1: float


@dataclass(frozen=True)
class Restored:
    """The environment that a tool has made for a model, and the variables with which MLflow finds it."""

    manager: str
    python: Path
    variables: dict[str, str]


@pytest.fixture(scope="module")
def trained(digits_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    data = [f"data.train={digits_data}/train", f"data.eval={digits_data}/eval"]
    length = ["model.name=resnet8", "train.length=40 steps", "schedule.warmup=5 steps"]
    recipe = load_recipe(ROOT / "jobs/digits.py", [*data, *length])
    with Spool(open_storage(folder / "run").log("spool.jsonl")) as spool:
        outcome = train(recipe, str(folder / "run"), World.single(), spool)
    newest = list_checkpoints(folder / "run/checkpoints")[-1]
    write_model(folder / "model", newest, recipe, Model(), outcome.metrics)
    (folder / "images").mkdir()
    for shard in sorted((digits_data / "eval").glob("*.tar")):
        _unpack(shard, folder / "images")
    return Trained(folder / "model", folder / "images", outcome.metrics["eval/top1"])


def _unpack(shard: Path, folder: Path) -> None:
    """Write the images of a shard as CLASS-KEY.png."""
    with tarfile.open(shard) as tar:
        files = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
    for name, content in files.items():
        key, _, end = name.partition(".")
        if end == "png":
            (folder / f"{files[f'{key}.cls'].decode()}-{key}.png").write_bytes(content)


@pytest.fixture(scope="module", params=["uv", "virtualenv"])
def restored(
    request: pytest.FixtureRequest, trained: Trained, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Restored]:
    """Let MLflow make the environment of the model, once for all tests: by uv, or by `venv` and pip."""
    manager, folder = request.param, tmp_path_factory.mktemp(request.param)
    ours = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    root = folder / "environments"
    variables = {**ours, "MLFLOW_ENV_ROOT": str(root), "PATH": f"{pyenv(folder)}:{ours['PATH']}"}
    # Compiling what is never imported takes as long as installing it.
    variables["PIP_NO_COMPILE"] = "1"
    need_index(variables)
    foreign_project(folder)
    command = [sys.executable, "-m", "mlflow", "models", "prepare-env", "-m", str(trained.model)]
    done = subprocess.run(
        [*command, "--env-manager", manager],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (python,) = root.glob("*/bin/python")
    yield Restored(manager, python, variables)
    shutil.rmtree(root, ignore_errors=True)  # gigabytes


def pyenv(folder: Path) -> Path:
    """Return a folder with a pyenv that has this Python: the real one builds the newest release from its source."""
    version = platform.python_version()
    (folder / "bin").mkdir()
    (folder / "pyenv/versions").mkdir(parents=True)
    (folder / "pyenv/versions" / version).symlink_to(sys.base_prefix)
    answers = f'case "$*" in "install --list") echo "  {version}";; root) echo "{folder}/pyenv";; esac'
    (folder / "bin/pyenv").write_text(f"#!/bin/sh\n{answers}\n")
    (folder / "bin/pyenv").chmod(0o755)
    return folder / "bin"


def need_index(variables: dict[str, str]) -> None:
    """Skip where no index of packages answers."""
    command = ["uv", "pip", "compile", "--no-deps", "--no-cache", "--quiet", "-"]
    asked = subprocess.run(
        command, input="safetensors", env=variables, capture_output=True, text=True, timeout=200, check=False
    )
    if asked.returncode:
        pytest.skip(f"no package index is reachable: {asked.stderr.strip()[-200:]}")


@contextmanager
def serving(model: Path, restored: Restored, cwd: Path, **variables: str) -> Iterator[str]:
    """Serve the model by MLflow's own server in the environment that was restored; yield the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(model), "-p", str(port)]
    log, environment = cwd / "server.log", {**restored.variables, **variables}
    with log.open("wb") as file:
        server = subprocess.Popen(
            [*command, "--env-manager", restored.manager],
            cwd=cwd,
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
        while True:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            with suppress(OSError), urllib.request.urlopen(f"{address}/ping", timeout=5):
                break
            time.sleep(0.2)
        yield address
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answer(address: str, inputs: object, **more: object) -> list[dict[str, list[object]]]:
    body = json.dumps({"inputs": inputs, **more}).encode()
    request = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=100) as response:
        found: list[dict[str, list[object]]] = json.load(response)["predictions"]
    return found


def foreign_project(folder: Path) -> None:
    """Make a folder that is another uv project, whose lock nothing could be restored from."""
    (folder / "pyproject.toml").write_text(
        "[project]\nname = 'other'\nversion = '1'\ndependencies = ['none-such']\n"
    )
    (folder / "uv.lock").write_text("version = 1\nrequires-python = '>=3.99'\n")


def test_the_accuracy_is_that_of_the_run(restored: Restored, trained: Trained, tmp_path: Path) -> None:
    foreign_project(tmp_path)
    done = subprocess.run(
        [str(restored.python), "-c", ACCURACY, str(trained.model), str(trained.images)],
        cwd=tmp_path,
        env={**restored.variables, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    correct, count = map(int, done.stdout.split())
    assert count == 360
    assert correct / count == pytest.approx(trained.top1, abs=1e-9)
    assert trained.top1 > 0.5  # The net has learnt something that a wrong preprocessing would lose.


@pytest.mark.parametrize("pickles", ["true", "false"])
def test_it_serves_images_and_arrays_over_http(
    restored: Restored, trained: Trained, tmp_path: Path, pickles: str
) -> None:
    foreign_project(tmp_path)
    here = mlflow.pyfunc.load_model(str(trained.model))
    picture = min(trained.images.iterdir()).read_bytes()
    pixels = np.arange(40 * 50, dtype=np.uint8).reshape(40, 50, 1)
    refusing = {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": pickles}
    with serving(trained.model, restored, tmp_path, **refusing) as address:
        (found,) = answer(address, [base64.b64encode(picture).decode()], params={"top_k": 2})
        arrays = answer(address, [pixels.tolist(), pixels.tolist()])
        with pytest.raises(HTTPError) as refused:
            answer(address, ["aGVsbG8="])
        assert refused.value.code == 400
        assert "image 0: not a readable image: a text file" in refused.value.read().decode()
    (expected,) = here.predict([picture], params={"top_k": 2}).to_dict("records")
    assert found["classes"] == expected["classes"]
    # Another installation of torch may sum in another order.
    assert found["probabilities"] == pytest.approx(expected["probabilities"], rel=1e-5)
    assert [row["classes"] for row in arrays] == here.predict(pixels[None].repeat(2, 0))["classes"].tolist()


def test_the_environment_has_no_package_of_ours(restored: Restored, trained: Trained) -> None:
    done = subprocess.run(
        [str(restored.python), "-c", PACKAGES],
        env=restored.variables,
        capture_output=True,
        text=True,
        check=True,
    )
    names = json.loads(done.stdout)
    assert "resnet-dist" not in names
    assert "resnet_dist" not in names
    wanted = dict(line.split("==") for line in (trained.model / "requirements.txt").read_text().splitlines())
    assert {name: names[name].partition("+")[0] for name in wanted} == wanted
