"""Secrets planted in the environment, in URLs and in the recipe of a submitted run: afterwards nothing has one.

Searched are all that the run, Ray, the S3 store and the MLflow server keep: logs, databases, objects, artifacts, the metadata
of the job, and the arguments of every process while it trains.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from resnet_dist.launch.ray_cluster.job import RECIPE_FILE
from resnet_dist.tracking.store import STORE_FILE
from tests.data.odd_server import odd_server
from tests.launch.jobs.real_head import SECONDS, Head, descendants, read_until, small_head
from tests.paths import ROOT
from tests.s3_server import S3Server, variables
from tests.tracking.mlflow.servers import MlflowServer

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
# As odd_server wants it; quoted and unquoted.
DATA_PASSWORDS = ("p%40ss%2Fword", "p@ss/word", "ss%2Fword")
PLANTED = {
    "signature of a URL": "planted-signature",
    "password of MLflow": "planted-mlflow",
    "token of MLflow": "planted-bearer",
    "key of S3": "planted-s3-key",
    "token of Ray": "planted-ray-token-of-at-least-32-characters",
    "header of fsspec": "planted-header",
    "variable of a person": "planted-variable",
}
SECRETS = (*PLANTED.values(), *DATA_PASSWORDS)


def found_in(name: str, content: bytes) -> list[str]:
    return [f"{secret} in {name}" for secret in SECRETS if secret.encode() in content or secret in name]


def search_files(folder: Path, *, but: tuple[str, ...] = ()) -> list[str]:
    """Return where files below `folder` have a secret. but: the names of files that may."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in but]
    assert files
    return [place for path in files for place in found_in(str(path), path.read_bytes())]


def objects_of(server: S3Server, bucket: str) -> Iterator[tuple[str, bytes]]:
    boto3 = pytest.importorskip("boto3", reason="needs moto[server]")
    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "y", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=server.proxy.url, **keys)
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for entry in page.get("Contents", ()):
            yield entry["Key"], client.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read()


def arguments_of_processes(root: int) -> Iterator[tuple[str, bytes]]:
    for pid in descendants(root, ""):
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            yield f"arguments of {process.name()}", "\n".join(process.cmdline()).encode()


@pytest.fixture
def tracking(tmp_path: Path) -> Iterator[MlflowServer]:
    folder = tmp_path / "tracking"
    folder.mkdir()
    server = MlflowServer(folder, f"sqlite:///{folder / STORE_FILE}")
    server.start()
    yield server
    server.kill()


def planted_environment(s3: str, tracking: str) -> Mapping[str, str]:
    return {
        **variables(s3),
        "AWS_SECRET_ACCESS_KEY": PLANTED["key of S3"],
        "MLFLOW_TRACKING_URI": tracking.replace("://", f"://anna:{PLANTED['password of MLflow']}@"),
        "MLFLOW_TRACKING_TOKEN": PLANTED["token of MLflow"],
        "FSSPEC_HTTP": json.dumps({"headers": {"X-Team": PLANTED["header of fsspec"]}}),
        "MY_API_KEY": PLANTED["variable of a person"],
    }


def flags(port: int) -> list[str]:
    url = f"http://user:{DATA_PASSWORDS[0]}@127.0.0.1:{port}/basic"
    fields = {
        "data.train": f"{url}/train?Signature={PLANTED['signature of a URL']}",
        "data.eval": f"{url}/eval?Signature={PLANTED['signature of a URL']}",
        "data.source": "none",
        "description": f"from {url}/train?Signature={PLANTED['signature of a URL']}",
        "model.name": "resnet8",
        "train.length": "24 steps",
        "train.checkpoint_every": "8 steps",
        "schedule.decay": "constant",
    }
    return [word for name, value in fields.items() for word in ("--set", f"{name}={value}")]


def train_submitted(head: Head, ray: int, words: list[str]) -> list[str]:
    """Submit a run, look while it trains, and wait for its end; return where secrets were found."""
    client = head.start(*words)
    printed = read_until(client, "step 10/")
    found = [place for name, line in arguments_of_processes(ray) for place in found_in(name, line)]
    rest, _ = client.communicate(timeout=SECONDS)
    assert client.returncode == 0, printed + rest
    found += found_in("output of submit", (printed + rest).encode())
    for path in ("/api/jobs/", "/api/v0/jobs", "/api/v0/actors", "/api/v0/workers", "/api/v0/runtime_envs"):
        found += found_in(path, head.ask(path).encode())
    for command in (["jobs", "--json"], ["logs", "x"]):
        code, output = head.run(*command)
        assert code == 0, output
        found += found_in(" ".join(command), output.encode())
    return found


def test_no_planted_secret_is_stored_or_shown(
    tmp_path: Path, digits_data: Path, shared_s3: S3Server, tracking: MlflowServer
) -> None:
    bucket, home = shared_s3.new_bucket(), tmp_path / "home"
    home.mkdir()
    words = ["submit", str(ROOT / "jobs/digits.py"), "--workers", "1", "--name", "x"]
    with odd_server(digits_data) as web, small_head(home, PLANTED["token of Ray"]) as head:
        head.variables |= planted_environment(shared_s3.proxy.url, tracking.address)
        words += ["--output", f"s3://{bucket}/output", *flags(web.port)]
        with head.running() as ray:
            # `submit` refuses an address with a password, which would be sent; the cluster has the whole variable.
            del head.variables["MLFLOW_TRACKING_URI"]
            found = train_submitted(head, ray.pid, words)
            # The recipe is sent to the cluster whole, as docs/data.md states; Ray keeps its copy while the job runs.
            found += search_files(Path(head.variables["RAY_TMPDIR"]), but=(Path(RECIPE_FILE).name,))
        assert any(PLANTED["signature of a URL"] in line for line in web.log)  # It was used.
    stored = dict(objects_of(shared_s3, bucket))
    names = {name.rpartition("/")[2] for name in stored}
    assert {"run.json", "checkpoint.json", "model.safetensors", "00000001.jsonl"} <= names, names
    found += [place for name, content in stored.items() for place in found_in(name, content)]
    found += search_files(home)
    found += search_files(tmp_path / "tracking")
    database = (tmp_path / "tracking/mlflow.db").read_bytes()
    assert b"***@127.0.0.1" in database  # The description came this far, without its secrets.
    assert list((tmp_path / "tracking").rglob("MLmodel"))
    assert found == []
