"""The numbers of ranks that a run may use: one number, or a range to follow the size of a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from resnet_dist.config.data.batch import divisors
from resnet_dist.config.recipe import Recipe
from resnet_dist.errors import RecipeError, UserError

DEFAULT_WORKERS = 2  # ranks under Ray
DEFAULT_MAX_RESTARTS = 10  # of lost ranks, within an hour


@dataclass(frozen=True)
class WorkerRange:
    """The ranks of a run under Ray: as many as fit, from `min` to `max`, of the numbers that the recipe allows.

    With less than `preferred` ranks no run begins, and one that lost a node waits before it resumes with fewer.
    """

    min: int
    max: int
    preferred: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the range of "4" or "2:8".

        Four ranks begin, and fewer resume where a node was lost and did not come back in time. Between two and eight
        ranks begin; fewer or more resume at once where nodes leave or join. Raises UserError.
        """
        low, colon, high = text.strip().partition(":")
        if not (low.isdecimal() and (high.isdecimal() or not colon)):
            raise UserError(f"--workers {text!r}: use a number of ranks such as 4, or a range such as 2:8")
        numbers = int(low), int(high or low)
        if not 1 <= numbers[0] <= numbers[1]:
            raise UserError(f"--workers {text!r}: use numbers from 1, the smaller one first, such as 2:8")
        return cls(*numbers, preferred=numbers[0]) if colon else cls(1, numbers[0], preferred=numbers[0])

    @classmethod
    def default(cls, recipe: Recipe, *, limit: int = DEFAULT_WORKERS) -> Self:
        """Return the ranks for a person who names no number: `limit`, or the largest number below that the recipe allows."""
        parts = recipe.data.micro_batches or recipe.data.lanes
        return cls.parse(str(max(size for size in divisors(parts) if size <= limit)))

    @classmethod
    def exactly(cls, workers: int) -> Self:
        return cls(workers, workers, preferred=workers)

    @property
    def is_range(self) -> bool:
        """Report whether nodes that leave or join change the number of ranks at once."""
        return self.preferred < self.max

    def __str__(self) -> str:
        return f"{self.preferred}:{self.max}" if self.is_range else str(self.max)

    def sizes(self, recipe: Recipe) -> list[int]:
        """Return the numbers of ranks that give the same curve with `recipe`, the largest first.

        Raises RecipeError where the range has none, or where batch norm would see other images on fewer ranks.
        """
        data = recipe.data
        if data.micro_batches is None and not recipe.train.sync_batch_norm:
            if self.is_range:
                raise RecipeError(
                    f"--workers {self}: without data.micro_batch_size the number of ranks decides which images batch norm "
                    f"sees together; set it to a divisor of data.global_batch_size={data.global_batch_size}, or use one "
                    "number of ranks"
                )
            return [self.max]
        parts, name = (data.micro_batches, "micro-batches") if data.micro_batches else (data.lanes, "lanes")
        sizes = [size for size in divisors(parts) if self.min <= size <= self.max]
        if not sizes:
            raise RecipeError(
                f"--workers {self}: the recipe has {parts} {name} a step; a range must hold one of {divisors(parts)}"
            )
        return sizes[::-1]
