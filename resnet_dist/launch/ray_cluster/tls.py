"""TLS as Ray's variables switch it on: RAY_USE_TLS, and the three files that it needs. Sends no byte."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from resnet_dist.errors import UserError

TLS_VARIABLE = "RAY_USE_TLS"
CERTIFICATE, KEY, AUTHORITY = (f"RAY_TLS_{name}" for name in ("SERVER_CERT", "SERVER_KEY", "CA_CERT"))


def uses_tls() -> bool:
    """Report whether Ray's processes that this shell starts speak TLS."""
    return os.environ.get(TLS_VARIABLE, "").lower() in ("1", "true")


def channel_credentials() -> Any:
    """Return gRPC's credentials of this shell. Raises UserError where a variable or its file is missing."""
    import grpc

    certificate, key, authority = map(_content, (CERTIFICATE, KEY, AUTHORITY))
    return grpc.ssl_channel_credentials(authority, key, certificate)


def _content(variable: str) -> bytes:
    path = os.environ.get(variable)
    if not path:
        raise UserError(
            f"{TLS_VARIABLE}={os.environ[TLS_VARIABLE]}, but {variable} is not set; set {CERTIFICATE}, {KEY} and "
            f"{AUTHORITY} to the files of the cluster, or unset {TLS_VARIABLE}"
        )
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{variable}={path}: {error.strerror}; name the file as on the cluster") from None
