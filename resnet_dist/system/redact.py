"""Keep passwords and signatures out of everything that is stored or shown.

A URL may carry a password, a token or a signature, which only the process in memory needs. run.json, checkpoints,
MLflow, logs and messages get the URL without it.
"""

from __future__ import annotations

import logging
import re
from typing import TypeVar

Value = TypeVar("Value")

HIDDEN = "***"
# Limits keep a search linear in the length of a line: without them, each start of a word would look at all of the rest.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,40}://[^\s'\"<>]+")
# A password may hold any character, also those that must be encoded in a URL: take all up to the last @ of the host.
_USER_INFO = re.compile(r"(?<=://)[^/?#\s]*@")
# A password with a slash, which ends the host of a URL; NAME:PORT/ is a host.
_USER_INFO_WITH_SLASH = re.compile(r"(?<=://)[^/?#\s@:]+:(?!\d*(?:/|$))[^\s@]{0,4000}@")
# Parameters that select content and are no secret. The values of all others are hidden, because each cloud has its own
# names for signatures.
_PUBLIC_PARAMETERS = frozenset(
    {"versionid", "version", "generation", "ref", "rev", "revision", "raw", "download", "alt"}
    # Of MLflow's pages: the mode, the saved view, and what is drawn beside the table.
    | {"workflowtype", "viewstatesharekey", "comparerunsmode"}
)
_PARAMETER = re.compile(r"([?&])([^=&#?\s]+)=([^&#\s'\"<>]*)")
_BARE_TOKEN = re.compile(r"([?&])[^=&#?\s'\"<>]{16,}(?=$|[&#?\s'\"<>])")
_SECRET_HEADER = r"(?:(?:proxy-)?authorization|(?:set-)?cookie|(?:[a-z]+-)*(?:api-?key|auth|password|secret)|(?:[a-z]+-)+(?:key|token))"
# A header in quotes, as for curl -H: its value may have spaces, and ends with the quotes.
_QUOTED_HEADER = re.compile(
    rf"(?i)(['\"])({_SECRET_HEADER}\s*:\s*)((?:bearer|basic|token)\s+)?(?:(?!\1)[^\n])+"
)
# A word of a shell, in quotes, or with a part in quotes: anna:'a b'. One that is hidden already is left as it is: the quote
# behind it may end the words around it.
_QUOTED = r"(?:'[^'\n]*'|\"[^\"\n]*\")"
_WORD = rf"(?!\*\*\*)(?:{_QUOTED}|[^\s'\"]*:{_QUOTED}|\S+)"
# A variable whose quoted value may have spaces.
_QUOTED_VARIABLE = re.compile(
    r"(?i)(\b[a-z0-9_]{0,200}(?:secret|password|passwd|api_?key|access_?key|account_?key|storage_?key|token)[a-z0-9_]{0,200}=)"
    + _QUOTED
)
# A name such as X-Auth-Token or AWS_SECRET_ACCESS_KEY: what stands before its last words is shown in any case.
_HEADER = re.compile(
    r"(?i)(\b(?:proxy-)?authorization|(?<=[a-z]-)(?:token|key|secret)|"
    r"(?:secret|password|passwd|(?:api|access|account|storage)[-_]?key|token)(?:[-_][a-z0-9_-]{0,200})?"
    r"(?=\s?=|['\"]\s*:|:\S))(['\"]?\s*[:=]\s*['\"]?)((?:bearer|basic|token)\s+)?[^\s'\"&]+"
)
# The option -u of `ulimit` is a number of processes.
_CURL_USER = re.compile(
    r"(?<!\S)(?<!ulimit )(-u|--user|--proxy-user|-U|--password|--oauth2-bearer|--cookie)(\s+|=)" + _WORD
)


# Options of curl alone: -uNAME:PASSWORD, -sSu NAME:PASSWORD, -b COOKIES.
_CURL_SHORT = re.compile(r"(?<!\S)(-[a-zA-Z#]{0,30}?[uU](?=[^\s:]+:\S)|-[a-zA-Z#]{0,30}[uUb]\s+)" + _WORD)


def redact(text: str) -> str:
    """Return `text` with user names, passwords and signed queries of every URL in it replaced by ***.

    Headers, variables and options that name a secret (`Authorization: …`, `TOKEN=…`, `-u name:…`), as in a shard's
    command, are hidden too.
    """
    if "://" in text:
        # Hide passwords first: they may hold a quote, which ends a URL in a text.
        text = _USER_INFO.sub(f"{HIDDEN}@", _USER_INFO_WITH_SLASH.sub(f"{HIDDEN}@", text))
        text = _URL.sub(lambda match: redact_url(match[0]), text)
        # The query of a URL whose path has spaces.
        text = _PARAMETER.sub(_hide_parameter, text)
    text = _QUOTED_HEADER.sub(rf"\1\2\3{HIDDEN}", text)
    text = _QUOTED_VARIABLE.sub(rf"\1{HIDDEN}", text)
    text = _CURL_USER.sub(rf"\1\2{HIDDEN}", text)
    if "curl" in text:
        text = _CURL_SHORT.sub(rf"\1{HIDDEN}", text)
    return _HEADER.sub(rf"\1\2\3{HIDDEN}", text)


def redact_url(url: str) -> str:
    """Return one URL without user name, password and signature; its scheme, host, path and public parameters stay."""
    url = _USER_INFO_WITH_SLASH.sub(f"{HIDDEN}@", url, count=1)
    url = _USER_INFO.sub(f"{HIDDEN}@", url, count=1)
    return _BARE_TOKEN.sub(rf"\1{HIDDEN}", _PARAMETER.sub(_hide_parameter, url))


def redact_all(value: Value) -> Value:
    """Return a value of JSON with every URL in its texts redacted; other texts stay as they are."""
    if isinstance(value, str):
        return redact(value) if "://" in value else value  # type: ignore[return-value]
    if isinstance(value, dict):
        return {key: redact_all(item) for key, item in value.items()}  # type: ignore[return-value]
    if isinstance(value, list | tuple):
        return type(value)(redact_all(item) for item in value)  # type: ignore[return-value]
    return value


class RedactingFormatter(logging.Formatter):
    """Format log records, their tracebacks included, without passwords and signatures."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _hide_parameter(match: re.Match[str]) -> str:
    mark, name, value = match.groups()
    return f"{mark}{name}={value if name.lower() in _PUBLIC_PARAMETERS else HIDDEN}"
