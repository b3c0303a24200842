"""The data of a recipe: the shards, the order of samples, and the way from bytes to pixels."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from resnet_dist.config.lengths import Length
from resnet_dist.config.part import Part, refuse_unread, refuse_without
from resnet_dist.errors import RecipeError

Crop = Literal["none", "pad-crop", "random-resized-crop"]
Cache = Literal["none", "ram", "device"]
MAX_PIXELS = 80_000_000

PixelSize = Annotated[int, Field(ge=1)]

# Fields that only some choices read. A value that nothing reads is a mistake, not a preference.
_CROPS_THAT_READ = {"pad": ("pad-crop",), "pad_fill": ("pad-crop",), "resize": ("random-resized-crop",)}
_RAND, _TRIVIAL = ("rand-augment",), ("trivial-augment",)
_POLICIES_THAT_READ = {
    "policy_ops": _RAND,
    "policy_magnitude": _RAND,
    "policy_space": _RAND,
    "policy_probability": _RAND,
    "policy_noise": _RAND,
    "policy_translation": _TRIVIAL,
    "policy_backend": _RAND + _TRIVIAL,
}
_BACKENDS_THAT_READ = {
    "policy_space": ("pillow",),
    "policy_interpolation": ("pillow",),
    "policy_fill": ("pillow",),
}


class Data(Part):
    """The shards, the order of samples, and the way from bytes to pixels."""

    train: str
    """The training set: a folder or URL (https, s3, gs, hf, …) with an index.json, or the URL of the index
    itself. `{output}` is replaced by the output folder."""
    eval: str
    """The held-out set, in the same form as `train`. Both must have the same classes."""
    source: str | None = None
    """Data set or image folder from which missing shards are written: a SOURCE of `resnet-dist prepare`. With
    it, `train` and `eval` must be the folders train/ and eval/ of one folder. None: the shards must exist."""

    image_size: int = Field(ge=1)
    """Height and width, in pixels, of the images that the model gets. No `train_sizes` may be larger."""
    train_sizes: tuple[tuple[Length, PixelSize], ...] = ()
    """Progressive resizing: points (length, pixels), such as (("0 epochs", 160), ("13 epochs", 192)). Before
    the first point its size holds, after the last point its size. Empty: `image_size` throughout.
    random-resized-crop crops to the size of the step, pad-crop takes a window of that size from the image of
    `image_size`, none shrinks that image."""
    train_size_curve: Literal["steps", "linear"] = "steps"
    """Size between two points of `train_sizes`. steps: that of the earlier point. linear: interpolated and
    rounded to a multiple of `train_size_multiple`."""
    train_size_multiple: int = Field(default=32, ge=1)
    """Pixels. With a linear curve every size is a multiple of it, those in `train_sizes` too."""
    eval_size: int | None = Field(default=None, ge=1)
    """Height and width, in pixels, of images in evaluation and prediction. None: `image_size`. Random crops
    enlarge objects, so training at 176 suits evaluation at 224 (arXiv 1906.06423)."""
    channels: Literal[1, 3] = 3
    """Color channels of an image: 1 is grey, 3 is RGB."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of the pixels, scaled to 0..1, which is subtracted; one value per channel."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of the pixels, scaled to 0..1, a divisor; one value above 0 per channel."""

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

    crop: Crop = "none"
    """none: the middle of the image, as in evaluation. pad-crop: the middle, shifted by up to `pad` pixels
    over black. random-resized-crop: 8 to 100 % of the area (arXiv 1409.4842)."""
    pad: int = Field(default=4, ge=0)
    """Largest shift of pad-crop, in pixels."""
    pad_fill: Literal["black", "reflect"] = "black"
    """Pixels around the image in pad-crop. reflect: the mirror image at each edge, as CIFAR speed recipes have."""
    resize: Literal["bilinear", "bicubic", "random"] = "bilinear"
    """Interpolation of random-resized-crop, always antialiased. random: bilinear or bicubic for each image, as
    in timm."""
    flip: Literal[False, True, "alternate"] = False
    """True: mirror a random half of the images. alternate: mirror each image every second time that it is
    drawn, the first time at random (arXiv 2404.00498)."""
    policy: Literal["none", "rand-augment", "trivial-augment"] = "none"
    """rand-augment: RandAugment (arXiv 1909.13719) with `policy_ops` and `policy_magnitude`. trivial-augment:
    TrivialAugment (arXiv 2103.10158)."""
    policy_ops: int = Field(default=2, ge=1, le=8)
    """Operations that RandAugment applies to each image."""
    policy_magnitude: int = Field(default=9, ge=0, le=30)
    """Strength of RandAugment's operations, on its scale of 0 to 30. timm's scale goes to 10: its 6 is 18."""
    policy_space: Literal["torchvision", "timm"] = "torchvision"
    """RandAugment's operations and their largest strengths. torchvision: 14, of which one is the identity.
    timm: the 15 of its "increasing" set, with invert and solarize-add."""
    policy_probability: float = Field(default=1.0, gt=0, le=1)
    """Probability with which RandAugment applies each chosen operation; 0.5 in timm."""
    policy_noise: float = Field(default=0.0, ge=0, le=30)
    """Standard deviation of the strength of each operation of RandAugment around `policy_magnitude`, on the
    same scale: timm's `mstd0.5` is 1.5."""
    policy_translation: Literal["share", "pixels"] = "share"
    """TrivialAugment's largest translation. share: 32/224 of the image. pixels: 32 pixels at any image size, as
    in torchvision."""
    policy_backend: Literal["tensor", "pillow"] = "tensor"
    """Library of the policy's operations. pillow: Pillow, as torchvision's and timm's training used. tensor:
    torchvision's operations on tensors, whose results differ by rounding."""
    policy_interpolation: Literal["nearest", "bilinear", "random"] = "nearest"
    """Interpolation where the policy shears, moves or rotates; all but nearest need pillow. random: bilinear or
    bicubic for each operation, as in timm."""
    policy_fill: Literal["black", "mean"] = "black"
    """Color of what the policy moves into view. mean: the color `mean`, which needs pillow."""
    color_jitter: float = Field(default=0.0, ge=0, le=1)
    """Range x of random changes: brightness, contrast and saturation are scaled by factors in 1 - x .. 1 + x."""
    erase: float = Field(default=0.0, ge=0, le=1)
    """Probability that a rectangle is filled with the mean color (arXiv 1708.04896)."""
    mixup: float = Field(default=0.0, ge=0)
    """alpha of mixup (arXiv 1710.09412), 0 for none. With `cutmix` too, each micro-batch gets one of them."""
    cutmix: float = Field(default=0.0, ge=0)
    """alpha of CutMix (arXiv 1905.04899), 0 for none."""
    eval_crop: float = Field(default=1.0, gt=0, le=1)
    """Share of an image's short side that evaluation sees: 0.875 is 224 of 256 pixels."""
    eval_resize: Literal["bilinear", "bicubic"] = "bilinear"
    """Interpolation, always antialiased, where the middle of an image is resized: in evaluation, and in
    training without random-resized-crop."""
    eval_flip: bool = False
    """Evaluate the mean of the logits of an image and its mirror image, which takes two forward passes."""
    eval_shift: int = Field(default=0, ge=0)
    """Pixels by which an image is shifted down and right, and up and left, over its reflection: half of the mean are
    the logits of the image, a quarter those of each shifted one (arXiv 2404.00498). With `eval_flip` each of the three
    is mirrored too, in six forward passes. It holds for predictions and exports too, as `eval_flip` does. 0: none."""
    eval_confidence: float | None = Field(default=None, gt=0, le=1)
    """Probability from which the answer for an image alone is kept: mirrored and shifted images are evaluated for less
    certain ones only, which takes less time, but not in exported graphs. None: for all images."""

    cache: Cache = "none"
    """ram, device: decode every image once and keep all of them, as uint8, in the memory of each rank or on
    its device. Not with random-resized-crop; device also not with `policy` or `color_jitter`."""
    decode: Literal["cpu", "gpu"] = "cpu"
    """Where JPEGs are decoded and resized. gpu: by nvJPEG, which needs CUDA; samples and boxes are the same, pixels
    differ by rounding. An image that it cannot decode is decoded on the CPU and counted. Not with a `cache`,
    `policy` or `color_jitter`, nor grey images."""
    loader_workers: int | None = Field(default=None, ge=1)
    """Decoding threads per rank. None: one per CPU thread of the rank, but one for images of a few KiB."""
    prefetch_batches: int = Field(default=2, ge=1)
    """Maximum number of batches that a rank decodes ahead of use."""
    prefetch_bytes: int = Field(default=2**30, ge=1)
    """Maximum number of bytes of decoded batches per rank; lowers `prefetch_batches`, down to one batch."""
    max_bad_fraction: float = Field(default=0.001, ge=0, le=1)
    """Share of samples that may fail to decode before the run ends with an error."""
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)
    """Maximum number of pixels of an image; a larger one is a bad sample, as a small file can claim any size.
    Decoding takes 3 bytes of memory per pixel, of formats other than JPEG up to 10. A baseline JPEG may be
    larger where its crops are so large that they are decoded at 1/2, 1/4 or 1/8 of the scale."""
    shard_cache: str = "~/.cache/resnet-dist/shards"
    """Folder on each node, shared by its ranks, for remote and compressed shards."""
    shard_cache_bytes: int = Field(default=200 * 2**30, ge=1)
    """Maximum number of bytes in `shard_cache`."""
    fetch_timeout_seconds: float = Field(default=600.0, gt=0)
    """Seconds without a byte of progress after which a shard is no longer retried and the run ends."""
    allow_commands: bool = False
    """Allow shards that are commands (`pipe:…`), which run in a shell."""

    @property
    def micro_batches(self) -> int | None:
        """Micro-batches in a global batch; None where the recipe does not fix their size."""
        return self.micro_batch_size and self.global_batch_size // self.micro_batch_size

    @property
    def evaluation_size(self) -> int:
        """Height and width of images in evaluation and prediction, in pixels."""
        return self.eval_size or self.image_size

    @property
    def smallest_training_size(self) -> int:
        """Smallest height and width of images in training, in pixels."""
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
        refuse_unread(self, "policy_backend", _BACKENDS_THAT_READ)
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
        if self.pad_fill == "reflect" and self.pad >= self.image_size:
            raise ValueError(
                f"pad={self.pad} with pad_fill='reflect' needs an image of more than {self.pad} pixels, and image_size="
                f"{self.image_size}; use a smaller pad"
            )
        self._check_decode()
        self._check_test_time()
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

    def _check_test_time(self) -> None:
        if self.eval_shift >= self.evaluation_size:
            raise ValueError(
                f"eval_shift={self.eval_shift} needs an image of more than {self.eval_shift} pixels, and "
                f"{'eval_size' if self.eval_size else 'image_size'}={self.evaluation_size}; use a smaller shift, such as 1"
            )
        if self.eval_confidence is not None and not (self.eval_flip or self.eval_shift):
            raise ValueError(
                f"eval_confidence={self.eval_confidence} is not read without eval_flip or eval_shift; leave it out, or "
                "set one of them"
            )

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
        if self.spread_repeats:
            self._check_spread_repeats()
        elif self.repeats > 1 and (self.mixup or self.cutmix) and per_lane == self.repeats:
            raise ValueError(
                f"repeats={self.repeats} with mixup={self.mixup} and cutmix={self.cutmix} would mix an image with "
                f"itself, as global_batch_size={self.global_batch_size} takes one from each of lanes={self.lanes}; "
                "use fewer lanes"
            )

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


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
