"""Folders that libraries need: the usual ones, or one of our own where those cannot be used."""

from __future__ import annotations

import os
import pwd
import secrets
import stat
import tempfile
from pathlib import Path

from resnet_dist.errors import UserError

TEMPORARY = Path("/tmp")  # Ray's default
# Those that Python uses; the working folder may be one of them.
USUAL_TEMPORARY = ("/tmp", "/var/tmp", "/usr/tmp")
# Parents of our own folder, most suitable first: the last one is the machine's memory.
PARENTS = (TEMPORARY, Path("/var/tmp"), Path("/dev/shm"))
MIN_FREE_BYTES = 32 * 2**20  # Ray's logs of a short run
# A Unix socket has a path of at most 107 bytes, of which Ray's names for a session and its sockets take these.
MAX_RAY_FOLDER_BYTES = 107 - len("/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store.0")
RAY_VARIABLE = "RAY_TMPDIR"
# The caches of libraries that would otherwise be inside the home folder, and their names in a folder of our own.
CACHES = {
    "MPLCONFIGDIR": "matplotlib",
    "TORCH_HOME": "torch",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "NUMBA_CACHE_DIR": "numba",
}
RAY_TOKEN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def own_folder() -> Path | None:
    """Return a folder of this user alone for temporary files, with a short path; None where none can be made."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    for parent in (*PARENTS, *([Path(runtime)] if os.path.isabs(runtime) else [])):
        folder = parent / f"rd-{os.getuid()}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            status = folder.lstat()  # Somebody else may have put a link or a folder of theirs there.
        except OSError:
            continue
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and problem_of(folder) is None:
            folder.chmod(0o700)
            return folder
    return None


def problem_of(folder: Path, min_free_bytes: int = MIN_FREE_BYTES) -> str | None:
    """Return the reason why no files can be written into `folder`; None where they can."""
    if not folder.is_absolute():
        return "is a relative path"
    try:
        if not folder.exists():
            return "is missing"
        if not folder.is_dir():
            return "is not a folder"
        if not os.access(folder, os.W_OK | os.X_OK):
            return "cannot be written to"
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
        space = os.statvfs(folder)
    except OSError as error:  # such as a full disk, or a parent folder that is closed to us
        return f"cannot be used ({error.strerror})"
    free = space.f_bavail * space.f_frsize
    return f"has {free // 2**20} MiB left" if free < min_free_bytes else None


def use_home() -> list[str]:
    """Let caches go to a folder of our own where there is no home folder, or none that can be written to.

    Raises UserError where there is no home folder and no other either.
    """
    home, name = _home()
    if home:
        os.environ["HOME"] = home  # Ray's native code reads nothing but the variable.
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if home and not _may_write(Path(home)):
        reason = f"HOME={home} cannot be written to"
    elif cache and not _may_write(Path(cache)):
        reason = f"XDG_CACHE_HOME={cache} cannot be written to"
    elif not home:
        reason = "HOME is not set"
    else:
        if name is None and (own := own_folder()) is not None:
            # Its default holds the user's name.
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(own / CACHES["TORCHINDUCTOR_CACHE_DIR"]))
        return []
    own = own_folder()
    if own is None:
        raise UserError(
            f"{reason}, and neither {', '.join(map(str, PARENTS))} nor XDG_RUNTIME_DIR can be; set HOME to a "
            "folder that can be written to"
        )
    for variable, folder in CACHES.items():
        os.environ.setdefault(variable, str(own / folder))
    if not home:
        os.environ["HOME"] = str(own)
    _use_own_token(own)
    return [f"{reason}: caches go to {own}"]


def _home() -> tuple[str | None, str | None]:
    """Return the home folder and the name of this user; None for what they lack."""
    try:
        entry = pwd.getpwuid(os.getuid())
    except KeyError:  # A container may run under a user id without a name.
        return os.environ.get("HOME") or None, None
    return os.environ.get("HOME") or entry.pw_dir or None, entry.pw_name


def _may_write(folder: Path) -> bool:
    """Report whether `folder` can be written to, or made."""
    existing = next((path for path in (folder, *folder.parents) if path.exists()), None)
    return existing is not None and existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _use_own_token(own: Path) -> None:
    """Give Ray a token in a folder of our own: it would write one into the home folder.

    A token in the home folder stays in use.
    """
    if any(name in os.environ for name in RAY_TOKEN_VARIABLES):
        return
    if os.access(Path(os.environ["HOME"]) / ".ray/auth_token", os.R_OK):
        return
    token = own / "ray-token"
    if not token.exists():
        partial = own / f"ray-token.{secrets.token_hex(4)}"
        partial.touch(0o600)
        partial.write_text(secrets.token_hex(32))
        partial.replace(token)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)


def use_temporary() -> list[str]:
    """Let temporary files go to a folder of our own where Python finds none but the working folder.

    Raises UserError where there is none at all.
    """
    tempfile.tempdir = None
    try:
        found = tempfile.gettempdir()
    except FileNotFoundError:
        found = None
    chosen = [os.path.abspath(os.environ[name]) for name in ("TMPDIR", "TEMP", "TMP") if os.environ.get(name)]
    if found is not None and (found != os.getcwd() or found in chosen or found in USUAL_TEMPORARY):
        return []
    own, value = own_folder(), os.environ.get("TMPDIR", "")
    if own is None:
        if found is not None:
            return []
        raise UserError(
            f"TMPDIR={value}: neither it nor {', '.join(map(str, PARENTS))} nor the working folder can be written to; "
            "set TMPDIR to a folder that can"
        )
    os.environ["TMPDIR"] = tempfile.tempdir = str(own)
    return [f"{TEMPORARY} cannot be written to: temporary files go to {own}"]


def use_ray_folder() -> list[str]:
    """Let Ray put its sockets and logs into a folder of our own where it cannot use the one that it would take.

    Raises UserError where there is none.
    """
    variable = next((name for name in (RAY_VARIABLE, "TMPDIR") if name in os.environ), None)
    parent = Path(os.environ[variable]) if variable else TEMPORARY
    problem = problem_of_ray(parent)
    if problem is None:
        return []
    shown = f"{variable}={parent}" if variable else str(parent)
    own = own_folder()
    if own is None or (remaining := problem_of_ray(own)) is not None:
        rest = f"{own} {remaining}" if own else f"neither can {', '.join(map(str, PARENTS))}"
        raise UserError(
            f"{shown} {problem}, so Ray cannot start here, and {rest}; set {RAY_VARIABLE} to a short absolute "
            "path that can be written to, or use --local"
        )
    os.environ[RAY_VARIABLE] = str(own)
    return [f"{shown} {problem}: Ray uses {own}"]


def problem_of_ray(parent: Path) -> str | None:
    """Return the reason why Ray cannot use its folder `ray` in `parent`; None where it can."""
    folder = parent / "ray"
    if (excess := len(os.fsencode(folder)) - MAX_RAY_FOLDER_BYTES) > 0:
        return (
            f"is {excess} bytes too long for Ray's sockets, which allow {MAX_RAY_FOLDER_BYTES - len('/ray')}"
        )
    if (problem := problem_of(parent)) is not None:
        # Ray's folder in it may still be usable, as where an administrator has made it.
        return problem if not folder.is_dir() or not parent.is_absolute() else problem_of(folder)
    if os.path.lexists(folder) and (problem := problem_of(folder)) is not None:
        return f"has a folder ray that {problem}"
    current = folder / "ray_current_cluster"
    if current.exists() and not os.access(current, os.W_OK):
        return "has a folder ray of somebody else's cluster"
    return None
