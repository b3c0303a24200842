"""Trees with everything in them: the scan agrees with an independent walk, and names every file exactly once."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_dist.data.findings import Findings
from resnet_dist.data.prepare.image_folder import FolderOptions, open_image_folder
from resnet_dist.data.prepare.split import prepare_splits
from resnet_dist.data.prepare.write import PrepareOptions
from tests.data.prepare.trees import image, write, write_classes
from tests.paths import FUZZ_FACTOR

CONTENTS = {
    "0.png": image(0),
    "0.PNG": image(1),
    "1.JPG": image(2, "jpeg"),
    "2.jpg": image(3),  # a PNG
    "page.jpg": b"<html>",
    "empty.png": b"",
    "noname": image(4),
    "photo.img": image(5),
    "blob.bin": bytes(range(200)),
    "many.zip": b"PK\3\4",
    "shot.nef": b"II*\0",
    "labels.csv": b"a,b",
    "README": b"These are pictures.",
    ".hidden.png": image(6),
    "._0.png": b"\0\5\26\7",
    "Thumbs.db": b"\xd0\xcf",
    "ni\udcf1o.png": image(7),
    "two\nlines.png": image(8),
    "cafe\u0301.webp": image(9, "webp"),
}
LINKS = {
    "broken.png": "nowhere",
    "broken": "nowhere/x",
    "self": "self",
    "up": "..",
    "here": ".",
    "far": "{store}",
}
FOLDERS = ["sub", "deep", ".git", "@eaDir", "__MACOSX", ".ipynb_checkpoints", "empty folder"]

files = st.lists(st.sampled_from([*CONTENTS, *LINKS]), max_size=8, unique=True)
trees = st.recursive(
    st.fixed_dictionaries({"files": files, "folders": st.just({})}),
    lambda inner: st.fixed_dictionaries(
        {"files": files, "folders": st.dictionaries(st.sampled_from(FOLDERS), inner, max_size=3)}
    ),
    max_leaves=8,
)


def build(folder: Path, tree: dict[str, object], store: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in tree["files"]:  # type: ignore[attr-defined]
        if name in CONTENTS:
            (folder / name).write_bytes(CONTENTS[name])
        else:
            (folder / name).symlink_to(LINKS[name].format(store=store))
    for name, inner in tree["folders"].items():  # type: ignore[attr-defined]
        build(folder / name, inner, store)


def walked(folder: str, prefix: str = "", above: tuple[str, ...] = (), hidden: bool = False) -> Iterator[str]:
    """Yield every file below `folder`. Links are followed, but not in hidden folders; a loop ends with a slash."""
    above = (*above, os.path.realpath(folder))
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if not os.path.isdir(path):
            yield prefix + name
        elif hidden or name.startswith((".", "@", "__")):
            if not os.path.islink(path):
                yield from walked(path, f"{prefix}{name}/", above, True)
        elif os.path.realpath(path) in above:
            yield f"{prefix}{name}/"
        else:
            yield from walked(path, f"{prefix}{name}/", above)


def check_agrees(source: Path, used: list[str], findings: Findings) -> None:
    expected = list(walked(str(source)))
    assert len(expected) == len(set(expected))
    found = [finding.name for finding in findings.left_out + findings.passed_over]
    assert not [name for name, count in Counter(used + found).items() if count > 1]
    covered = Counter(
        name
        for name in expected
        for other in {*used, *found}
        if name == other or (other.endswith("/") and name.startswith(other))
    )
    assert [name for name in expected if covered[name] != 1] == []
    assert set(used + [name for name in found if not name.endswith("/")]) <= set(expected)
    assert len(used) + findings.num_left_out + findings.num_passed_over == len(expected)


@settings(max_examples=80 * FUZZ_FACTOR)
@given(tree=trees)
def test_every_file_is_accounted_for_once(tree: dict[str, object]) -> None:
    with tempfile.TemporaryDirectory() as place:
        source, store = Path(place).resolve() / "in", Path(place).resolve() / "store"
        write_classes(store, inner=2)
        write_classes(source, sure=1)
        build(source, {"files": tree["files"], "folders": {"cat": tree, "dog": tree}}, store)
        opened = open_image_folder(source, FolderOptions(whole_split="train", allow_empty=True))
        findings = Findings()
        findings.add(opened.findings.values())
        used = [item.name for item in opened.splits["train"]]
        assert used == sorted(used, key=lambda name: name.split("/"))
        check_agrees(source, used, findings)


def test_every_file_is_accounted_for_once_in_the_shards(tmp_path: Path) -> None:
    source, store = tmp_path / "in", tmp_path / "store"
    write_classes(store, inner=2)
    everything: dict[str, object] = {"files": [*CONTENTS, *LINKS], "folders": {}}
    tree = {"files": [*CONTENTS, *LINKS], "folders": dict.fromkeys(FOLDERS, everything)}
    build(source, {"files": [], "folders": {"cat": tree, "dog": tree}}, store)
    write(source / "stray.png", image())
    opened = open_image_folder(source, FolderOptions())
    done = prepare_splits(opened, tmp_path / "out", PrepareOptions(shards=2))
    again = prepare_splits(opened, tmp_path / "out", PrepareOptions(shards=2))  # reads the report
    expected = list(walked(str(source)))
    for prepared in (done, again):
        findings = Findings()
        findings.add(split.findings for split in prepared.values())
        assert findings.used == sum(split.index.num_samples for split in prepared.values()) > 0
        assert findings.used + findings.num_left_out + findings.num_passed_over == len(expected)
    kinds = {finding.kind for split in done.values() for finding in split.findings.left_out}
    assert {"an HTML page", "an empty file", "a broken link", "a zip file"} <= kinds
    assert json.dumps(done["train"].findings.as_json()) == json.dumps(again["train"].findings.as_json())
