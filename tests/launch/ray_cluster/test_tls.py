"""A cluster that speaks TLS is checked as one without it: joined with its files, and named within seconds without them."""

from __future__ import annotations

import datetime
import ipaddress
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from resnet_dist.errors import UserError
from resnet_dist.launch.ray_cluster import gcs
from resnet_dist.launch.ray_cluster.check import find_cluster
from resnet_dist.launch.ray_cluster.tls import AUTHORITY, CERTIFICATE, KEY, TLS_VARIABLE
from tests.launch.ray_cluster import servers

SAME = (version("ray"), platform.python_version())


def self_signed(folder: Path) -> dict[str, Path]:
    """Write a certificate for 127.0.0.1, which is its own authority, and its key; return the files by variable."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ray")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    folder.mkdir()
    files = {CERTIFICATE: folder / "cert.pem", KEY: folder / "key.pem", AUTHORITY: folder / "cert.pem"}
    files[CERTIFICATE].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    files[KEY].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return files


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Return the files of a cluster with TLS, which the variables of this shell name."""
    monkeypatch.setattr("ray._private.services.find_node_ids", lambda: {servers.NODE_ID.hex()})
    monkeypatch.setattr(gcs, "CALL_SECONDS", 1.0)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    files = self_signed(tmp_path / "cluster")
    monkeypatch.setenv(TLS_VARIABLE, "1")
    for name, path in files.items():
        monkeypatch.setenv(name, str(path))
    return files


def with_tls(files: dict[str, Path], versions: tuple[str, str] = SAME) -> Any:
    """Return a context with the GCS of a cluster that asks for certificates and shows its own, as Ray's does."""
    pair = (files[KEY].read_bytes(), files[CERTIFICATE].read_bytes())
    credentials = grpc.ssl_server_credentials([pair], files[AUTHORITY].read_bytes(), require_client_auth=True)
    return servers.gcs(versions, credentials=credentials)


def refusal(port: int) -> str:
    with pytest.raises(UserError) as caught:
        find_cluster(f"127.0.0.1:{port}")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_cluster_with_tls_is_checked_and_joined(files: dict[str, Path]) -> None:
    with with_tls(files) as (port, _):
        assert find_cluster(f"127.0.0.1:{port}") == f"127.0.0.1:{port}"
    with with_tls(files, ("2.9.0", SAME[1])) as (port, _):
        assert "that cluster runs Ray 2.9.0" in refusal(port)


def test_files_that_are_missing_or_of_another_cluster(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with with_tls(files) as (port, _):
        other = self_signed(tmp_path / "other")
        for name, path in other.items():
            monkeypatch.setenv(name, str(path))
        assert "over TLS, with the files of RAY_TLS_SERVER_CERT" in refusal(port)
        monkeypatch.setenv(KEY, str(tmp_path / "gone"))
        assert (
            refusal(port)
            == f"{KEY}={tmp_path}/gone: No such file or directory; name the file as on the cluster"
        )
        monkeypatch.delenv(KEY)
        assert refusal(port).startswith(f"RAY_USE_TLS=1, but {KEY} is not set; set ")


def test_one_side_without_tls(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with servers.gcs(SAME) as (port, _):
        assert "a server of gRPC without TLS answers" in refusal(port)
    with with_tls(files) as (port, _):
        monkeypatch.delenv(TLS_VARIABLE)
        assert refusal(port) == (
            f"--address 127.0.0.1:{port}: a server that requires TLS answers on 127.0.0.1:{port}; where it is the GCS, set "
            f"RAY_USE_TLS=1 and {CERTIFICATE}, {KEY} and {AUTHORITY} as on the cluster"
        )
