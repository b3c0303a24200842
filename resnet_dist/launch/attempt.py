"""What every rank of an attempt receives, and the type of what starts them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from resnet_dist.config import Recipe
from resnet_dist.runs.folder import RunFolder
from resnet_dist.train.loop import Outcome

# Runs all ranks of one attempt to their end; None where they were interrupted before they could save.
RankLauncher = Callable[[RunFolder], Outcome | None]


@dataclass(frozen=True)
class Attempt:
    """The orders of one rank, as plain values: they travel to other machines."""

    recipe_json: str
    folder: str
    threads: int  # of the CPU, per rank

    @classmethod
    def of(cls, recipe: Recipe, folder: RunFolder, *, threads: int) -> Attempt:
        return cls(recipe.to_json(), str(folder.path.absolute()), threads)

    @property
    def recipe(self) -> Recipe:
        return Recipe.from_json(self.recipe_json)
