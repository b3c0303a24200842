"""The image size of every training step: a pure function of the step, so that a restart changes nothing.

Small images at first save time and cost little accuracy: FFCV's ResNet-50 begins with 160 pixels and ends with 192.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from resnet_dist.config import Data, Length
from resnet_dist.errors import RecipeError


@dataclass(frozen=True)
class Sizes:
    """Points of (step, size in pixels) with increasing steps; before the first and after the last the size is constant."""

    points: tuple[tuple[int, int], ...]
    multiple: int | None = None
    """Interpolate linearly between points and round to this. None: a point's size holds until the next point."""

    @classmethod
    def constant(cls, size: int) -> Sizes:
        return cls(((0, size),))

    @classmethod
    def of(cls, data: Data, steps: Callable[[Length], int]) -> Sizes:
        """Return the sizes of a recipe. steps: converts a Length to steps. Raises RecipeError where steps do not grow."""
        if not data.train_sizes:
            return cls.constant(data.image_size)
        points = tuple((steps(length), size) for length, size in data.train_sizes)
        for number, ((before, _), (after, _)) in enumerate(zip(points, points[1:], strict=False)):
            if after <= before:
                first, second = (length for length, _ in data.train_sizes[number : number + 2])
                raise RecipeError(
                    f"data.train_sizes: {second!r} is step {after}, which is not after {first!r}, step {before}; "
                    "give each point a greater length than the one before it"
                )
        return cls(points, data.train_size_multiple if data.train_size_curve == "linear" else None)

    def __str__(self) -> str:
        return " and ".join(f"{size} pixels at step {step}" for step, size in self.points)

    @property
    def largest(self) -> int:
        return max(size for _, size in self.points)

    def at(self, step: int) -> int:
        """Return the image size of a training step, in pixels."""
        number = bisect_right(self.points, step, key=lambda point: point[0])
        if number == 0:
            return self.points[0][1]
        start, low = self.points[number - 1]
        if self.multiple is None or number == len(self.points):
            return low
        end, high = self.points[number]
        exact = low + (high - low) * (step - start) / (end - start)
        return round(exact / self.multiple) * self.multiple
