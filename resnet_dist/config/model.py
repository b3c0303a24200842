"""Which network."""

from __future__ import annotations

from typing import Literal

from resnet_dist.config.part import Part


class Model(Part):
    """Which network; the names are the table in model/resnet.py."""

    name: str = "resnet20"
    shortcut: Literal["projection", "zero-pad", "none"] = "projection"
    """projection: 1x1 convolution where the shape changes (option B). zero-pad: no parameters (option A).
    none: the plain net, without skip connections."""
