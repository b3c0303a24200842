"""One file of a folder → an image that is not read yet, or a finding with the reason.

An image's extension is trusted here, so that a large folder is not opened file by file: its bytes decide when it is
read to be written. A file of another name is an image where its first bytes say so.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import dataclass

from resnet_dist.data.findings import Findings
from resnet_dist.data.images.formats import HEAD_BYTES, IMAGE_EXTENSIONS, PPM, describe, format_of

TOOL_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"))
_IMAGE_EXTENSIONS = frozenset(IMAGE_EXTENSIONS)
# Extensions of what lies beside images and is none of them.
_TEXT = re.compile(
    "txt|[ct]sv|jsonl?|xml|html?|md|rst|tex|ya?ml|toml|ini|cfg|conf|log|py|sh|ipynb|url|lnk|xmp|aae|rtf|"
    "docx?|xlsx?|pptx?|od[tsp]"
)
_BACKUP = re.compile("bak|old|orig|swp|tmp|jpe?g_original")
_UNFINISHED = re.compile("part|partial|crdownload|download|filepart|aria2")
# A camera's raw file is a TIFF by its first bytes; Pillow would take the thumbnail in it for the image.
_RAW = re.compile("arw|cr2|cr3|crw|dng|erf|kdc|mrw|nef|nrw|orf|pef|raf|raw|rw2|sr2|srf|srw")
# White space and comments, then the width: a text that begins with "P1 shows a cat" is no image.
_PPM_START = re.compile(rb"P[1-6](\s|#[^\r\n]*([\r\n]|$))+(\d|$)")
_READMES = frozenset(("README", "LICENSE", "COPYING", "NOTICE", "CHANGELOG", "MANIFEST"))
_TEXT_KINDS = ("a text file", "an XML or SVG file", "a JSON file")  # as `describe` names them


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image that is not read yet."""

    path: str
    name: str  # relative to the source
    extension: str  # without a dot, in lower case; of its format where the name has none of an image
    num_bytes: int


def read_file(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def judge(entry: os.DirEntry[str], name: str, findings: Findings, *, in_class: bool) -> ImageFile | None:
    """Return the image at `entry`; record anything else and return None."""
    reason = _reason_to_pass_over_file(entry.name)
    if reason is not None:
        findings.pass_over(name, reason)
        return None
    extension = _extension(entry.name)
    is_text = _TEXT.fullmatch(extension) is not None
    record = findings.pass_over if is_text else findings.leave_out
    try:
        info = entry.stat()
    except OSError as error:
        record(name, *_why_not(entry, error))
        return None
    if not stat.S_ISREG(info.st_mode):
        record = findings.leave_out if extension in _IMAGE_EXTENSIONS else findings.pass_over
        record(name, "a pipe, socket or device")
        return None
    if extension in _IMAGE_EXTENSIONS and info.st_size:
        return ImageFile(entry.path, name, extension, info.st_size)
    if _RAW.fullmatch(extension):
        findings.leave_out(name, f"a camera's raw file, .{extension}")
        return None
    if _UNFINISHED.fullmatch(extension):
        findings.leave_out(name, f"an unfinished download, .{extension}")
        return None
    return _judge_by_bytes(entry, name, extension, info.st_size, findings, in_class=in_class)


def judge_name(file_name: str, name: str, findings: Findings) -> bool:
    """Report whether a file may be an image by its name alone; record it as `name` where it is none."""
    reason, extension = _reason_to_pass_over_file(file_name), _extension(file_name)
    if reason is None and _TEXT.fullmatch(extension):
        reason = f"a .{extension} file"
    if reason is None and file_name.upper() in _READMES:
        reason = "a text file"
    if reason is not None:
        findings.pass_over(name, reason)
        return False
    if _RAW.fullmatch(extension):
        findings.leave_out(name, f"a camera's raw file, .{extension}")
    elif _UNFINISHED.fullmatch(extension):
        findings.leave_out(name, f"an unfinished download, .{extension}")
    else:
        return bool(file_name)  # The entry of a folder itself ends with a slash.
    return False


def _judge_by_bytes(
    entry: os.DirEntry[str], name: str, extension: str, num_bytes: int, findings: Findings, *, in_class: bool
) -> ImageFile | None:
    """Return the image at `entry` if its first bytes are one's; record anything else and return None."""
    is_text = _TEXT.fullmatch(extension) is not None
    try:
        with open(entry.path, "rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        (findings.pass_over if is_text else findings.leave_out)(name, *_why_not(entry, error))
        return None
    form = format_of(head)
    if form is PPM and not _PPM_START.match(head):
        form = None
    if form is not None:
        return ImageFile(entry.path, name, form.extensions[0], num_bytes)
    kind, _, detail = describe(head).partition(" (")
    if is_text:
        findings.pass_over(name, f"a .{extension} file")
    elif (kind in _TEXT_KINDS and extension != "svg") or not (in_class or extension in _IMAGE_EXTENSIONS):
        findings.pass_over(name, f"a .{extension} file" if extension else kind)
    else:
        findings.leave_out(name, kind, detail.removesuffix(")"))
    return None


def _extension(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()


def _reason_to_pass_over_file(name: str) -> str | None:
    if name.startswith("._"):
        return "an AppleDouble file"
    if name.startswith("."):
        return "a hidden file"
    if name.lower() in TOOL_FILES:
        return "a file of a tool"
    if name.endswith("~") or _BACKUP.fullmatch(_extension(name)):
        return "a backup copy"
    return None


def _why_not(entry: os.DirEntry[str], error: OSError) -> tuple[str, str]:
    """Return kind and detail of a file that cannot be looked at."""
    if isinstance(error, PermissionError):
        return "no permission to read it", ""
    if entry.is_symlink() and (isinstance(error, FileNotFoundError) or error.errno == errno.ELOOP):
        return "a broken link", f"to {os.readlink(entry.path)}"
    return "a file that cannot be read", str(error.strerror)
