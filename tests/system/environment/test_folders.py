"""Caches, temporary files and Ray's sockets find a folder that works, or one sentence names the variable."""

from __future__ import annotations

import os
import pwd
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from resnet_dist.errors import UserError
from resnet_dist.system.environment import folders


@pytest.fixture
def short() -> Iterator[Path]:
    """Yield a folder with a short path: Ray's sockets must fit into it."""
    with tempfile.TemporaryDirectory(prefix="rd", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def own(short: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that is made where others cannot be used."""
    monkeypatch.setattr(folders, "PARENTS", (short / "gone", short))
    return short / f"rd-{os.getuid()}"


def closed(monkeypatch: pytest.MonkeyPatch, *paths: Path) -> None:
    """Let these folders be closed to this user: for root, permissions close none."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in paths and Path(path).exists())


def test_our_own_folder_is_of_this_user_alone(own: Path) -> None:
    assert folders.own_folder() == own
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    own.chmod(0o777)
    assert folders.own_folder() == own
    assert stat.S_IMODE(own.stat().st_mode) == 0o700


def test_a_link_or_a_file_in_its_place_is_not_used(own: Path, tmp_path: Path) -> None:
    own.symlink_to(tmp_path)
    assert folders.own_folder() is None
    own.unlink()
    own.touch()
    assert folders.own_folder() is None
    os.environ["XDG_RUNTIME_DIR"] = str(tmp_path)
    assert folders.own_folder() == tmp_path / own.name


def test_a_folder_of_somebody_else_is_not_used(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own.mkdir()
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    own.rename(own.with_name(f"rd-{uid + 1}"))
    assert folders.own_folder() is None


def use(short: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a value of TMPDIR of this kind."""
    if kind == "long":
        path = short / "slurm_jobdir" / ("x" * 40)
        path.mkdir(parents=True)
    elif kind == "spaces":
        path = short / "a b"
        path.mkdir()
    elif kind == "file":
        path = short / "f"
        path.touch()
    elif kind == "closed":
        path = short / "c"
        path.mkdir()
        closed(monkeypatch, path)
    elif kind == "ray closed":
        path = short / "o"
        (path / "ray").mkdir(parents=True)
        closed(monkeypatch, path / "ray")
    elif kind == "ray of a cluster":
        path = short / "o"
        (path / "ray").mkdir(parents=True)
        (path / "ray/ray_current_cluster").touch()
        closed(monkeypatch, path / "ray/ray_current_cluster")
    elif kind == "full":
        path = short / "full"
        path.mkdir()
        real = os.statvfs

        def statvfs(folder: Path) -> os.statvfs_result:
            values = list(real(folder))
            return (
                os.statvfs_result([*values[:2], *([10] * 3), *values[5:]]) if folder == path else real(folder)
            )

        monkeypatch.setattr(os, "statvfs", statvfs)
    else:
        return {"relative": "tmp", "missing": str(short / "gone")}[kind]
    return str(path)


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("long", "bytes too long for Ray's sockets"),
        ("relative", "is a relative path"),
        ("missing", "is missing"),
        ("file", "is not a folder"),
        ("closed", "cannot be written to"),
        ("full", "has 0 MiB left"),
        ("ray closed", "has a folder ray that cannot be written to"),
        ("ray of a cluster", "has a folder ray of somebody else's cluster"),
    ],
)
def test_ray_gets_a_folder_of_our_own(
    variable: str, kind: str, reason: str, own: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = os.environ[variable] = use(short, kind, monkeypatch)
    (line,) = folders.use_ray_folder()
    assert line.startswith(f"{variable}={value} ")
    assert reason in line
    assert line.endswith(f": Ray uses {own}")
    assert os.environ["RAY_TMPDIR"] == str(own)
    assert folders.use_ray_folder() == []  # The folder itself is one that Ray can use.


def test_a_folder_that_ray_can_use_stays(short: Path, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.environ["TMPDIR"] = use(short, "spaces", monkeypatch)
    assert folders.use_ray_folder() == []
    assert "RAY_TMPDIR" not in os.environ
    assert not own.exists()
    closed(monkeypatch, Path(os.environ["TMPDIR"]))
    (Path(os.environ["TMPDIR"]) / "ray").mkdir()  # made by an administrator
    assert folders.use_ray_folder() == []


def test_the_length_of_a_path_counts_in_bytes(own: Path) -> None:
    os.environ["TMPDIR"] = "/tmp/" + "ä" * 20
    assert "bytes too long" in folders.use_ray_folder()[0]


def test_no_folder_for_ray_is_one_sentence(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "PARENTS", (short / "gone",))
    os.environ["TMPDIR"] = str(short / "gone")
    with pytest.raises(
        UserError, match=rf"^TMPDIR={short}/gone is missing, so Ray .* set RAY_TMPDIR to .*--local$"
    ):
        folders.use_ray_folder()


def test_a_home_folder_stays_unmentioned(tmp_path: Path, own: Path) -> None:
    os.environ["HOME"] = str(tmp_path)
    assert folders.use_home() == []
    os.environ["HOME"] = str(tmp_path / "not/there/yet")
    assert folders.use_home() == []
    assert "MPLCONFIGDIR" not in os.environ


def test_without_the_variable_the_home_folder_of_the_user_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = pwd.struct_passwd(("me", "x", os.getuid(), 0, "", str(tmp_path), ""))
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: entry)
    for value in (None, ""):
        os.environ.pop("HOME", None)
        if value is not None:
            os.environ["HOME"] = value
        assert folders.use_home() == []
        assert os.environ["HOME"] == str(tmp_path)


def nobody(uid: int) -> pwd.struct_passwd:
    raise KeyError(f"getpwuid(): uid not found: {uid}")


@pytest.mark.parametrize("home", [None, ""])
def test_a_user_without_name_and_home_gets_both_caches_and_a_home(
    home: str | None, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    os.environ.pop("HOME")
    if home is not None:
        os.environ["HOME"] = home
    assert folders.use_home() == [f"HOME is not set: caches go to {own}"]
    assert Path.home() == own
    for name in folders.CACHES:
        assert os.environ[name].startswith(f"{own}/")
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    text = token.read_text()
    assert len(text) == 64
    del os.environ["RAY_AUTH_TOKEN_PATH"]
    folders.use_home()
    assert token.read_text() == text  # Another command of this user reaches the same cluster.


def test_a_user_without_name_and_with_a_home_has_a_cache_of_inductor(
    tmp_path: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    os.environ["HOME"] = str(tmp_path)
    assert folders.use_home() == []
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(own / "inductor")


@pytest.mark.parametrize("variable", ["HOME", "XDG_CACHE_HOME"])
def test_a_home_that_is_closed_is_kept_and_caches_move(
    variable: str, tmp_path: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.environ["HOME"] = str(tmp_path)
    os.environ["MPLCONFIGDIR"] = "/mine"
    (tmp_path / "closed").mkdir()
    os.environ[variable] = str(tmp_path / "closed")
    home = os.environ["HOME"]
    closed(monkeypatch, tmp_path / "closed")
    assert folders.use_home() == [f"{variable}={tmp_path}/closed cannot be written to: caches go to {own}"]
    assert os.environ["HOME"] == home  # It may hold credentials.
    assert os.environ["MPLCONFIGDIR"] == "/mine"
    assert os.environ["TORCH_HOME"] == str(own / "torch")


def test_a_token_of_the_person_stays_in_use(
    tmp_path: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "closed"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray/auth_token").write_text("secret")
    os.environ["HOME"] = str(home)
    closed(monkeypatch, home)
    assert folders.use_home()
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ


def test_no_folder_for_caches_is_one_sentence(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "PARENTS", (short / "gone",))
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    del os.environ["HOME"]
    with pytest.raises(UserError, match="^HOME is not set, and neither .*; set HOME to a folder"):
        folders.use_home()


def test_temporary_files(short: Path, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        os.environ["TMPDIR"] = str(short / "gone")
        assert folders.use_temporary() == []  # Python uses /tmp.
        with monkeypatch.context() as there:
            there.chdir("/tmp")
            assert folders.use_temporary() == []  # The working folder is no stopgap there.
        os.environ["TMPDIR"] = os.getcwd()
        assert folders.use_temporary() == []  # the choice of the person
        os.environ["TMPDIR"] = str(short / "gone")
        monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/1", os.getcwd()])
        assert folders.use_temporary() == [f"/tmp cannot be written to: temporary files go to {own}"]
        assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(own)
        monkeypatch.setattr(folders, "PARENTS", ())
        monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/1"])
        with pytest.raises(UserError, match=r"^TMPDIR=.*; set TMPDIR to a folder that can"):
            folders.use_temporary()
    finally:
        tempfile.tempdir = None
