"""Check a run that is one of several before the first of them is trained."""

from __future__ import annotations

from resnet_dist.config import Recipe
from resnet_dist.data.shards.index import Index, read_index
from resnet_dist.driver.preflight import check_continued, check_request, with_workers
from resnet_dist.driver.request import Request
from resnet_dist.errors import StorageError, UserError
from resnet_dist.runs.choose import choose_run


def check_trial(request: Request, title: str) -> None:
    """Raise UserError where the run cannot be begun or continued. title: names it in front of the sentence."""
    try:
        check_request(with_workers(request))
        run = choose_run(request.output, request.recipe, request.name, resume=False)
        if run.attempt > 1 and (index := _training_index(request.recipe)) is not None:
            check_continued(run, request.recipe, index)
    except UserError as error:
        raise UserError(f"{title}: {error}") from None


def _training_index(recipe: Recipe) -> Index | None:
    """Return the index of the training set; None where there is none yet, or no more."""
    try:
        return read_index(recipe.data.train)
    except (UserError, StorageError):  # `run_training` prepares the set, or raises again.
        return None
