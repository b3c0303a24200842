"""A password and a signature in a URL are needed in memory alone: no file and no line of output ever holds them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import resnet_dist.cli as cli
from resnet_dist.cli.main import run_command
from resnet_dist.config import Recipe
from resnet_dist.driver import publish
from resnet_dist.errors import UNSENT_EXIT_CODE
from resnet_dist.runs.choose import choose_run
from resnet_dist.runs.folder import RUN_FILE
from resnet_dist.tracking.store import STORE_FILE
from tests.data.odd_server import OddServer, odd_server
from tests.paths import ROOT
from tests.tracking.mlflow.servers import unused_address

PASSWORD, SIGNATURE, NEXT_SIGNATURE = "p%40ss%2Fword", "hunter%2F22", "hunter%2F33"
SECRETS = (PASSWORD, "p@ss/word", "ss%2Fword", "hunter")


def train_words(server: OddServer, signature: str, *arguments: str, path: str = "basic") -> list[str]:
    """Return the arguments of a `train --local` of ./digits.py on the served digits."""
    url = f"http://user:{PASSWORD}@127.0.0.1:{server.port}/{path}"
    changes = {
        "data.train": f"{url}/train?Signature={signature}",
        "data.eval": f"{url}/eval?Signature={signature}",
        "data.source": "none",
        "data.shard_cache": "{output}/cache",
        "model.name": "resnet8",
        "train.checkpoint_every": "2 steps",
        "description": f"from {url}/train?Signature={signature}",
    }
    sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    return ["train", "digits.py", "--local", "--cpu", "--name", "x", *sets, *arguments]


def copy_recipe(folder: Path) -> Path:
    """Copy the recipe of the digits into no checkout, whose changes would be among the files of a run."""
    return shutil.copy(ROOT / "jobs/digits.py", folder / "digits.py")


def run_program(folder: Path, words: list[str]) -> tuple[int, str]:
    """Run a command as a process, whose libraries write to a log; return exit code and output."""
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    done = subprocess.run(
        [sys.executable, "-m", "resnet_dist", *words],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT), "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def assert_no_secret(folder: Path, output: str) -> None:
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {"mlflow.db", "run.json", "checkpoint.json", "recipe.json"} <= {path.name for path in files}
    for secret in SECRETS:
        assert secret not in output
        assert [path for path, content in files.items() if secret.encode() in content] == []
        assert [path for path in files if secret in path.name] == []


def test_no_password_or_signature_is_stored_or_shown(
    tmp_path: Path,
    digits_data: Path,
    empty_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    copy_recipe(tmp_path)
    (tmp_path / "output").mkdir()
    shutil.copy(empty_store, tmp_path / "output" / STORE_FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def run_here(words: list[str]) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["resnet-dist", *words])
        code = run_command()
        return code, "".join(capfd.readouterr())

    constant = ("--set", "schedule.decay=constant", "--set")
    with odd_server(digits_data) as server:
        # A run that is interrupted by a lack of steps, then resumed with URLs that are signed anew.
        words = train_words(server, SIGNATURE, *constant, "train.length=4 steps")
        code, output = run_program(tmp_path, words)
        assert code == 0, output
        assert any(f"?Signature={SIGNATURE}" in line for line in server.log)
        assert_no_secret(tmp_path / "output", output)
        more_steps = (*constant, "train.length=6 steps", "--set", "train.figures=none")  # drawn by the first
        code, more = run_here(train_words(server, NEXT_SIGNATURE, *more_steps, "--resume"))
        assert code == 0, more
        assert "resumed at step 4" in more
        assert_no_secret(tmp_path / "output", output + more)
        code, failed = run_here(train_words(server, SIGNATURE, *more_steps, path="status-403"))
        assert code == 2
        assert "403 Forbidden" in failed
        assert_no_secret(tmp_path / "output", failed)
    recipe = json.loads((tmp_path / "output/runs/x" / RUN_FILE).read_text())["recipe"]
    assert recipe["data"]["train"] == f"http://***@127.0.0.1:{server.port}/basic/train?Signature=***"


def test_a_tracker_that_is_away_costs_the_exit_code_and_no_password_is_shown(
    tmp_path: Path,
    digits_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """MLflow's client and urllib3 would print the address, with the password in it."""
    address = unused_address().replace("http://", "http://anna:hush@")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setattr(publish, "LAST_UPLOAD_SECONDS", 0.5)
    monkeypatch.setattr(publish, "CLOSE_SECONDS", 0.5)
    changes = {
        "data.train": f"{digits_data}/train",
        "data.eval": f"{digits_data}/eval",
        "model.name": "resnet8",
        "train.length": "2 steps",
    }
    sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    command = ["train", str(copy_recipe(tmp_path)), "--local", "--cpu", "--name", "x", *sets]
    output = tmp_path / "output"
    assert cli.app([*command, "--output", str(output)], standalone_mode=False) == UNSENT_EXIT_CODE
    out, err = capfd.readouterr()
    shown = address.replace("anna:hush", "***")
    assert f"\nMLflow at {shown}: connection refused; training does not wait for it" in f"\n{out}"
    assert re.fullmatch(
        r"exit code 4: run x is trained, but not sent to MLflow: \d+ metrics, the parameters, the model, the figures, the status; "
        rf"this sends it: resnet-dist sync x --output {output}\n",
        err,
    )
    assert caplog.text == ""
    assert "hush" not in out + err
    files = [path for path in output.rglob("*") if path.is_file()]
    assert RUN_FILE in [path.name for path in files]
    assert [path for path in files if b"hush" in path.read_bytes()] == []
    stored = json.loads((output / "runs/x" / RUN_FILE).read_text())
    assert (stored["status"], stored["tracker"]) == ("FINISHED", shown)


def test_a_run_whose_file_still_has_a_password_is_resumed(tmp_path: Path, digits_recipe: Recipe) -> None:
    """An earlier version stored it; the recipe that is passed anew is compared without it, and replaces it."""
    old = digits_recipe.with_overrides(["data.train=http://user:hush@host/set?Signature=hush1"])
    run = choose_run(tmp_path, old, "x", resume=False)
    run.write()
    file = Path(run.location) / RUN_FILE
    value = json.loads(file.read_text())
    file.write_text(json.dumps(value | {"recipe": old.model_dump(mode="json")}))
    new = digits_recipe.with_overrides(["data.train=http://user:hush@host/set?Signature=hush2"])
    again = choose_run(tmp_path, new, "x", resume=True)
    again.write()
    assert again.attempt == 2
    assert "hush" not in file.read_text()
    assert new.digest() == old.digest()


@pytest.mark.parametrize(
    "program", ["raise OSError({!r})", "import logging; logging.warning({!r}); raise SystemExit(1)"]
)
def test_tracebacks_and_logs_are_redacted(program: str) -> None:
    text = "cannot read http://user:hush@host/a.tar?sig=hush now"
    app = f"import resnet_dist.cli as cli\ndef app(**options):\n  {program.format(text)}\n"
    start = f"{app}cli.app = app\nfrom resnet_dist.cli.main import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", start], capture_output=True, text=True, timeout=100, cwd=ROOT, check=False
    )
    assert done.returncode == 1
    assert "hush" not in done.stderr
    assert "http://***@host/a.tar?sig=*** now" in done.stderr
