"""The saved view of an experiment: the columns of its table, and its charts in the order of their interest.

MLflow's page keeps a view as a tag of the experiment, and opens it by its key in an address. The format is not documented:
tests/tracking/mlflow/test_browse.py opens one in a browser.
"""

from __future__ import annotations

import base64
import json
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import mlflow

from resnet_dist.tracking.logged_run import (
    GROUP_TAGS,
    IMAGES,
    LOSS,
    RATE,
    SPEED,
    TOP1,
    TRAIN_LOSS,
    LoggedRun,
    differing,
)

VIEW = "resnet-dist"  # its key in an address
VIEW_NAME = "best runs first"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
# Views in which the runs of a study or a sweep stand together: grouped by the tags that name them, the best first; and below
# the run of the study, which has its figure and conclusion. The page nests runs only in the order of their creation, and
# keeps no parent open in a saved view.
NESTED, NESTED_NAME = "resnet-dist-nested", "runs below their study or sweep"
GROUPS, GROUPS_NAME = "resnet-dist-groups", "studies and sweeps"
GROUPS_TAG, NESTED_TAG = (f"mlflow.sharedViewState.{key}" for key in (GROUPS, NESTED))
CREATED = "attributes.start_time"
PRIMARY_TAG = "mlflow.experiment.primaryMetric.name"
DURATION, DATASET = "duration", "attributes.`Dataset`"  # columns, as the page calls them
# Pixels, so that two fields that differ are seen without scrolling where the window has 1,000.
METRIC_WIDTH, FIELD_WIDTH, DATASET_WIDTH = 85, 90, 200
CARD_HEIGHT = 300  # pixels, so that four charts are seen without scrolling
MAX_FIELDS = 8  # columns for recipe fields that differ
# The four charts that answer first whether a run is good, and then sections by the prefix of their metrics. Bad samples
# are in the last one, which is closed.
FIRST_SECTION = "at a glance"
FIRST_CHARTS = (TOP1, TRAIN_LOSS, RATE, SPEED)
SECTIONS = ("eval", "train", "perf", "System metrics", "data")
CLOSED_SECTIONS = ("System metrics", "data")


def save_views(client: mlflow.MlflowClient, experiment_id: str, runs: Sequence[LoggedRun]) -> tuple[str, ...]:
    """Save the views of an experiment with these runs, unless they are there; return their keys.

    The second and the third are there where runs belong to studies or sweeps. Raises what the store raises.
    """
    tags = client.get_experiment(experiment_id).tags
    views = {VIEW: (VIEW_TAG, VIEW_NAME, view_state(runs))}
    if names := group_tags(runs):
        views[GROUPS] = GROUPS_TAG, GROUPS_NAME, {**view_state(runs), "groupBy": _groups(names)}
        views[NESTED] = NESTED_TAG, NESTED_NAME, {**view_state(runs), "orderByKey": CREATED}
    for tag, name, value in views.values():
        state = _packed(value)
        if _state_of(tags.get(tag, "")) != state:
            envelope = {"name": name, "createdAt": time.time_ns() // 1_000_000, "state": state}
            client.set_experiment_tag(experiment_id, tag, json.dumps(envelope))
    if PRIMARY_TAG not in tags:
        client.set_experiment_tag(experiment_id, PRIMARY_TAG, TOP1)
    return tuple(views)


def group_tags(runs: Sequence[LoggedRun]) -> list[str]:
    """Return the tags that name the studies and sweeps of runs."""
    return [tag for tag in GROUP_TAGS if any(tag in run.tags for run in runs)]


def _groups(tags: Sequence[str]) -> dict[str, Any]:
    """Return how the page groups runs: by tags, each group with the largest values of its runs."""
    keys = [{"mode": "tag", "groupByData": tag} for tag in tags]
    return {"aggregateFunction": "max", "groupByKeys": keys}


def view_state(runs: Sequence[LoggedRun]) -> dict[str, Any]:
    """Return the state of the page: order, columns and charts. The page fills in what is missing."""
    top1, loss, speed = (f"metrics.`{key}`" for key in (TOP1, LOSS, SPEED))
    fields = [f"params.`{key}`" for key in list(differing(runs))[:MAX_FIELDS]]
    groups = [f"tags.`{tag}`" for tag in group_tags(runs)]
    columns = [top1, loss, *fields, speed, *groups, DURATION, DATASET, "attributes.`Models`"]
    widths = dict.fromkeys((top1, loss, speed), METRIC_WIDTH) | dict.fromkeys(fields, FIELD_WIDTH)
    return {
        "orderByKey": top1,
        "orderByAsc": False,
        "selectedColumns": columns,
        "columnOrder": columns,
        "columnWidths": {**widths, DATASET: DATASET_WIDTH},
        "compareRunCharts": _charts(runs),
        "compareRunSections": [_section(name) for name in (FIRST_SECTION, *SECTIONS)],
        # Otherwise the page sorts the sections by their names.
        "isAccordionReordered": True,
    }


def _charts(runs: Sequence[LoggedRun]) -> list[dict[str, Any]]:
    """Return the charts of the first section, and of all other metrics so far; the page adds those that come later."""
    known = sorted({key for run in runs for key in run.metrics} - set(FIRST_CHARTS))
    others = [_chart(key, name) for name in SECTIONS for key in known if key.rpartition("/")[0] == name]
    return [*(_chart(key, FIRST_SECTION) for key in FIRST_CHARTS), *_images(runs), *others]


def _images(runs: Sequence[LoggedRun]) -> list[dict[str, Any]]:
    """Return the card of the most surely wrong images, at the step that most runs have: the page begins at step 0."""
    steps = Counter(step for run in runs for step in run.image_steps[-1:])
    if not steps:
        return []
    card = _card("IMAGE", IMAGES, "eval")
    return [{**card, "imageKeys": [IMAGES], "step": steps.most_common(1)[0][0], "showRunParams": False}]


def _chart(key: str, section: str) -> dict[str, Any]:
    return {
        **_card("LINE", key, section),
        "metricKey": key,
        # Curves as they were measured: the page smooths a chart that leaves this out.
        "lineSmoothness": 0,
        "useGlobalLineSmoothing": True,
        "useGlobalXaxisKey": True,
        "xAxisKey": "step",
    }


def _card(kind: str, key: str, section: str) -> dict[str, Any]:
    return {
        "type": kind,
        "uuid": f"chart {key}",
        "metricSectionId": f"section {section}",
        "isGenerated": True,
        "deleted": False,
        "runsCountToCompare": 10,
    }


def _section(name: str) -> dict[str, Any]:
    display = name not in CLOSED_SECTIONS
    return {
        "uuid": f"section {name}",
        "name": name,
        "display": display,
        "isReordered": True,
        "deleted": False,
        "isGenerated": True,
        # Three beside each other, as by default, are 130 pixels wide in a window of 1,000.
        "columns": 2,
        "cardHeight": CARD_HEIGHT,
    }


def _packed(state: dict[str, Any]) -> str:
    """Return a state as the page reads it, compressed as the page does it: a tag has room for MAX_TAG characters."""
    return f"deflate;{base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()}"


def _state_of(tag: str) -> str:
    try:
        return str(json.loads(tag)["state"])
    except (ValueError, KeyError, TypeError):
        return ""
