"""Copies of batches to a rank's device: one ahead of its use, beside the step under way, and without a wait."""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

import torch

from resnet_dist.data.batches.resident import Samples

Begun = tuple[Samples, Any]  # the samples on the device, and the event that ends their copy


class Copies(Protocol):
    """Brings batches to a device."""

    def begin(self, samples: Samples) -> Begun:
        """Begin to copy samples, whose memory may be reused by others as soon as nobody holds it."""
        ...

    def end(self, begun: Begun) -> Samples:
        """Return the samples on the device, for work that is submitted from now on."""
        ...


def copies_to(device: torch.device) -> Copies:
    return CudaCopies(device) if device.type == "cuda" else NoCopies()


class NoCopies:
    """Leaves batches where they are: on the CPU."""

    def begin(self, samples: Samples) -> Begun:
        return samples, None

    def end(self, begun: Begun) -> Samples:
        return begun[0]


class CudaCopies:
    """Copies from pinned memory on a stream of its own; neither the host nor the computing stream waits for the bus."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        # Batches whose copy may still read them: hold them, or the loader would decode others into their memory.
        self._sources: deque[tuple[Any, Samples]] = deque()

    def begin(self, samples: Samples) -> Begun:
        with torch.cuda.stream(self._stream):
            copied = samples.to(self._device)
        copied_event = self._stream.record_event()
        while self._sources and self._sources[0][0].query():
            self._sources.popleft()
        self._sources.append((copied_event, samples))
        return copied, copied_event

    def end(self, begun: Begun) -> Samples:
        copied, copied_event = begun
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(copied_event)
        for tensor in copied.tensors:
            # The allocator knows the copying stream alone: it would give the memory away while a step reads it.
            tensor.record_stream(computing)
        return copied
