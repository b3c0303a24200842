"""The prediction for every sample of an evaluation, from which figures are made.

During the evaluation everything stays on the device: no batch waits for the host, and no collective is added. At the
end all ranks exchange some 30 bytes a sample, and then the images of the worst ones, of which each rank has kept a few.

Shapes: B samples of a forward pass, N samples, K worst ones; S image size, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save
from torch import Tensor

from resnet_dist.config import Train
from resnet_dist.world import World

MAX_WORST = 36  # images
MAX_SAMPLES = 2_000_000  # of a set whose predictions are kept: 60 MB
LABEL, PREDICTION, PROBABILITY, LABEL_PROBABILITY, WEIGHT = range(5)  # places in a row
TOP = 5  # classes that are ranked for the metrics of an evaluation
RIGHT = 2.0  # beyond any probability: a sample that is no candidate for the worst ones


@dataclass(frozen=True)
class Predictions:
    """The predictions for all samples of a set that could be decoded, in the order of their ids.

    Probabilities are those of a softmax, also where a model was trained with another loss.
    """

    ids_N: NDArray[np.int64]
    labels_N: NDArray[np.int32]
    predictions_N: NDArray[np.int32]
    probabilities_N: NDArray[np.float32]  # of the predicted class
    label_probabilities_N: NDArray[np.float32]
    worst_K: NDArray[np.int64]  # places of the samples that are most surely wrong, worst first
    images_KSSC: NDArray[np.uint8]  # of these

    def to_bytes(self) -> bytes:
        """Return all arrays as a safetensors file."""
        return bytes(save({name: np.ascontiguousarray(value) for name, value in vars(self).items()}))

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Return what `to_bytes` has written. Raises an Exception of safetensors or a TypeError where it is damaged."""
        return cls(**load(content))


class PredictionLog:
    """Collects the predictions of this rank in an evaluation; `gather` brings those of all ranks together."""

    def __init__(self) -> None:
        self._ids: list[NDArray[np.int64]] = []
        self._rows: list[Tensor] = []
        self._num_rows = 0
        # Probabilities of the labels, ids, places in the rows, images.
        self._worst: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def add(
        self,
        logits: Tensor,
        labels_B: Tensor,
        weights_B: Tensor,
        ids_B: NDArray[np.int64],
        images_BSSC: Tensor,
    ) -> None:
        """Add a forward pass. logits: (B, classes), float32. weights_B: 0 for padding and bad samples."""
        probabilities = logits.softmax(dim=1)
        # As the metrics rank them: of equal logits, another call may choose another class.
        predicted_B = logits.topk(min(TOP, logits.shape[1]), dim=1).indices[:, 0]
        highest_B, own_B = (probabilities.gather(1, one[:, None])[:, 0] for one in (predicted_B, labels_B))
        columns = (labels_B, predicted_B, highest_B, own_B, weights_B)
        self._rows.append(torch.stack([column.float() for column in columns]))
        self._ids.append(ids_B)
        is_wrong_B = (weights_B > 0) & (predicted_B != labels_B)
        self._keep_worst(torch.where(is_wrong_B, own_B, RIGHT), ids_B, images_BSSC)
        self._num_rows += len(ids_B)

    def _keep_worst(self, own_B: Tensor, ids_B: NDArray[np.int64], images_BSSC: Tensor) -> None:
        """Keep copies of the worst images so far: the batch's own memory is used again."""
        ids = torch.from_numpy(np.ascontiguousarray(ids_B)).to(own_B.device, non_blocking=True)
        rows = _lowest(own_B, ids)
        found = (own_B[rows], ids[rows], rows + self._num_rows, images_BSSC[rows])
        if self._worst is not None:
            both = [torch.cat(pair) for pair in zip(self._worst, found, strict=True)]
            keep = _lowest(both[0], both[1])
            found = tuple(part[keep] for part in both)  # type: ignore[assignment]
        self._worst = found

    def gather(self, world: World) -> Predictions:
        """Return the predictions of all ranks, on every rank. A collective, of all ranks that have added a batch."""
        assert self._worst is not None
        ids, table = np.concatenate(self._ids), torch.cat(self._rows, dim=1).cpu().numpy()
        own, _, rows, images = (part.cpu().numpy() for part in self._worst)
        is_used = table[WEIGHT] > 0
        is_wrong = own < RIGHT
        candidates = dict(zip(ids[rows[is_wrong]].tolist(), images[is_wrong], strict=True))
        scored = list(zip(own[is_wrong].tolist(), candidates, strict=True))
        everyone = world.gather((ids[is_used], table[:WEIGHT, is_used], scored))
        worst = [one for _, one in sorted(pair for _, _, pairs in everyone for pair in pairs)][:MAX_WORST]
        mine = {number: image for number, image in candidates.items() if number in worst}
        found = {number: image for part in world.gather(mine) for number, image in part.items()}
        shape = (0, *images.shape[1:])
        return _in_order(
            np.concatenate([part for part, _, _ in everyone]),
            np.concatenate([part for _, part, _ in everyone], axis=1),
            worst,
            np.stack([found[number] for number in worst]) if worst else np.zeros(shape, np.uint8),
        )


def log_for_figures(
    train: Train, num_samples: int, report: Callable[[str], None], *, is_last: bool
) -> PredictionLog | None:
    """Return the log of an evaluation of which the recipe wants figures; None for any other, as on all ranks.

    is_last: no step of the run follows. report: gets the line about a set that is too large for figures.
    """
    if not (train.figures == "evaluations" or (train.figures == "end" and is_last)):
        return None
    if num_samples > MAX_SAMPLES:
        report(f"no figures of an evaluation with {num_samples:,} samples: at most {MAX_SAMPLES:,} are kept")
        return None
    return PredictionLog()


def _lowest(own: Tensor, ids: Tensor) -> Tensor:
    """Return the places of the MAX_WORST lowest probabilities; of equal ones, of the lowest ids, on every device."""
    by_id = ids.argsort(stable=True)
    return by_id[own[by_id].argsort(stable=True)][:MAX_WORST]


def joined(parts: Sequence[Predictions]) -> Predictions:
    """Return the predictions of parts of a set as those of the whole."""
    ids = np.concatenate([part.ids_N for part in parts])
    names = ("labels_N", "predictions_N", "probabilities_N", "label_probabilities_N")
    rows = np.stack([np.concatenate([getattr(part, name) for part in parts]) for name in names])
    candidates = [
        (float(part.label_probabilities_N[place]), int(part.ids_N[place]), image)
        for part in parts
        for place, image in zip(part.worst_K.tolist(), part.images_KSSC, strict=True)
    ]
    worst = sorted(candidates, key=lambda one: one[:2])[:MAX_WORST]
    images = np.stack([image for *_, image in worst]) if worst else parts[0].images_KSSC
    return _in_order(ids, rows.astype(np.float32), [number for _, number, _ in worst], images)


def _in_order(
    ids_N: NDArray[np.int64], rows: NDArray[np.float32], worst: Sequence[int], images: NDArray[np.uint8]
) -> Predictions:
    order = ids_N.argsort()
    ids_N, rows = ids_N[order], rows[:, order]
    return Predictions(
        ids_N,
        rows[LABEL].astype(np.int32),
        rows[PREDICTION].astype(np.int32),
        rows[PROBABILITY],
        rows[LABEL_PROBABILITY],
        np.searchsorted(ids_N, np.array(worst, np.int64)).astype(np.int64),
        images,
    )
