"""The evaluation that is due at a step, on all ranks: it ends early where they agree to stop."""

from __future__ import annotations

from resnet_dist.config import Recipe
from resnet_dist.errors import TooManyBadSamples, TrainingError, UserError
from resnet_dist.train.evaluate import evaluate
from resnet_dist.train.log_lines import BAD_EVALUATION_SAMPLE, note_bad
from resnet_dist.train.parts import Parts
from resnet_dist.train.predictions import PredictionLog, too_many
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

    predictions = PredictionLog() if wants_figures(parts, recipe, tracker) else None
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


def wants_figures(parts: Parts, recipe: Recipe, tracker: Tracker) -> bool:
    """Report whether figures of the evaluation that begins are asked for; all ranks decide the same."""
    is_asked = recipe.train.figures == "evaluations" or parts.state.step >= parts.plan.total
    if recipe.train.figures == "none" or not is_asked:
        return False
    if (line := too_many(parts.eval_loader.index.num_samples)) is not None:
        tracker.note(line)
    return line is None
