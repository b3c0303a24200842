"""The evaluation that is due at a step, on all ranks: it ends early where they agree to stop."""

from __future__ import annotations

from resnet_dist.config import Recipe
from resnet_dist.errors import TooManyBadSamples, TrainingError, UserError
from resnet_dist.train.evaluate import evaluate
from resnet_dist.train.log_lines import BAD_EVALUATION_SAMPLE, note_bad
from resnet_dist.train.parts import Parts
from resnet_dist.train.predictions import log_for_figures
from resnet_dist.train.tracker import Tracker
from resnet_dist.train.watch.control import Stopped
from resnet_dist.train.watch.progress import GATHERING, Progress
from resnet_dist.world import World


def evaluate_unless_stopped(
    parts: Parts, recipe: Recipe, progress: Progress, world: World, tracker: Tracker
) -> dict[str, float] | None:
    """Return the metrics of the evaluation set, or None where the ranks agreed to stop before its end.

    The predictions for all samples are recorded where figures of this evaluation are asked for.
    """

    def before_batch() -> None:
        progress.at("evaluating")
        parts.control.agree()
        if parts.control.stop:
            raise Stopped

    def report_bad(texts: list[str]) -> None:
        note_bad(texts, BAD_EVALUATION_SAMPLE, tracker)

    is_last = parts.state.step >= parts.plan.total
    num_samples = parts.eval_loader.index.num_samples
    predictions = log_for_figures(recipe.train, num_samples, tracker.note, is_last=is_last)
    try:
        metrics = evaluate(
            parts.predictor,
            parts.eval_loader,
            world,
            before_batch,
            report_bad,
            predictions,
            recipe.train.precision,
        )
        if predictions is not None:
            progress.at(GATHERING)
            tracker.log_predictions(predictions.gather(world), parts.state.step)
        return metrics
    except Stopped:
        return None
    except (TooManyBadSamples, UserError) as error:
        raise TrainingError(str(error)) from None
