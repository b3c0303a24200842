"""Images: the sizes and values of the images that the network gets, in training and in evaluation."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from resnet_dist.config.lengths import Length
from resnet_dist.config.part import Part, refuse_without

PixelSize = Annotated[int, Field(ge=1)]


class Images(Part):
    """The sizes and values of the images that the network gets."""

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

    @property
    def evaluation_size(self) -> int:
        """Height and width of images in evaluation and prediction, in pixels."""
        return self.eval_size or self.image_size

    @property
    def smallest_training_size(self) -> int:
        """Smallest height and width of images in training, in pixels."""
        return min((size for _, size in self.train_sizes), default=self.image_size)

    @model_validator(mode="after")
    def _check_images(self) -> Self:
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(
                f"mean={self.mean} and std={self.std} need {self.channels} value(s) each, one per channel"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std={self.std} must be greater than zero in every channel")
        refuse_without(self, "train_sizes", ("train_size_curve",))
        self._check_test_time()
        self._check_sizes()
        return self

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
