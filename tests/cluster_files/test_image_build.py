"""The steps of the Dockerfile, carried out in a Debian of `debootstrap` where there is no Docker; PyTorch is resolved only.

A base that is kept saves a minute: `debootstrap --variant=minbase bookworm FOLDER`, RESNET_DIST_IMAGE_BASE=FOLDER.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster_files.files import instructions
from tests.paths import ROOT

BASE_VARIABLE = "RESNET_DIST_IMAGE_BASE"
PYTHON_PACKAGES = "ca-certificates python3-pip python3-venv"  # of what the image of Python has
MIRROR = "http://deb.debian.org/debian"
SECONDS = 900.0
pytestmark = [pytest.mark.long, pytest.mark.timeout(2 * SECONDS)]
# Gigabytes of wheels are found and not downloaded: uv still chooses all versions, for this Python.
DRY_UV = """#!/bin/sh
case "$*" in "pip install"*" -r "*) exec /usr/local/bin/uv "$@" --dry-run ;; *) exec /usr/local/bin/uv "$@" ;; esac
"""


def make_base(folder: Path) -> None:
    """Make a Debian of the release that the image has; skip where its packages cannot be had."""
    command = ["debootstrap", "--variant=minbase", "bookworm", str(folder), MIRROR]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    if done.returncode:
        pytest.skip(f"debootstrap failed: {(done.stdout + done.stderr).strip().splitlines()[-1]}")


@pytest.fixture
def root() -> Iterator[Path]:
    """Yield a copy of the base, with the settings of this machine for its package indexes."""
    base = os.environ.get(BASE_VARIABLE)
    if os.geteuid() != 0 or not (base or shutil.which("debootstrap")):
        pytest.skip(
            f"needs root, and debootstrap or {BASE_VARIABLE} with the folder of a Debian that it has made"
        )
    with tempfile.TemporaryDirectory(prefix="rd", dir=Path(base).parent if base else "/var/tmp") as folder:
        copy = Path(folder) / "root"
        if base:
            subprocess.run(["cp", "-a", "--reflink=auto", base, copy], check=True)
        else:
            make_base(copy)
        for name in ("etc/resolv.conf", "etc/hosts", "etc/pip.conf", "etc/uv/uv.toml"):
            if (Path("/") / name).exists():
                (copy / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(Path("/") / name, copy / name)
        certificates = copy / "usr/local/share/ca-certificates"
        if Path("/usr/local/share/ca-certificates").is_dir():
            shutil.copytree("/usr/local/share/ca-certificates", certificates, dirs_exist_ok=True)
        (copy / "usr/local/dry").mkdir()
        (copy / "usr/local/dry/uv").write_text(DRY_UV)
        (copy / "usr/local/dry/uv").chmod(0o755)
        yield copy


def run(root: Path, step: str, **environment: str) -> str:
    """Carry out a RUN step as root of the new system, with namespaces that end with it."""
    kept = {
        name: value for name, value in os.environ.items() if re.match("PIP_|UV_|SSL_|.*_proxy$", name, re.I)
    }
    kept |= {
        "DEBIAN_FRONTEND": "noninteractive",
        "PIP_BREAK_SYSTEM_PACKAGES": "1",
        "HOME": "/root",
        **environment,
    }
    kept["PATH"] = "/usr/local/dry:/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    script = (
        f"mount -t proc proc {root}/proc && mount --rbind /dev {root}/dev && exec chroot {root} /bin/sh -c "
    )
    command = [
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "sh",
        "-c",
        script + shlex.quote(step),
    ]
    done = subprocess.run(
        command,
        env=kept,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{step}\n{done.stdout[-3000:]}"
    return done.stdout


def copy(root: Path, words: list[str]) -> None:
    *sources, target = words
    for source in sources:
        place = root / target.lstrip("/")
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, place)
        else:
            place.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / source, place / source)


def test_the_steps_of_the_image(root: Path) -> None:
    run(root, f"apt-get update -qq && apt-get install -y -qq {PYTHON_PACKAGES} && update-ca-certificates")
    environment: dict[str, str] = {}
    folder = "/"
    for name, rest in instructions():
        if name in ("ARG", "ENV"):
            pairs = [word.partition("=")[::2] for word in shlex.split(rest)]
            environment |= {key: value for key, value in pairs if key != "PATH"}
        elif name == "WORKDIR":
            folder = rest
            (root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif name == "COPY" and "--from" not in rest:
            copy(root, rest.split())
        elif name == "RUN":
            output = run(root, f"cd {folder} && {rest}", **environment)
            if " -r pyproject.toml" in rest:
                assert all(
                    f"+ {package}==" in output for package in ("torch", "ray", "mlflow", "obstore", "gcsfs")
                )
    assert run(root, "id -u ray").strip() == "1000"
    assert "g++" in run(root, "g++ --version")
    assert "/opt/venv/bin/python" in (root / "opt/package/bin/resnet-dist").read_text()[:60]
    assert list(root.glob("opt/package/lib/python3*/site-packages/resnet_dist/__init__.py"))
