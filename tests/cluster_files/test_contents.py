"""The files in cluster/: the options, names and versions in them exist, and agree with one another."""

from __future__ import annotations

import configparser
import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
import yaml
from packaging.requirements import Requirement

from resnet_dist.config import WorkerRange, load_recipe
from resnet_dist.driver.gauges import GAUGES
from tests.cluster_files.files import (
    CLUSTER,
    commands_in,
    instructions,
    interpolated,
    load,
    parse_command,
    project_version,
    ray_version,
    text_of,
)
from tests.paths import ROOT

LAUNCHERS = ["ray-launcher.yaml", "ray-launcher-aws.yaml", "ray-launcher-gcp.yaml"]
KUBERAY = ["kuberay-rayjob.yaml", "kuberay-raycluster.yaml"]
SECRETS = {name: f"{name.lower()}-x" for name in re.findall(r"\$\{(\w+):\?", text_of("mlflow-compose.yaml"))}


def test_the_image_is_built_under_the_name_that_is_pulled() -> None:
    built = re.findall(r"docker build .* -t (\S+)", text_of("Dockerfile"))
    pulled = [re.findall(r"image: &image (\S+)", text_of(name)) for name in KUBERAY]
    assert pulled == [[f"resnet-dist:{project_version()}"]] * 2
    assert built[0] == f"resnet-dist:{project_version()}"
    assert load("dstack.yaml")["image"].rpartition("/")[2] == built[0]


def test_dockerfile() -> None:
    found = instructions()
    for source in (
        word for name, rest in found if name == "COPY" and "--from" not in rest for word in rest.split()[:-1]
    ):
        assert (ROOT / source).exists(), source
    last_stage = found[max(number for number, (name, _) in enumerate(found) if name == "FROM") :]
    (user,) = [rest for name, rest in last_stage if name == "USER"]
    (install,) = [rest for name, rest in last_stage if name == "RUN"]
    assert f"useradd --create-home --uid {user} ray" in install  # A number: runAsNonRoot can check it.
    assert all(word in install.split() for word in ("g++", "git", "rsync", "openssh-client", "wget"))
    for name in KUBERAY:
        assert f"runAsUser: {user}" in text_of(name)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_launcher(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = load(name)
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    token, wheel = config["file_mounts"]
    started = [line for line in starts if "ray start" in line]
    assert len(started) == 2
    assert all(f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token}" in line for line in started)
    assert "--dashboard-host=127.0.0.1" in started[0]
    # Anyone could publish a package under the bare name on the package index.
    (install,) = [line for line in config["setup_commands"] if "resnet" in line]
    assert any(word.partition("[")[0] == wheel for word in shlex.split(install))
    built = f"resnet_dist-{project_version()}-py3-none-any.whl"
    assert (Path(wheel).name, config["file_mounts"][wheel]) == (built, f"dist/{built}")
    for line in commands_in(name, "uvx"):
        assert f"ray[default]=={ray_version()}" in shlex.split(line)
    (submitted,) = commands_in(name, "resnet-dist")
    parameters = parse_command(submitted)
    if name != "ray-launcher.yaml":
        nodes = config["available_node_types"]["gpu-spot"]
        assert parameters["workers"].max == nodes["max_workers"] == config["max_workers"]
        assert parameters["wait"] > 0  # Without it no node is asked for.
        assert nodes["min_workers"] == 0
    validate_config(prepare_config(config))
    with pytest.raises(Exception, match="worker_count"):  # The check can fail.
        validate_config(prepare_config({**load(name), "worker_count": 2}))


def test_skypilot_installs_the_wheel_of_this_version_alone() -> None:
    wheel = f"resnet_dist-{project_version()}-py3-none-any.whl"
    assert load("skypilot.yaml")["file_mounts"][f"~/{wheel}"] == f"dist/{wheel}"
    assert f"~/'{wheel}[s3,gs]'" in load("skypilot.yaml")["setup"]


def pods(spec: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_of_kuberay(name: str) -> None:
    found = load(name)
    spec = found["spec"].get("rayClusterSpec", found["spec"])
    assert spec["rayVersion"] == ray_version()
    assert spec["authOptions"] == {"mode": "token"}
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    for pod in pods(spec):
        (container,) = pod["containers"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes == {"shm"}  # nothing shared
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        # Secrets by reference alone.
        assert all("secretRef" in source for source in container["envFrom"])
        assert not [
            item for item in container.get("env", []) if re.search("KEY|TOKEN|PASSWORD", item["name"])
        ]
    head, *workers = (pod["containers"][0] for pod in pods(spec))
    tracking = {"secretRef": {"name": "tracking"}}
    assert tracking in head["envFrom"]
    assert all(tracking not in worker["envFrom"] for worker in workers)


def test_rayjob() -> None:
    job = load("kuberay-rayjob.yaml")
    assert "kueue.x-k8s.io/queue-name" in job["metadata"]["labels"]
    spec = job["spec"]
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    parameters = parse_command(spec["entrypoint"])
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert parameters["gpu"] is True
    assert parameters["workers"].max == workers["replicas"] * int(limits["nvidia.com/gpu"])
    assert parameters["output"].startswith("s3://")
    assert parameters["name"]  # The attempts of backoffLimit continue its run.
    load_recipe(ROOT / parameters["recipe"].relative_to("/app"))
    variables = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    assert all(isinstance(value, str) for value in variables.values())
    grace = workers["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > int(variables["RAY_JOB_STOP_WAIT_TIME_S"])
    with pytest.raises(Exception, match="--ranks"):  # The check can fail.
        parse_command("resnet-dist train jobs/digits.py --ranks 2")


def test_raycluster_grows_for_the_job_that_its_comment_submits() -> None:
    cluster = load("kuberay-raycluster.yaml")
    assert cluster["spec"]["enableInTreeAutoscaling"] is True
    (workers,) = cluster["spec"]["workerGroupSpecs"]
    (line,) = commands_in("kuberay-raycluster.yaml", "resnet-dist")
    parameters = parse_command(line)
    assert parameters["workers"].max == workers["maxReplicas"]
    assert parameters["wait"] > 0  # Without it no node is asked for.
    # Version 2 of the autoscaler refuses pods that start again by themselves.
    assert {pod["restartPolicy"] for pod in pods(cluster["spec"])} == {"Never"}
    assert f"get secret {cluster['metadata']['name']} " in text_of("kuberay-raycluster.yaml")


@pytest.mark.filterwarnings("ignore:.*Any type hint")  # MLflow imports its own agents.
def test_mlflow_compose() -> None:
    from mlflow.cli import cli

    text = text_of("mlflow-compose.yaml")
    services = yaml.safe_load(interpolated(text, SECRETS))
    server = services["services"]["mlflow"]
    program, command, *options = server["command"]
    assert program == "mlflow"
    known = {name for parameter in cli.commands[command].params for name in parameter.opts}
    for option in options:
        assert option.partition("=")[0] in known, option
    assert set(server["depends_on"]) < set(services["services"])
    used = {v.partition(":")[0] for s in services["services"].values() for v in s.get("volumes", [])}
    assert used == set(services["volumes"])
    for name, service in services["services"].items():
        assert name == "bucket" or "healthcheck" in service, name  # bucket ends.
    install = re.findall(r"pip install --no-cache-dir (.+?) &&", server["build"]["dockerfile_inline"])[0]
    required = [Requirement(word) for word in shlex.split(install)]
    assert {each.name for each in required} == {"mlflow", "psycopg2-binary", "boto3"}
    assert required[0].extras == {"auth"}
    assert str(required[0].specifier) in (ROOT / "pyproject.toml").read_text()


def server_options(**variables: str) -> dict[str, str]:
    """Return the options of the MLflow server, with these variables in tracking.env."""
    services = yaml.safe_load(interpolated(text_of("mlflow-compose.yaml"), {**SECRETS, **variables}))
    words = services["services"]["mlflow"]["command"]
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def test_the_tracking_stack_has_the_driver_of_its_database() -> None:
    """SQLAlchemy takes psycopg for an address that names no driver, and MLflow's image has psycopg2 alone."""
    services = yaml.safe_load(interpolated(text_of("mlflow-compose.yaml"), SECRETS))
    users = configparser.ConfigParser()
    users.read_string(services["configs"]["auth"]["content"])
    for uri in (server_options()["--backend-store-uri"], users["mlflow"]["database_uri"]):
        assert sqlalchemy.make_url(uri).get_driver_name() == "psycopg2"
    assert "psycopg2-binary==" in services["services"]["mlflow"]["build"]["dockerfile_inline"]


@pytest.mark.parametrize(
    ("variables", "page", "host"),
    [
        ({}, "http://localhost:5000", "localhost:5000"),
        ({"MLFLOW_HOST": "ml.example"}, "http://ml.example:5000", "ml.example:5000"),
        ({"MLFLOW_HOST": "ml.example"}, "https://ml.example", "ml.example"),
    ],
    ids=["here", "elsewhere", "tls"],
)
def test_the_page_of_the_tracking_stack_may_ask_its_own_server(
    variables: dict[str, str], page: str, host: str
) -> None:
    from mlflow.server.security_utils import is_allowed_host_header, should_block_cors_request

    options = server_options(**variables)
    assert is_allowed_host_header(options["--allowed-hosts"].split(","), host)
    origins = options["--cors-allowed-origins"].split(",")
    assert not should_block_cors_request(page, "POST", origins)
    assert should_block_cors_request("https://evil.example", "POST", origins)
    assert not is_allowed_host_header(options["--allowed-hosts"].split(","), "evil.example")


def test_the_page_of_the_cluster_sets_the_variables_of_the_tracking_stack() -> None:
    page = (ROOT / "docs/cluster.md").read_text()
    (made,) = re.findall(r"for name in ([A-Z0-9_ ]+); do .* > tracking\.env", page)
    assert set(made.split()) == set(SECRETS)
    optional = set(re.findall(r"\$\{(\w+):-", text_of("mlflow-compose.yaml")))
    assert set(re.findall(r"echo (MLFLOW_\w+)=\S+ >> tracking\.env", page)) == optional
    assert re.search(r"-f (\S+) up -d", page)[1] == "cluster/mlflow-compose.yaml"  # type: ignore[index]
    (admin,) = re.findall(r"s/\^(\w+)=//p", page)
    assert f"MLFLOW_AUTH_ADMIN_PASSWORD: ${{{admin}:?" in text_of("mlflow-compose.yaml")
    assert server_options()["--port"] == "5000"
    assert "MLFLOW_TRACKING_URI=http://localhost:5000" in page


def test_secrets_of_the_tracking_stack_have_no_default_and_are_no_arguments() -> None:
    text = text_of("mlflow-compose.yaml")
    assert len(SECRETS) == 5
    with pytest.raises(KeyError):  # Docker stops with the text after `:?`.
        interpolated(text, {})
    services = yaml.safe_load(interpolated(text, SECRETS))
    shown = [service.get("command") for service in services["services"].values()]
    shown += [service.get("entrypoint") for service in services["services"].values()]
    shown += [services["configs"], services["services"]["mlflow"]["build"]]
    assert not [value for value in SECRETS.values() if value in json.dumps(shown)]
    assert services["services"]["mlflow"]["ports"] == ["127.0.0.1:5000:5000"]
    assert all("ports" not in services["services"][name] for name in ("postgres", "s3"))


def test_users_of_the_tracking_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's own reader of its users' settings takes them, with the password of the environment."""
    package = importlib.util.find_spec("mlflow")
    assert package is not None
    assert package.origin is not None
    # By its file: the package around it starts a server, and needs what the extra `auth` installs.
    place = Path(package.origin).parent / "server/auth/config.py"
    spec = importlib.util.spec_from_file_location("auth_config", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    services = yaml.safe_load(interpolated(text_of("mlflow-compose.yaml"), SECRETS))
    server = services["services"]["mlflow"]
    path = tmp_path / "auth.ini"
    path.write_text(services["configs"]["auth"]["content"])
    monkeypatch.setenv("MLFLOW_AUTH_CONFIG_PATH", str(path))
    monkeypatch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", server["environment"]["MLFLOW_AUTH_ADMIN_PASSWORD"])
    read = module.read_auth_config()
    assert (read.admin_username, read.admin_password) == ("admin", SECRETS["MLFLOW_ADMIN_PASSWORD"])
    assert read.default_permission == "NO_PERMISSIONS"
    assert read.database_uri == next(o.partition("=")[2] for o in server["command"] if "backend-store" in o)
    parser = configparser.ConfigParser()
    parser.read(path)
    assert set(parser.sections()) == {"mlflow"}


def test_the_recipes_of_the_lines_for_slurm_have_work_for_all_their_ranks() -> None:
    page = (ROOT / "docs/cluster.md").read_text()
    header = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text_of("slurm.sbatch"), re.M))
    lines = re.findall(r"^(?:[A-Z]+=\S+ )?sbatch (.*?)cluster/slurm\.sbatch (\S+) ", page, re.M)
    assert len(lines) == 4
    for options, recipe in lines:
        given = header | dict(re.findall(r"--([\w-]+)=(\S+)", options))
        ranks = int(given["nodes"]) * (int(given["gpus-per-node"]) or 1)
        WorkerRange.exactly(ranks).sizes(load_recipe(ROOT / recipe))  # Raises UserError.


@pytest.mark.parametrize("name", ["skypilot.yaml", "dstack.yaml"])
def test_ranks_of_torchrun_have_one_command(name: str) -> None:
    """The variables that the tool sets are those of its documentation; train's flags are real."""
    task = load(name)
    command = task["run"] if name == "skypilot.yaml" else task["commands"][-1]
    line = command.replace("\\\n", " ").split("-m resnet_dist ", 1)[1]
    parameters = parse_command(f"resnet-dist {line}")
    assert parameters["gpu"] is True
    given = task.get("envs") or {item.partition("=")[0] for item in task["env"]}
    assert {str(parameters[key]).strip("$") for key in ("recipe", "name", "output")} <= set(given)
    own = {"skypilot.yaml": "SKYPILOT_", "dstack.yaml": "DSTACK_"}[name]
    used = set(re.findall(r"\$\{?([A-Z_]+)", json.dumps(task)))
    assert {variable for variable in used if not variable.startswith(own)} <= set(given)


def test_dashboard_and_alerts_show_gauges_that_exist() -> None:
    texts = [text_of("grafana-dashboard.json"), text_of("prometheus-rules.yaml")]
    shown = {name for text in texts for name in re.findall(r"ray_(resnet_dist_\w+)", text)}
    assert shown == set(GAUGES)
    panels = json.loads(texts[0])["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = {(x, y) for panel in panels for x, y in [(panel["gridPos"]["x"], panel["gridPos"]["y"])]}
    assert len(places) == len(panels)


@pytest.mark.parametrize("path", sorted(CLUSTER.iterdir()), ids=lambda path: path.name)
def test_no_secret_and_no_path_of_a_machine(path: Path) -> None:
    text = path.read_text()
    assert text.startswith(("#", "{"))
    assert not re.search(r"/work/|/root/|password: *[A-Za-z0-9]", text, re.I)
