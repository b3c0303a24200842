"""`resnet-dist ui`: the page opens with the best run first, and all processes that it started end with it."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest

from resnet_dist.errors import UserError
from resnet_dist.tracking.mlflow.browse import serve
from resnet_dist.tracking.mlflow.browse.serve import show_runs
from resnet_dist.tracking.mlflow.browse.view import GROUPS_TAG, NESTED_TAG, PRIMARY_TAG, VIEW_TAG
from resnet_dist.tracking.mlflow.reading import Tracker
from resnet_dist.tracking.store import URI_VARIABLE

LINK = "/#/experiments/1/runs?workflowType=machine_learning&viewStateShareKey=resnet-dist"


@pytest.fixture(autouse=True)
def client(output: Path) -> mlflow.MlflowClient:
    """Return a client of the store, with two runs of one experiment that differ in their rate."""
    client = mlflow.MlflowClient(f"sqlite:///{output}/mlflow.db")
    client.create_experiment("digits", artifact_location=output.as_uri())
    for name, lr, top1 in (("low", "0.1", 0.75), ("high", "0.3", 0.5)):
        run_id = client.create_run("1", run_name=name).info.run_id
        client.log_param(run_id, "optim.lr", lr)
        client.log_param(run_id, "model.name", "resnet8")
        measured = {"eval/top1": top1, "eval/loss": 0.5, "perf/images_per_second": 9.0, "train/loss": 1.0}
        for key, value in {"data/bad_samples": 0.0, **measured}.items():
            client.log_metric(run_id, key, value, step=2)
        client.set_terminated(run_id)
    return client


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Return the environments and commands of servers that are started: they answer and end at once."""
    seen: list[dict[str, str]] = []

    class Server:
        pid = -1

        def __init__(self, command: list[str], env: dict[str, str], **options: object) -> None:
            seen.append({**env, "command": " ".join(command)})

        def __enter__(self) -> Server:
            return self

        def __exit__(self, *arguments: object) -> None:
            pass

        def poll(self) -> None:
            pass

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(serve.subprocess, "Popen", Server)
    monkeypatch.setattr(serve, "_end_group", lambda server: None)
    monkeypatch.setattr(serve, "_answers", lambda port: True)
    monkeypatch.setattr(serve, "_warm_up", lambda port, experiment: None)
    return seen


def view_of(client: mlflow.MlflowClient, tag: str = VIEW_TAG) -> dict[str, Any]:
    state = json.loads(client.get_experiment("1").tags[tag])["state"]
    return dict(json.loads(zlib.decompress(base64.b64decode(state.removeprefix("deflate;")))))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def used_port() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_a_port_in_use_is_reported_before_anything_starts(output: Path, used_port: int) -> None:
    reports: list[str] = []
    with pytest.raises(UserError, match=rf"--port {used_port}: cannot be used \(Address already in use\)"):
        show_runs(Tracker.open(output), used_port, None, reports.append)
    assert reports == []


def test_a_free_port_takes_the_place_of_the_usual_one(
    output: Path, used_port: int, served: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "DEFAULT_PORT", used_port)
    reports: list[str] = []
    assert show_runs(Tracker.open(output), None, None, reports.append) == 0
    assert reports[0] == f"port {used_port} is in use: another one is taken"
    assert f"http://127.0.0.1:{used_port}/" not in reports[1]
    assert served[0]["command"].split("--port ")[1].split()[0] in reports[1]


def test_a_database_of_the_environment_is_served(
    output: Path, tmp_path: Path, served: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(URI_VARIABLE, f"sqlite:///{output}/mlflow.db")
    reports: list[str] = []
    port = free_port()
    assert show_runs(Tracker.open(tmp_path / "elsewhere"), port, None, reports.append) == 0
    assert reports[0].splitlines() == [
        f"open   http://127.0.0.1:{port}{LINK}",
        f"charts http://127.0.0.1:{port}{LINK}&compareRunsMode=CHART",
        "Ctrl-C ends it",
    ]
    assert served[0]["MLFLOW_BACKEND_STORE_URI"] == f"sqlite:///{output}/mlflow.db"
    assert "sqlite" not in served[0]["command"]  # Everybody on the machine can read it.


def test_the_view_has_what_answers_which_run_is_best(
    output: Path, client: mlflow.MlflowClient, served: list[dict[str, str]]
) -> None:
    show_runs(Tracker.open(output), free_port(), None, lambda text: None)
    view = view_of(client)
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`eval/top1`", False)
    assert "params.`optim.lr`" in view["selectedColumns"]
    assert "params.`model.name`" not in view["selectedColumns"]  # It is the same in all runs.
    charts = [
        chart["metricKey"] for chart in view["compareRunCharts"]
    ]  # no card of images, as no run has any
    assert charts[:4] == ["eval/top1", "train/loss", "train/lr", "perf/images_per_second"]
    assert charts[-1] == "data/bad_samples"
    sections = {section["uuid"] for section in view["compareRunSections"]}
    assert {chart["metricSectionId"] for chart in view["compareRunCharts"]} <= sections
    assert client.get_experiment("1").tags[PRIMARY_TAG] == "eval/top1"
    before = client.get_experiment("1").tags
    show_runs(Tracker.open(output), free_port(), None, lambda text: None)
    assert client.get_experiment("1").tags == before  # It is not written again.


def test_the_card_of_images_shows_the_step_that_runs_have(
    output: Path, client: mlflow.MlflowClient, served: list[dict[str, str]]
) -> None:
    for run, steps in zip(client.search_runs(["1"]), ("66 132", "132"), strict=True):
        client.set_tag(run.info.run_id, "resnet_dist.figures", steps)
    show_runs(Tracker.open(output), free_port(), None, lambda text: None)
    view = view_of(client)
    (card,) = [chart for chart in view["compareRunCharts"] if chart["type"] == "IMAGE"]
    assert (card["imageKeys"], card["step"]) == (["eval/worst images"], 132)
    assert card["metricSectionId"] in {section["uuid"] for section in view["compareRunSections"]}


def add_study(client: mlflow.MlflowClient, name: str, top1s: tuple[float, ...], tag: str = "study") -> None:
    """Add a study, or a sweep, and a run of it for each top-1."""
    parent = client.create_run("1", run_name=name, tags={tag: name}).info.run_id
    for number, top1 in enumerate(top1s):
        tags = {tag: name, "mlflow.parentRunId": parent, "resnet_dist.folder": "/x"}
        run_id = client.create_run("1", run_name=f"{name}-{number}", tags=tags).info.run_id
        client.log_metric(run_id, "eval/top1", top1, step=2)


def test_runs_of_studies_and_sweeps_have_a_view_that_groups_them(
    output: Path, client: mlflow.MlflowClient, served: list[dict[str, str]]
) -> None:
    port, reports = free_port(), list[str]()
    show_runs(Tracker.open(output), port, None, reports.append)
    assert GROUPS_TAG not in client.get_experiment("1").tags
    assert "groups" not in reports[-1]
    add_study(client, "depths", (0.5, 0.25), "sweep")
    show_runs(Tracker.open(output), port, None, reports.append)
    link = LINK.replace("=resnet-dist", "=resnet-dist-groups")
    assert reports[-1].splitlines()[2] == f"groups http://127.0.0.1:{port}{link}"
    assert reports[-1].splitlines()[3] == f"nested http://127.0.0.1:{port}{link.replace('groups', 'nested')}"
    assert view_of(client, GROUPS_TAG)["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": "sweep"}]
    nested = view_of(client, NESTED_TAG)
    assert (nested["orderByKey"], nested["orderByAsc"]) == ("attributes.start_time", False)
    add_study(client, "nets", (0.5,))
    show_runs(Tracker.open(output), port, None, reports.append)
    keys = [key["groupByData"] for key in view_of(client, GROUPS_TAG)["groupBy"]["groupByKeys"]]
    assert sorted(keys) == ["study", "sweep"]
    assert "groupBy" not in view_of(client)


@pytest.mark.long
def test_a_browser_shows_the_runs_of_a_study_below_it(
    output: Path, tmp_path: Path, client: mlflow.MlflowClient
) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser: `apt-get install chromium` brings one")
    add_study(client, "weak", (0.125, 0.25))
    add_study(client, "strong", (0.875, 0.625))
    port = free_port()
    command = [sys.executable, "-m", "resnet_dist", "ui", "--output", str(output), "--port", str(port)]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            links = [process.stdout.readline().split()[1] for _ in range(4)]
            page, nested = (dom_of(browser, link, tmp_path / "profile") for link in links[2:])
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
    assert "studies and sweeps" in page
    page = page[page.index("Group by") :]
    for name in (">strong-0<", ">weak-1<", "Additional runs"):
        assert name in page
    assert page.count("Group: ") >= 2
    assert page.count("0.875") >= 2  # The group has the value of its best run, which has it too.
    assert "runs below their study or sweep" in nested
    names = re.findall(r">(weak|strong|weak-[01]|strong-[01]|low|high)</", nested)
    # A click on the + of a study lists its runs.
    assert list(dict.fromkeys(names)) == ["strong", "weak", "high", "low"]


def test_one_run_is_opened(output: Path, served: list[dict[str, str]]) -> None:
    reports: list[str] = []
    port, run = free_port(), Tracker.open(output).find("low")
    show_runs(Tracker.open(output), port, "low", reports.append)
    link = f"http://127.0.0.1:{port}/#/experiments/1/runs/{run.run_id}?workflowType=machine_learning"
    assert reports[0].splitlines()[0] == f"open {link}"
    with pytest.raises(UserError, match="has no run named lo; did you mean low"):
        show_runs(Tracker.open(output), port, "lo", reports.append)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_and_its_workers(
    output: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    command = [sys.executable, "-m", "resnet_dist", "ui", "--output", str(output), "--port", str(port)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, text=True, **pipes)
    try:
        assert process.stdout is not None
        # The page is named when it can be opened.
        assert process.stdout.readline() == f"open   http://127.0.0.1:{port}{LINK}\n"
        assert answers(port)
        monkeypatch.setenv(URI_VARIABLE, f"http://127.0.0.1:{port}")
        check_server(output, port)
        os.kill(process.pid, number)  # A terminal would signal the whole group.
        assert process.wait(60) == 0
        assert not answers(port)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def check_server(output: Path, port: int) -> None:
    """Read runs from a server, as from a file; its pages are linked, and nothing is started."""
    tracker, reports = Tracker.open(output), list[str]()
    found = tracker.runs([tracker.experiment(None)], "metrics.`eval/top1` > 0.1")
    assert [run.name for run in found] == ["low", "high"]
    assert [(point.step, point.value) for point in tracker.history(found[0], "eval/top1")] == [(2, 0.75)]
    assert show_runs(tracker, None, None, reports.append) == 0
    assert reports[0] == f"open   http://127.0.0.1:{port}{LINK}"
    assert tracker.page_of(found[0]).endswith(f"/runs/{found[0].run_id}?workflowType=machine_learning")
    with pytest.raises(UserError, match="Invalid clause"):
        tracker.runs([tracker.experiment(None)], "nonsense")


def answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
    except OSError:
        return False
    return True


def dom_of(browser: str, url: str, profile: Path) -> str:
    """Return the page at `url` as a browser shows it when its requests are answered."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    # The page draws only the columns and charts that it has room for.
    command += ["--window-size=3200,2400", "--virtual-time-budget=60000", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.long
def test_a_browser_shows_the_preset_columns_and_charts(output: Path, tmp_path: Path) -> None:
    """The format of a view is not documented: a new version of MLflow may read it otherwise."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser: `apt-get install chromium` brings one")
    links, port = list[str](), free_port()
    command = [sys.executable, "-m", "resnet_dist", "ui", "--output", str(output), "--port", str(port)]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            links = [process.stdout.readline().split()[1] for _ in range(2)]
            table, charts = (dom_of(browser, link, tmp_path / "profile") for link in links)
        finally:
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
    assert errors == ""  # no warnings of the server's libraries
    assert "best runs first" in table
    for name in (
        "low",
        "high",
        "eval/top1",
        "eval/loss",
        "perf/images_per_second",
        "optim.lr",
        "Duration",
        "Dataset",
    ):
        assert name in table
    best, other = (re.search(rf"\b{name}</", table) for name in ("low", "high"))
    assert best is not None
    assert other is not None
    assert best.start() < other.start()
    assert "model.name" not in table
    first = charts.partition("at a glance")[2]  # The sort order above names a metric too.
    assert first.index("eval/top1") < first.index("train/loss") < first.index("perf/images_per_second")
    assert "data/bad_samples" not in first  # Its section is closed.
