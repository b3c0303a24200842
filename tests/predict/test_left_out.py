"""Count and name what could not be predicted; a file of rows is finished only when it is whole."""

from __future__ import annotations

import errno
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from resnet_dist.errors import UserError
from resnet_dist.predict import row_file
from resnet_dist.predict.find import find_model
from resnet_dist.predict.row_file import RowFile
from resnet_dist.system.locks import hold_lock
from resnet_dist.train.checkpoint.load import load_model
from resnet_dist.train.checkpoint.single_file import write_single_file
from tests.checkpoints import COLORED, random_checkpoint
from tests.data.images.pictures import jpeg, photo
from tests.data.servers import file_server
from tests.predict.conftest import Command
from tests.predict.test_predict import rows_of, tar_of

PHOTO = jpeg(photo(40, 30))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_shard_that_cannot_be_read_is_tried_again(
    command: Command, model: str, tmp_path: Path, name: str
) -> None:
    for shard in ("a.tar", "b.tar", "c.tar"):
        tar_of(tmp_path / shard, {"1.jpg": PHOTO, "2.jpg": PHOTO})
    whole = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[:700])
    words = ("predict", model, "a.tar", "b.tar", "c.tar", "--to", name)
    for _ in range(2):
        code, out, err = command(*words)
        assert (code, out) == (3, "")
        assert f"{name} is not finished, because 1 shard could not be read" in err
        assert "left out b.tar: a shard that cannot be read (" in err
        assert not (tmp_path / name).exists()
    (tmp_path / "b.tar").write_bytes(whole)
    assert command(*words)[:2] == (0, f"{name}: 6 rows\n")
    (tmp_path / "b.tar").write_bytes(whole[:700])
    words = ("predict", model, "b.tar", "--to", f"alone-{name}")
    assert command(*words)[0] == 3
    assert command(*words, "--allow-left-out")[:2] == (0, f"alone-{name}: 1 rows\n")
    assert "b.tar" in (tmp_path / f"alone-{name}").read_text()
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_a_second_command_does_not_write_the_same_file(command: Command, model: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(PHOTO)
    with hold_lock(tmp_path / ".rows.csv.partial.lock", 0):
        code, _, err = command("predict", model, "a.jpg", "--to", "rows.csv")
    assert (code, err.count("\n")) == (2, 1)
    assert "--to rows.csv: another command writes rows.csv.partial; wait for it" in err
    trained = load_model(model, torch.device("cpu"))
    with RowFile.open(tmp_path / "rows.csv", trained, 1) as rows:
        rows.write("input\n")
        (tmp_path / "rows.csv").write_text("another's")
        with pytest.raises(UserError, match="exists already"):
            rows.finish()
    assert (tmp_path / "rows.csv").read_text() == "another's"


@pytest.mark.parametrize("what", ["folder", "disk"])
def test_rows_that_cannot_be_written_are_one_sentence(
    command: Command, model: str, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a.jpg").write_bytes(PHOTO)
    monkeypatch.setattr(row_file, "hold_lock" if what == "folder" else "write_text_atomically", fails)
    code, out, err = command("predict", model, "a.jpg", "--to", "rows.csv")
    expected = "error: --to rows.csv: cannot be written: No space left on device; the same command resumes\n"
    assert (code, out, err) == (1, "", expected)


def test_images_that_share_a_key_and_members_of_no_sample(
    command: Command, model: str, tmp_path: Path
) -> None:
    names = ("IMG.2024.01.jpg", "IMG.2024.02.jpg", "x.jpg", "x.mask.png")
    tar_of(tmp_path / "set.tar", dict.fromkeys(names, PHOTO))
    with tarfile.open(tmp_path / "set.tar", "a") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "x.jpg"
        tar.addfile(link)
    code, out, err = command("predict", model, "set.tar", "--json")
    assert [row["input"] for row in rows_of(out)] == [
        "set.tar/IMG.2024.01",
        "set.tar/IMG.2024.02",
        "set.tar/x",
    ]
    assert "passed over: 1 another image of a sample, which is not read: set.tar/x.mask.png\n" in err
    assert "left out set.tar/link.jpg: a link in a tar" in err
    assert (code, err.splitlines()[-1]) == (3, "exit code 3: 1 left out; --allow-left-out accepts this")


def test_a_model_permits_no_commands_and_names_no_cache(command: Command, tmp_path: Path) -> None:
    tar_of(tmp_path / "set.tar", {"1.jpg": PHOTO})
    overrides = ("data.allow_commands=true", "data.shard_cache=/proc/nowhere")
    folder, recipe = random_checkpoint(tmp_path / "m", *COLORED, *overrides)
    data = load_model(folder, torch.device("cpu")).recipe.data
    assert (data.allow_commands, data.shard_cache) == (False, type(data).model_fields["shard_cache"].default)
    assert recipe.portable().data.shard_cache == data.shard_cache
    assert not recipe.portable().data.allow_commands
    code, out, err = command("predict", folder, "set.tar", "pipe:touch done; cat set.tar", "--json")
    assert (code, out, (tmp_path / "done").exists()) == (2, "", False)
    assert "pass --allow-commands" in err
    assert load_model(folder, torch.device("cpu"), allow_commands=True).recipe.data.allow_commands


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"state": {}}, "its weights do not fit its recipe: Missing key"),
        ({"classes": [1, 2]}, r"its classes are \[1, 2\]; they must be a list of names"),
        ({"classes": []}, r"its classes are \[\]"),
    ],
)
def test_a_file_that_does_not_fit_is_one_sentence(
    tmp_path: Path, model: str, change: dict[str, Any], words: str
) -> None:
    trained = load_model(model, torch.device("cpu"))
    state = change.get("state", trained.model.state_dict())
    classes = change.get("classes", trained.classes)
    write_single_file(tmp_path / "m.safetensors", state, trained.recipe.model_dump(mode="json"), classes, 7)
    with pytest.raises(UserError, match=words):
        load_model(tmp_path / "m.safetensors", torch.device("cpu"))


def test_an_exported_file_by_its_url(tmp_path: Path, model: str) -> None:
    trained, folder = load_model(model, torch.device("cpu")), tmp_path / "a b"
    folder.mkdir()
    recipe = trained.recipe.model_dump(mode="json")
    write_single_file(folder / "m.safetensors", trained.model.state_dict(), recipe, trained.classes, 7)
    with file_server(folder) as server:
        for url in (f"{server.url}/m.safetensors", (folder / "m.safetensors").as_uri()):
            found = find_model(url, str(tmp_path / "output"))
            assert load_model(found, torch.device("cpu")).classes == trained.classes
        with pytest.raises(UserError, match="none.safetensors: no such file"):
            load_model(f"{server.url}/none.safetensors", torch.device("cpu"))


def test_a_remote_folder_at_any_depth(command: Command, model: str) -> None:
    store = fsspec.filesystem("memory")
    for name in ("a.jpg", "inner/b.jpg", "README", "labels.csv", ".hidden/c.jpg"):
        store.pipe(f"/bucket/photos/{name}", PHOTO)
    code, out, err = command("predict", model, "memory://bucket/photos/", "--json")
    inputs = [str(row["input"]).rpartition("photos/")[2] for row in rows_of(out)]
    assert (code, inputs) == (0, ["a.jpg", "inner/b.jpg"]), err
    for kind in ("a text file", "a .csv file", "a file in a hidden folder or that of a tool"):
        assert f"passed over: 1 {kind}: " in err


def test_paths_on_stdin_may_hold_separators_of_unicode(
    command: Command, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["a\u2028b.jpg", "c\x85d.jpg"]
    for name in names:
        (tmp_path / name).write_bytes(PHOTO)
    content = "".join(f"{name}\r\n" for name in names).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    code, out, err = command("predict", model, "-", "--json")
    assert (code, len([json.loads(line) for line in out.splitlines()])) == (0, 2), err
