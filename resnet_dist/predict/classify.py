"""Images → class names and probabilities, as `evaluate` sees them: the same decoders, view, normalization and model.

Threads read and decode batches ahead of the model, as in the loader.

Shapes: N images of a batch, S image size, C channels, K best classes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import chain, islice

import torch
from torch import Tensor

from resnet_dist.config import Data
from resnet_dist.data.batches.decode_threads import (
    MAX_PIXELS_PER_TASK,
    MAX_SAMPLES_PER_TASK,
    SMALL_SAMPLE_BYTES,
    SMALL_SIZE,
    start_threads,
)
from resnet_dist.data.batches.resident import Buffers
from resnet_dist.data.findings import one_line
from resnet_dist.data.images.augment import normalize
from resnet_dist.data.images.decode import open_image
from resnet_dist.data.images.view import evaluation_view
from resnet_dist.predict.thumbnails import thumbnail
from resnet_dist.predict.unread import Input
from resnet_dist.train.checkpoint.load import TrainedModel
from resnet_dist.train.evaluate import logits_of

MAX_BATCH = 256  # images of a forward pass
BATCHES_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Prediction:
    """The best classes of one input, the most probable first; none where it has a problem."""

    name: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    problem: str | None = None
    thumbnail: tuple[str, ...] = ()  # lines of text; none where nobody asked for them


@dataclass(frozen=True)
class Decoded:
    """A batch of inputs and what evaluation sees of them; the row of an input with a problem is black."""

    inputs: Sequence[Input]
    images_NSSC: Tensor  # uint8
    problems: Sequence[str | None]


def predictions(
    trained: TrainedModel,
    inputs: Iterable[Input],
    device: torch.device,
    top_k: int,
    *,
    thumbnails: bool = False,
) -> Iterator[list[Prediction]]:
    """Yield one prediction for each input, in the same order, a batch at a time.

    An image that cannot be read or decoded becomes a prediction with a problem. Raises what iterating `inputs` raises.
    """
    for batch in decoded_batches(inputs, trained.recipe.data):
        rows = _classified(trained, batch, device, top_k)
        yield list(_with_thumbnails(rows, batch) if thumbnails else rows)


def decoded_batches(inputs: Iterable[Input], data: Data) -> Iterator[Decoded]:
    """Yield the inputs in batches, which threads decode ahead. Raises what iterating `inputs` raises."""
    waiting, inputs = deque[_Pending](), iter(inputs)
    first = next(inputs, None)
    if first is None:
        return
    inputs = chain([first], inputs)
    size = min(data.micro_batch_size or data.global_batch_size, MAX_BATCH)
    # Not torch.zeros: the threads in which torch fills memory then wait busily, and slow decoding.
    buffers = Buffers(BATCHES_AHEAD + 3)
    pool = start_threads(_num_threads(first, data))
    try:
        while True:
            while len(waiting) <= BATCHES_AHEAD and (some := list(islice(inputs, size))):
                images = buffers.take((len(some), *_shape(data)))
                tasks = [pool.submit(_fill, part, data) for part in _parts(some, images)]
                waiting.append(_Pending(some, images, tasks))
            if not waiting:
                return
            yield waiting.popleft().wait()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class _Pending:
    """A batch that threads are decoding. A task returns the problems of its rows."""

    inputs: Sequence[Input]
    images_NSSC: Tensor
    tasks: Sequence[Future[list[str | None]]]

    def wait(self) -> Decoded:
        problems = [problem for task in self.tasks for problem in task.result()]
        return Decoded(self.inputs, self.images_NSSC, problems)


_Part = tuple[Sequence[Input], Tensor]


def _shape(data: Data) -> tuple[int, int, int]:
    return data.evaluation_size, data.evaluation_size, data.channels


def _num_threads(first: Input, data: Data) -> int:
    """Return the number of decoding threads: one for small images, which spend most of their time under the GIL."""
    is_small = (first.num_bytes or SMALL_SAMPLE_BYTES) < SMALL_SAMPLE_BYTES
    return 1 if is_small and data.evaluation_size <= SMALL_SIZE else torch.get_num_threads()


def _parts(inputs: Sequence[Input], images_NSSC: Tensor) -> Iterator[_Part]:
    """Cut a batch into tasks for threads."""
    size = images_NSSC.shape[1]
    num_samples = min(MAX_SAMPLES_PER_TASK, max(1, MAX_PIXELS_PER_TASK // size**2))
    for low in range(0, len(inputs), num_samples):
        rows = slice(low, low + num_samples)
        yield inputs[rows], images_NSSC[rows]


def _fill(part: _Part, data: Data) -> list[str | None]:
    """Read and decode the images of a part into their rows; return the problem of each."""
    inputs, rows = part[0], part[1].numpy()
    problems: list[str | None] = []
    for number, given in enumerate(inputs):
        problem = None
        try:
            image = open_image(given.read(), data.channels, data.max_pixels)
            rows[number] = evaluation_view(image, data)
        except OSError as error:
            problem = one_line(f"cannot be read: {error.strerror or error}")
        except ValueError as error:
            problem = one_line(str(error))
        if problem is not None:
            rows[number] = 0
        problems.append(problem)
    return problems


def _with_thumbnails(rows: Iterable[Prediction], batch: Decoded) -> Iterator[Prediction]:
    for row, pixels in zip(rows, batch.images_NSSC.numpy(), strict=True):
        yield row if row.problem is not None else replace(row, thumbnail=thumbnail(pixels))


def _classified(
    trained: TrainedModel, batch: Decoded, device: torch.device, top_k: int
) -> Iterator[Prediction]:
    data, images = trained.recipe.data, batch.images_NSSC
    if device.type == "cuda":
        images = images.pin_memory().to(device, non_blocking=True)
    with torch.inference_mode():
        logits = logits_of(trained.model, normalize(images, data), data)
        best = logits.float().softmax(dim=1).topk(min(top_k, len(trained.classes)), dim=1)
    rows = zip(batch.inputs, batch.problems, best.values.tolist(), best.indices.tolist(), strict=True)
    for given, problem, values, labels in rows:
        if problem is None:
            names = tuple(trained.classes[label] for label in labels)
            yield Prediction(given.name, names, tuple(values))
        else:
            yield Prediction(given.name, (), (), problem)
