"""The pages of a run that was trained, in a real browser: columns, charts, data sets, figures, and a failure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import mlflow
import pytest

from resnet_dist.config import Recipe
from resnet_dist.driver.request import Request
from resnet_dist.driver.run import run_training
from resnet_dist.errors import Diverged
from resnet_dist.tracking.mlflow.browse.links import MODE
from resnet_dist.tracking.mlflow.browse.view import NESTED
from resnet_dist.tracking.mlflow.reading import Tracker
from resnet_dist.tracking.mlflow.run import PARENT_TAG
from resnet_dist.tracking.open import open_publisher
from tests.benchmarks.many_runs import browser, served
from tests.reporter import RecordingReporter

CLOSE_ASSISTANT = "[data-component-id='mlflow.assistant.chat_panel.close']"
MILLISECONDS = 90_000  # an upper limit for anything to be seen
SHORT = ("train.length=6 steps", "train.eval_every=3 steps", "train.log_every=1 steps")


@pytest.fixture
def two_runs(output: Path, digits_recipe: Recipe) -> Path:
    """Return the output folder of a run that has ended, and one that has diverged."""
    recipe = digits_recipe.with_overrides([*SHORT, "train.figures=evaluations"])
    for name, overrides in (("good", []), ("bad", ["optim.lr=1e30", "schedule.warmup=0 steps"])):
        changed = recipe.with_overrides(overrides)
        request = Request(changed, "jobs/digits.py", output, gpu=False, local=True, name=name)
        try:
            run_training(request, RecordingReporter(), open_publisher)
        except Diverged:
            assert name == "bad"
    return output


@pytest.fixture
def page() -> Iterator[Any]:
    if find_spec("playwright") is None:
        pytest.skip("no playwright: `uv sync` installs it")
    if not (shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("no browser: `apt-get install chromium` brings one")
    with browser() as opened:
        page = opened.new_page(viewport={"width": 1600, "height": 1000})
        page.set_default_timeout(MILLISECONDS)
        yield page


def sees(page: Any, *texts: str) -> None:
    """Wait until each of the texts can be seen."""
    for text in texts:
        page.get_by_text(text).first.wait_for()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_person_finds_the_result_its_data_and_its_figures(two_runs: Path, page: Any) -> None:
    runs = {run.name: run for run in Tracker.open(two_runs).runs(Tracker.open(two_runs).experiments())}
    with served(two_runs) as (table, charts):
        base = table.partition("/#")[0]
        page.goto(table)
        sees(page, "good", "bad", "eval/top1", "eval/loss", "perf/images_per_", "optim.lr")
        assert page.locator(CLOSE_ASSISTANT).count() == 0
        page.get_by_text("good", exact=True).first.click()
        sees(page, "Finished", "Model registry")
        assert page.get_by_text("Playground").count() == 0  # What is there for agents.
        page.goto(charts)
        sees(page, "at a glance", "eval/top1", "train/loss", "train/lr")
        page.locator(".js-plotly-plot").first.wait_for()  # A chart is drawn.

        run_page = f"{base}/#/experiments/{runs['good'].experiment_id}/runs/{runs['good'].run_id}"
        page.goto(f"{run_page}?workflowType=machine_learning")
        sees(page, "Finished", "Datasets", "digits", "resnet-dist train jobs/digits.py")
        page.goto(f"{run_page}/model-metrics?workflowType=machine_learning")
        page.locator(".js-plotly-plot").first.wait_for()
        page.goto(f"{run_page}/artifacts/figures/confusions.png?workflowType=machine_learning")
        assert width_of(page, "img[src*='figures'], img[src^='blob:'], [class*=image] img") > 100

        page.goto(
            f"{run_page.replace(runs['good'].run_id, runs['bad'].run_id)}?workflowType=machine_learning"
        )
        sees(page, "Failed", "the training loss is not finite")

        ids = [runs[name].run_id for name in ("good", "bad")]
        page.goto(
            f"{base}/#/compare-runs?{urlencode({'runs': json.dumps(ids), 'experiments': json.dumps(['1'])})}&{MODE}"
        )
        sees(page, "Comparing 2 Runs", "good", "bad", "Parallel Coordinates Plot")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_narrow_window_shows_what_matters(two_runs: Path, page: Any) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{two_runs}/mlflow.db")
    experiment = Tracker.open(two_runs).experiment(None).experiment_id
    parent = client.create_run(experiment, run_name="depths", tags={"study": "depths"}).info.run_id
    tags = {"study": "depths", PARENT_TAG: parent}
    child = client.create_run(experiment, run_name="depth-20", tags=tags).info.run_id
    client.log_metric(child, "eval/top1", 0.5, step=6)
    page.set_viewport_size({"width": 1000, "height": 1000})
    with served(two_runs) as (table, charts):
        page.goto(table)
        # Columns that have no room are not in the page.
        sees(page, "good", "depth-20", "eval/top1", "eval/loss", "optim.lr")
        page.goto(charts)
        sees(page, "good", "at a glance", "eval/top1")
        page.locator(".js-plotly-plot").first.wait_for()

        page.goto(table.replace("=resnet-dist", f"={NESTED}"))
        sees(page, "runs below their study", "depths", "good")
        assert not page.get_by_text("depth-20").first.is_visible()
        page.locator(".ag-row", has=page.get_by_text("depths", exact=True)).first.locator(
            "button"
        ).first.click()
        sees(page, "depth-20")


def width_of(page: Any, selector: str) -> int:
    """Return the pixels of a picture, once it is there."""
    picture = page.locator(selector).first
    picture.wait_for()
    page.wait_for_function("image => image.naturalWidth > 0", arg=picture.element_handle())
    return int(picture.evaluate("image => image.naturalWidth"))
