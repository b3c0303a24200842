"""MLflow's server as `ui` starts it: the same page, with static files that Flask does not see."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import tomllib

import pytest

from resnet_dist.system.signals import handle_signals, raise_interrupt
from resnet_dist.tracking.mlflow.browse import app, serve
from tests.paths import ROOT

PROGRAM = """
import gc
from fastapi.testclient import TestClient
from resnet_dist.tracking.mlflow.browse.app import create_app

assert "mlflow" not in __import__("sys").modules
client = TestClient(create_app(), base_url="http://localhost")
answer = client.get("/")
page = answer.text
print(answer.status_code, page.count("<script>"), "mlflow.workflowType_v1" in page, "x-frame-options" in answer.headers)
script = page.split('src="')[1].split('"')[0]
answer = client.get("/" + script)
print(answer.status_code, len(answer.content) > 1_000_000, answer.headers["cache-control"], "etag" in answer.headers)
print(client.get("/static-files/missing.js").status_code, client.get("/health").text, gc.get_freeze_count() > 100_000)
"""


@pytest.mark.long
def test_the_application_is_mlflows_with_static_files_of_its_own() -> None:
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout == ("200 1 True True\n200 True public, max-age=2419200 True\n404 OK True\n"), (
        done.stderr
    )


def test_the_installed_package_names_the_application() -> None:
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["mlflow.app"]
    assert named == {app.APP_NAME: f"{app.__name__}:{app.create_app.__name__}"}


@pytest.mark.parametrize("is_installed", [True, False])
def test_the_server_runs_it_where_the_installation_has_it(
    is_installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Names:
        names = frozenset({"basic-auth", *([app.APP_NAME] if is_installed else [])})

    seen: list[list[str]] = []

    def popen(command: list[str], **options: object) -> None:
        seen.append(command)
        raise OSError

    monkeypatch.setattr(serve, "entry_points", lambda group: Names)
    monkeypatch.setattr(serve.subprocess, "Popen", popen)
    with pytest.raises(OSError):  # noqa: PT011
        serve._serve("sqlite:///x.db", 5000, lambda: None)
    assert (seen[0][-2:] == ["--app-name", "resnet-dist"]) == is_installed


def test_an_interrupt_while_the_page_warms_up_waits_for_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that does not end within seconds of Ctrl-C is ended, and would leave the server behind."""
    main, release = threading.get_ident(), threading.Event()
    asked, answered = list[object](), list[bool]()

    def never_answers(request: object, timeout: float) -> None:
        asked.append(request)
        if len(asked) == 2 * serve.NUM_WORKERS:  # all of them
            signal.pthread_kill(main, signal.SIGINT)
        answered.append(release.wait(60))
        raise OSError

    monkeypatch.setattr(serve._here, "open", never_answers)
    try:
        with handle_signals(raise_interrupt), pytest.raises(KeyboardInterrupt):
            serve._warm_up(5000, "1")
        assert answered == []
    finally:
        release.set()
