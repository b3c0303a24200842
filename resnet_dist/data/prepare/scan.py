"""The walk through a folder: every file in it is an image of its class, or a finding with its name and the reason.

Links are followed, as torchvision's ImageFolder does. Folders that hide (`.git`) or belong to a tool (`@eaDir`) are
passed over at every level.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from resnet_dist.data.findings import Findings, one_line
from resnet_dist.data.prepare.judge import ImageFile, judge, judge_name
from resnet_dist.data.prepare.layout import is_eval, is_train
from resnet_dist.errors import UserError

TOOL_FOLDERS = frozenset(
    ("__macosx", "__pycache__", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "lost+found")
)
# A folder of links that all lead to one another has more paths than could ever be walked.
MAX_VISITS = 100

Identity = tuple[int, int]  # device and inode


@dataclass(frozen=True)
class Folder:
    """A folder to scan, and the prefix of the names in its findings: its path relative to the source, and a slash."""

    path: str
    prefix: str = ""
    parent: Folder | None = None

    def sub(self, name: str) -> Folder:
        return Folder(os.path.join(self.path, name), f"{self.prefix}{name}/", self)

    def chain(self) -> list[Identity | None]:
        """Return the identities of the folder and of those above it, down from the source."""
        above = self.parent.chain() if self.parent is not None else []
        return [*above, identity_of(self.path)]


def is_image_by_name(name: str, findings: Findings) -> bool:
    """Report whether a file may be an image by its name, with its folders; record it where it is none.

    For files that would have to be fetched to look into them.
    """
    *folders, last = name.split("/")
    if any(folder.startswith(".") or folder.lower() in TOOL_FOLDERS for folder in folders):
        findings.pass_over(name, "a file in a hidden folder or that of a tool")
        return False
    return judge_name(last, name, findings)


class Scan:
    """Walks through folders below a source. output: a folder that is passed over wherever it is met."""

    def __init__(self, output: Path | None = None) -> None:
        self._output = identity_of(str(output)) if output is not None else None

    def subfolders(self, folder: Folder) -> list[str]:
        """Return the names of the folders that may be classes or splits, sorted. Raises UserError where unreadable."""
        chain = folder.chain()
        return [
            entry.name
            for entry in _entries(folder.path)
            if _is_folder(entry) and self._reason_to_pass_over(entry, chain) is None
        ]

    def top(self, folder: Folder, findings: Findings, used: frozenset[str], reason: str) -> None:
        """Record everything in `folder` but its subfolders `used`, which are scanned for themselves.

        Its other subfolders are left out for `reason` where they hold images.
        """
        chain = folder.chain()
        for entry in _entries(folder.path):
            name = folder.prefix + entry.name
            if not _is_folder(entry):
                found = judge(entry, name, findings, in_class=False)
                if found is not None:
                    findings.leave_out(name, "an image outside of the class folders")
            elif not self._pass_over(entry, name, findings, chain) and entry.name not in used:
                self._leave_out(folder.sub(entry.name), findings, reason)

    def images(self, folder: Folder, findings: Findings) -> Iterator[ImageFile]:
        """Yield the images at any depth of a class's folder, sorted by the parts of their names."""
        names: list[str] = []  # the names of its subfolders
        yield from self._walk(folder, findings, names)
        self._check_no_splits(folder, names)

    def files(self, folder: Folder, findings: Findings) -> Iterator[ImageFile]:
        """Yield the images at any depth of a folder whose subfolders have no meaning, sorted as by `images`."""
        return self._walk(folder, findings, [])

    def _walk(self, top: Folder, findings: Findings, names: list[str]) -> Iterator[ImageFile]:
        # A stack and not a recursion: folders may be nested deeper than Python recurses.
        stack = [(top, iter(_readable_entries(top, findings)))]
        chain = top.chain()
        visits: dict[Identity | None, int] = {}
        while stack:
            folder, entries = stack[-1]
            entry = next(entries, None)
            if entry is None:
                stack.pop()
                chain.pop()
                continue
            name = folder.prefix + entry.name
            if not _is_folder(entry):
                found = judge(entry, name, findings, in_class=True)
                if found is not None:
                    yield found
            elif not self._pass_over(entry, name, findings, chain):
                if len(stack) == 1:
                    names.append(entry.name)
                identity = identity_of(entry.path)
                visits[identity] = visits.get(identity, 0) + 1
                if visits[identity] > MAX_VISITS:
                    findings.leave_out(
                        f"{name}/", f"a folder that links lead to more than {MAX_VISITS} times"
                    )
                    continue
                inner = folder.sub(entry.name)
                stack.append((inner, iter(_readable_entries(inner, findings))))
                chain.append(identity)

    def _reason_to_pass_over(self, entry: os.DirEntry[str], chain: list[Identity | None]) -> str | None:
        if entry.name.startswith("."):
            return "a hidden folder"
        if entry.name.lower() in TOOL_FOLDERS:
            return "a folder of a tool"
        identity = identity_of(entry.path)
        if identity is not None and identity == self._output:
            return "the output folder"
        if identity is not None and identity in chain:
            return "a link to a folder above it"
        return None

    def _pass_over(
        self, entry: os.DirEntry[str], name: str, findings: Findings, chain: list[Identity | None]
    ) -> bool:
        """Record a folder that is not scanned, and report whether it is one."""
        reason = self._reason_to_pass_over(entry, chain)
        if reason is None:
            return False
        if reason in ("the output folder", "a link to a folder above it"):
            findings.pass_over(f"{name}/", reason)
        elif count := _count_files(entry.path):
            findings.pass_over(f"{name}/", reason, "1 file" if count == 1 else f"{count:,} files", count)
        return True

    def _leave_out(self, folder: Folder, findings: Findings, reason: str) -> None:
        """Record a folder beside the ones that are used: left out with its images, passed over with the rest."""
        inside = Findings()
        num_images = sum(1 for _ in self._walk(folder, inside, []))
        lost = num_images + inside.num_left_out
        if lost:
            findings.leave_out(folder.prefix, reason, f"{lost:,} of its files", lost)
        if inside.num_passed_over:
            findings.pass_over(
                folder.prefix, "no images, in a folder that is not used", "", inside.num_passed_over
            )

    def _check_no_splits(self, folder: Folder, names: list[str]) -> None:
        """Raise UserError where a class's folder holds splits: training on its test images would go unseen."""
        trains, evals = ([name for name in names if test(name)] for test in (is_train, is_eval))
        if trains and evals:
            raise UserError(
                f"{one_line(folder.path)}: would be a class, but holds the splits {one_line(trains[0])}/ and "
                f"{one_line(evals[0])}/; give that folder itself as the source, or put the folders of the classes "
                "into those of the splits"
            )


def identity_of(path: str) -> Identity | None:
    """Return device and inode of what is at `path`, or a link there leads to; None where nothing is."""
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_dev, info.st_ino


def _entries(path: str) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, sorted by name. Raises UserError where it cannot be read."""
    try:
        return _sorted_entries(path)
    except OSError as error:
        raise UserError(f"{one_line(path)}: cannot be read ({error.strerror})") from None


def _readable_entries(folder: Folder, findings: Findings) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, sorted by name; none where it cannot be read, which is recorded."""
    try:
        return _sorted_entries(folder.path)
    except PermissionError:
        findings.leave_out(folder.prefix, "a folder without permission to read it")
    except OSError as error:
        findings.leave_out(folder.prefix, "a folder that cannot be read", str(error.strerror))
    return []


def _sorted_entries(path: str) -> list[os.DirEntry[str]]:
    with os.scandir(path) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself, or into a folder without permission
        return False


def _count_files(path: str) -> int:
    """Return the number of files in a folder and below it; a folder that cannot be read counts as one."""
    errors: list[OSError] = []
    return sum(len(files) for _, _, files in os.walk(path, onerror=errors.append)) + len(errors)
