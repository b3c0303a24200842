"""Batch: the samples of a step, as lanes and micro-batches that ranks can share, and the copies of each sample."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from resnet_dist.config.part import Part


class Batch(Part):
    """The samples of a step, and their order."""

    global_batch_size: int = Field(ge=1)
    """Samples per optimizer step, over all ranks. A multiple of `lanes`."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Samples per forward pass. A number fixes what batch norm sees, so that any number of ranks draws the
    same curve; it must divide `global_batch_size` into micro-batches whose number divides `lanes`. None: the
    share of a rank in a step, so that batch norm depends on the number of ranks."""
    lanes: int = Field(default=8, ge=1)
    """Contiguous parts of an epoch, each read by one rank. The number of ranks must divide it."""
    window: int = Field(default=4096, ge=1)
    """Samples over which a lane is shuffled. The first batch of a run waits for the shards that hold the first
    `window` samples of each lane."""
    repeats: int = Field(default=1, ge=1)
    """Repeated augmentation (arXiv 1901.09335): copies of each sample in its global batch, each augmented in
    its own way. An epoch is all samples times `repeats`: torchvision's 600 epochs with `--ra-reps 4`, whose
    epochs draw as many images as the set has, are `train.length="150 epochs"` with `repeats=4`. All copies
    are on one rank and in one micro-batch, unless `spread_repeats` is set. It must divide
    `global_batch_size / lanes`."""
    spread_repeats: bool = False
    """Put the copies of a sample into different micro-batches, as torchvision puts them on different ranks: batch
    norm then sees `micro_batch_size` different images. `repeats` must divide the number of micro-batches. A rank
    with fewer micro-batches than copies decodes images that other ranks decode too."""

    @property
    def micro_batches(self) -> int | None:
        """Micro-batches in a global batch; None where the recipe does not fix their size."""
        return self.micro_batch_size and self.global_batch_size // self.micro_batch_size

    @property
    def samples_of_lane(self) -> int:
        """Samples that a step takes from each lane, copies included."""
        return self.global_batch_size // self.lanes

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.global_batch_size % self.lanes:
            near = divisors(self.global_batch_size)
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of lanes={self.lanes}; "
                f"use lanes from {near}, or another batch size"
            )
        if self.micro_batch_size and self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} does not divide "
                f"global_batch_size={self.global_batch_size}; use one of {divisors(self.global_batch_size)}"
            )
        if self.samples_of_lane % self.repeats:
            raise ValueError(
                f"repeats={self.repeats} does not divide the {self.samples_of_lane} samples that global_batch_size="
                f"{self.global_batch_size} takes from each of lanes={self.lanes}; use one of "
                f"{divisors(self.samples_of_lane)}, or fewer lanes"
            )
        if self.spread_repeats:
            self._check_spread_repeats()
        if self.micro_batches and self.lanes % self.micro_batches:
            fitting = [self.global_batch_size // d for d in reversed(divisors(self.lanes))]
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} cuts a step into {self.micro_batches} "
                f"micro-batches, which does not divide lanes={self.lanes}; use one of {fitting}"
            )
        return self

    def _check_spread_repeats(self) -> None:
        if self.repeats == 1:
            raise ValueError("spread_repeats=True is not read with repeats=1; leave it out")
        if self.micro_batches is None or self.micro_batches % self.repeats:
            counts = [count for count in divisors(self.lanes) if count % self.repeats == 0]
            fitting = [self.global_batch_size // count for count in reversed(counts)]
            raise ValueError(
                f"spread_repeats=True puts the repeats={self.repeats} copies of a sample into different micro-batches of "
                f"a step, but micro_batch_size={self.micro_batch_size} cuts it into "
                f"{self.micro_batches or 'as many as there are ranks'}; use "
                + (
                    f"micro_batch_size from {fitting}"
                    if fitting
                    else f"lanes that repeats={self.repeats} divides"
                )
            )


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
