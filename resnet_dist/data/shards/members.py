"""Members of a tar: which of them make up a sample, which is its image, which its label, and which are no part of any.

The rules are webdataset's. What a person chooses otherwise is in MemberRules, which index.json records, so that every
reader applies the same rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from resnet_dist.data.findings import printable
from resnet_dist.data.images.formats import IMAGE_EXTENSIONS
from resnet_dist.errors import UserError

# The header of a damaged tar may state any size.
MAX_IMAGE_BYTES = 256 * 2**20
MAX_LABEL_BYTES = 16 * 2**20
LABEL_EXTENSIONS = ("cls", "json")
JSON_EXTENSION = "json"
# Fields of index.json; each is there only where a person chose other rules than webdataset's.
KEYS_FIELD, FULL_KEYS = "sample_keys", "full"
IMAGE_EXTENSIONS_FIELD, LABEL_EXTENSIONS_FIELD = "image_extensions", "label_extensions"

# These follow webdataset's base_plus_ext and skip_meta: the extension begins at the first dot of the last part.
KEY_AND_EXTENSION = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
METADATA = re.compile(r"__[^/]*__($|/)")
_FULL_KEY_AND_EXTENSION = re.compile(r"^((?:.*/|)[^/]+)[.]([^/.]*)$")
# Files that macOS, Windows, a NAS or an editor adds to a folder, and that a tar of the folder then holds.
_TOOL_FILE = re.compile(
    r"(?:^|/)(?:(\._[^/]*|\.DS_Store|(?:__MACOSX|\.AppleDouble)(?:/.*)?)"
    r"|Thumbs\.db|desktop\.ini|(?:@eaDir|\.ipynb_checkpoints|\.thumbnails)(?:/.*)?)$"
)


@dataclass(frozen=True)
class Member:
    """A file inside a tar: its content starts at byte `offset` and has `size` bytes."""

    extension: str
    offset: int
    size: int
    name: str

    @property
    def key(self) -> str:
        """Return the name without its extension, as text: a name in a tar may be any bytes."""
        return printable(self.name[: -1 - len(self.extension)])

    @property
    def last_extension(self) -> str:
        """Return the extension behind the last dot: `jpg` of `left.jpg`."""
        return self.extension.rpartition(".")[2]

    @property
    def is_json(self) -> bool:
        return self.last_extension == JSON_EXTENSION


@dataclass(frozen=True)
class MemberRules:
    """The rules by which members become samples."""

    full_keys: bool = False  # A key is a name up to its last dot; else up to its first, as in webdataset.
    # In the order of preference. An entry without a dot stands for dotted extensions too, after all plain ones.
    image_extensions: tuple[str, ...] = IMAGE_EXTENSIONS
    label_extensions: tuple[str, ...] = LABEL_EXTENSIONS

    def split(self, name: str) -> tuple[str, str] | None:
        """Return key and extension of a member; None where the name has no extension."""
        match = (_FULL_KEY_AND_EXTENSION if self.full_keys else KEY_AND_EXTENSION).match(name)
        return (match[1], match[2].lower()) if match else None

    def image(self, members: Iterable[Member]) -> Member | None:
        """Return the image to read: by the order of preference, never by the order in the tar."""
        return _find(members, self._image_ranks)

    def label(self, members: Iterable[Member]) -> Member | None:
        """Return the label: the `.cls` member, else the `.json` member, plain before dotted."""
        return _find(members, self._label_ranks)

    def images(self, members: Iterable[Member]) -> list[Member]:
        return [member for member in members if self.is_image(member.extension)]

    def is_image(self, extension: str) -> bool:
        return _rank(extension, self._image_ranks) is not None

    def is_label(self, extension: str) -> bool:
        return _rank(extension, self._label_ranks) is not None

    def rivals(self, members: Sequence[Member]) -> list[Member]:
        """Return members of a group that show it to be several samples, or that nothing lets choose from; else [].

        These are images or labels of the same last extension, all of them dotted; or images that have a label each.
        """
        if not any("." in member.extension for member in members):
            return []
        image = self.image(members)
        for chosen, ranks in ((image, self._image_ranks), (self.label(members), self._label_ranks)):
            if chosen is not None and chosen.extension not in ranks:
                same = [
                    m for m in members if "." in m.extension and m.last_extension == chosen.last_extension
                ]
                if len(same) > 1:
                    return same
        if image is not None and "." in image.extension and image.extension in self._image_ranks:
            return []  # a person named this extension, so that the choice is made
        labelled = {_prefix(member) for member in members if self.is_label(member.extension)}
        with_label = [member for member in self.images(members) if _prefix(member) in labelled]
        return with_label if len({_prefix(member) for member in with_label}) > 1 else []

    def as_json(self) -> dict[str, Any]:
        """Return the fields of index.json: none for webdataset's rules."""
        fields: dict[str, Any] = {}
        if self.full_keys:
            fields[KEYS_FIELD] = FULL_KEYS
        if self.image_extensions != IMAGE_EXTENSIONS:
            fields[IMAGE_EXTENSIONS_FIELD] = list(self.image_extensions)
        if self.label_extensions != LABEL_EXTENSIONS:
            fields[LABEL_EXTENSIONS_FIELD] = list(self.label_extensions)
        return fields

    def describe(self) -> str:
        """Return the rules that are not webdataset's, for the end of a line; nothing for webdataset's."""
        fields = self.as_json().items()
        return "".join(
            f", {name}={value if isinstance(value, str) else ';'.join(value)}" for name, value in fields
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> MemberRules:
        """Return the rules that index.json records. Raises ValueError where it records some that are not known."""
        keys = value.get(KEYS_FIELD)
        if keys not in (None, FULL_KEYS):
            raise ValueError(f"{KEYS_FIELD} is {keys!r}, not {FULL_KEYS!r}")
        images = tuple(str(extension) for extension in value.get(IMAGE_EXTENSIONS_FIELD, IMAGE_EXTENSIONS))
        labels = tuple(str(extension) for extension in value.get(LABEL_EXTENSIONS_FIELD, LABEL_EXTENSIONS))
        return cls(keys == FULL_KEYS, images, labels)

    @cached_property
    def _image_ranks(self) -> dict[str, tuple[int, int]]:
        """Map extensions to their ranks, plain and dotted: every plain one is before every dotted one."""
        count = len(self.image_extensions)
        return {
            extension: (rank, count + rank)
            for rank, extension in reversed([*enumerate(self.image_extensions)])
        }

    @cached_property
    def _label_ranks(self) -> dict[str, tuple[int, int]]:
        """Map extensions to their ranks, plain and dotted: a dotted `.cls` is before every `.json`."""
        return {
            extension: (2 * rank, 2 * rank + 1)
            for rank, extension in reversed([*enumerate(self.label_extensions)])
        }


WEBDATASET = MemberRules()


def _rank(extension: str, ranks: Mapping[str, tuple[int, int]]) -> int | None:
    found = ranks.get(extension)
    if found is not None:
        return found[0]
    _, dot, last = extension.rpartition(".")
    found = ranks.get(last) if dot else None
    return None if found is None else found[1]


def _find(members: Iterable[Member], ranks: Mapping[str, tuple[int, int]]) -> Member | None:
    best, best_order = None, (0, "")
    for member in members:
        rank = _rank(member.extension, ranks)
        # Extensions in their alphabetical order settle what the ranks leave open.
        if rank is not None and (best is None or (rank, member.extension) < best_order):
            best, best_order = member, (rank, member.extension)
    return best


def _prefix(member: Member) -> str:
    """Return what stands before the last extension: `left` of `left.jpg`, nothing for `jpg`."""
    return member.extension.rpartition(".")[0]


def tool_file(name: str) -> str | None:
    """Return the kind of a member that a tool added to the folder, such as an AppleDouble file; None for others."""
    match = _TOOL_FILE.search(name)
    if match is None:
        return None
    return "metadata of macOS" if match[1] else "a file of a file browser or editor"


def extensions_of(text: str, option: str) -> tuple[str, ...]:
    """Return the extensions in a list such as `jpg;png` or `left.jpg`. Raises UserError naming `option`."""
    found = tuple(part.strip().lower().removeprefix(".") for part in re.split("[;,]", text))
    if any(not part or "/" in part for part in found):
        raise UserError(f"{option} {text}: must be extensions with ; between them, such as jpg;png")
    return found
