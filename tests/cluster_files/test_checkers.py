"""Each file of cluster/ passes the checker of its own tool, which refuses a wrong edit of it."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.cluster_files.checkers import (
    COMPOSE,
    DSTACK,
    HADOLINT,
    PODS,
    PROMTOOL_CONFIG,
    PROMTOOL_RULES,
    SHELLCHECK,
    SKYPILOT,
    Checker,
    Program,
)
from tests.cluster_files.files import CLUSTER, edited, interpolated, project_version, text_of
from tests.cluster_files.kuberay import problems
from tests.cluster_files.test_contents import SECRETS


@dataclass(frozen=True)
class Case:
    """A file, its checker, and one wrong edit, of which the checker's output must hold `complaint`."""

    name: str
    checker: Checker | Program
    old: str
    new: str
    complaint: str


CASES = [
    Case("Dockerfile", HADOLINT, "USER 1000", "USER root", "DL3002"),
    Case("mlflow-compose.yaml", COMPOSE, "    healthcheck:", "    healthchecks:", "`healthchecks`"),
    Case("kuberay-rayjob.yaml", PODS, "mountPath: /dev/shm", "mountpath: /dev/shm", "mountpath"),
    Case("kuberay-raycluster.yaml", PODS, "sizeLimit: 4Gi", "maxSize: 4Gi", "maxSize"),
    Case("skypilot.yaml", SKYPILOT, "use_spot: true", "spot: true", "spot"),
    Case("dstack.yaml", DSTACK, "spot_policy: spot", "spot_policy: sometimes", "spot_policy"),
    Case("slurm.sbatch", SHELLCHECK, 'on_node "$@" &', "on_node $@ &", "SC2068"),
    Case("prometheus.yaml", PROMTOOL_CONFIG, "scrape_interval: 15s", "scrape_interval: often", "duration"),
    Case("prometheus-rules.yaml", PROMTOOL_RULES, "max by (run) (", "max by run (", "parse error"),
]


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_file_passes_and_a_wrong_edit_does_not(tmp_path: Path, case: Case) -> None:
    """Slurm itself, Ray's launcher and KubeRay's schemas have tests of their own."""
    texts = {"right": text_of(case.name), "wrong": edited(case.name, case.old, case.new)}
    paths = {kind: tmp_path / kind / case.name for kind in texts}
    for kind, path in paths.items():
        for name in ("dist", "jobs"):  # Files name them.
            (path.parent / name).mkdir(parents=True)
        (path.parent / f"dist/resnet_dist-{project_version()}-py3-none-any.whl").touch()
        is_compose = case.name == "mlflow-compose.yaml"
        path.write_text(interpolated(texts[kind], SECRETS) if is_compose else texts[kind])
    found = case.checker.check(*paths.values())
    assert found[str(paths["right"])][0], found
    passed, said = found[str(paths["wrong"])]
    assert not passed
    assert case.complaint in said


RULES_TEST = {
    "evaluation_interval": "1m",
    "tests": [
        {
            "interval": "1m",
            "input_series": [
                {"series": 'ray_resnet_dist_step_time_seconds{run="x"}', "values": "0x60"},
                {"series": 'ray_resnet_dist_checkpoint_time_seconds{run="x"}', "values": "0+60x120"},
                {"series": 'ray_resnet_dist_step{run="x"}', "values": "7x20 _x100"},
                {"series": 'ray_resnet_dist_total_steps{run="x"}', "values": "9x20 _x100"},
            ],
            "alert_rule_test": [
                {"eval_time": "14m", "alertname": "RunMakesNoSteps", "exp_alerts": []},
                {"eval_time": "20m", "alertname": "RunMakesNoSteps", "exp_alerts": ["page"]},
                {"eval_time": "60m", "alertname": "CheckpointIsOld", "exp_alerts": []},
                {"eval_time": "18m", "alertname": "RunEndedEarly", "exp_alerts": []},
                {"eval_time": "28m", "alertname": "RunEndedEarly", "exp_alerts": ["warn"]},
            ],
        }
    ],
}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (apt-get install prometheus)")
def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    """Prometheus' own tool evaluates the rules over time."""
    rules = yaml.safe_load(text_of("prometheus-rules.yaml"))
    for rule in rules["groups"][0]["rules"]:
        rule["annotations"] = {}  # Their texts need no test.
    wanted = json.loads(json.dumps(RULES_TEST))
    for alert in wanted["tests"][0]["alert_rule_test"]:
        alert["exp_alerts"] = [
            {"exp_labels": {"run": "x", "severity": severity}} for severity in alert["exp_alerts"]
        ]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    path = tmp_path / "test.yaml"
    path.write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], **wanted}))
    command = ["promtool", "test", "rules", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (apt-get install prometheus)")
def test_queries_of_the_dashboard_are_promql(tmp_path: Path) -> None:
    panels = json.loads(text_of("grafana-dashboard.json"))["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    assert len(queries) >= len(panels)
    for text, passes in ((queries, True), ([*queries, "max by run (x)"], False)):
        rules = [{"record": f"x:{number}", "expr": query} for number, query in enumerate(text)]
        path = tmp_path / "rules.yaml"
        path.write_text(yaml.safe_dump({"groups": [{"name": "x", "rules": rules}]}))
        assert PROMTOOL_RULES.check(path)[str(path)][0] == passes


@pytest.mark.parametrize("name", ["kuberay-rayjob.yaml", "kuberay-raycluster.yaml"])
def test_kuberays_own_schemas(name: str) -> None:
    """Every field is one of the custom resource definition: a server without them drops it, or refuses the file."""
    assert problems(yaml.safe_load(text_of(name))) == []
    wrong = yaml.safe_load(edited(name, "rayStartParams:", "rayStartParam:"))
    assert any("rayStartParam" in problem for problem in problems(wrong))
    # In a part that several kinds share, and of the wrong type.
    wrong = yaml.safe_load(edited(name, "mountPath: /dev/shm", "mountpath: /dev/shm"))
    assert any("mountpath" in problem for problem in problems(wrong))
    wrong = yaml.safe_load(edited(name, "maxReplicas: ", "maxReplicas: many #"))
    assert any("'many' is not of type 'integer'" in problem for problem in problems(wrong))


def test_every_file_has_a_checker() -> None:
    """Ray's launcher files, the dashboard and the README are checked by the tests of contents and the one above."""
    others = {
        "README.md",
        "grafana-dashboard.json",
        *(path.name for path in CLUSTER.glob("ray-launcher*.yaml")),
    }
    assert {case.name for case in CASES} | others == {path.name for path in CLUSTER.iterdir()}
