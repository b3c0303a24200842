"""The images of an evaluation under corruptions, and the table of their accuracies.

Shapes: B samples of a forward pass, S image size, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resnet_dist.data.batches.decode_threads import start_threads
from resnet_dist.data.images.corruptions.table import CORRUPTIONS, SEVERITIES, corrupt
from resnet_dist.order.samples import PADDING
from resnet_dist.train.evaluate import View


class Condition(NamedTuple):
    """A corruption at a severity."""

    corruption: str
    severity: int


ALL_CONDITIONS = tuple(Condition(name, severity) for name in CORRUPTIONS for severity in SEVERITIES)


@contextmanager
def views(conditions: Sequence[Condition], num_threads: int) -> Iterator[list[View]]:
    """Yield a view for each condition, computed by threads of a pool."""
    if not conditions:
        yield []
        return
    pool = start_threads(num_threads)
    try:
        yield [partial(_corrupted, pool, condition) for condition in conditions]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _corrupted(
    pool: ThreadPoolExecutor, condition: Condition, images_BSSC: Tensor, ids_B: NDArray[np.int64]
) -> Tensor:
    """Return the images under a corruption, on the device on which they are."""
    pixels_BSSC = images_BSSC.cpu().numpy()

    def one(row: int) -> NDArray[np.uint8]:
        pixels: NDArray[np.uint8] = pixels_BSSC[row]
        return pixels if ids_B[row] == PADDING else corrupt(pixels, int(ids_B[row]), *condition)

    rows = np.stack(list(pool.map(one, range(len(ids_B)))))
    return torch.from_numpy(rows).to(images_BSSC.device)


def robust_metrics(top1: Mapping[Condition, float]) -> dict[str, float]:
    """Return the mean accuracy of each corruption over its severities, and the mean of these means."""
    names = dict.fromkeys(condition.corruption for condition in top1)
    means = {
        name: float(np.mean([value for condition, value in top1.items() if condition.corruption == name]))
        for name in names
    }
    return {f"robust/{name}": mean for name, mean in means.items()} | {
        "robust/mean": float(np.mean(list(means.values())))
    }


def robust_table(top1: Mapping[Condition, float]) -> str:
    """Return the accuracies as lines: a row for each corruption, a column for each severity, and the means."""
    means = robust_metrics(top1)
    severities = sorted({condition.severity for condition in top1})
    lines = [f"{'top-1':<17}" + "".join(f"{severity:>8}" for severity in severities) + f"{'mean':>8}"]
    for name in dict.fromkeys(condition.corruption for condition in top1):
        cells = [f"{top1[Condition(name, severity)]:8.2%}" for severity in severities]
        lines.append(f"{name.replace('_', ' '):<17}{''.join(cells)}{means[f'robust/{name}']:8.2%}")
    lines.append(f"{'mean':<17}{'':>{8 * len(severities)}}{means['robust/mean']:8.2%}")
    return "\n".join(lines)
