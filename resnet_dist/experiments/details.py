"""One run: what it is, what it reached, where things are, and its curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from resnet_dist.experiments.curves import chart
from resnet_dist.experiments.listing import short
from resnet_dist.experiments.numbers import duration_text, metric_text, time_text
from resnet_dist.runs.group_folder import GROUP_KINDS
from resnet_dist.tracking.logged_run import (
    FOLDER_TAG,
    LOSS,
    NOT_COMPARED,
    RATE,
    SPEED,
    TOP1,
    TRAIN_LOSS,
    LoggedRun,
    Point,
    differing,
)

CURVES = (TOP1, TRAIN_LOSS, RATE, SPEED)
RESULTS = (TOP1, "eval/top5", LOSS, TRAIN_LOSS, SPEED)
OWN = "resnet_dist."  # the prefix of our tags
# Our tags that a person has no use for, or that have a line of their own.
HIDDEN = tuple(OWN + name for name in ("key", "folder", "attempt"))
ORIGIN = {
    "source": "mlflow.source.name",
    "commit": "mlflow.source.git.commit",
    "user": "mlflow.user",
    **{kind.word: kind.tag for kind in GROUP_KINDS},
    "folder": FOLDER_TAG,
}


def describe(run: LoggedRun, others: Sequence[LoggedRun], place: str, page: str) -> list[str]:
    """Return the lines about a run. others: the runs of its experiment, among them the run itself; page: its link, or ""."""
    lines = {
        "run": f"{run.name} ({run.run_id})",
        "state": f"{run.state}, {duration_text(run.seconds)}, started {time_text(run.start_ms)}",
        "experiment": f"{run.experiment}, {place}",
        **{title: run.tags[tag] for title, tag in ORIGIN.items() if run.tags.get(tag)},
        "artifacts": run.artifacts,
        "page": page,
        "result": result_text(run),
        **_recipe(run, others),
        **{key.removeprefix(OWN): text for key, text in run.tags.items() if _is_shown(key)},
    }
    width = max(map(len, lines))
    return [f"{title:<{width}}  {text}" for title, text in lines.items() if text]


def result_text(run: LoggedRun) -> str:
    """Return the newest values of the main metrics."""
    shown = [(key, run.metrics.get(key)) for key in RESULTS]
    return ", ".join(f"{key} {metric_text(key, value)}" for key, value in shown if value is not None)


def curves(histories: Mapping[str, Sequence[Point]], *, plain: bool) -> list[str]:
    """Return the charts of the metrics of a run."""
    return [line for name, points in histories.items() for line in ("", *chart(name, points, plain=plain))]


def _recipe(run: LoggedRun, others: Sequence[LoggedRun]) -> dict[str, str]:
    """Return the fields in which the runs of an experiment differ, as this run has them; the main ones of a single run."""
    fields = [key for key in differing(others) if key in run.params]
    title = "recipe"
    if not fields:
        fields = ["model.name", "optim.lr", "train.length", "data.global_batch_size"]
    texts = [
        f"{key}={short(run.params[key])}" for key in fields if key in run.params and key not in NOT_COMPARED
    ]
    return {title: ", ".join(texts)}


def _is_shown(tag: str) -> bool:
    return tag.startswith(OWN) and tag not in HIDDEN
