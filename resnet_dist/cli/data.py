"""The command that writes a data set as shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from resnet_dist.cli.options import (
    RESUMES,
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
from resnet_dist.config.data.reading import MAX_PIXELS
from resnet_dist.data.findings import Findings
from resnet_dist.errors import UserError
from resnet_dist.system.cpus import cpu_count
from resnet_dist.terminal import bars

if TYPE_CHECKING:
    from resnet_dist.data.prepare.split import Prepared

# Fewer samples than this are written by one process before others have started.
FEW_SAMPLES = 4096

SourceName = Annotated[
    str,
    typer.Argument(
        help="digits, cifar10, cifar100, mnist, fashion-mnist, a folder of images (class = folder), or of indexed shards.",
    ),
]
ShardSize = Annotated[
    int | None, typer.Option(min=1, metavar="BYTES", help="Approximate size of a tar; default: 256 MiB.")
]
ResizeShort = Annotated[
    int | None,
    typer.Option(min=1, metavar="PIXELS", help="Shrink longer short sides; default: keep the bytes."),
]
Seekable = Annotated[
    bool, typer.Option("--seekable", help="Rewrite JPEGs without loss, so that crops are decoded faster.")
]
Split = Annotated[
    Literal["train", "eval"] | None,
    typer.Option(help="Write only this split; a folder without splits goes into it whole."),
]


@on_interrupt(RESUMES)
def prepare(
    source: SourceName,
    folder: Annotated[str, typer.Argument(metavar="OUT", help="Gets train/ and eval/.")],
    shards: Annotated[int | None, typer.Option(min=1, help="Tars per split.")] = None,
    shard_size: ShardSize = None,
    resize_short: ResizeShort = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality of shrunk images.")] = 92,
    seekable: Seekable = False,
    split: Split = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the shuffle.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one per CPU.")] = None,
    max_pixels: Annotated[int, typer.Option(min=1, help="Leave out images with more.")] = MAX_PIXELS,
    allow_empty: Annotated[
        bool, typer.Option("--allow-empty", help="Keep classes without images, which are refused otherwise.")
    ] = False,
    allow_left_out: AllowLeftOut = False,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Write a data set as shuffled WebDataset shards with an index; interrupted, the same command resumes.

    What is left out or passed over is counted, and listed in left-out.txt. Exit code 3: something was left out.
    """
    from resnet_dist.data.prepare.output import check_apart, check_output
    from resnet_dist.data.prepare.sources import open_source
    from resnet_dist.data.prepare.split import prepare_splits
    from resnet_dist.data.prepare.write import SHARD_BYTES, PrepareOptions

    if shards is not None and shard_size is not None:
        raise UserError(
            f"--shards {shards} and --shard-size {shard_size} exclude each other; use one of them"
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
        max_pixels,
        strict,
        allow_empty,
        seekable,
    )
    opened = open_source(source, seed=seed, whole_split=split, allow_empty=allow_empty, output=target)
    samples = sum(len(items) for items in opened.splits.values())
    workers = workers or (1 if samples < FEW_SAMPLES else cpu_count())
    chosen = [split] if split else list(opened.splits)
    with bars(err if as_json else out, chosen, "images") as show_progress:
        prepared = prepare_splits(
            opened, target, options, splits=chosen, workers=workers, progress=show_progress
        )
    _show_prepared(prepared, opened.folders, as_json=as_json)
    exit_where_left_out(_all_findings(prepared), allow_left_out=allow_left_out)


def _all_findings(prepared: dict[str, Prepared]) -> Findings:
    findings = Findings()
    findings.add(done.findings for done in prepared.values())
    return findings


def _show_prepared(prepared: dict[str, Prepared], folders: Mapping[str, str], *, as_json: bool) -> None:
    """Print the summary of every split. folders: of the source, by split, where it has some."""
    if as_json:
        print_json({name: json_of(done.findings, done.report, done.index) for name, done in prepared.items()})
        return
    for name, done in prepared.items():
        index, origin = done.index, f", from {folders[name]}" if name in folders else ""
        print_summary(
            f"{name}: {index.num_samples:,} samples of {len(index.classes):,} classes in "
            f"{len(index.shards):,} shards{origin}, {index.location}",
            done.findings,
            done.report,
        )
