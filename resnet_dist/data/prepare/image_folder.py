"""A folder of images as a source: its splits, the names of its classes, their images, and all that is none."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from resnet_dist.data.findings import MAX_NAMES, Findings, one_line, printable
from resnet_dist.data.prepare.items import SHARED, Item, Source, hold_out_of_each_class, plain_name
from resnet_dist.data.prepare.judge import read_file
from resnet_dist.data.prepare.layout import Splits, find_splits, is_eval
from resnet_dist.data.prepare.scan import Folder, Scan
from resnet_dist.errors import UserError

OUTSIDE_CLASSES = "a folder that is no class"


@dataclass(frozen=True)
class FolderOptions:
    """The options of a folder of images."""

    seed: int = 0  # chooses the held-out share where the folder has no splits
    whole_split: str | None = None  # scan this split alone; a folder without splits goes into it whole
    allow_empty: bool = False  # keep classes without samples
    output: Path | None = None  # the output folder, which is no part of the source


def open_image_folder(path: Path, options: FolderOptions) -> Source:
    """Open a folder with one folder per class, or with a folder per split, each with these folders.

    Raises UserError where its splits are ambiguous, or a class has no samples.
    """
    scan, root = Scan(options.output), Folder(str(path))
    names = scan.subfolders(root)
    splits = find_splits(
        one_line(str(path)),
        names,
        lambda name: bool(scan.subfolders(root.sub(name))),
        train_only=options.whole_split == "train",
    )
    name = plain_name(path.absolute().name)
    if splits is None:
        return _without_splits(name, scan, root, names, options)
    return _with_splits(name, scan, root, names, splits, options)


def _without_splits(
    name: str, scan: Scan, root: Folder, names: Sequence[str], options: FolderOptions
) -> Source:
    findings = Findings()
    scan.top(root, findings, frozenset(names), OUTSIDE_CLASSES)
    classes = _class_names(root, names)
    items = _items(scan, root, classes, classes, findings, options)
    if options.whole_split is not None:
        splits: Mapping[str, Sequence[Item]] = {options.whole_split: items}
    else:
        splits = hold_out_of_each_class(items, options.seed)
    return Source(name, tuple(classes), splits, {SHARED: findings})


def _with_splits(
    name: str, scan: Scan, root: Folder, names: Sequence[str], splits: Splits, options: FolderOptions
) -> Source:
    findings = {SHARED: Findings()}
    folders = {"train": root.sub(splits.train)}
    used = {splits.train}
    if splits.eval is not None:
        folders["eval"] = root.sub(splits.eval)
        used.add(splits.eval)
    else:  # not asked for, and so not left out
        used.update(filter(is_eval, names))
    beside = " and ".join(folder.prefix for folder in folders.values())
    scan.top(root, findings[SHARED], frozenset(used), f"a folder beside {beside}")
    own = {split: _class_names(folder, scan.subfolders(folder)) for split, folder in folders.items()}
    items = {}
    for split, folder in folders.items():
        _check_known(folder, own[split], folders["train"], own["train"])
        if options.whole_split in (None, split):
            findings[split] = Findings()
            scan.top(folder, findings[split], frozenset(own[split].values()), OUTSIDE_CLASSES)
            items[split] = _items(scan, folder, own["train"], own[split], findings[split], options)
    prefixes = {split: folder.prefix for split, folder in folders.items()}
    return Source(name, tuple(own["train"]), items, findings, prefixes)


def _class_names(folder: Folder, names: Sequence[str]) -> dict[str, str]:
    """Return the folder of each class by its name as text. Raises UserError where two names are the same as text."""
    classes: dict[str, str] = {}
    for name in names:
        if (text := printable(name)) in classes:
            raise UserError(
                f"{one_line(folder.path)}: two folders of classes have the name {text!r} once bytes that are not UTF-8 "
                "are written as an escape; rename one"
            )
        classes[text] = name
    return classes


def _items(
    scan: Scan,
    folder: Folder,
    classes: dict[str, str],
    own: dict[str, str],
    findings: Findings,
    options: FolderOptions,
) -> list[Item]:
    """Return the images of one split, by class and name. classes: by label; own: those with a folder in `folder`."""
    items: list[Item] = []
    start = len(folder.prefix)
    for label, text in enumerate(classes):
        if text in own:
            items += (
                Item(
                    label,
                    image.extension,
                    partial(read_file, image.path),
                    image.name[start:],
                    image.num_bytes,
                )
                for image in scan.images(folder.sub(own[text]), findings)
            )
    if not items:
        expected = "expected one folder per class, with images"
        raise UserError(f"{one_line(folder.path)}: no images; {expected}{_instead(folder.prefix, findings)}")
    labels = {item.label for item in items}
    empty = [text for label, text in enumerate(classes) if text in own and label not in labels]
    if empty and not options.allow_empty:
        shown = ", ".join(
            f"{one_line(c)!r}{_instead(f'{folder.prefix}{own[c]}/', findings)}" for c in empty[:MAX_NAMES]
        )
        raise UserError(
            f"{one_line(folder.path)}: {len(empty)} of {len(own)} classes have no samples: {shown}"
            f"{', …' if len(empty) > MAX_NAMES else ''}; remove these folders, or pass --allow-empty to keep the classes"
        )
    return items


def _instead(prefix: str, findings: Findings) -> str:
    """Return what a folder has instead of images, in parentheses; nothing where it is empty."""
    kinds: Counter[str] = Counter()
    for finding in findings.left_out + findings.passed_over:
        if finding.name.startswith(prefix):
            kinds[finding.kind] += finding.count
    found = ", ".join(f"{count:,} × {kind}" for kind, count in kinds.most_common(MAX_NAMES))
    return f" (it has {found})" if found else ""


def _check_known(folder: Folder, own: dict[str, str], train: Folder, classes: dict[str, str]) -> None:
    """Raise UserError where a split has classes that the training split has not."""
    unknown = [name for name in own if name not in classes]
    if not unknown:
        return
    similar = {_folded(name): name for name in classes}
    hints = [
        f"{name!r} differs from {similar[_folded(name)]!r} in case or accents alone"
        for name in unknown
        if _folded(name) in similar
    ]
    raise UserError(
        f"{one_line(folder.path)}: classes {unknown[:10]}{' and more' if len(unknown) > 10 else ''} have no folder in "
        f"{one_line(train.path)}" + (f"; {hints[0]}" if hints else "")
    )


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
