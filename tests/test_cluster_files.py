"""The files in cluster/, as far as they can be checked offline: schemas, options and names that must exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from packaging.requirements import Requirement

from resnet_dist.cli import app
from resnet_dist.config import load_recipe
from tests.paths import ROOT

CLUSTER = ROOT / "cluster"


def load(name: str) -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load((CLUSTER / name).read_text())
    return value


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", (CLUSTER / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines]


def project_version() -> str:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return str(tomllib.load(file)["project"]["version"])


def parse_train(entrypoint: str) -> dict[str, Any]:
    """Parse a `resnet-dist train …` line with the real command line, and return the parameters."""
    program, command, *words = shlex.split(entrypoint)
    assert (program, command) == ("resnet-dist", "train")
    group = typer.main.get_command(app)
    return dict(group.commands["train"].make_context("train", words).params)  # type: ignore[attr-defined]


def test_the_image_is_built_under_the_name_that_is_pulled() -> None:
    (built,) = re.findall(r"docker build .* -t (\S+)", (CLUSTER / "Dockerfile").read_text())
    (pulled,) = re.findall(r"image: &image (\S+)", (CLUSTER / "kuberay-rayjob.yaml").read_text())
    assert built == pulled == f"resnet-dist:{project_version()}"


def test_dockerfile() -> None:
    found = instructions()
    assert found[0][0] == "FROM"
    known = {"FROM", "RUN", "WORKDIR", "ENV", "COPY", "USER", "CMD"}
    assert {name for name, _ in found} <= known
    for source in (word for name, rest in found if name == "COPY" for word in rest.split()[:-1]):
        assert (ROOT / source).exists(), source
    users = [rest for name, rest in found if name == "USER"]
    assert users
    assert users[-1] not in ("root", "0")
    assert f"useradd --create-home {users[-1]}" in " ".join(rest for name, rest in found if name == "RUN")


def test_ray_launcher() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = load("ray-launcher.yaml")
    validate_config(prepare_config(config))
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    token, wheel = config["file_mounts"]
    started = [line for line in starts if "ray start" in line]
    assert len(started) == 2
    assert all(f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token}" in line for line in started)
    # Anyone could publish a package under the bare name on the package index.
    (install,) = [line for line in config["setup_commands"] if "resnet" in line]
    assert shlex.split(install)[-1] == wheel
    built = f"resnet_dist-{project_version()}-py3-none-any.whl"
    assert (Path(wheel).name, config["file_mounts"][wheel]) == (built, f"dist/{built}")
    with pytest.raises(Exception, match="worker_count"):  # The check can fail.
        validate_config(prepare_config({**load("ray-launcher.yaml"), "worker_count": 2}))


def test_rayjob() -> None:
    job = load("kuberay-rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
    head, (workers,) = spec["rayClusterSpec"]["headGroupSpec"], spec["rayClusterSpec"]["workerGroupSpecs"]
    for group in (head, workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert container["resources"]["requests"] == container["resources"]["limits"]
        environment = {item["name"]: item["value"] for item in container["env"]}
        assert environment["RAY_AUTH_MODE"] == "token"
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert str(Path(environment["RAY_AUTH_TOKEN_PATH"]).parent) in mounts
    parameters = parse_train(spec["entrypoint"])
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert parameters["gpu"] is True
    assert parameters["workers"].max == workers["replicas"] * int(limits["nvidia.com/gpu"])
    assert Path(parameters["output"]).is_relative_to("/mnt/shared")
    load_recipe(ROOT / parameters["recipe"].relative_to("/app"))
    variables = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    assert all(isinstance(value, str) for value in variables.values())
    grace = workers["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > int(variables["RAY_JOB_STOP_WAIT_TIME_S"])
    with pytest.raises(Exception, match="--ranks"):  # The check can fail.
        parse_train("resnet-dist train jobs/digits.py --ranks 2")


@pytest.mark.filterwarnings("ignore:.*Any type hint")  # MLflow imports its own agents.
def test_mlflow_compose() -> None:
    from mlflow.cli import cli

    services = load("mlflow-compose.yaml")
    server = services["services"]["mlflow"]
    program, command, *options = server["command"]
    assert program == "mlflow"
    known = {name for parameter in cli.commands[command].params for name in parameter.opts}
    for option in options:
        assert option.partition("=")[0] in known, option
    uri = next(option for option in options if "--backend-store-uri" in option)
    assert "@postgres:5432" in uri
    assert "postgres" in services["services"]
    (install,) = re.findall(r"pip install --no-cache-dir (.+)", server["build"]["dockerfile_inline"])
    assert {Requirement(word).name for word in install.split()} == {"mlflow", "psycopg2-binary"}
    used = {v.partition(":")[0] for s in services["services"].values() for v in s["volumes"]}
    assert used == set(services["volumes"])


@pytest.mark.parametrize("path", sorted(CLUSTER.iterdir()), ids=lambda path: path.name)
def test_no_secret_and_no_path_of_a_machine(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("#")
    assert not re.search(r"/work/|/root/|password: *[A-Za-z0-9]", text, re.I)
