"""Commands about data: write shards, index them, check them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resnet_dist.cli.options import (
    DEFAULT_SHARD_CACHE,
    FETCH_TIMEOUT_SECONDS,
    RESUMES,
    SHARD_CACHE_BYTES,
    STARTS_OVER,
    Split,
    err,
    local_folder,
    on_interrupt,
    out,
)
from resnet_dist.cli.summary import (
    AllowLeftOut,
    AsJson,
    Strict,
    exit_where_left_out,
    json_of,
    print_json,
    print_summary,
)
from resnet_dist.data.findings import Findings
from resnet_dist.errors import UserError
from resnet_dist.system.cpus import cpu_count
from resnet_dist.terminal import bars

FEW_SAMPLES = 4096  # which one process writes before others have started
MAX_LINES_SHOWN = 50  # of a report that are shown


@on_interrupt(RESUMES)
def prepare(
    source: Annotated[
        str,
        typer.Argument(
            help="digits, cifar10, cifar100, mnist, fashion-mnist, or a folder of images (class = folder)."
        ),
    ],
    folder: Annotated[str, typer.Argument(metavar="OUT", help="Gets train/ and eval/.")],
    shards: Annotated[int | None, typer.Option(min=1, help="Tars per split.")] = None,
    shard_size: Annotated[
        int | None, typer.Option(min=1, metavar="BYTES", help="About this much per tar; default 256 MiB.")
    ] = None,
    resize_short: Annotated[
        int | None,
        typer.Option(min=1, metavar="PIXELS", help="Shrink longer short sides; else bytes are kept."),
    ] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality of what is shrunk.")] = 92,
    split: Annotated[
        Split | None, typer.Option(help="Only this one; a folder without splits goes into it whole.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the shuffle.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one per CPU.")] = None,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Leave out larger images; default: 80 million pixels.")
    ] = None,
    allow_empty: Annotated[
        bool, typer.Option("--allow-empty", help="Keep classes without images, which are refused otherwise.")
    ] = False,
    allow_left_out: AllowLeftOut = False,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Write a data set as shuffled WebDataset shards with an index; interrupted, the same call goes on.

    What is left out or passed over is counted, and listed in left-out.txt. Exit code 3: something was left out.
    """
    from resnet_dist.data.prepare.output import check_apart, check_output
    from resnet_dist.data.prepare.sources import open_source
    from resnet_dist.data.prepare.split import prepare_splits
    from resnet_dist.data.prepare.write import MAX_PIXELS, SHARD_BYTES, PrepareOptions

    if shards is not None and shard_size is not None:
        raise UserError(
            f"--shards {shards} and --shard-size {shard_size} both say how to cut; give one of them"
        )
    target = local_folder(folder, "OUT")
    check_output(target, [split] if split else ["train", "eval"])
    check_apart(source, target)
    options = PrepareOptions(
        seed,
        shards,
        shard_size or SHARD_BYTES,
        resize_short,
        quality,
        max_pixels or MAX_PIXELS,
        strict,
        allow_empty,
    )
    opened = open_source(source, seed=seed, whole_split=split, allow_empty=allow_empty, output=target)
    samples = sum(len(items) for items in opened.splits.values())
    workers = workers or (1 if samples < FEW_SAMPLES else cpu_count())
    chosen = [split] if split else list(opened.splits)
    with bars(err if as_json else out, chosen, "images") as tell:
        done = prepare_splits(opened, target, options, splits=chosen, workers=workers, progress=tell)
    if as_json:
        print_json({name: json_of(it.findings, it.report, it.index) for name, it in done.items()})
    everything = Findings()
    for name, it in done.items():
        everything.add([it.findings])
        if not as_json:
            inside = opened.folders.get(name)
            print_summary(
                f"{name}: {it.index.num_samples:,} samples of {len(it.index.classes):,} classes in "
                f"{len(it.index.shards):,} shards{f', from {inside}' if inside else ''}, {it.index.location}",
                it.findings,
                it.report,
            )
    exit_where_left_out(everything, allow_left_out=allow_left_out)


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
        str | None, typer.Option(help="How many, or a file with a name per line; default: as labels need.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of timm's _info.json.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Recompute checksums and decode every image.")
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; default: one per CPU.")] = None,
    allow_commands: Annotated[
        bool, typer.Option("--allow-commands", help="Run shards named pipe:… in a shell.")
    ] = False,
    shard_cache: Annotated[Path, typer.Option(help="Where remote shards are kept.")] = DEFAULT_SHARD_CACHE,
) -> None:
    """Make an index for WebDataset shards that something else wrote; --verify checks an indexed set."""
    from resnet_dist.data.shards.build import build_index, num_compressed
    from resnet_dist.data.shards.index import index_location
    from resnet_dist.data.shards.names import class_names, default_location, expand
    from resnet_dist.data.shards.verify import verify_index
    from resnet_dist.data.storage.shard_cache import CacheLimits
    from resnet_dist.data.storage.transfer import exists

    limits = CacheLimits(shard_cache.expanduser(), SHARD_CACHE_BYTES, FETCH_TIMEOUT_SECONDS, allow_commands)
    workers = workers or cpu_count()
    target = to
    if not (verify and len(shards) == 1 and to is None and exists(index_location(shards[0]))):
        found = expand(shards, split)
        target = to or default_location(found)
        if target is None:
            raise UserError("--out: say where the index goes, these shards are not all in one folder here")
        if num_compressed(found):
            err.print(
                f"{num_compressed(found)} of {len(found)} shards are compressed: nothing inside them can be read by offset, "
                f"so each is unpacked whole into {limits.folder} before its first use"
            )
        with bars(out, ["index"], "shards") as tell:
            built, problems = build_index(
                found,
                target,
                limits,
                classes=class_names(classes),
                workers=workers,
                progress=lambda done, total: tell("index", done, total),
            )
        out.print(
            f"{built.num_samples:,} samples of {len(built.classes)} classes in {len(built.shards)} shards, {built.location}"
        )
        _report(problems, "samples without a usable image or label")
    if verify:
        location = str(target) if target else shards[0]
        with bars(out, ["verify"], "shards") as tell:
            wrong = verify_index(
                location, limits, workers=workers, progress=lambda done, total: tell("verify", done, total)
            )
        _report(wrong, "problems")
        if wrong:
            raise typer.Exit(1)
        out.print(f"verified {location}: every checksum agrees, every image can be decoded")


def _report(lines: list[str], what: str) -> None:
    for line in lines[:MAX_LINES_SHOWN]:
        err.print(line)
    if lines:
        err.print(
            f"{len(lines):,} {what}" + (f", {MAX_LINES_SHOWN} shown" if len(lines) > MAX_LINES_SHOWN else "")
        )
