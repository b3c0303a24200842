"""What is read, in which order, and how bytes become pixels."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from resnet_dist.config.lengths import Length
from resnet_dist.config.part import Part, refuse_unread, refuse_without
from resnet_dist.errors import RecipeError

# Fields that only some of the choices read. A value that nothing reads is a mistake, not a preference.
_CROPS_THAT_READ = {"pad": ("pad-crop",)}
_POLICIES_THAT_READ = {"policy_ops": ("rand-augment",), "policy_magnitude": ("rand-augment",)}

PixelSize = Annotated[int, Field(ge=1)]


class Data(Part):
    """What is read, in which order, and how bytes become pixels."""

    train: str
    """Folder or URL (https, s3, gs, hf …) with an index.json, or the index itself. `{output}` stands for the
    output folder."""
    eval: str
    source: str | None = None
    """What `train` prepares by itself where the shards are missing, as `resnet-dist prepare` names it."""

    image_size: int = Field(ge=1)
    """Height and width, in pixels, of what the model sees; no `train_sizes` may be larger."""
    train_sizes: tuple[tuple[Length, PixelSize], ...] = ()
    """Progressive resizing: (Length, size) points, such as (("0 epochs", 160), ("13 epochs", 192)). The size is the
    first one before the first point, and the last one after the last. Empty: image_size throughout.
    random-resized-crop crops to the size of the step; pad-crop takes a window of that size from the image of
    image_size; none shrinks that image."""
    train_size_curve: Literal["steps", "linear"] = "steps"
    """Between two points: the earlier one's size, or linear, rounded to a multiple of `train_size_multiple`."""
    train_size_multiple: int = Field(default=32, ge=1)
    eval_size: int | None = Field(default=None, ge=1)
    """Height and width in evaluation and of what is predicted. None: image_size. Random crops show objects larger
    than whole images do, so training at 176 suits testing at 224 (arXiv 1906.06423)."""
    channels: Literal[1, 3] = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Per channel, of pixels scaled to 0..1."""

    global_batch_size: int = Field(ge=1)
    """Samples per optimizer step, over all ranks."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Samples per forward pass. Set, it fixes what batch norm sees, and any number of ranks draws the same
    curve. None: all that a rank has of a step, so batch norm changes with the number of ranks."""
    lanes: int = Field(default=8, ge=1)
    """Contiguous parts of an epoch. Each is read by one rank: ranks must divide lanes."""
    window: int = Field(default=4096, ge=1)
    """Samples over which a lane is shuffled."""
    repeats: int = Field(default=1, ge=1)
    """Repeated augmentation (arXiv 1901.09335): how often each sample is in its global batch, every copy augmented
    in its own way. An epoch is all samples times `repeats`, so torchvision's 600 epochs with `--ra-reps 4`, whose
    epochs draw as many images as there are, are train.length="150 epochs" with repeats=4. The copies are on one
    rank and in one micro-batch, which decodes each image once; torchvision's are on different ranks."""

    crop: Literal["none", "pad-crop", "random-resized-crop"] = "none"
    """none: the middle, as in evaluation. pad-crop: the middle, shifted by up to `pad` pixels over black.
    random-resized-crop: 8 to 100 % of the area (arXiv 1409.4842)."""
    pad: int = Field(default=4, ge=0)
    flip: Literal[False, True, "alternate"] = False
    """Mirror a random half of the images; alternate: each image every second time that it is seen, the first by
    chance (arXiv 2404.00498)."""
    policy: Literal["none", "rand-augment", "trivial-augment"] = "none"
    """RandAugment (arXiv 1909.13719) with `policy_ops` and `policy_magnitude`; TrivialAugment (2103.10158)."""
    policy_ops: int = Field(default=2, ge=1, le=8)
    policy_magnitude: int = Field(default=9, ge=0, le=30)
    color_jitter: float = Field(default=0.0, ge=0, le=1)
    """Brightness, contrast and saturation change by a factor from 1 - this to 1 + this."""
    erase: float = Field(default=0.0, ge=0, le=1)
    """Probability that a rectangle is painted over with the mean color (arXiv 1708.04896)."""
    mixup: float = Field(default=0.0, ge=0)
    """alpha of mixup (arXiv 1710.09412); with `cutmix` too, each micro-batch gets one of them."""
    cutmix: float = Field(default=0.0, ge=0)
    """alpha of CutMix (arXiv 1905.04899)."""
    eval_crop: float = Field(default=1.0, gt=0, le=1)
    """Share of an image's short side that evaluation sees: 0.875 is 224 of 256."""
    eval_flip: bool = False
    """Average the logits of each image and of its mirror image in evaluation, which costs two forward passes."""

    cache: Literal["none", "ram", "device"] = "none"
    """ram, device: decode every image once, keep all as uint8 in each rank's memory or on its device."""
    loader_workers: int | None = Field(default=None, ge=1)
    """Decoding threads of one rank. None: as many as the rank has CPU threads; one for images of a few KiB."""
    prefetch_batches: int = Field(default=2, ge=1)
    prefetch_bytes: int = Field(default=2**30, ge=1)
    """Decoded batches in flight take no more than this, or one batch. At most as many as `prefetch_batches`."""
    max_bad_fraction: float = Field(default=0.001, ge=0, le=1)
    """Share of samples that may fail to decode before the run stops."""
    shard_cache: str = "~/.cache/resnet-dist/shards"
    """Folder of a node, shared by its ranks, where remote and compressed shards are kept."""
    shard_cache_bytes: int = Field(default=200 * 2**30, ge=1)
    fetch_timeout_seconds: float = Field(default=600.0, gt=0)
    """How long a shard is tried again without a byte of progress before the run ends."""
    allow_commands: bool = False
    """Whether a shard may be a command (`pipe:…`) that is run in a shell."""

    @property
    def micro_batches(self) -> int | None:
        """Micro-batches in a global batch, where the recipe fixes their size."""
        return self.micro_batch_size and self.global_batch_size // self.micro_batch_size

    @property
    def evaluation_size(self) -> int:
        """Height and width of images in evaluation and prediction."""
        return self.eval_size or self.image_size

    @property
    def smallest_training_size(self) -> int:
        return min((size for _, size in self.train_sizes), default=self.image_size)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(
                f"mean={self.mean} and std={self.std} need {self.channels} value(s) each, one per channel"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std={self.std} must be greater than zero in every channel")
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
        refuse_unread(self, "crop", _CROPS_THAT_READ)
        refuse_unread(self, "policy", _POLICIES_THAT_READ)
        refuse_without(self, "train_sizes", ("train_size_curve",))
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
        if (self.mixup or self.cutmix) and min(self.micro_batch_size or 2, self.global_batch_size) < 2:
            raise ValueError(
                f"mixup={self.mixup} and cutmix={self.cutmix} mix the images of a micro-batch, which has one "
                f"(micro_batch_size={self.micro_batch_size}, global_batch_size={self.global_batch_size}); use 2 or more"
            )
        self._check_sizes()
        self._check_repeats()
        if self.micro_batches and self.lanes % self.micro_batches:
            fitting = [self.global_batch_size // d for d in reversed(divisors(self.lanes))]
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} cuts a step into {self.micro_batches} "
                f"micro-batches, which does not divide lanes={self.lanes}; use one of {fitting}"
            )
        return self

    def _check_sizes(self) -> None:
        sizes = [size for _, size in self.train_sizes]
        if max(sizes, default=0) > self.image_size:
            raise ValueError(
                f"train_sizes goes to {max(sizes)}, but image_size={self.image_size} is the largest; raise image_size"
            )
        uneven = [size for size in sizes if size % self.train_size_multiple]
        if self.train_size_curve == "linear" and uneven:
            raise ValueError(
                f"train_sizes has {uneven[0]}, which is not a multiple of train_size_multiple="
                f"{self.train_size_multiple}; change one of them, or use train_size_curve='steps'"
            )

    def _check_repeats(self) -> None:
        per_lane = self.global_batch_size // self.lanes
        if per_lane % self.repeats:
            raise ValueError(
                f"repeats={self.repeats} does not divide the {per_lane} samples that global_batch_size="
                f"{self.global_batch_size} takes from each of lanes={self.lanes}; use one of {divisors(per_lane)}, "
                "or fewer lanes"
            )
        if self.repeats > 1 and (self.mixup or self.cutmix) and per_lane == self.repeats:
            raise ValueError(
                f"repeats={self.repeats} with mixup={self.mixup} and cutmix={self.cutmix} would mix an image with "
                f"itself, as global_batch_size={self.global_batch_size} takes one from each of lanes={self.lanes}; "
                "use fewer lanes"
            )


def check_world_size(data: Data, world_size: int) -> None:
    """Raise RecipeError, naming the numbers of ranks that work, unless `world_size` ranks share a step."""
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


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
