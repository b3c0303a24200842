"""The trials of a sweep, which are drawn once, and their outcomes: OUTPUT/sweeps/NAME/sweep.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from resnet_dist.config import Recipe
from resnet_dist.config.part import explain
from resnet_dist.errors import UserError
from resnet_dist.runs.choose import may_change
from resnet_dist.runs.folder import stored_recipe
from resnet_dist.runs.group_folder import SWEEP_FILE
from resnet_dist.system.files import write_text_atomically

# finished: trained to its end; stopped: by the scheduler, early; diverged: its loss was no number any more. The others are
# no results: failed is tried again by the next command, interrupted is continued by it.
State = Literal["finished", "stopped", "diverged", "failed", "interrupted"]
NOT_EVALUATED = "not evaluated: "  # begins the reason of a trial whose evaluations have failed
RESULTS: tuple[State, ...] = ("finished", "stopped", "diverged")
# Draws this number of different trials, as `--set` texts, from the seed; the first ones do not depend on the number.
Draw = Callable[[int], list[tuple[str, ...]]]


@dataclass(frozen=True)
class Outcome:
    """The end of a trial."""

    state: State
    value: float | None = None  # of the metric, at the last evaluation
    step: int | None = None  # of that evaluation
    metrics: Mapping[str, float] = field(default_factory=dict)  # of that evaluation
    reason: str = ""  # the error of one that failed, why it was stopped, or the steps that were not evaluated
    seconds: float = 0.0

    @property
    def is_result(self) -> bool:
        return self.state in RESULTS


@dataclass(frozen=True)
class PlannedTrial:
    """One trial: the values that it sets, and its outcome, if it has one."""

    name: str  # of its run
    sets: tuple[str, ...]  # as `--set` takes them
    outcome: Outcome | None = None

    @property
    def has_result(self) -> bool:
        return self.outcome is not None and self.outcome.is_result

    @property
    def state(self) -> str:
        return "left" if self.outcome is None else self.outcome.state

    @property
    def not_evaluated(self) -> str:
        """The steps of a finished trial that were to be evaluated, each with the reason; mostly empty."""
        if self.outcome is None or self.outcome.state != "finished":
            return ""
        return self.outcome.reason.removeprefix(NOT_EVALUATED)

    @property
    def values(self) -> dict[str, str]:
        """The values by field."""
        return dict((field, value) for field, _, value in (text.partition("=") for text in self.sets))


@dataclass(frozen=True)
class Plan:
    """All trials of a sweep, and what they were drawn from."""

    searches: tuple[str, ...]  # as they were typed
    seed: int
    metric: str
    recipe: Mapping[str, object]  # without passwords; of it the trials differ by what is searched
    trials: tuple[PlannedTrial, ...] = ()

    @property
    def mode(self) -> Literal["min", "max"]:
        return "min" if self.metric.endswith("loss") else "max"

    def best(self) -> PlannedTrial | None:
        """Return the trial with the best metric of those that were trained to their end; of all, where none was."""
        ended = [(trial, trial.outcome.value) for trial in self.trials if trial.outcome is not None]
        known = [(trial, value) for trial, value in ended if value is not None]
        whole = [pair for pair in known if pair[0].outcome and pair[0].outcome.state == "finished"]
        choose = min if self.mode == "min" else max
        return choose(whole or known, key=lambda pair: pair[1])[0] if known else None

    def ended(self, name: str, outcome: Outcome) -> Plan:
        """Return the plan with the outcome of a trial."""
        trials = (replace(one, outcome=outcome) if one.name == name else one for one in self.trials)
        return replace(self, trials=tuple(trials))

    def to_json(self) -> str:
        best = self.best()
        value = {**asdict(self), "best": None if best is None else best.name}
        return json.dumps(value, indent=1, ensure_ascii=False) + "\n"

    def write(self, folder: Path) -> None:
        write_text_atomically(folder / SWEEP_FILE, self.to_json())


def read_plan(folder: Path) -> Plan | None:
    """Return the plan in the folder of a sweep; None where there is none. Raises UserError where it cannot be parsed."""
    file = folder / SWEEP_FILE
    if not file.exists():
        return None
    try:
        value = json.loads(file.read_text())
        value.pop("best")
        trials = tuple(map(_trial, value.pop("trials")))
        return Plan(**{**value, "searches": tuple(value["searches"]), "trials": trials})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: not a sweep ({error})") from None


def planned(
    known: Plan | None, wanted: Plan, recipe: Recipe, names: Callable[[int], list[str]], num: int, draw: Draw
) -> Plan:
    """Return the plan with `num` trials: those of `known`, and more where it has fewer.

    wanted: without trials. names: returns the names of so many runs. Raises UserError where the known plan was made
    otherwise, or has more trials.
    """
    if known is not None:
        _check_same(known, wanted, recipe, num)
    trials = known.trials if known is not None else ()
    drawn = [] if len(trials) == num else draw(num)
    kept = [trial.sets for trial in trials]
    new = [sets for sets in drawn if sets not in kept][: num - len(trials)]
    added = [PlannedTrial(name, sets) for name, sets in zip(names(num)[len(trials) :], new, strict=True)]
    return replace(wanted, trials=(*trials, *added))


def _check_same(known: Plan, wanted: Plan, recipe: Recipe, num: int) -> None:
    """Raise UserError where a sweep would continue with other trials than it began with."""
    name = "this sweep was begun with"
    advice = "; give a new --name, or the same flags"
    for flag, before, now in (
        ("--search", " ".join(known.searches), " ".join(wanted.searches)),
        ("--seed", str(known.seed), str(wanted.seed)),
        ("train.best_metric", known.metric, wanted.metric),
    ):
        if before != now:
            raise UserError(f"{flag} {now}: {name} {before}{advice}")
    if num < len(known.trials):
        raise UserError(f"--trials {num}: {name} {len(known.trials)}; give {len(known.trials)} or more")
    try:
        before_recipe = Recipe.model_validate(dict(known.recipe))
    except ValidationError as error:
        raise UserError(
            f"this sweep was begun by another version of resnet_dist ({explain(error, Recipe)}); give a new --name"
        ) from None
    changed = [
        f"{key} was {was}, is {now}"
        for key, (now, was) in recipe.changes_from(before_recipe).items()
        if not may_change(key, before_recipe, recipe)
    ]
    if changed:
        raise UserError(f"{name} another recipe ({'; '.join(changed)}){advice}")


def plan_without_trials(searches: Sequence[str], seed: int, metric: str, recipe: Recipe) -> Plan:
    return Plan(tuple(searches), seed, metric, stored_recipe(recipe))


def _trial(value: dict[str, Any]) -> PlannedTrial:
    outcome = value.pop("outcome")
    return PlannedTrial(value["name"], tuple(value["sets"]), None if outcome is None else Outcome(**outcome))
