"""Keep passwords and signatures out of everything that is stored or shown.

A URL may carry a password, a token or a signature, which only the process in memory needs. run.json, checkpoints,
MLflow, logs and messages get the URL without it.
"""

from __future__ import annotations

import re
from typing import TypeVar

Value = TypeVar("Value")

HIDDEN = "***"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")
_USER_INFO = re.compile(r"(?<=://)[^/?#@\s]*@")
# Parameters that select content and are no secret. The values of all others are hidden, because each cloud has its own
# names for signatures.
_PUBLIC_PARAMETERS = frozenset(
    {"versionid", "version", "generation", "ref", "rev", "revision", "raw", "download", "alt"}
)
_PARAMETER = re.compile(r"([?&])([^=&#]+)=([^&#]*)")
_HEADER = re.compile(
    r"(?i)\b((?:proxy-)?authorization|x-[a-z-]*token|[a-z_-]*(?:secret|password|passwd|api[-_]?key|token))"
    r"(\s*[:=]\s*)((?:bearer|basic|token)\s+)?[^\s'\"&]+"
)


def redact(text: str) -> str:
    """Return `text` with user names, passwords and signed queries of every URL in it replaced by ***.

    Headers and variables that name a secret (`Authorization: …`, `TOKEN=…`), as in a shard's command, are hidden too.
    """
    return _HEADER.sub(rf"\1\2\3{HIDDEN}", _URL.sub(lambda match: redact_url(match[0]), text))


def redact_url(url: str) -> str:
    """Return one URL without user name, password and signature; its scheme, host, path and public parameters stay."""
    url = _USER_INFO.sub(f"{HIDDEN}@", url, count=1)
    return _PARAMETER.sub(_hide_parameter, url)


def redact_all(value: Value) -> Value:
    """Return a value of JSON with every text in it redacted."""
    if isinstance(value, str):
        return redact(value)  # type: ignore[return-value]
    if isinstance(value, dict):
        return {key: redact_all(item) for key, item in value.items()}  # type: ignore[return-value]
    if isinstance(value, list | tuple):
        return type(value)(redact_all(item) for item in value)  # type: ignore[return-value]
    return value


def _hide_parameter(match: re.Match[str]) -> str:
    mark, name, value = match.groups()
    return f"{mark}{name}={value if name.lower() in _PUBLIC_PARAMETERS else HIDDEN}"
