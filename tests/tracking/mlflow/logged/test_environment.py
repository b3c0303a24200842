"""A logged model in an environment that is made from its own requirements: served over HTTP, with and without a shell's
foreign project, and with pickles refused."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import HTTPError

import mlflow
import numpy as np
import pytest

from tests.data.images.pictures import jpeg, photo

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),  # An index may take minutes to send torch.
    pytest.mark.skipif(
        shutil.which("uv") is None, reason="uv, which restores the environment, is not installed"
    ),
]
START_SECONDS = 600.0
PICTURE = jpeg(photo(80, 120))


@pytest.fixture(scope="module")
def restored(logged: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """Return a copy of the model, and the variables with which its environment is restored once for all tests."""
    folder = tmp_path_factory.mktemp("restored")
    shutil.copytree(logged, folder / "model")
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    yield folder / "model", {**environment, "MLFLOW_ENV_ROOT": str(folder / "environments")}
    shutil.rmtree(folder / "environments", ignore_errors=True)  # gigabytes


@contextmanager
def serving(model: Path, environment: dict[str, str], cwd: Path) -> Iterator[str]:
    """Serve the model by MLflow's own server in the environment that uv restores; yield the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "serve",
        "-m",
        str(model),
        "-p",
        str(port),
        "--env-manager",
        "uv",
    ]
    log = cwd / "server.log"
    with log.open("wb") as file:
        server = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=file, stderr=file, start_new_session=True
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


@pytest.mark.filterwarnings("ignore::UserWarning:mlflow", "ignore::FutureWarning:mlflow")
@pytest.mark.parametrize("pickles", ["true", "false"])
def test_it_serves_images_and_arrays_over_http(
    restored: tuple[Path, dict[str, str]], logged: Path, tmp_path: Path, pickles: str
) -> None:
    model, environment = restored
    foreign_project(tmp_path)
    here = mlflow.pyfunc.load_model(str(logged))
    pixels = np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3)
    with serving(model, {**environment, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": pickles}, tmp_path) as address:
        (found,) = answer(address, [base64.b64encode(PICTURE).decode()], params={"top_k": 2})
        arrays = answer(address, [pixels.tolist(), pixels.tolist()])
        with pytest.raises(HTTPError) as refused:
            answer(address, ["aGVsbG8="])
        assert refused.value.code == 400
        assert "image 0: not a readable image: a text file" in refused.value.read().decode()
    (expected,) = here.predict([PICTURE], params={"top_k": 2}).to_dict("records")
    assert found["classes"] == expected["classes"]
    # Another installation of torch may sum in another order.
    assert found["probabilities"] == pytest.approx(expected["probabilities"], rel=1e-5)
    assert [row["classes"] for row in arrays] == here.predict(pixels[None].repeat(2, 0))["classes"].tolist()


def test_the_environment_has_no_package_of_ours(
    restored: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    """Runs behind the tests above, in what they restored: MLflow's own `predict`, by the example of the model."""
    model, environment = restored
    command = [sys.executable, "-m", "mlflow", "models", "predict", "-m", str(model), "--env-manager", "uv"]
    command += ["-i", str(model / "serving_input_example.json"), "-o", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "out.json").read_text())["predictions"]) == 1
    (python,) = (Path(environment["MLFLOW_ENV_ROOT"])).glob("*/bin/python")
    packages = subprocess.run(
        ["uv", "pip", "list", "--format", "json", "--python", str(python)],
        capture_output=True,
        text=True,
        check=True,
    )
    names = {entry["name"]: entry["version"] for entry in json.loads(packages.stdout)}
    assert "resnet-dist" not in names
    wanted = dict(line.split("==") for line in (model / "requirements.txt").read_text().splitlines())
    assert {name: names[name].partition("+")[0] for name in wanted} == wanted
