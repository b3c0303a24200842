"""The address of a Ray cluster as a person types it, in its parts."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from resnet_dist.errors import UserError
from resnet_dist.launch.on_ray.settings import ADDRESS_VARIABLE
from resnet_dist.system.redact import redact

DASHBOARD_VARIABLE = "RAY_API_SERVER_ADDRESS"
GCS_PORT, CLIENT_PORT, DASHBOARD_PORT = 6379, 10001, 8265
AUTO, LOCAL = "auto", "local"
FORMS = "HOST:PORT, http://HOST:PORT, ray://HOST:PORT, auto or local; an IPv6 address in brackets"
_URL_PORTS = {"http": 80, "https": 443, "ray": CLIENT_PORT}


@dataclass(frozen=True)
class Address:
    """One address: `scheme` is empty where none was typed, `host` for the words auto and local."""

    label: str  # where it comes from, for messages: `--address X` or `RAY_ADDRESS=X`
    scheme: str = ""
    host: str = ""
    port: int = 0
    path: str = ""  # the path of a dashboard behind a web server, without a slash at its end
    user_info: str = ""  # `NAME:PASSWORD@` of a dashboard behind a web server
    has_port: bool = True  # false: the port is the default of the scheme
    word: str = ""  # auto or local
    typed: str = ""

    @property
    def target(self) -> str:
        """Return HOST:PORT, with the brackets of an IPv6 address."""
        return f"{bracketed(self.host)}:{self.port}"

    @property
    def url(self) -> str:
        """Return the address as the URL of a dashboard."""
        return f"{self.scheme or 'http'}://{self.user_info}{self.target}{self.path}"


def typed_address(
    option: str | None, variables: tuple[str, ...], default_port: int
) -> tuple[Address, str] | None:
    """Return the address of the option, else of the first variable that is set, and where it comes from.

    None where there is none: an empty text counts as none. Raises UserError where it cannot be one.
    """
    sources = [("--address ", option or "")]
    sources += [(f"{name}=", os.environ.get(name, "")) for name in variables]
    for source, text in sources:
        if text.strip():
            return parse_address(text, f"{source}{redact(text.strip())}", default_port), source.strip(" =")
    return None


def gcs_address(option: str | None) -> tuple[Address, str] | None:
    """Return the address of the cluster to join; None: start one here."""
    return typed_address(option, (ADDRESS_VARIABLE,), GCS_PORT)


def parse_address(text: str, label: str, default_port: int) -> Address:
    """Return the parts of `text`.

    Raises UserError where it is no address, with the forms that are accepted.
    """
    text = text.strip().strip("'\"").strip()
    if text.lower() in (AUTO, LOCAL):
        return Address(label, word=text.lower())
    scheme, mark, rest = text.partition("://")
    scheme = scheme.lower() if mark else ""
    if mark and not re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme):
        raise UserError(f"{label}: no address has this form; use {FORMS}")
    if not mark:
        rest = text
    if re.search(r"\s", rest) or re.fullmatch(r"[0-9A-Fa-f:]*:[0-9A-Fa-f:]*:[0-9A-Fa-f:]*", rest):
        raise UserError(f"{label}: no address has this form; use {FORMS}")
    try:
        parts = urlsplit(f"//{rest}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"{label}: {_lower_first(str(error))}; use {FORMS}") from None
    if not host or port == 0:
        raise UserError(f"{label}: no address has this form; use {FORMS}")
    user_info = parts.netloc.rpartition("@")[0]
    return Address(
        label,
        scheme,
        host,
        port or _URL_PORTS.get(scheme, default_port),
        parts.path.rstrip("/"),
        f"{user_info}@" if user_info else "",
        port is not None,
        typed=text,
    )


def bracketed(host: str) -> str:
    """Return `host` as it stands before a port: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
