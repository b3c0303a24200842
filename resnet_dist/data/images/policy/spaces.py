"""The operations that each policy chooses from, and their strengths at the levels 0 and 30."""

from __future__ import annotations

from dataclasses import dataclass

BINS = 31  # levels of strength, 0 to 30, as in the papers


@dataclass(frozen=True)
class Op:
    """An operation, and its strength at level 0 and at level 30; a `signed` one may be negated."""

    name: str
    low: float = 0.0
    high: float = 0.0
    signed: bool = False
    whole: bool = False  # The strength differs from `low` by an integer, rounded towards zero.

    def strength(self, level: float, *, negative: bool) -> float:
        """Return the strength at `level`, 0 to 30; `negative` negates that of a signed operation."""
        change = (self.high - self.low) * level / (BINS - 1)
        strength = self.low + (int(change) if self.whole else change)
        return -strength if self.signed and negative else strength


Space = tuple[Op, ...]


def _space(
    *, shear: float, translate: float, rotate: float, change: float, posterize: float, pixels: bool = False
) -> Space:
    """Return the operations of both papers, which differ only in the largest strengths.

    pixels: `translate` is in pixels, instead of a share of the image.
    """
    unit = "pixels_" if pixels else ""
    moves = {
        "shear_x": shear,
        "shear_y": shear,
        f"translate_{unit}x": translate,
        f"translate_{unit}y": translate,
    }
    changes = dict.fromkeys(("brightness", "color", "contrast", "sharpness"), change)
    return (
        Op("identity"),
        *(Op(name, 0, high, signed=True) for name, high in (moves | {"rotate": rotate} | changes).items()),
        Op("posterize", 8, posterize),
        Op("solarize", 255, 0),
        Op("autocontrast"),
        Op("equalize"),
    )


# Strengths are those of torchvision's RandAugment and TrivialAugmentWide. TrivialAugmentWide moves images of every size
# by up to 32 pixels; TRIVIAL_AUGMENT scales that with the image, from the 224 pixels that it was made for.
RAND_AUGMENT = _space(shear=0.3, translate=150 / 331, rotate=30, change=0.9, posterize=4)
TRIVIAL_AUGMENT = _space(shear=0.99, translate=32 / 224, rotate=135, change=0.99, posterize=2)
TRIVIAL_AUGMENT_PIXELS = _space(shear=0.99, translate=32, rotate=135, change=0.99, posterize=2, pixels=True)

# timm's "increasing" operations, in its order: all of them change the image more at a higher level.
TIMM_RAND_AUGMENT: Space = (
    Op("autocontrast"),
    Op("equalize"),
    Op("invert"),
    Op("rotate", 0, 30, signed=True),
    Op("posterize", 4, 0, whole=True),
    Op("solarize", 256, 0, whole=True),
    Op("solarize_add", 0, 110, whole=True),
    *(Op(name, 0, 0.9, signed=True) for name in ("color", "contrast", "brightness", "sharpness")),
    Op("shear_x", 0, 0.3, signed=True),
    Op("shear_y", 0, 0.3, signed=True),
    Op("translate_part_x", 0, 0.45, signed=True),
    Op("translate_part_y", 0, 0.45, signed=True),
)
