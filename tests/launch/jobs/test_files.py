"""The folder that travels with a job: what is sent and what is not, the same package for the same files, the limit."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from resnet_dist.config import Recipe
from resnet_dist.driver.preflight import absolute_paths
from resnet_dist.errors import UserError
from resnet_dist.launch.jobs import files
from resnet_dist.launch.jobs.files import pack, read_working_folder
from resnet_dist.launch.ray_cluster.job import RECIPE_FILE, START_FILE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with files that are sent, and some that are not."""
    made = tmp_path / "mine"
    for name in (
        "recipe.py",
        "weights/start.safetensors",
        "weights/huge.bin",
        "images/cat/1.png",
        ".git/config",
        "images/.gitignore",
        "images/cache/1.npy",
        "__pycache__/recipe.pyc",
        "output/runs/first/run.json",
        "notes/a.tmp",
    ):
        path = made / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (made / ".rayignore").write_text("/notes\n")
    (made / "images/.gitignore").write_text("cache/\n")
    (made / "broken").symlink_to(made / "nowhere")
    (made / "images/up").symlink_to(made)
    return made


def test_what_is_sent_and_what_is_left_out(folder: Path) -> None:
    working = read_working_folder(folder, ["*.bin"])
    assert sorted(working.files) == [
        ".rayignore",
        "images/.gitignore",
        "images/cat/1.png",
        "recipe.py",
        "weights/start.safetensors",
    ]
    assert set(working.left_out) == {
        ".git/",
        "__pycache__/",
        "broken",
        "images/cache/",
        "images/up/",
        "notes/",
        "output/",
        "weights/huge.bin",
    }
    line = working.summary()
    assert line.startswith(f"sending 5 files ({working.num_bytes} bytes) of {folder}; left out: .git/, ")
    assert line.endswith(" and 3 more")


def test_an_output_folder_of_another_kind_is_sent(tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output/labels.txt").write_text("x")
    assert list(read_working_folder(tmp_path).files) == ["output/labels.txt"]


def test_the_package_has_the_files_the_recipe_and_the_script(folder: Path, tmp_path: Path) -> None:
    (folder / "recipe.json").write_text("mine")
    (folder / "recipe.py").chmod(0o755)
    working = read_working_folder(folder, ["*.bin"])
    first, second = tmp_path / "1.zip", tmp_path / "2.zip"
    pack(first, "ours", working)
    os.utime(folder / "recipe.py", (1, 1))
    pack(second, "ours", read_working_folder(folder, ["*.bin"]))
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as package:
        assert set(package.namelist()) == {*working.files, RECIPE_FILE, START_FILE}
        assert package.read(RECIPE_FILE) == b"ours"
        assert package.read("recipe.json") == b"mine"
        assert package.getinfo("recipe.py").external_attr >> 16 & 0o111


def test_a_folder_over_the_limit_is_refused_with_its_largest_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "weights/huge.bin").write_bytes(bytes(5000))
    monkeypatch.setattr(files, "MAX_BYTES", 4096)
    with pytest.raises(UserError) as refused:
        read_working_folder(folder)
    assert "and Ray takes less than 4.0 KiB; the largest files: weights/huge.bin (4.9 KiB), " in str(
        refused.value
    )
    assert read_working_folder(folder, ["huge.bin"]).num_bytes < 4096


@pytest.mark.parametrize("name", ["torch.py", "queue/__init__.py", "mlflow/__init__.py"])
def test_a_file_that_hides_a_library_is_refused(name: str, folder: Path) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    top = name.partition("/")[0]
    with pytest.raises(UserError, match=f"{top} has the name of a library, which no rank could import"):
        read_working_folder(folder)
    assert name not in read_working_folder(folder, [f"/{top}"]).files


def test_a_library_is_found_behind_one_that_is_left_out(folder: Path) -> None:
    (folder / "queue.py").write_text("")
    (folder / "torch").mkdir()
    (folder / "torch/__init__.py").write_text("")
    with pytest.raises(UserError, match="torch has the name of a library"):
        read_working_folder(folder, ["/queue.py"])


def test_a_folder_that_cannot_be_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = os.access

    def access(path: Path, mode: int) -> bool:
        return path not in closed and allowed(path, mode)

    monkeypatch.setattr(os, "access", access)
    closed = {folder / "images/cat"}
    with pytest.raises(
        UserError, match=r"images/cat cannot be read \(no permission\); --exclude images/cat leaves it out"
    ):
        read_working_folder(folder)
    assert "images/cat/" in read_working_folder(folder, ["images/cat"]).left_out
    closed = {folder}
    with pytest.raises(UserError, match="it cannot be read"):
        read_working_folder(folder)


def test_a_folder_that_cannot_be_sent(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, reason in (
        (tmp_path / "none", "no such folder"),
        (tmp_path / "file", "it is no folder"),
    ):
        with pytest.raises(UserError, match=f"--working-dir {path}: {reason}"):
            read_working_folder(path)
    with pytest.raises(UserError, match="it has no file to send; left out: file"):
        read_working_folder(tmp_path, ["*"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_cannot_be_read(folder: Path) -> None:
    (folder / "recipe.py").chmod(0)
    with pytest.raises(UserError, match=r"recipe\.py cannot be read \(no permission\)"):
        read_working_folder(folder)


def test_paths_of_a_recipe_inside_the_folder_become_relative(
    digits_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine/images/cat").mkdir(parents=True)
    (tmp_path / "mine/images/cat/1.png").write_text("")
    (tmp_path / "mine/start").write_text("")
    changes = [
        "data.source=mine/images",
        "model.init_from=mine/../mine/start",
        "data.train=other/train",
        "data.eval=mine/eval",  # It is not there: the cluster would prepare it in a copy that Ray removes.
    ]
    for folder in (Path("mine"), Path("mine/../mine"), tmp_path / "mine"):
        recipe = absolute_paths(digits_recipe.with_overrides(changes), read_working_folder(folder).sent)
        assert (recipe.data.source, recipe.model.init_from) == ("images", "start")
        assert recipe.data.train == f"{tmp_path}/other/train"
        assert recipe.data.eval == f"{tmp_path}/mine/eval"
    without = absolute_paths(
        digits_recipe.with_overrides(changes), read_working_folder(Path("mine"), ["start"]).sent
    )
    assert without.model.init_from == f"{tmp_path}/mine/start"
