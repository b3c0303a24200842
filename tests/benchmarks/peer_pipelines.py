"""Peers of the loader that decode in threads of their own, each with the crop, resizing and mirror of loader_peers.py.

A peer that is not installed is left out. SPDL needs FFmpeg's libraries.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

WORKERS, BATCH, SIZE = 2, 40, 224
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def dali(folder: Path, work: Path, shards: str = "shards") -> Any:
    """DALI's CPU pipeline: it decodes the box of a crop alone, and reads our shards by our own .idx files."""
    from nvidia.dali import fn, pipeline_def, types

    tars = sorted((work / shards / "train").glob("*.tar"))
    total = sum(int(Path(tar).with_suffix(".idx").read_text().split()[1]) for tar in tars)

    @pipeline_def(batch_size=BATCH, num_threads=WORKERS, device_id=None, prefetch_queue_depth=2)  # type: ignore[misc]
    def pipeline() -> Any:
        encoded, labels = fn.readers.webdataset(
            paths=[str(tar) for tar in tars],
            index_paths=[str(tar.with_suffix(".idx")) for tar in tars],
            ext=["jpg;jpeg;JPEG", "cls"],
            random_shuffle=True,
            initial_fill=1000,
        )
        images = fn.decoders.image_random_crop(
            encoded, device="cpu", output_type=types.RGB, random_area=AREA, random_aspect_ratio=RATIO
        )
        images = fn.resize(images, size=(SIZE, SIZE), interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.flip(images, horizontal=fn.random.coin_flip()), labels

    made = pipeline()
    made.build()
    return Steps(lambda: torch.from_numpy(np.array(made.run()[0].as_array())), total // BATCH)


def dali_seekable(folder: Path, work: Path) -> Any:
    return dali(folder, work, "seekable")


class Steps:
    """An epoch of so many calls."""

    def __init__(self, call: Callable[[], torch.Tensor], steps: int) -> None:
        self.call, self.steps = call, steps

    def __iter__(self) -> Iterator[tuple[torch.Tensor]]:
        for _ in range(self.steps):
            yield (self.call(),)


def box_of(height: int, width: int) -> tuple[int, int, int, int]:
    """Return the top, left, height and width of a random crop, as torchvision's RandomResizedCrop draws it."""
    for _ in range(10):
        area = height * width * random.uniform(*AREA)
        ratio = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            return random.randint(0, height - high), random.randint(0, width - wide), high, wide
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def files_of(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.glob("*/*"))]


class Threads:
    """An epoch of shuffled files, decoded by WORKERS threads of SPDL's pipeline."""

    def __init__(self, files: list[str], decode: Callable[[str], torch.Tensor]) -> None:
        self.files, self.decode = files, decode

    def __iter__(self) -> Iterator[tuple[torch.Tensor]]:
        from spdl.pipeline import PipelineBuilder

        files = random.sample(self.files, len(self.files))
        builder = PipelineBuilder().add_source(files).pipe(self.decode, concurrency=WORKERS)
        pipeline = builder.aggregate(BATCH).pipe(torch.stack).add_sink(4).build(num_threads=WORKERS + 1)
        with pipeline.auto_stop():
            for batch in pipeline.get_iterator(timeout=60):
                yield (batch,)


def spdl(folder: Path, work: Path) -> Any:
    """SPDL: FFmpeg decodes, crops, resizes and mirrors, in threads."""
    import spdl.io as io

    def decode(path: str) -> torch.Tensor:
        packets = io.demux_image(path)
        top, left, high, wide = box_of(packets.height, packets.width)
        flip = "hflip," if random.random() < 0.5 else ""
        steps = (
            f"crop={wide}:{high}:{left}:{top},scale={SIZE}:{SIZE}:flags=bilinear,{flip}format=pix_fmts=rgb24"
        )
        frames = io.decode_packets(packets, filter_desc=steps)
        return torch.from_numpy(np.array(io.to_numpy(io.convert_frames(frames)))).reshape(SIZE, SIZE, 3)

    decode(files_of(folder)[0])  # Fails here where FFmpeg is missing.
    return Threads(files_of(folder), decode)


def torchcodec(folder: Path, work: Path) -> Any:
    """TorchCodec decodes whole images, torchvision's v2 crops and resizes them, in SPDL's threads."""
    from torchcodec.decoders import decode_jpeg
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional

    flip = v2.RandomHorizontalFlip()

    def decode(path: str) -> torch.Tensor:
        image = decode_jpeg(
            torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8), mode="RGB"
        )
        box = box_of(*image.shape[1:])
        found: torch.Tensor = flip(functional.resized_crop(image, *box, [SIZE, SIZE], antialias=True))
        return found

    decode(files_of(folder)[0])
    return Threads(files_of(folder), decode)


def grain(folder: Path, work: Path) -> Any:
    """grain with worker processes, and torchvision's transforms on Pillow's images.

    Its processes decode ahead between the rounds: a figure of few images says nothing.
    """
    import grain
    from PIL import Image

    from tests.benchmarks.loader_peers import transform

    change = transform()

    def decode(path: str) -> np.ndarray[Any, Any]:
        with Image.open(path) as image:
            pixels: np.ndarray[Any, Any] = change(image.convert("RGB")).numpy()
            return pixels

    files = files_of(folder)
    dataset = grain.MapDataset.source(files).shuffle(seed=0).repeat().map(decode).batch(BATCH)
    # One iterator for all epochs: its processes stay. By default it would decode hundreds of batches between epochs.
    few = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    options = grain.MultiprocessingOptions(num_workers=WORKERS, per_worker_buffer_size=1)
    batches = iter(dataset.to_iter_dataset(few).mp_prefetch(options))
    return Steps(lambda: torch.from_numpy(next(batches)), len(files) // BATCH)
