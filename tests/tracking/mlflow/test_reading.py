"""Runs read back from a tracker: found by what a person calls them, and every mistake in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest

from resnet_dist.errors import UserError
from resnet_dist.tracking.mlflow import reading
from resnet_dist.tracking.mlflow.reading import Tracker
from resnet_dist.tracking.store import URI_VARIABLE, TrackerAway
from tests.tracking.mlflow.servers import LOGIN_PAGE, answering, silent, unused_address


@pytest.fixture
def ids(output: Path) -> dict[str, str]:
    """Return the ids of runs in two experiments, by name; two runs are named twice."""
    client = mlflow.MlflowClient(f"sqlite:///{output}/mlflow.db")
    found = {}
    for experiment, names in (
        ("digits", ("first", "second", "twice")),
        ("cifar", ("it's", "twice", "both ' and \"")),
    ):
        experiment_id = client.create_experiment(experiment, artifact_location=output.as_uri())
        for number, name in enumerate(names):
            run_id = client.create_run(experiment_id, run_name=name, start_time=number + 1).info.run_id
            client.log_metric(run_id, "eval/top1", number / 4, step=4)
            client.log_metric(run_id, "eval/top1", 0.0, step=2)
            client.log_param(run_id, "optim.lr", str(number))
            found[name] = run_id
    client.create_run(client.get_experiment_by_name("digits").experiment_id, run_name="no", start_time=99)
    return found


def test_runs_are_found_by_what_a_person_calls_them(output: Path, ids: dict[str, str]) -> None:
    tracker = Tracker.open(output)
    assert tracker.experiment(None).name == "digits"  # that of the newest run
    listed = tracker.runs([tracker.experiment("digits")])
    assert [run.name for run in listed] == ["twice", "second", "first", "no"]
    assert [run.name for run in tracker.runs([tracker.experiment("digits")], limit=2)] == ["twice", "second"]
    chosen = tracker.runs([tracker.experiment("digits")], "params.`optim.lr` = '1'")
    assert [run.name for run in chosen] == ["second"]
    for name in ("second", ids["second"], ids["second"][:8]):
        assert tracker.find(name).run_id == ids["second"]
    for odd in ("it's", "both ' and \""):
        assert tracker.find(odd).run_id == ids[odd]
    points = tracker.history(tracker.find("second"), "eval/top1")
    assert [(point.step, point.value) for point in points] == [(2, 0.0), (4, 0.25)]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda tracker: tracker.find("secnd"), "no run named secnd; did you mean second"),
        (
            lambda tracker: tracker.find("twice"),
            "2 runs are named twice: .* in (digits|cifar), .*; give the id of one",
        ),
        (lambda tracker: tracker.experiment("digit"), "--experiment 'digit': .* did you mean digits"),
        (lambda tracker: tracker.runs(tracker.experiments(), "nonsense"), "Invalid|nonsense"),
    ],
)
def test_a_mistake_is_named(
    output: Path, ids: dict[str, str], ask: Callable[[Tracker], object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ask(Tracker.open(output))


def test_a_store_without_runs(output: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mlflow.db has no runs yet; `resnet-dist train` begins one"):
        Tracker.open(output).experiment(None)
    with pytest.raises(UserError, match="no runs yet; `resnet-dist train` makes it"):
        Tracker.open(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_tracker_that_does_not_answer(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "ANSWER_SECONDS", 0.5)

    def refused(address: str, error: type[Exception]) -> str:
        monkeypatch.setenv(URI_VARIABLE, address)
        with pytest.raises(error) as found:
            Tracker.open(output).experiment(None)
        return str(found.value)

    assert refused(unused_address(), TrackerAway).endswith("connection refused")
    with answering(401) as address:
        assert "401 Unauthorized: set MLFLOW_TRACKING_USERNAME" in refused(address, UserError)
    with answering(200, LOGIN_PAGE) as address:
        assert "it answers with a page, as a proxy" in refused(address, TrackerAway)
    with silent() as address:
        assert "no answer within 0.5 s" in refused(address, TrackerAway)
