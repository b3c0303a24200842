"""Other tools read our shards and we read theirs: webdataset, wids, timm's index, Ray Data."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import webdataset

from resnet_dist.data.findings import Findings
from resnet_dist.data.shards.build import build_index
from resnet_dist.data.shards.index import Index, IndexMismatch, check_shards, read_index
from resnet_dist.data.shards.names import class_names, expand, expand_braces
from resnet_dist.data.shards.reader import BadSample, ShardReader
from resnet_dist.data.shards.verify import verify_index
from resnet_dist.data.storage.cache.folder import CacheLimits
from resnet_dist.errors import UserError
from tests.data.conftest import CLASSES, encoded, picture, write_shards
from tests.data.servers import file_server


def samples(index: Index, limits: CacheLimits) -> list[tuple[bytes, int]]:
    reader = ShardReader(index, limits)
    found = [tuple(reader.read(sample_id)) for sample_id in range(index.num_samples)]
    reader.close()
    return found  # type: ignore[return-value]


def test_shards_of_webdatasets_shard_writer_with_json_labels(tmp_path: Path, limits: CacheLimits) -> None:
    with webdataset.ShardWriter(str(tmp_path / "train-%06d.tar"), maxcount=7, verbose=0) as writer:
        for number in range(25):
            name = f"dir.with.dots/{number:04d}" if number % 2 else f"{number:04d}"
            image = encoded(picture(number), "jpeg" if number % 3 else "png")
            writer.write(
                {
                    "__key__": name,
                    "json": {"label": number % CLASSES, "width": 8},
                    "left.JPG" if number % 3 else "png": image,
                    "depth.npy": bytes(100_000 if number == 5 else 10),
                }
            )
    index, findings = build_index(expand([str(tmp_path / "train-{000000..000003}.tar")]), tmp_path, limits)
    assert (index.counts, findings) == ((7, 7, 7, 4), Findings(used=25))
    expected = [(encoded(picture(n), "jpeg" if n % 3 else "png"), n % CLASSES) for n in range(25)]
    assert samples(index, limits) == expected
    assert index.classes == tuple(str(label) for label in range(CLASSES))


def test_an_index_of_wids_without_classes_or_sizes(tmp_path: Path, limits: CacheLimits) -> None:
    names = write_shards(tmp_path, (4, 5))
    value = {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "shardlist": [{"url": Path(n).name, "nsamples": c} for n, c in zip(names, (4, 5), strict=True)],
    }
    (tmp_path / "wids.json").write_text(json.dumps(value))
    with pytest.raises(IndexMismatch, match="resnet-dist index"):
        read_index(tmp_path / "wids.json")
    index, _ = build_index(expand([str(tmp_path / "wids.json")]), tmp_path / "own", limits)
    assert index.counts == (4, 5)
    assert len(samples(read_index(tmp_path / "own"), limits)) == 9
    value["shardlist"][1]["nsamples"] = 6  # type: ignore[index]
    (tmp_path / "wids.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match="has 5 samples, but the index that named it records 6"):
        build_index(expand([str(tmp_path / "wids.json")]), tmp_path / "other", limits)
    assert not (tmp_path / "other").exists()


def test_timms_info(tmp_path: Path, limits: CacheLimits) -> None:
    write_shards(tmp_path, (4, 5, 3))
    info = {
        "splits": {
            "train": {
                "name": "train",
                "filenames": ["part-00000.tar", "part-00001.tar"],
                "shard_lengths": [4, 5],
                "num_samples": 9,
            },
            "validation": {
                "name": "validation",
                "filenames": ["part-00002.tar"],
                "shard_lengths": [3],
                "num_samples": 3,
            },
        }
    }
    path = tmp_path / "_info.json"
    path.write_text(json.dumps(info))
    index, _ = build_index(expand([str(path)], "train"), tmp_path / "own", limits)
    assert index.counts == (4, 5)
    with pytest.raises(UserError, match="train, validation; name one with --split"):
        expand([str(path)])


def test_names_of_shards(tmp_path: Path) -> None:
    assert expand_braces("a-{000..002}.tar") == ["a-000.tar", "a-001.tar", "a-002.tar"]
    assert expand_braces("{x,y}/{1..2}.tar") == ["x/1.tar", "x/2.tar", "y/1.tar", "y/2.tar"]
    write_shards(tmp_path, (1, 1))
    a, b = (str(tmp_path / f"part-0000{n}.tar") for n in range(2))
    assert [shard.url for shard in expand([f"{b}::{a}"])] == [b, a]
    assert [shard.url for shard in expand([str(tmp_path)])] == [a, b]
    for wrong, message in (
        ([f"{a}::"], "empty name"),
        ([a, a], "named twice"),
        (["a-{0..9999999999}.tar"], "more than 1,000,000"),
        (["a-{0..3000000..2}.tar"], "more than 1,000,000"),
        (["a-{0..1999}-{0..1999..2}.tar"], "more than 1,000,000"),
        ([str(tmp_path / "none.json")], "no such index"),
    ):
        with pytest.raises(UserError, match=message):
            expand(wrong)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no shards in this folder"):
        expand([str(tmp_path / "empty")])


def test_names_of_commands() -> None:
    def urls(pattern: str) -> list[str]:
        return [shard.url for shard in expand([pattern])]

    assert urls("pipe:curl -s http://[::1]/a-{08..10}.tar") == [
        f"pipe:curl -s http://[::1]/a-{n}.tar" for n in ("08", "09", "10")
    ]
    assert urls("pipe:cat a.tar::pipe:cat {1..2}.tar") == [
        "pipe:cat a.tar",
        "pipe:cat 1.tar",
        "pipe:cat 2.tar",
    ]
    assert urls("https://x/a.tar::pipe:cat b.tar")[1] == "pipe:cat b.tar"
    for command in ("pipe:awk '{print $1, $2}' a.tar", "pipe:cat ${HOME}/{a,b}.tar", "pipe:{ cat a.tar; }"):
        assert urls(command) == [command]
    with pytest.raises(UserError, match="more than 1,000,000"):
        expand(["pipe:cat {0..9999999999}.tar"])


def test_a_range_with_a_step_counts_what_it_names() -> None:
    assert expand_braces("a-{0..9..2}.tar") == [f"a-{n}.tar" for n in (0, 2, 4, 6, 8)]
    assert len(expand_braces("a-{9000000..0..-100}.tar")) == 90_001
    assert len(expand_braces("a-{0000000..9999999..1000}-{0..9}.tar")) == 100_000


def test_checksums_in_capitals(tmp_path: Path, limits: CacheLimits) -> None:
    index, _ = build_index(expand(write_shards(tmp_path, (4, 5))), tmp_path, limits)
    value = json.loads((tmp_path / "index.json").read_text())
    for entry in value["shardlist"]:
        entry["sha256"] = f" {entry['sha256'].upper()}"
    (tmp_path / "index.json").write_text(json.dumps(value))
    assert read_index(tmp_path) == index
    assert verify_index(str(tmp_path), limits) == []


@pytest.mark.parametrize("style", ["wids", "timm"])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_an_index_from_elsewhere_names_no_file_here(
    tmp_path: Path, limits: CacheLimits, style: str, scheme: str
) -> None:
    [name] = write_shards(tmp_path / "mine", (4,))
    wids = {"shardlist": [{"url": scheme + name, "nsamples": 4}]}
    timm = {"splits": {"train": {"filenames": [scheme + name], "shard_lengths": [4]}}}
    served = tmp_path / "served"
    served.mkdir()
    (served / "theirs.json").write_text(json.dumps(wids if style == "wids" else timm))
    with (
        file_server(served) as server,
        pytest.raises(UserError, match=r"theirs\.json: names .*part-00000\.tar, a path"),
    ):
        expand([f"{server.url}/theirs.json"])
    assert not list((tmp_path / "mine").glob("*.idx"))
    here = expand([str(served / "theirs.json")])  # an index on this machine may name paths
    assert build_index(here, tmp_path / "out", limits)[0].counts == (4,)


def test_classes(tmp_path: Path, limits: CacheLimits) -> None:
    names = write_shards(tmp_path, (12,))
    (tmp_path / "names.txt").write_text("".join(f"class {n}\n" for n in range(CLASSES)))
    classes = class_names(str(tmp_path / "names.txt"))
    assert build_index(expand(names), tmp_path, limits, classes=classes)[0].classes[3] == "class 3"
    assert class_names("4") == ["0", "1", "2", "3"]
    with pytest.raises(UserError, match="4 names, but a label is 9"):
        build_index(expand(names), tmp_path, limits, classes=class_names("4"))
    (tmp_path / "names.txt").write_text("a\n\nb\n")
    for wrong in ("0", "nowhere.txt", str(tmp_path / "names.txt")):
        with pytest.raises(UserError, match="--classes"):
            class_names(wrong)


def test_classes_outlive_a_new_index_and_are_not_made_of_ids(tmp_path: Path, limits: CacheLimits) -> None:
    names = write_shards(tmp_path, (12,))
    build_index(expand(names), tmp_path, limits, classes=[f"class {n}" for n in range(CLASSES)])
    assert build_index(expand(names), tmp_path, limits)[0].classes[3] == "class 3"
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        writer.write({"__key__": "a", "png": encoded(picture(1)), "cls": b"1700000000"})
    with pytest.raises(UserError, match=r"a\.tar: a label is 1700000000"):
        build_index(expand([str(tmp_path / "a.tar")]), tmp_path / "own", limits)


def test_samples_without_image_or_label_are_named_and_counted(tmp_path: Path, limits: CacheLimits) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        writer.write({"__key__": "good", "png": encoded(picture(1)), "cls": b"1"})
        writer.write({"__key__": "no-label", "png": encoded(picture(2))})
        writer.write({"__key__": "no-image", "cls": b"0"})
        writer.write({"__key__": "word", "png": encoded(picture(3)), "cls": b"cat"})
    index, findings = build_index(expand([str(tmp_path)]), tmp_path, limits)
    assert (index.counts, findings.used) == ((4,), 1)
    assert [(finding.name, finding.kind, finding.detail) for finding in findings.left_out] == [
        (
            "a.tar/word",
            ".cls label is a word, not a number; --classes FILE names the classes",
            'it is "cat"',
        ),
        ("a.tar/no-label", "has no label (.cls or .json; --label-ext reads others)", ".png"),
        ("a.tar/no-image", "has no image", ".cls"),
    ]
    assert (tmp_path / "left-out.txt").read_text().count("\n") == 3
    reader = ShardReader(index, limits)
    assert reader.read(0).label == 1
    for sample_id, message in ((1, "no label"), (2, "no image"), (3, "not a number")):
        with pytest.raises(BadSample, match=message):
            reader.read(sample_id)


def test_names_with_spaces_need_no_idx(tmp_path: Path, limits: CacheLimits) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        for number in range(3):
            writer.write({"__key__": f"my photo {number}", "png": encoded(picture(number)), "cls": b"1"})
    index, _ = build_index(expand([str(tmp_path)]), tmp_path, limits)
    assert not list(tmp_path.glob("*.idx"))
    assert [image for image, _ in samples(index, limits)] == [encoded(picture(n)) for n in range(3)]


def test_names_that_are_not_ascii(tmp_path: Path, limits: CacheLimits) -> None:
    """webdataset's writer, through tarfile, puts such a name in a PAX header, and a `?` per character in the plain one."""
    names = ["café", "日本/東京", "naïve.v1"]
    for form in ("PAX_FORMAT", "GNU_FORMAT"):
        folder = tmp_path / form
        folder.mkdir()
        path = folder / "a.tar"
        with webdataset.TarWriter(str(path), encoder=False, format=form) as writer:
            for number, name in enumerate(names):
                writer.write({"__key__": name, "png": encoded(picture(number)), "cls": b"%d" % number})
        build_index(expand([str(path)]), folder, limits)
        index = read_index(folder)
        assert path.with_suffix(".idx").exists()
        check_shards(index)
        assert samples(index, limits) == [(encoded(picture(n)), n) for n in range(3)]


def test_dotted_labels(tmp_path: Path, limits: CacheLimits) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        writer.write({"__key__": "a", "v1.png": encoded(picture(0)), "v1.cls": b"3"})
        writer.write({"__key__": "b", "v1.png": encoded(picture(1)), "v1.json": b'{"label": 4}'})
    index, findings = build_index(expand([str(tmp_path)]), tmp_path, limits)
    assert findings == Findings(used=2)
    assert samples(index, limits) == [(encoded(picture(0)), 3), (encoded(picture(1)), 4)]


def test_a_set_without_a_usable_label_gets_no_index(tmp_path: Path, limits: CacheLimits) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        writer.write({"__key__": "a", "png": encoded(picture(0)), "cls": b"cat"})
        writer.write({"__key__": "b", "png": encoded(picture(1))})
    for classes in (None, ["dog"]):
        with pytest.raises(UserError, match=r"no sample .* usable label; the first: a.tar/a: .cls label is "):
            build_index(expand([str(tmp_path)]), tmp_path, limits, classes=classes)
    assert not (tmp_path / "index.json").exists()


def test_names_that_are_not_utf8_and_a_stale_idx(tmp_path: Path, limits: CacheLimits) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        for name, content in (("caf\xe9.png", encoded(picture(1))), ("caf\xe9.cls", b"1"), ("b.cls", b"0")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    stale = "v1.2 1\npng 512 10 old.png cls 1536 1 old.cls\n"
    path.with_suffix(".idx").write_text(stale)
    index, findings = build_index(expand([str(path)]), tmp_path, limits)
    assert [finding.line() for finding in findings.left_out] == ["a.tar/b: has no image (.cls)"]
    assert [finding.name for finding in findings.passed_over] == ["a.idx"]
    assert [file.name for file in tmp_path.glob("*.idx")] == ["a.idx"]
    assert path.with_suffix(".idx").read_text() == stale
    assert not list(tmp_path.glob(".*partial"))
    reader = ShardReader(index, limits)
    assert reader.read(0) == (encoded(picture(1)), 1)
    assert reader.key(0) == "a.tar/caf\\xe9"


def test_many_threads_ask_for_names_at_once(tmp_path: Path, limits: CacheLimits) -> None:
    """Without an .idx, names come from the headers, which all threads read through one open file."""
    names = write_shards(tmp_path, (30,))
    index, _ = build_index(expand(names), tmp_path, limits)
    next(tmp_path.glob("*.idx")).unlink()
    reader = ShardReader(index, limits)
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(reader.key, list(range(30)) * 4))
    assert keys == [f"part-00000.tar/sample{n:06d}" for n in range(30)] * 4


@pytest.fixture(scope="module")
def ray_data() -> Iterator[object]:
    ray = pytest.importorskip("ray")
    datasets = pytest.importorskip("ray.data")
    folder = tempfile.mkdtemp(prefix="rd-")  # a short path: Ray's sockets lie below it
    ray.init(
        num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR", _temp_dir=folder
    )
    datasets.DataContext.get_current().enable_progress_bars = False
    yield datasets
    ray.shutdown()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_ray_data_reads_ours_and_we_read_what_it_writes(
    digits_data: Path, tmp_path: Path, limits: CacheLimits, ray_data: object
) -> None:
    index = read_index(digits_data / "eval")
    ours = samples(index, limits)
    dataset = ray_data.read_webdataset([shard.url for shard in index.shards], decoder=None)  # type: ignore[attr-defined]
    rows = dataset.take_all()
    assert sorted((row["png"], int(row["cls"])) for row in rows) == sorted(ours)
    dataset.write_webdataset(str(tmp_path / "theirs"), encoder=None)
    written = [str(path) for path in sorted((tmp_path / "theirs").glob("*.tar"))]
    again, findings = build_index(expand(written), tmp_path / "own", limits)
    assert findings == Findings(used=360)
    assert sorted(samples(again, limits)) == sorted(ours)
