"""Members become samples by rules that never depend on their order, and none disappears without a count and a name."""

from __future__ import annotations

import io
import itertools
import random
import tarfile
from pathlib import Path

import pytest

from resnet_dist.data.findings import Findings
from resnet_dist.data.shards.build import IndexOptions, build_index
from resnet_dist.data.shards.index import Index, read_index
from resnet_dist.data.shards.members import Member, MemberRules, extensions_of, tool_file
from resnet_dist.data.shards.names import expand
from resnet_dist.data.shards.reader import ShardReader
from resnet_dist.data.shards.tar import TarError, group_samples
from resnet_dist.data.shards.verify import verify_index
from resnet_dist.data.storage.cache.folder import CacheLimits
from resnet_dist.errors import UserError
from tests.data.conftest import encoded, picture, write_members
from tests.paths import FUZZ_FACTOR

FULL = MemberRules(full_keys=True)
PHOTO, MASK = encoded(picture(1), "jpeg"), encoded(picture(2), "png")


def indexed(folder: Path, limits: CacheLimits, rules: MemberRules | None = None) -> tuple[Index, Findings]:
    _, findings = build_index(expand([str(folder)]), folder, limits, options=IndexOptions(rules))
    return read_index(folder), findings


def images_of(index: Index, limits: CacheLimits) -> list[bytes]:
    reader = ShardReader(index, limits)
    return [reader.read(i).image for i in range(index.num_samples)]


def counts(findings: Findings) -> tuple[int, dict[str, int], dict[str, int]]:
    value = findings.as_json()
    return value["used"], value["left_out"], value["passed_over"]  # type: ignore[return-value]


def dotted(count: int) -> list[tuple[str, bytes]]:
    return [
        member
        for n in range(count)
        for member in (
            (f"IMG.{n:04d}.cls", b"%d" % (n % 4)),
            (f"IMG.{n:04d}.png", encoded(picture(n))),
        )
    ]


def test_dotted_names_are_refused_with_the_way_out_and_read_by_full_keys(
    tmp_path: Path, limits: CacheLimits
) -> None:
    write_members(tmp_path / "0.tar", dotted(40))
    with pytest.raises(UserError, match=r"40 members share the key IMG; .*--key full"):
        indexed(tmp_path, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["0.tar"]
    index, findings = indexed(tmp_path, limits, FULL)
    assert (index.counts, index.rules, findings) == ((40,), FULL, Findings(used=40))
    assert images_of(index, limits) == [encoded(picture(n)) for n in range(40)]
    assert ShardReader(index, limits).key(7) == "0.tar/IMG.0007"
    assert verify_index(str(tmp_path), limits) == []
    assert (tmp_path / "0.tar.full.idx").exists()
    (tmp_path / "0.tar.full.idx").unlink()
    assert images_of(index, limits)[7] == encoded(picture(7))
    # The same rules are kept when the set is indexed once more, and change its digest.
    again, _ = indexed(tmp_path, limits)
    assert again == index
    assert again.digest() != Index(index.location, index.shards, index.classes).digest()


def test_some_dotted_names_among_plain_ones(tmp_path: Path, limits: CacheLimits) -> None:
    plain = [("a.cls", b"0"), ("a.png", MASK)]
    more = [(f"scan_v1.{n}.{ext}", data) for n in range(20) for ext, data in (("cls", b"1"), ("png", MASK))]
    write_members(tmp_path / "0.tar", plain + more)
    with pytest.raises(UserError, match="20 members share the key scan_v1"):
        indexed(tmp_path, limits)
    assert indexed(tmp_path, limits, FULL)[0].counts == (21,)


@pytest.mark.parametrize(
    "members",
    [
        ["s.png", "s.cls", "s.1.png", "s.1.cls"],  # a plain one, and another with a label of its own
        ["s.1.jpg", "s.1.cls", "s.2.png", "s.2.cls"],  # images of two formats
        ["s.left.jpg", "s.right.jpg", "s.cls"],
        ["s.jpg", "s.coarse.cls", "s.fine.cls"],
    ],
)
def test_several_samples_under_one_key_are_refused(
    tmp_path: Path, limits: CacheLimits, members: list[str]
) -> None:
    for order in (members, members[::-1]):
        write_members(tmp_path / "0.tar", [(name, b"1" if name.endswith("cls") else PHOTO) for name in order])
        with pytest.raises(UserError, match=r"2 members share the key s; .*--key full"):
            indexed(tmp_path, limits)


def test_one_of_several_dotted_ones_can_be_named(tmp_path: Path, limits: CacheLimits) -> None:
    members = [
        ("s.right.jpg", MASK),
        ("s.left.jpg", PHOTO),
        ("s.coarse.cls", b"0"),
        ("s.fine.cls", b"3"),
    ]
    write_members(tmp_path / "0.tar", members)
    rules = MemberRules(False, ("left.jpg",), ("fine.cls",))
    index, findings = indexed(tmp_path, limits, rules)
    assert index.rules == rules
    assert ShardReader(index, limits).read(0) == (PHOTO, 3)
    assert counts(findings)[2] == {"several images in a sample: .left.jpg is read, not .right.jpg": 1}


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["jpg", "png"], "jpg"),
        (["png", "jpeg", "webp"], "jpeg"),
        (["a.jpg", "png"], "png"),
        (["mask.png", "photo.jpg"], "photo.jpg"),
        (["tif", "b.png", "c.jpg"], "tif"),
        (["gif", "ppm", "avif"], "gif"),
    ],
)
def test_the_choice_among_several_images_is_one_of_preference(names: list[str], chosen: str) -> None:
    for order in itertools.permutations(names):
        members = [Member(extension, 512, 1, f"k.{extension}") for extension in order]
        found = MemberRules().image(members)
        assert found is not None
        assert found.extension == chosen


@pytest.mark.parametrize("image_ext", [None, "png;jpg"])
def test_photo_and_mask_in_any_order(tmp_path: Path, limits: CacheLimits, image_ext: str | None) -> None:
    members: list[tuple[str, bytes]] = []
    for n in range(12):
        pair = [(f"{n}.jpg", PHOTO), (f"{n}.png", MASK)]
        members += [(f"{n}.cls", b"0"), *(pair if n % 2 else pair[::-1])]
    write_members(tmp_path / "0.tar", members)
    rules = MemberRules(image_extensions=extensions_of(image_ext, "--image-ext")) if image_ext else None
    index, findings = indexed(tmp_path, limits, rules)
    assert images_of(index, limits) == [MASK if image_ext else PHOTO] * 12
    read, other = (".png", ".jpg") if image_ext else (".jpg", ".png")
    assert counts(findings) == (12, {}, {f"several images in a sample: {read} is read, not {other}": 12})
    assert verify_index(str(tmp_path), limits) == []


def test_members_that_lie_apart_are_told_from_missing_ones(tmp_path: Path, limits: CacheLimits) -> None:
    near = [member for n in range(5) for member in ((f"{n}.png", MASK), (f"{n}.cls", b"1"))]
    far = [*((f"{n}.png", MASK) for n in range(5, 8)), *((f"{n}.cls", b"1") for n in range(5, 8))]
    folders = [("images/8.png", MASK), ("labels/8.cls", b"1")]
    missing = [("9.png", MASK), ("9.npy", b"x"), ("10.txt", b"x"), ("10.npy", b"x"), ("11.cls", b"0")]
    write_members(tmp_path / "0.tar", near + far + folders + missing)
    _, findings = indexed(tmp_path, limits)
    assert counts(findings) == (
        5,
        {
            "its label lies elsewhere in the tar: members of a sample must lie together (tar --sort=name)": 3,
            "its label lies in another folder of the tar: members of a sample need the same folder and name": 1,
            "has no label (.cls or .json; --label-ext reads others)": 1,
            "has no image": 2,
        },
        {"members that lie apart from their image": 4},
    )
    lines = [finding.line() for finding in findings.left_out if finding.kind.startswith("has no")]
    assert lines == [
        "0.tar/9: has no label (.cls or .json; --label-ext reads others) (.png, .npy)",
        "0.tar/10: has no image (.txt, .npy)",
        "0.tar/11: has no image (.cls)",
    ]


def test_a_tar_in_the_order_of_the_file_system_is_refused_once(tmp_path: Path, limits: CacheLimits) -> None:
    images, labels = [(f"{n}.png", MASK) for n in range(60)], [(f"{n}.cls", b"0") for n in range(60)]
    write_members(tmp_path / "0.tar", images + labels)
    with pytest.raises(
        UserError, match=r"the first: 0.tar/0: its label lies elsewhere .*tar --sort=name"
    ) as caught:
        indexed(tmp_path, limits)
    assert "\n" not in str(caught.value)


def test_files_of_tools_links_and_metadata_are_counted(tmp_path: Path, limits: CacheLimits) -> None:
    path = tmp_path / "0.tar"
    members: list[tuple[str, bytes]] = [("__meta__/a.json", b"{}"), ("README", b"x"), (".DS_Store", b"x")]
    for n in range(3):
        members += [
            (f"set/._{n}.cls", b"\0\5\x16\7"),
            (f"set/{n}.cls", b"1"),
            (f"set/._{n}.jpg", b"\0\5\x16\7"),
            (f"__MACOSX/set/._{n}.jpg", b"\0\5\x16\7"),
            (f"set/{n}.jpg", PHOTO),
        ]
    write_members(path, members)
    with tarfile.open(path, "a") as tar:
        for name, kind in (
            ("set/9.jpg", tarfile.LNKTYPE),
            ("latest", tarfile.SYMTYPE),
            ("set", tarfile.DIRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "set/0.jpg"
            tar.addfile(info)
    index, findings = indexed(tmp_path, limits)
    assert index.counts == (3,)
    assert counts(findings) == (
        3,
        {"a link in a tar, which holds no bytes": 1},
        {
            "metadata of macOS": 10,
            "metadata of webdataset": 1,
            "a name without key or extension": 1,
            "a link in a tar, which holds no bytes": 1,
        },
    )
    assert images_of(index, limits) == [PHOTO] * 3


def test_every_format_is_an_image_and_empty_ones_are_not(tmp_path: Path, limits: CacheLimits) -> None:
    extensions = ["jpg", "jfif", "png", "ppm", "tif", "TIFF", "gif", "avif", "bmp", "webp", "jp2"]
    members = [m for n, ext in enumerate(extensions) for m in ((f"{n}.{ext}", MASK), (f"{n}.cls", b"0"))]
    write_members(tmp_path / "0.tar", [*members, ("empty.png", b""), ("empty.cls", b"0")])
    _, findings = indexed(tmp_path, limits)
    assert counts(findings) == (len(extensions), {"an empty image": 1}, {})


def test_strict_leaves_nothing_behind(tmp_path: Path, limits: CacheLimits) -> None:
    write_members(tmp_path / "in/0.tar", [("0.png", MASK), ("0.cls", b"0"), ("1.png", MASK)])
    shards = expand([str(tmp_path / "in")])
    with pytest.raises(UserError, match=r"1 would be left out: 1 has no label .*0.tar/1"):
        build_index(shards, tmp_path / "out.json", limits, options=IndexOptions(strict=True))
    assert {path.name for path in tmp_path.rglob("*")} <= {"in", "0.tar", "cache"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("._x.jpg", "metadata of macOS"),
        ("a/._x.jpg", "metadata of macOS"),
        ("__MACOSX/a/x.jpg", "metadata of macOS"),
        ("a/.DS_Store", "metadata of macOS"),
        ("a/Thumbs.db", "a file of a file browser or editor"),
        ("a/@eaDir/x.jpg", "a file of a file browser or editor"),
        ("a/.ipynb_checkpoints/x-checkpoint.jpg", "a file of a file browser or editor"),
        ("a/x.jpg", None),
        ("a_.x.jpg", None),
        ("home/.cache/x.jpg", None),
        ("my__MACOSX/x.jpg", None),
    ],
)
def test_files_of_tools(name: str, expected: str | None) -> None:
    assert tool_file(name) == expected


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.b.png", ("a.b", "png")),
        ("d.v1/a.PNG", ("d.v1/a", "png")),
        ("d.v1/a", None),
        (".hidden", None),
        ("d/.hidden.png", ("d/.hidden", "png")),
        ("a.", ("a", "")),
    ],
)
def test_full_keys(name: str, parts: tuple[str, str] | None) -> None:
    assert FULL.split(name) == parts


@pytest.mark.parametrize("text", ["", ";", "a/b", "jpg;;png"])
def test_lists_of_extensions(text: str) -> None:
    assert extensions_of(".JPG; png", "--image-ext") == ("jpg", "png")
    with pytest.raises(UserError, match="--image-ext"):
        extensions_of(text, "--image-ext")


def random_members(generator: random.Random) -> list[tuple[str, bytes, bytes]]:
    """Return names, kinds and contents of a tar that holds a bit of everything."""
    names = ["a", "b", "c/a", "c/._a", "__MACOSX/a", "d.1", "README", "__x__/m", ".h", "d/@eaDir/t"]
    extensions = ["png", "jpg", "cls", "json", "txt", "1.png", "2.png", "2.cls", ""]
    contents = [MASK, b"", b"1", b"cat", b"-1", b'{"label": 2}', b"{}", b"\xef\xbb\xbf3"]
    kinds = [tarfile.REGTYPE] * 12 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE]
    found = [("good.png", tarfile.REGTYPE, MASK), ("good.cls", tarfile.REGTYPE, b"1")]
    noise = [
        (
            f"{generator.choice(names)}{generator.randrange(4)}.{generator.choice(extensions)}".rstrip("."),
            generator.choice(kinds),
            generator.choice(contents),
        )
        for _ in range(generator.randrange(1, 14))
    ]
    if generator.random() < 0.7:
        noise = sorted({name: (name, kind, content) for name, kind, content in noise}.values())
    elif generator.random() < 0.3:
        noise.append(noise[-1])
    return found + noise


@pytest.mark.parametrize("rules", [MemberRules(), FULL])
def test_every_member_is_in_a_sample_or_in_the_account(
    tmp_path: Path, limits: CacheLimits, rules: MemberRules
) -> None:
    """Compare the account of random tars with a walk of our own through their entries."""
    path, outcomes = tmp_path / "0.tar", set()
    for number in range(80 * FUZZ_FACTOR):
        members = random_members(random.Random(number))
        with tarfile.open(path, "w") as tar:
            for name, kind, content in members:
                info = tarfile.TarInfo(name)
                info.type, info.size = kind, len(content) if kind == tarfile.REGTYPE else 0
                tar.addfile(info, io.BytesIO(content))
        in_tar = Findings()
        try:
            with path.open("rb") as file:
                samples = list(group_samples(file, "0.tar", rules, in_tar))
            index, findings = build_index(
                expand([str(path)]), tmp_path, limits, options=IndexOptions(rules, allow_empty=True)
            )
        except UserError as error:  # twice in one sample, several samples under one key, nothing to use
            outcomes.add("damaged" if isinstance(error, TarError) else "refused")
            continue
        outcomes.add("indexed")
        files = sum(kind != tarfile.DIRTYPE for _, kind, _ in members)
        assert files == sum(map(len, samples)) + in_tar.num_left_out + in_tar.num_passed_over
        apart = counts(findings)[2].get("members that lie apart from their image", 0)
        links = in_tar.num_left_out
        assert len(samples) == index.num_samples == findings.used + findings.num_left_out - links + apart
        # What the index counts as used can be read, and nothing else.
        reader, readable = ShardReader(index, limits), 0
        for sample_id in range(index.num_samples):
            try:
                sample = reader.read(sample_id)
            except Exception:
                continue
            readable += sample.label >= 0 and len(sample.image) > 0
        assert readable == findings.used
    assert outcomes >= {"damaged", "indexed"}
