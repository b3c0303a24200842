"""The command that writes an index for existing shards and verifies one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from resnet_dist.cli.options import (
    DEFAULT_SHARD_CACHE,
    FETCH_TIMEOUT_SECONDS,
    SHARD_CACHE_BYTES,
    STARTS_OVER,
    AllowCommands,
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
from resnet_dist.data.findings import Findings, one_line
from resnet_dist.errors import UserError
from resnet_dist.system.cpus import cpu_count
from resnet_dist.system.files import expanded
from resnet_dist.terminal import bars

if TYPE_CHECKING:
    from resnet_dist.data.shards.build import IndexOptions
    from resnet_dist.data.shards.index import Index
    from resnet_dist.data.shards.members import MemberRules
    from resnet_dist.data.storage.cache.folder import CacheLimits

MAX_LINES_SHOWN = 50  # lines of a report of problems


Shards = Annotated[
    list[str],
    typer.Argument(
        metavar="SHARDS...", help="Tars, a{0..9}.tar, lists with ::, folders, other indexes; URLs."
    ),
]
Out = Annotated[str | None, typer.Option("--out", help="Index to write; default: beside the shards.")]
Classes = Annotated[
    str | None,
    typer.Option(
        help="Number of classes, a file with one name per line, or another index; default: as many as the labels need."
    ),
]
Key = Annotated[
    Literal["first-dot", "full"] | None,
    typer.Option(
        help="Where a sample's key ends: at the first dot of a name, as in webdataset (default), or the last."
    ),
]
ImageExt = Annotated[
    str | None,
    typer.Option(metavar="EXT[;EXT]", help="Images to read, best first; default: jpg;jpeg;…;png;…"),
]
LabelExt = Annotated[
    str | None, typer.Option(metavar="EXT[;EXT]", help="Labels to read, best first; default: cls;json")
]
AllowEmpty = Annotated[bool, typer.Option("--allow-empty", help="Keep numbers of classes that no label has.")]
TimmSplit = Annotated[str | None, typer.Option(help="Split of timm's _info.json to index.")]
Verify = Annotated[
    bool, typer.Option("--verify", help="Recompute checksums, compare offsets and decode every image.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads; default: one per CPU.")]
CacheFolder = Annotated[Path, typer.Option(help="Where remote shards are kept.")]
MaxPixels = Annotated[int, typer.Option(min=1, help="Images with more are a problem to --verify.")]


@on_interrupt(STARTS_OVER)
def index(
    shards: Shards,
    to: Out = None,
    classes: Classes = None,
    key: Key = None,
    image_ext: ImageExt = None,
    label_ext: LabelExt = None,
    allow_empty: AllowEmpty = False,
    split: TimmSplit = None,
    verify: Verify = False,
    workers: Threads = None,
    allow_commands: AllowCommands = False,
    shard_cache: CacheFolder = DEFAULT_SHARD_CACHE,
    max_pixels: MaxPixels = MAX_PIXELS,
    allow_left_out: AllowLeftOut = False,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Write an index for WebDataset shards of any origin; --verify checks the shards of an index.

    What is left out or passed over is counted, and listed in left-out.txt. Exit code 3: something was left out.
    """
    from resnet_dist.data.shards.build import IndexOptions
    from resnet_dist.data.storage.cache.folder import CacheLimits

    limits = CacheLimits(expanded(shard_cache), SHARD_CACHE_BYTES, FETCH_TIMEOUT_SECONDS, allow_commands)
    workers = workers or cpu_count()
    rules = _rules(key, image_ext, label_ext)
    # Options that shape an index ask for a new one, even where there is one to verify.
    asks_for_index = bool(to or classes or split or rules)
    if verify and len(shards) == 1 and not asks_for_index and _has_index(shards[0]):
        result = _verify(shards[0], limits, workers, max_pixels, as_json=as_json)
        if as_json:
            print_json(result)
        raise typer.Exit(1 if result["problems"] else 0)
    options = IndexOptions(rules, strict, allow_empty)
    built, findings, report = _write_index(
        shards, split, to, classes, options, limits, workers, as_json=as_json
    )
    result = _verify(built.location, limits, workers, max_pixels, as_json=as_json) if verify else {}
    if as_json:
        print_json({**json_of(findings, report, built), **result})
    if result.get("problems"):
        raise typer.Exit(1)
    exit_where_left_out(findings, allow_left_out=allow_left_out)


def _rules(key: str | None, image_ext: str | None, label_ext: str | None) -> MemberRules | None:
    """Return the rules that the options ask for; None where none was typed: those of an index there already hold."""
    from resnet_dist.data.images.formats import IMAGE_EXTENSIONS
    from resnet_dist.data.shards.members import LABEL_EXTENSIONS, MemberRules, extensions_of

    if not (key or image_ext or label_ext):
        return None
    return MemberRules(
        key == "full",
        extensions_of(image_ext, "--image-ext") if image_ext else IMAGE_EXTENSIONS,
        extensions_of(label_ext, "--label-ext") if label_ext else LABEL_EXTENSIONS,
    )


def _has_index(shards: str) -> bool:
    """Return whether there is an index to verify: a file named so, or one of ours in a folder."""
    from resnet_dist.data.shards.index import IndexMismatch, index_location, read_index
    from resnet_dist.data.storage.transfer import exists
    from resnet_dist.data.storage.urls import SHARD_SUFFIXES, path_of

    if index_location(shards) == shards:
        return exists(shards)
    if path_of(shards).lower().endswith(SHARD_SUFFIXES):
        return False
    try:
        read_index(shards)
    except IndexMismatch:
        return False
    return True


def _write_index(
    shards: list[str],
    split: str | None,
    to: str | None,
    classes: str | None,
    options: IndexOptions,
    limits: CacheLimits,
    workers: int,
    *,
    as_json: bool,
) -> tuple[Index, Findings, Path]:
    """Write an index for the shards and print its summary. Returns it, its account, and the file that lists that."""
    from resnet_dist.data.shards.build import build_index, num_compressed
    from resnet_dist.data.shards.names import class_names, default_location, expand
    from resnet_dist.data.shards.output import place_of_index, report_path
    from resnet_dist.data.storage.urls import without_user

    findings = Findings()
    target = local_folder(to, "--out") if to is not None else None
    found = expand(shards, split, findings)
    target = target or default_location(found)
    if target is None:
        raise UserError(
            "--out is missing: these shards are not all in one local folder, where the index goes by default"
        )
    report = report_path(place_of_index(target))  # before anything is read: the place may be a wrong one
    if count := num_compressed(found):
        err.print(
            f"{count} of {len(found)} shards are compressed: nothing inside them can be read by offset, "
            f"so each is unpacked whole into {limits.folder} before its first use"
        )
    with bars(err if as_json else out, ["index"], "shards") as show_progress:
        built, findings = build_index(
            found,
            target,
            limits,
            classes=class_names(classes),
            options=options,
            workers=workers,
            progress=partial(show_progress, "index"),
            findings=findings,
        )
    if any(without_user(shard.url) != shard.url for shard in found):
        err.print(
            f"{built.location}: holds no user and password; put them into ~/.netrc, where they are found"
        )
    if not as_json:
        print_summary(
            f"{built.num_samples:,} samples of {len(built.classes):,} classes in {len(built.shards):,} shards, "
            f"{built.location}{built.rules.describe()}",
            findings,
            report,
        )
    return built, findings, report


def _verify(
    location: str, limits: CacheLimits, workers: int, max_pixels: int, *, as_json: bool
) -> dict[str, object]:
    """Check the shards of an index and report what is wrong. Returns what `--json` adds."""
    from resnet_dist.data.shards.verify import verify_index

    with bars(err if as_json else out, ["verify"], "shards") as show_progress:
        problems = verify_index(
            location,
            limits,
            workers=workers,
            progress=partial(show_progress, "verify"),
            max_pixels=max_pixels,
        )
    _report(problems)
    if not problems and not as_json:
        out.print(f"verified {one_line(location)}: every checksum agrees, every image can be decoded")
    return {"problems": [one_line(problem) for problem in problems]}


def _report(problems: list[str]) -> None:
    """Print problems, the same one of several samples once, and the number of all of them."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(problem.partition(": ")[2] or problem, []).append(problem)
    for same in list(kinds.values())[:MAX_LINES_SHOWN]:
        more = f", and {len(same) - 1:,} more" if len(same) > 1 else ""
        err.print(one_line(same[0]) + more)
    if problems:
        shown = f", {MAX_LINES_SHOWN} kinds shown" if len(kinds) > MAX_LINES_SHOWN else ""
        err.print(f"{len(problems):,} problems{shown}")
