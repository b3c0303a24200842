"""The account of a scan: what became of every file of a folder, or of every member of a tar.

Used, left out or passed over: nothing disappears without a count and a name. Left out is what a person may have meant
as a sample and that is lost (an unreadable image, a broken link): the command that finds such ends with exit code
LEFT_OUT. Passed over is what was never meant as one (a thumbnail cache, an AppleDouble file, a README).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from resnet_dist.system.files import write_text_atomically

LEFT_OUT = 3  # exit code of a command that is done, but has left something out
REPORT_NAME = "left-out.txt"  # in the folder of a split, or beside an index
BAD_IMAGE = "a bad image"  # the kind of what `predict` could not decode
BAD_SHARD = "a shard that cannot be read"
MAX_NAMES = 3  # the names of one kind that a message has

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def printable(name: str) -> str:
    """Return a file's name as text: bytes of it that are not UTF-8 become an escape such as `\\xe9`."""
    try:
        return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    except UnicodeEncodeError:  # half of a surrogate pair, which no file system decodes to
        return name.encode(errors="backslashreplace").decode()


def one_line(name: str) -> str:
    """Return a name as text on one line: control characters become escapes too."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), printable(name))


@dataclass(frozen=True)
class Finding:
    """A file or member that is no sample: its name, the kind of reason (a few words, counted), and the details.

    It may also be a folder of `count` files that is not scanned; its name ends with a slash.
    """

    name: str
    kind: str
    detail: str = ""
    count: int = 1

    def line(self) -> str:
        return one_line(f"{self.name}: {self.kind}" + (f" ({self.detail})" if self.detail else ""))


@dataclass
class Findings:
    """Counts and names of one scan."""

    used: int = 0
    left_out: list[Finding] = field(default_factory=list)
    passed_over: list[Finding] = field(default_factory=list)
    # Those of `used` that were to be written in another way, and are as they were.
    unchanged: list[Finding] = field(default_factory=list)

    @property
    def num_left_out(self) -> int:
        return sum(finding.count for finding in self.left_out)

    @property
    def num_passed_over(self) -> int:
        return sum(finding.count for finding in self.passed_over)

    def leave_out(self, name: str, kind: str, detail: str = "", count: int = 1) -> None:
        self.left_out.append(Finding(name, kind, detail, count))

    def pass_over(self, name: str, kind: str, detail: str = "", count: int = 1) -> None:
        self.passed_over.append(Finding(name, kind, detail, count))

    def keep_unchanged(self, name: str, kind: str, detail: str = "", count: int = 1) -> None:
        self.unchanged.append(Finding(name, kind, detail, count))

    def _lists(self) -> dict[str, list[Finding]]:
        return {"left out": self.left_out, "passed over": self.passed_over, "unchanged": self.unchanged}

    def add(self, others: Iterable[Findings]) -> None:
        for other in others:
            self.used += other.used
            self.left_out += other.left_out
            self.passed_over += other.passed_over
            self.unchanged += other.unchanged

    def rows(self) -> list[tuple[str, str, int, str]]:
        """Return (what, kind, count, first name), most frequent first: the summary's table."""
        rows = []
        for what, found in self._lists().items():
            firsts = {finding.kind: finding.name for finding in reversed(found)}
            rows += [(what, kind, count, firsts[kind]) for kind, count in _counts(found).most_common()]
        return rows

    def as_json(self) -> dict[str, object]:
        """Return counts by kind, as `--json` prints them."""
        return {
            "used": self.used,
            "left_out": dict(_counts(self.left_out)),
            "passed_over": dict(_counts(self.passed_over)),
            **({"unchanged": dict(_counts(self.unchanged))} if self.unchanged else {}),
        }

    def refusal(self) -> str:
        """Return what `--strict` refuses, in one sentence with counts and the first names of each kind."""
        kinds = [
            f"{count:,} {kind} ({', '.join(one_line(f.name) for f in named[:MAX_NAMES])}{', …' * (len(named) > MAX_NAMES)})"
            for kind, count in _counts(self.left_out).most_common()
            for named in [[finding for finding in self.left_out if finding.kind == kind]]
        ]
        return (
            f"{self.num_left_out:,} would be left out: {'; '.join(kinds)}; mend or remove them, or leave out "
            f"--strict, and {REPORT_NAME} lists them all"
        )

    def write(self, path: Path) -> bool:
        """List every finding in a file, a line each: what, name, kind, details, count, between tabs.

        The file of an earlier scan is removed where there are none. Returns whether there are any.
        """
        lines = [
            "\t".join(one_line(text) for text in (what, f.name, f.kind, f.detail, str(f.count)))
            for what, found in self._lists().items()
            for f in found
        ]
        if lines:
            write_text_atomically(path, "".join(f"{line}\n" for line in lines))
        else:
            path.unlink(missing_ok=True)
        return bool(lines)

    @classmethod
    def read(cls, path: Path) -> Findings:
        """Return what `write` listed; nothing where the file is missing."""
        findings = cls()
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        for line in lines:
            what, name, kind, detail, count = (line.split("\t") + [""] * 4)[:5]
            found = findings._lists().get(what, findings.passed_over)
            found.append(Finding(name, kind, detail, int(count) if count.isdecimal() else 1))
        return findings


def _counts(found: Iterable[Finding]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for finding in found:
        counts[finding.kind] += finding.count
    return counts
