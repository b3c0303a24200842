"""Reading: where the training and the evaluation set lie, and how samples are read, decoded and kept."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from resnet_dist.config.part import Part

Cache = Literal["none", "ram", "device"]
MAX_PIXELS = 80_000_000


class Reading(Part):
    """Where the sets lie, and how samples are read, decoded and kept."""

    train: str
    """The training set: a folder or URL (https, s3, gs, hf, …) with an index.json, or the URL of the index
    itself. `{output}` is replaced by the output folder."""
    eval: str
    """The held-out set, in the same form as `train`. Both must have the same classes."""
    source: str | None = None
    """Data set or image folder from which missing shards are written: a SOURCE of `resnet-dist prepare`. With
    it, `train` and `eval` must be the folders train/ and eval/ of one folder. None: the shards must exist."""

    cache: Cache = "none"
    """ram, device: decode every image once and keep all of them, as uint8, in the memory of each rank or on
    its device. Not with random-resized-crop; device also not with `policy` or `color_jitter`."""
    decode: Literal["cpu", "gpu"] = "cpu"
    """Where JPEGs are decoded and resized. gpu: by nvJPEG, which needs CUDA; samples and boxes are the same, pixels
    differ by rounding. An image that it cannot decode is decoded on the CPU and counted. Not with a `cache`,
    `policy` or `color_jitter`, nor grey images."""
    loader_workers: int | None = Field(default=None, ge=1)
    """Decoding threads per rank. None: one per CPU thread of the rank, but one for images of a few KiB."""
    prefetch_batches: int = Field(default=2, ge=1)
    """Maximum number of batches that a rank decodes ahead of use."""
    prefetch_bytes: int = Field(default=2**30, ge=1)
    """Maximum number of bytes of decoded batches per rank; lowers `prefetch_batches`, down to one batch."""
    max_bad_fraction: float = Field(default=0.001, ge=0, le=1)
    """Share of samples that may fail to decode before the run ends with an error."""
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)
    """Maximum number of pixels of an image; a larger one is a bad sample, as a small file can claim any size.
    Decoding takes 3 bytes of memory per pixel, of formats other than JPEG up to 10. A baseline JPEG may be
    larger where its crops are so large that they are decoded at 1/2, 1/4 or 1/8 of the scale."""
    shard_cache: str = "~/.cache/resnet-dist/shards"
    """Folder on each node, shared by its ranks, for remote and compressed shards."""
    shard_cache_bytes: int = Field(default=200 * 2**30, ge=1)
    """Maximum number of bytes in `shard_cache`."""
    fetch_timeout_seconds: float = Field(default=600.0, gt=0)
    """Seconds without a byte of progress after which a shard is no longer retried and the run ends."""
    allow_commands: bool = False
    """Allow shards that are commands (`pipe:…`), which run in a shell."""
