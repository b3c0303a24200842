"""The addresses of pages on an MLflow server."""

from __future__ import annotations

# Without it, a page opens in the mode for language models, which has no charts of metrics.
MODE = "workflowType=machine_learning"


def experiment_link(
    address: str, experiment_id: str, view: str | None = None, *, charts: bool = False
) -> str:
    """Return the address of the page that lists the runs of an experiment, with a saved view; charts: drawn beside."""
    parts = [MODE]
    parts += [f"viewStateShareKey={view}"] if view else []
    parts += ["compareRunsMode=CHART"] if charts else []
    return f"{address.rstrip('/')}/#/experiments/{experiment_id}/runs?{'&'.join(parts)}"


def run_link(address: str, experiment_id: str, run_id: str) -> str:
    """Return the address of a run's page; with an empty address, a link that holds inside any server's pages."""
    return f"{address.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}?{MODE}"
