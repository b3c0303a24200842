"""Data: all groups of fields together, and what they exclude of one another; the numbers of ranks that fit."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from resnet_dist.config.data.augmentation import Augmentation
from resnet_dist.config.data.batch import Batch, divisors
from resnet_dist.config.data.images import Images
from resnet_dist.config.data.reading import Reading
from resnet_dist.errors import RecipeError


class Data(Augmentation, Batch, Images, Reading):  # pydantic has the fields of the last one first
    """The shards, the order of samples, and the way from bytes to pixels."""

    # Not the name of a validator of the groups, which it would replace.
    @model_validator(mode="after")
    def _check_together(self) -> Self:
        self._check_cache()
        self._check_decode()
        self._check_mixing()
        if self.pad_fill == "reflect" and self.pad >= self.image_size:
            raise ValueError(
                f"pad={self.pad} with pad_fill='reflect' needs an image of more than {self.pad} pixels, and image_size="
                f"{self.image_size}; use a smaller pad"
            )
        return self

    def _check_cache(self) -> None:
        if self.cache != "none" and self.crop == "random-resized-crop":
            raise ValueError(
                f"cache={self.cache!r} keeps images of image_size={self.image_size}, which "
                "crop='random-resized-crop' cannot use; use cache='none', or crop='pad-crop' or 'none'"
            )
        if self.cache == "device" and (self.policy != "none" or self.color_jitter):
            raise ValueError(
                f"cache='device' cannot do policy={self.policy!r} and color_jitter={self.color_jitter}, which work "
                "on single images; use cache='ram'"
            )

    def _check_decode(self) -> None:
        if self.decode == "cpu":
            return
        if self.cache != "none":
            raise ValueError(
                f"decode='gpu' with cache={self.cache!r}, whose images are decoded once; use decode='cpu', or cache='none'"
            )
        if self.policy != "none" or self.color_jitter:
            raise ValueError(
                f"decode='gpu' cannot do policy={self.policy!r} and color_jitter={self.color_jitter}, which work on single "
                "images on a CPU; use decode='cpu'"
            )
        if self.channels == 1:
            raise ValueError("decode='gpu' with channels=1: it decodes three colors; use decode='cpu'")

    def _check_mixing(self) -> None:
        if not (self.mixup or self.cutmix):
            return
        if min(self.micro_batch_size or 2, self.global_batch_size) < 2:
            raise ValueError(
                f"mixup={self.mixup} and cutmix={self.cutmix} mix the images of a micro-batch, which has one "
                f"(micro_batch_size={self.micro_batch_size}, global_batch_size={self.global_batch_size}); use 2 or more"
            )
        if not self.spread_repeats and self.samples_of_lane == self.repeats > 1:
            raise ValueError(
                f"repeats={self.repeats} with mixup={self.mixup} and cutmix={self.cutmix} would mix an image with "
                f"itself, as global_batch_size={self.global_batch_size} takes one from each of lanes={self.lanes}; "
                "use fewer lanes"
            )


def check_world_size(data: Data, world_size: int) -> None:
    """Raise RecipeError, naming the accepted numbers of ranks, unless `world_size` ranks can share a step."""
    parts, name = (data.micro_batches, "micro-batches") if data.micro_batches else (data.lanes, "lanes")
    if world_size < 1 or parts % world_size:
        raise RecipeError(
            f"--workers {world_size}: the recipe has {parts} {name} a step (data.global_batch_size="
            f"{data.global_batch_size}, data.micro_batch_size={data.micro_batch_size}, data.lanes={data.lanes}), "
            f"which {world_size} ranks cannot share; use one of {divisors(parts)}"
        )
    if (data.mixup or data.cutmix) and not data.micro_batch_size and data.global_batch_size == world_size:
        raise RecipeError(
            f"--workers {world_size}: data.mixup={data.mixup} and data.cutmix={data.cutmix} mix the images of a rank, "
            f"which has one of data.global_batch_size={data.global_batch_size}; use fewer ranks, or a larger batch"
        )
