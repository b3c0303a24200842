"""Which network, and what its weights begin as."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from resnet_dist.config.part import Part


class Model(Part):
    """Which network; the names are the table in model/table.py, which also says what does not go together."""

    name: str = "resnet20"
    shortcut: Literal["projection", "pool-projection", "zero-pad", "none"] = "projection"
    """projection: 1x1 convolution where the shape changes (option B). pool-projection: the same behind a 2x2
    average (the -D nets). zero-pad: no parameters (option A). none: the plain net, without skip connections."""
    stem: Literal["auto", "cifar", "imagenet", "deep"] = "auto"
    """auto: as the name's paper has it. cifar: one 3x3 convolution. imagenet: a 7x7 that halves, and a max-pool
    that halves again. deep: three 3x3 in place of the 7x7 (arXiv 1812.01187)."""
    zero_init: bool = False
    """Every block begins as the identity: its last norm has scale zero (arXiv 1706.02677, section 5.1); in nets
    with pre-activation, its last convolution is zero."""
    se: bool = False
    """Squeeze-and-excitation in every block (arXiv 1709.01507)."""
    blurpool: bool = False
    """Blur before the strided convolutions of blocks (arXiv 1904.11486)."""
    stochastic_depth: float = Field(default=0.0, ge=0, lt=1)
    """Probability that a training step drops the last block for a sample; earlier blocks linearly less (arXiv
    1603.09382)."""
    init_from: str | None = None
    """Weights to begin with: a .pth, .pt or .safetensors file, a checkpoint or run folder, or
    torchvision:resnet50.IMAGENET1K_V2. What does not fit keeps its random values, such as the last layer where
    the classes are others."""

    def options(self) -> dict[str, Any]:
        """What `build_model` takes: all but where the weights come from."""
        return self.model_dump(exclude={"init_from"})
