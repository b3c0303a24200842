"""Headers that are read directly: the members, and the errors, are those that tarfile finds."""

from __future__ import annotations

import io
import random
import tarfile
from unittest import mock

import pytest

from resnet_dist.data.findings import Findings
from resnet_dist.data.shards import tar
from resnet_dist.data.shards.tar import TarError, group_samples

NAMES = ("a", "b.b", "dir/a", "äö", "x" * 99, "x" * 100, "x" * 120, "d/" * 60 + "k", "a b", "end/", ".hid")
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
TYPES = (*[tarfile.REGTYPE] * 10, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE)
SIZES = (0, 1, 511, 512, 513, 1500)
NO_END = "no end"  # in place of both sentences about a tar that ends with the content of its last member


def odd_tar(rng: random.Random) -> bytes:
    """Return a tar with long names, other types and formats, half of the time damaged or cut off."""
    buffer, form = io.BytesIO(), rng.choice(FORMATS)
    comment = {"comment": "hello"} if form == tarfile.PAX_FORMAT and rng.random() < 0.3 else None
    with tarfile.open(fileobj=buffer, mode="w", format=form, pax_headers=comment) as archive:
        for number in range(rng.randrange(6)):
            for extension in rng.sample([".jpg", ".cls", ".json", ""], 2):
                info = tarfile.TarInfo(f"{rng.choice(NAMES)}{number}{extension}")
                info.type = rng.choice(TYPES)
                info.size = rng.choice(SIZES) if info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) else 0
                info.linkname = "other" if info.type == tarfile.SYMTYPE else ""
                if form == tarfile.PAX_FORMAT and rng.random() < 0.1:
                    info.pax_headers = {"mtime": "1.5"}
                if form == tarfile.USTAR_FORMAT and len(info.name) > 90:
                    continue
                archive.addfile(info, io.BytesIO(rng.randbytes(info.size)))
    content = bytearray(buffer.getvalue())
    match rng.randrange(8):
        case 0 | 1:
            content[rng.randrange(min(len(content), 6000))] = rng.randrange(256)
        case 2:
            content = content[: rng.randrange(len(content) + 1)]
        case 3:
            content += b"x" * rng.randrange(2000)
    return bytes(content)


def read(content: bytes) -> tuple[object, str]:
    findings = Findings()
    try:
        return list(group_samples(io.BytesIO(content), "set.tar", findings=findings)), repr(vars(findings))
    except TarError as error:
        text = str(error)
        return None, NO_END if text.endswith(("unexpected end of data", "no end marker")) else text


@pytest.mark.parametrize("seed", range(3))
def test_members_and_errors_are_those_of_tarfile(seed: int) -> None:
    rng = random.Random(seed)
    plain = tar._plain_member
    direct, num_read, num_refused = [], 0, 0

    def counted(file: io.BytesIO, start: int) -> tarfile.TarInfo | None:
        found = plain(file, start)
        direct.append(found is not None)
        return found

    for _ in range(300):
        content = odd_tar(rng)
        with mock.patch.object(tar, "_plain_member", counted):
            found = read(content)
        with mock.patch.object(tar, "_plain_member", return_value=None):
            assert found == read(content)
        num_read += found[0] is not None
        num_refused += found[0] is None
    assert min(num_read, num_refused, sum(direct)) > 30
