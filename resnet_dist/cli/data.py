"""Commands that write shards, index them and verify them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from resnet_dist.cli.options import (
    DEFAULT_SHARD_CACHE,
    FETCH_TIMEOUT_SECONDS,
    RESUMES,
    SHARD_CACHE_BYTES,
    STARTS_OVER,
    err,
    on_interrupt,
    out,
)
from resnet_dist.errors import UserError
from resnet_dist.system.cpus import cpu_count
from resnet_dist.terminal import bars

if TYPE_CHECKING:
    from resnet_dist.data.storage.shard_cache import CacheLimits

# Fewer samples than this are written by one process before others have started.
FEW_SAMPLES = 4096
MAX_LINES_SHOWN = 50  # lines of a report of problems


@on_interrupt(RESUMES)
def prepare(
    source: Annotated[
        str,
        typer.Argument(
            help="digits, cifar10, cifar100, mnist, fashion-mnist, or a folder of images (class = folder)."
        ),
    ],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Gets train/ and eval/.")],
    shards: Annotated[int | None, typer.Option(min=1, help="Tars per split.")] = None,
    shard_size: Annotated[
        int | None, typer.Option(min=1, metavar="BYTES", help="Approximate size of a tar; default: 256 MiB.")
    ] = None,
    resize_short: Annotated[
        int | None,
        typer.Option(min=1, metavar="PIXELS", help="Shrink longer short sides; default: keep the bytes."),
    ] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality of shrunk images.")] = 92,
    split: Annotated[
        Literal["train", "eval"] | None,
        typer.Option(help="Write only this split; a folder without splits goes into it whole."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the shuffle.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one per CPU.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="An unreadable image is an error.")] = False,
) -> None:
    """Write a data set as shuffled WebDataset shards with an index; interrupted, the same command resumes."""
    from resnet_dist.data.prepare.sources import open_source
    from resnet_dist.data.prepare.split import REPORT_NAME
    from resnet_dist.data.prepare.split import prepare as prepare_source
    from resnet_dist.data.prepare.write import SHARD_BYTES, PrepareOptions

    if shards is not None and shard_size is not None:
        raise UserError(
            f"--shards {shards} and --shard-size {shard_size} exclude each other; use one of them"
        )
    options = PrepareOptions(seed, shards, shard_size or SHARD_BYTES, resize_short, quality, strict)
    opened = open_source(source, seed=seed, whole_split=split)
    samples = sum(len(items) for items in opened.splits.values())
    workers = workers or (1 if samples < FEW_SAMPLES else cpu_count())
    chosen = [split] if split else list(opened.splits)
    with bars(out, chosen, "images") as show_progress:
        indexes = prepare_source(
            opened, folder, options, splits=chosen, workers=workers, progress=show_progress
        )
    for name, index in indexes.items():
        out.print(f"{name}: {index.num_samples:,} samples in {len(index.shards)} shards, {index.location}")
        report = folder / name / REPORT_NAME
        if report.exists():
            lines = report.read_text().splitlines()
            err.print(f"{name}: left out {len(lines):,} unreadable images, listed in {report}")


@on_interrupt(STARTS_OVER)
def index(
    shards: Annotated[
        list[str],
        typer.Argument(
            metavar="SHARDS...", help="Tars, a{0..9}.tar, lists with ::, folders, other indexes; URLs."
        ),
    ],
    to: Annotated[
        Path | None, typer.Option("--out", help="Index to write; default: beside the shards.")
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            help="Number of classes, or a file with one name per line; default: as many as the labels need."
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of timm's _info.json to index.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Recompute checksums and decode every image.")
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; default: one per CPU.")] = None,
    allow_commands: Annotated[
        bool, typer.Option("--allow-commands", help="Run shards named pipe:… in a shell.")
    ] = False,
    shard_cache: Annotated[Path, typer.Option(help="Where remote shards are kept.")] = DEFAULT_SHARD_CACHE,
) -> None:
    """Write an index for WebDataset shards of any origin; --verify checks the shards of an index."""
    from resnet_dist.data.shards.index import index_location
    from resnet_dist.data.storage.shard_cache import CacheLimits
    from resnet_dist.data.storage.transfer import exists
    from resnet_dist.data.storage.urls import SHARD_SUFFIXES, path_of

    limits = CacheLimits(shard_cache.expanduser(), SHARD_CACHE_BYTES, FETCH_TIMEOUT_SECONDS, allow_commands)
    workers = workers or cpu_count()
    is_index = len(shards) == 1 and to is None and not path_of(shards[0]).endswith(SHARD_SUFFIXES)
    if verify and is_index and exists(index_location(shards[0])):
        location = shards[0]
    else:
        location = str(_write_index(shards, split, to, classes, limits, workers))
    if verify:
        _verify(location, limits, workers)


def _write_index(
    shards: list[str],
    split: str | None,
    to: Path | None,
    classes: str | None,
    limits: CacheLimits,
    workers: int,
) -> Path:
    """Write an index for the shards, report samples that cannot be used, and return the index's place."""
    from resnet_dist.data.shards.build import build_index, num_compressed
    from resnet_dist.data.shards.names import class_names, default_location, expand
    from resnet_dist.data.storage.urls import without_user

    found = expand(shards, split)
    target = to or default_location(found)
    if target is None:
        raise UserError(
            "--out is missing: these shards are not all in one local folder, where the index goes by default"
        )
    if count := num_compressed(found):
        err.print(
            f"{count} of {len(found)} shards are compressed: nothing inside them can be read by offset, "
            f"so each is unpacked whole into {limits.folder} before its first use"
        )
    with bars(out, ["index"], "shards") as show_progress:
        built, problems = build_index(
            found,
            target,
            limits,
            classes=class_names(classes),
            workers=workers,
            progress=partial(show_progress, "index"),
        )
    out.print(
        f"{built.num_samples:,} samples of {len(built.classes)} classes in {len(built.shards)} shards, {built.location}"
    )
    if any(without_user(shard.url) != shard.url for shard in found):
        err.print(f"{target}: holds no user and password; put them into ~/.netrc, where they are found")
    _report(problems, "samples without a usable image or label")
    return target


def _verify(location: str, limits: CacheLimits, workers: int) -> None:
    """Check the shards of an index, report what is wrong, and exit with 1 if anything is."""
    from resnet_dist.data.shards.verify import verify_index

    with bars(out, ["verify"], "shards") as show_progress:
        problems = verify_index(location, limits, workers=workers, progress=partial(show_progress, "verify"))
    _report(problems, "problems")
    if problems:
        raise typer.Exit(1)
    out.print(f"verified {location}: every checksum agrees, every image can be decoded")


def _report(lines: list[str], description: str) -> None:
    """Print the first lines of a report, and the number of all of them."""
    for line in lines[:MAX_LINES_SHOWN]:
        err.print(line)
    if lines:
        shown = f", {MAX_LINES_SHOWN} shown" if len(lines) > MAX_LINES_SHOWN else ""
        err.print(f"{len(lines):,} {description}{shown}")
