"""The pages of a run that was trained, in a real browser: columns, charts, data sets, figures, and a failure."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from resnet_dist.config import Recipe
from resnet_dist.driver.request import Request
from resnet_dist.driver.run import run_training
from resnet_dist.errors import Diverged
from resnet_dist.tracking.mlflow.reading import Tracker
from resnet_dist.tracking.open import open_publisher
from tests.benchmarks.many_runs import browser, served, without_assistant
from tests.reporter import RecordingReporter

MILLISECONDS = 90_000  # an upper limit for anything to be seen
SHORT = ("train.length=6 steps", "train.eval_every=3 steps", "train.log_every=1 steps", "train.figures=end")


@pytest.fixture
def two_runs(output: Path, digits_recipe: Recipe) -> Path:
    """Return the output folder of a run that has ended, and one that has diverged."""
    recipe = digits_recipe.with_overrides(SHORT)
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
@pytest.mark.timeout(500)
def test_a_person_finds_the_result_its_data_and_its_figures(two_runs: Path, page: Any) -> None:
    runs = {run.name: run for run in Tracker.open(two_runs).runs(Tracker.open(two_runs).experiments())}
    with served(two_runs) as (table, charts):
        base = table.partition("/#")[0]
        page.goto(table)
        without_assistant(page)
        sees(page, "good", "bad", "eval/top1", "eval/loss", "perf/images_per_", "optim.lr")
        page.goto(charts)
        sees(page, "at a glance", "eval/top1", "train/loss", "train/lr")
        page.locator(".js-plotly-plot").first.wait_for()  # A chart is drawn.

        run_page = f"{base}/#/experiments/{runs['good'].experiment_id}/runs/{runs['good'].run_id}"
        page.goto(f"{run_page}?workflowType=machine_learning")
        sees(page, "Finished", "Datasets", "digits", "resnet-dist train jobs/digits.py")
        page.goto(f"{run_page}/model-metrics?workflowType=machine_learning")
        page.locator(".js-plotly-plot").first.wait_for()
        page.goto(f"{run_page}/artifacts/figures/confusions.png?workflowType=machine_learning")
        picture = page.locator("img[src*='figures'], img[src^='blob:'], [class*=image] img").first
        picture.wait_for()
        assert picture.evaluate("image => image.naturalWidth") > 100

        page.goto(
            f"{run_page.replace(runs['good'].run_id, runs['bad'].run_id)}?workflowType=machine_learning"
        )
        sees(page, "Failed", "the training loss is not finite")
