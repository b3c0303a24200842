"""The model of a recipe: the network, its variants, and its initial weights."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from resnet_dist.config.part import Part


class Model(Part):
    """The network, its variants, and its initial weights. A variant that a network lacks is refused."""

    name: str = "resnet20"
    """A network of the table in resnet_dist/model/table.py, such as resnet20, resnet50 or wrn16_4."""
    shortcut: Literal["projection", "pool-projection", "zero-pad", "none"] = "projection"
    """Skip connections. projection: a 1x1 convolution where the shape changes (option B). pool-projection:
    the same behind a 2x2 average (the -D nets). zero-pad: no parameters (option A). none: the plain net,
    without skip connections."""
    stem: Literal["auto", "cifar", "imagenet", "deep"] = "auto"
    """First layers. auto: those of the network's paper. cifar: one 3x3 convolution. imagenet: a 7x7
    convolution and a max-pool, each of which halves the size. deep: three 3x3 convolutions in place of the
    7x7 (arXiv 1812.01187)."""
    zero_init: bool = False
    """Start every block as the identity: the scale of its last norm is zero (arXiv 1706.02677, section 5.1);
    in nets with pre-activation, its last convolution is zero."""
    se: bool = False
    """Squeeze-and-excitation in every block (arXiv 1709.01507)."""
    blurpool: bool = False
    """Blur before the strided convolutions of blocks (arXiv 1904.11486)."""
    stochastic_depth: float = Field(default=0.0, ge=0, lt=1)
    """Probability that a training step drops the last block for a sample; it decreases linearly towards the
    first block (arXiv 1603.09382)."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Term that batch norms add to the variance: 1e-12 in airbench94."""
    whitening: Literal["covariance", "second-moment"] = "covariance"
    """What the filters of resnet9_fast's first layer are computed from, over the 2x2 patches of 5,000 images.
    second-moment: their mean is not subtracted, as in airbench94."""
    init_from: str | None = None
    """Initial weights: a .pth, .pt or .safetensors file, a checkpoint or run folder, or a name of torchvision
    such as torchvision:resnet50.IMAGENET1K_V2. Layers that do not fit keep their random values, such as the
    last one where the classes differ. None: random weights."""

    def options(self) -> dict[str, Any]:
        """Return all fields but the initial weights, as `build_model` takes them."""
        return self.model_dump(exclude={"init_from"})
