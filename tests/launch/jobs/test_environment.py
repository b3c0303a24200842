"""Variables of `--env`: taken as typed or from the shell, refused without their values, and their secrets stay unseen."""

from __future__ import annotations

import pytest

from resnet_dist.errors import UserError
from resnet_dist.launch.jobs.environment import parse_variables, secrets_warning, without_secrets


def test_values_are_typed_or_taken_from_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_SHELL", "x=y")
    texts = ["A=1", "EMPTY=", "B=c=d e", "FROM_SHELL", "A=2"]
    assert parse_variables(texts) == {"A": "2", "EMPTY": "", "B": "c=d e", "FROM_SHELL": "x=y"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("=hush", "--env =…: a variable is KEY=VALUE"),
        ("1A=hush", "--env 1A=…: a variable is KEY=VALUE"),
        ("my key=hush", "--env my key=…: a variable is KEY=VALUE"),
        ("hush hush", "--env …: a variable is KEY=VALUE"),
        ("UNSET_HERE", "--env UNSET_HERE: it is not set in this shell; export it, or write UNSET_HERE=VALUE"),
        ("RESNET_DIST_COMMAND=hush", "--env RESNET_DIST_COMMAND: submit sets this variable itself"),
        ("RAY_JOB_STOP_SIGNAL=SIGKILL", "--env RAY_JOB_STOP_SIGNAL: submit sets this variable itself"),
        ("A=hush\0", "--env A: the value of a variable has no zero byte"),
    ],
)
def test_a_mistake_is_one_sentence_without_the_value(text: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_variables([text])
    assert str(refused.value).startswith(message)
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize(
    "name",
    [
        "WANDB_API_KEY",
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "db_password",
        "PGPASSWORD",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "AZURE_STORAGE_KEY",
        "GITHUB_PAT",
    ],
)
def test_a_secret_is_warned_of_and_not_quoted(name: str) -> None:
    words = ["resnet-dist", "submit", "x.py", "--env", f"{name}=hush", f"--env={name}=hush", "--env", "A=1"]
    assert f"--env {name}: Ray stores" in secrets_warning({name: "hush", "A": "1"})
    assert without_secrets(words) == [*words[:4], name, f"--env={name}", "--env", "A=1"]


def test_a_url_with_a_password_is_a_secret_and_a_plain_value_is_not() -> None:
    assert "MLFLOW_TRACKING_URI" in secrets_warning({"MLFLOW_TRACKING_URI": "http://anna:hush@h"})
    plain = {
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "1",
        "MLFLOW_TRACKING_URI": "http://h",
        "KEYBOARD": "us",
    }
    assert secrets_warning(plain) == ""
    # --env takes one word: what stands elsewhere is not a variable.
    words = ["resnet-dist", "submit", "x.py", "--set", "TOKEN=1"]
    assert without_secrets(words) == words
