"""Fields that another field's value leaves unread, where the recipe is accepted all the same.

Most such values are refused when the recipe is built: see `refuse_unread`. These were accepted by version 0.3.0, whose
runs and models must load, so they are reported before a run begins.
"""

from __future__ import annotations

from collections.abc import Iterator

from resnet_dist.config.part import Part
from resnet_dist.config.recipe import Recipe

# Part, field, the field that decides, and its values that read the first one.
_READERS = (
    ("optim", "sgd_momentum", "optimizer", ("muon",)),
    ("train", "bce_target_threshold", "loss", ("bce",)),
    ("data", "train_size_multiple", "train_size_curve", ("linear",)),
)


def unread_fields(recipe: Recipe) -> Iterator[str]:
    """Yield a sentence for each field that is not at its default and that nothing reads."""
    for part_name, name, choice, readers in _READERS:
        part: Part = getattr(recipe, part_name)
        value, chosen = getattr(part, name), getattr(part, choice)
        if chosen not in readers and value != type(part).model_fields[name].default:
            yield (
                f"{part_name}.{name}={value!r} is not read with {part_name}.{choice}={chosen!r}, only with "
                f"{' or '.join(repr(other) for other in readers)}"
            )
