"""The servers of a cluster, each on a host of its own: S3, MLflow on PostgreSQL, nginx with shards."""

from __future__ import annotations

import http.client
import importlib.util
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.hosts import TEMPORARY, Host, wait_until
from tests.cluster.ray_hosts import PYTHON
from tests.data.servers import nginx_configuration
from tests.s3_server import variables as variables_of_s3

S3_PORT, MLFLOW_PORT, WEB_PORT, POSTGRES_PORT = 9000, 5000, 8080, 5432
POSTGRES_USER = "nobody"  # PostgreSQL refuses to run as root.
SECONDS = 180.0  # limit for the start of a server, on a busy machine

Wait = Callable[[], None]  # until the server answers


def require_servers() -> None:
    """Skip the test, with the name of what is missing."""
    for module in ("moto.server", "obstore", "s3fs", "psycopg2"):
        pytest.importorskip(module, reason=f"needs {module.partition('.')[0]}")
    if shutil.which("nginx") is None:
        pytest.skip("needs nginx (apt-get install nginx-light)")
    if postgres_programs() is None:
        pytest.skip("needs PostgreSQL (apt-get install postgresql)")


def postgres_programs() -> Path | None:
    """Return the folder with the programs of the newest PostgreSQL; None where there is none."""
    return max((path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")), default=None)


def start_s3(host: Host) -> tuple[dict[str, str], Wait]:
    """Start an S3 server; return the variables of its users."""
    host.start([PYTHON, "-W", "ignore", "-m", "moto.server", "-H", "0.0.0.0", "-p", str(S3_PORT)])
    return variables_of_s3(f"http://{host.address}:{S3_PORT}"), lambda: _wait_for(host, S3_PORT)


def make_bucket(host: Host, name: str) -> None:
    connection = http.client.HTTPConnection(host.address, S3_PORT, timeout=60)
    connection.request("PUT", f"/{name}")
    assert connection.getresponse().status == 200
    connection.close()


def start_mlflow(host: Host) -> tuple[str, Wait]:
    """Start PostgreSQL, and an MLflow server on it; return its address."""
    programs, data = postgres_programs(), host.folder / "postgres"
    data.mkdir()
    shutil.chown(data, POSTGRES_USER)
    as_user = ["setpriv", f"--reuid={POSTGRES_USER}", "--clear-groups"]
    place = ["-D", str(TEMPORARY / "postgres")]
    host.run(
        [
            *as_user,
            f"{programs}/initdb",
            *place,
            "-A",
            "trust",
            "-U",
            "mlflow",
            "--locale=C",
            "--encoding=UTF8",
            "--no-sync",
        ]
    )
    options = ("listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off")
    host.start([*as_user, f"{programs}/postgres", *place, *(f"--{option}" for option in options)])
    host.wait_for("ready to accept connections", SECONDS)
    store = f"postgresql+psycopg2://mlflow@127.0.0.1:{POSTGRES_PORT}/postgres"
    command = [PYTHON, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
    command += [
        "--artifacts-destination",
        f"{TEMPORARY}/artifacts",
        "--host",
        "0.0.0.0",
        "--port",
        str(MLFLOW_PORT),
    ]
    # The driver of PostgreSQL need not lie where the other packages do.
    driver = importlib.util.find_spec("psycopg2")
    assert driver is not None
    assert driver.origin is not None
    variables = {
        "PYTHONPATH": str(Path(driver.origin).parent.parent),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    host.start(command, variables)
    return f"http://{host.address}:{MLFLOW_PORT}", lambda: _wait_for(host, MLFLOW_PORT)


def start_nginx(host: Host, files: Path) -> tuple[str, Wait]:
    """Serve a copy of a folder; return its address."""
    shutil.copytree(files, host.folder / "files")
    text = nginx_configuration(TEMPORARY / "files", TEMPORARY, f"0.0.0.0:{WEB_PORT}")
    (host.folder / "nginx.conf").write_text(text)
    host.start(["nginx", "-p", str(TEMPORARY), "-c", str(TEMPORARY / "nginx.conf")])
    return f"http://{host.address}:{WEB_PORT}", lambda: _wait_for(host, WEB_PORT)


def _wait_for(host: Host, port: int) -> None:
    def answers() -> bool:
        with suppress(OSError), socket.create_connection((host.address, port), timeout=1):
            return True
        return False

    wait_until(answers, SECONDS, lambda: f"nothing listens on {host.name}:{port}\n{host.output()[-3000:]}")
