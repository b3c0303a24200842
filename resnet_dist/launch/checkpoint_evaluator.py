"""The evaluation of one checkpoint after the other, in a process beside the ranks, or in the driver before them."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing

import torch

from resnet_dist.config import Recipe
from resnet_dist.data.shards.index import read_index
from resnet_dist.errors import ExplainedError, StorageError, TrainingError
from resnet_dist.launch.outstanding import Evaluation, Journal
from resnet_dist.runs.folder import RunFolder
from resnet_dist.train.checkpoint.load import load_model
from resnet_dist.train.device import chosen_precision, set_arithmetic
from resnet_dist.train.evaluate import evaluate, evaluation_loader
from resnet_dist.train.log_lines import BAD_EVALUATION_SAMPLE, bad_lines
from resnet_dist.train.plan import Plan, order_of
from resnet_dist.train.predictions import log_for_figures
from resnet_dist.world import World


class CheckpointEvaluator:
    """Evaluates checkpoints as the ranks would: the same data, precision and metrics, each sample once."""

    def __init__(self, recipe: Recipe, cpus: int, *, gpu: bool) -> None:
        torch.set_num_threads(cpus)
        self._recipe, self._world = recipe, World.single(gpu=gpu)
        set_arithmetic(recipe.train, self._world.device)
        self._precision, line = chosen_precision(None, recipe.train.precision, self._world.device)
        self._lines = [line] if line else []  # for a person, with the next evaluation
        self._loader = evaluation_loader(read_index(recipe.data.eval), recipe.data, self._world)
        # Without order: only the number of steps counts here.
        self._total = Plan.of(recipe, order_of(recipe, read_index(recipe.data.train))).total

    def evaluate(self, location: str) -> Evaluation:
        """Return the evaluation of a checkpoint. Raises TrainingError where it would end a training."""
        trained = load_model(location, self._world.device, allow_commands=self._recipe.data.allow_commands)
        is_last, num_samples = trained.step >= self._total, self._loader.index.num_samples
        log = log_for_figures(self._recipe.train, num_samples, self._lines.append, is_last=is_last)
        bad: list[str] = []
        metrics = evaluate(
            trained.model,
            self._loader,
            self._world,
            report_bad=bad.extend,
            predictions=log,
            precision=self._precision,
        )
        self._check(metrics, bad)
        lines, self._lines = [*self._lines, *bad_lines(bad, BAD_EVALUATION_SAMPLE)], []
        return metrics, None if log is None else log.gather(self._world).to_bytes(), lines

    def close(self) -> None:
        self._loader.close()

    def _check(self, metrics: dict[str, float], bad: list[str]) -> None:
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise TrainingError(f"{name} is {value}")
        limit = self._recipe.data.max_bad_fraction
        if len(bad) / (len(bad) + metrics["eval/samples"]) > limit:
            raise TrainingError(
                f"{len(bad)} samples could not be decoded, more than data.max_bad_fraction={limit} allows; the first is "
                f"{bad[0]}"
            )


def catch_up_here(
    recipe: Recipe, folder: RunFolder, cpus: int, *, gpu: bool, report: Callable[[str], None]
) -> None:
    """Evaluate and log in this process what evaluations beside training have left of a run, before its ranks begin.

    Raises StorageError.
    """
    journal = Journal(folder, recipe.train.best_metric, recipe.train.keep_checkpoints)
    if left := journal.outstanding():
        report(f"{len(left)} evaluation(s) are outstanding, of steps {', '.join(map(str, left))}")
        with closing(CheckpointEvaluator(recipe, cpus, gpu=gpu)) as evaluator:
            for step in left:
                _evaluate_one(evaluator, journal, step, report)
    journal.complete()


def _evaluate_one(
    evaluator: CheckpointEvaluator, journal: Journal, step: int, report: Callable[[str], None]
) -> None:
    try:
        evaluation = evaluator.evaluate(journal.location_of(step))
    except StorageError:
        raise
    except ExplainedError as problem:  # Another try would find the same.
        journal.write_problem(step, str(problem))
        report(f"the checkpoint of step {step} is not evaluated: {problem}")
        return
    journal.write(step, evaluation)
    for line in evaluation[2]:
        report(line)
