"""The limit on bad samples, for commands that measure something over a set and end when they have it."""

from __future__ import annotations

from collections.abc import Sequence

from resnet_dist.errors import TooManyBadSamples


def check_bad_fraction(where: str, bad: Sequence[str], num_samples: int, max_bad_fraction: float) -> None:
    """Raise TooManyBadSamples where more than `max_bad_fraction` of `num_samples` are bad.

    where: what the samples are of, for the message. bad: a key and a reason for each bad sample.
    """
    fraction = len(bad) / num_samples if num_samples else 0.0
    if fraction > max_bad_fraction:
        raise TooManyBadSamples(
            f"{where}: {len(bad):,} of {num_samples:,} samples ({fraction:.2%}) are bad, more than "
            f"data.max_bad_fraction={max_bad_fraction} allows; the first is {bad[0]}"
        )
