"""A study: several runs that answer one question, and the figure that shows the answer.

A job file may define `study() -> Study` beside `recipe() -> Recipe`. `resnet-dist train` trains the one
recipe, `resnet-dist study` every recipe of the study.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from resnet_dist.config.overrides import parse_value
from resnet_dist.config.part import NAME
from resnet_dist.config.recipe import Recipe, call_in_file
from resnet_dist.config.recipe_file import as_script, read_source
from resnet_dist.errors import RecipeError


@dataclass(frozen=True)
class Trial:
    """One run of a study."""

    name: str
    """Suffix of the run's name, after that of the study; unique, of the same letters as a recipe's name."""
    recipe: Recipe
    """The recipe that the run trains."""
    tags: Mapping[str, str]
    """Names and values that distinguish this run. MLflow shows them, and the figure groups runs by them."""


@dataclass(frozen=True)
class Result:
    """The outcome of a finished trial, as `Study.conclude` receives it."""

    tags: Mapping[str, str]
    """The tags of the trial."""
    metrics: Mapping[str, float]
    """The last value of every metric of the run; training metrics are means over `Study.last_steps`. Those of the
    evaluation are missing where the last one has failed."""


@dataclass(frozen=True)
class Study:
    """Runs on the same data, and the rules of their figure.

    Trials with the same values of `family` and `shade` are repeats of one another: a curve is the mean of
    repeats, its band reaches from the lowest to the highest.
    """

    name: str
    """Name of the study, of its folder, and prefix of its runs' names."""
    trials: tuple[Trial, ...]
    """The runs, in the order in which they are trained; at least one."""
    family: str
    """Name of the tag that chooses the color of a curve; every trial has it."""
    shade: str
    """Name of the tag that chooses the darkness of a curve, its values in order from light to dark; every
    trial has it."""
    last_steps: int
    """Number of last steps over which training metrics are averaged, at least 1: a rule that is fixed before
    anything is trained."""
    conclude: Callable[[Sequence[Result]], str]
    """Function that returns the title of the figure: a conclusion, true of any results, in one sentence."""
    description: str = ""
    """Text that MLflow shows beside the study."""

    def __post_init__(self) -> None:
        """Raise RecipeError where a name, a tag or `last_steps` cannot be used."""
        # `python -OO` drops docstrings, and a job may have none: `__doc__` is None then.
        object.__setattr__(self, "description", self.description or "")
        names = [trial.name for trial in self.trials]
        for name in [self.name, *names]:
            if not NAME.fullmatch(name):
                raise RecipeError(f"study: the name {name!r} must be letters, digits, '.', '_' and '-'")
        if not names:
            raise RecipeError(f"study {self.name}: has no trials")
        if len(set(names)) < len(names):
            raise RecipeError(f"study {self.name}: several trials are called {_first_repeated(names)!r}")
        for trial in self.trials:
            for tag in (self.family, self.shade):
                if tag not in trial.tags:
                    raise RecipeError(f"study {self.name}: trial {trial.name!r} has no tag {tag!r}")
        if self.last_steps < 1:
            raise RecipeError(f"study {self.name}: last_steps={self.last_steps} must be at least 1")

    @property
    def experiment(self) -> str:
        """The MLflow experiment of all runs of the study."""
        return self.trials[0].recipe.experiment or self.name

    def with_overrides(self, overrides: Sequence[str]) -> Study:
        """Return this study with `KEY=VALUE` applied to every recipe. Raises RecipeError."""
        trials = (replace(trial, recipe=trial.recipe.with_overrides(overrides)) for trial in self.trials)
        return replace(self, trials=tuple(trials))


def load_study(path: Path | str, arguments: Iterable[str] = (), overrides: Sequence[str] = ()) -> Study:
    """Call `study()` of a Python file with `NAME=VALUE` arguments; `KEY=VALUE` overrides go to every recipe.

    Raises RecipeError where the file is missing, raises, or returns something else than a Study.
    """
    path = Path(path)
    source = read_source(path, "job", "study")
    study = call_in_file(path, source, "study", "Study", dict(_argument(text) for text in arguments))
    if not isinstance(study, Study):
        raise RecipeError(f"{path}: study() returned {type(study).__name__}, must return a Study")
    conclude = study.conclude

    def conclude_beside_the_file(results: Sequence[Result]) -> str:
        with as_script(path):  # It may import its neighbours when it is called.
            return conclude(results)

    return replace(study.with_overrides(overrides), conclude=conclude_beside_the_file)


def _argument(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise RecipeError(f"--with {text}: must be NAME=VALUE, such as seeds=1")
    return name.strip(), parse_value(value)


def _first_repeated(names: Sequence[str]) -> str:
    return next(name for name in names if names.count(name) > 1)
