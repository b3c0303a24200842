"""URLs of shards: a path, `file://…`, a scheme of fsspec (https, s3, gs, hf …), or `pipe:COMMAND`.

Everything here follows from the text of the URL; nothing is opened.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from resnet_dist.system.redact import redact, redact_url

COMMAND = "pipe:"
# Compression by the ending of a file's name; what the bytes of a file say comes first.
COMPRESSED_SUFFIXES = {
    ".tar.gz": "gzip",
    ".tgz": "gzip",
    ".tar.zst": "zstd",
    ".tzst": "zstd",
    ".tar.bz2": "bzip2",
    ".tbz2": "bzip2",
    ".tbz": "bzip2",
    ".tar.xz": "xz",
    ".txz": "xz",
    ".tar.lzma": "xz",
    ".tar.lz4": "lz4",
}
SHARD_SUFFIXES = (".tar", *COMPRESSED_SUFFIXES)  # in any mixture of capitals
IDX_SUFFIX = ".idx"  # replaces `.tar` in the name of the DALI index beside a tar

# Parameters that sign a URL, by cloud: Amazon, Google, Alibaba, Tencent and CDNs. They change with every signing.
_SIGNING_PREFIXES = (
    "x-amz-",
    "x-goog-",
    "x-oss-",
    "x-cos-",
    "q-sign-",
    "q-ak",
    "q-key-",
    "q-header-",
    "q-url-",
)
_SIGNING = frozenset(
    {"signature", "expires", "expiry", "key-pair-id", "policy", "awsaccesskeyid", "googleaccessid"}
    | {
        "ossaccesskeyid",
        "security-token",
        "token",
        "access_token",
        "__token__",
        "hdnea",
        "hdnts",
        "verify",
        "sig",
    }
)
# Of Azure; too short to mean a signature unless `sig` is among the parameters.
_SIGNING_WITH_SIG = frozenset(
    [
        "sv",
        "ss",
        "srt",
        "sr",
        "sp",
        "st",
        "se",
        "sip",
        "spr",
        "skoid",
        "sktid",
        "skt",
        "ske",
        "sks",
        "skv",
        "saoid",
        "suoid",
        "scid",
    ]
)
_VERSION = re.compile(r"\?versionId=[^/]*$|#\d+$")  # the version of an object, as s3fs and gcsfs write it


def is_local(url: str) -> bool:
    return not url.startswith(COMMAND) and ("://" not in url or url.startswith("file://"))


def is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def local_path(url: str) -> Path:
    """Return the path of a local URL: `~` is the home folder, and `file://` URLs are decoded."""
    if url.startswith("file://"):
        return Path(unquote(url.removeprefix("file://").removeprefix("localhost"), errors="surrogateescape"))
    return Path(os.path.expanduser(url))


def path_of(url: str) -> str:
    """Return the URL without its query, or without the version of an object; a command and a path as they are."""
    if is_http(url):
        return url.partition("?")[0]
    return _VERSION.sub("", url) if "://" in url else url


def file_name(url: str) -> str:
    """Return the name of a file for messages and digests: the same wherever the file lies, signed or not."""
    if url.startswith(COMMAND):
        return posixpath.basename(redact(url).rstrip("/"))
    if not is_http(url):
        return local_path(url).name if is_local(url) else posixpath.basename(path_of(url).rstrip("/"))
    head, _, query = unsigned(url).partition("?")
    name = unquote(posixpath.basename(head.rstrip("/")))
    return f"{name}?{query}" if query else name


def shown(url: str) -> str:
    """Return the URL or command for messages: without password and signature."""
    return redact(url) if url.startswith(COMMAND) else redact_url(url) if "://" in url else url


def unsigned(url: str) -> str:
    """Return the URL without user, password and signature: a file that is signed anew is the same file.

    Other parameters stay, because they may choose the file.
    """
    if not is_http(url):
        return url
    head, _, query = without_user(url).partition("?")
    parameters = query.split("&") if query else []
    names = {parameter.partition("=")[0].lower() for parameter in parameters}
    signing = _SIGNING | _SIGNING_WITH_SIG if "sig" in names else _SIGNING
    kept = [
        parameter
        for parameter in parameters
        if not (name := parameter.partition("=")[0].lower()).startswith(_SIGNING_PREFIXES)
        and name not in signing
    ]
    return f"{head}?{'&'.join(kept)}" if kept else head


def without_user(url: str) -> str:
    """Return a web address without `user:password@`; any other URL as it is."""
    if not is_http(url):
        return url
    scheme, _, rest = url.partition("://")
    user, at, _ = rest.partition("/")[0].rpartition("@")
    return f"{scheme}://{rest.removeprefix(user + at)}" if at else url


def compression_of(url: str) -> str | None:
    """Return the compression by the file name; None for a plain tar and for a command, whose output is unknown."""
    if url.startswith(COMMAND):
        return None
    name = path_of(url).rstrip().lower()
    return next((kind for suffix, kind in COMPRESSED_SUFFIXES.items() if name.endswith(suffix)), None)


def folder_of(url: str) -> str:
    """Return the folder of a file; of a web address with its query, which `join` passes on."""
    if not is_http(url):
        return posixpath.dirname(url)
    head, mark, query = url.partition("?")
    return posixpath.dirname(head) + mark + query


def join(base: str, name: str) -> str:
    """Return `name` relative to the folder or URL `base`; a URL, a command or an absolute path stays as it is.

    On the web, a name without a query gets that of `base`, and a URL on the same host also user and password, where
    it has none: so one signature, or one password, in the URL of an index serves its shards. No other host gets them.
    """
    if name.startswith((COMMAND, "/")):
        return name
    if "://" in name:
        return _with_credentials_of(base, name) if is_http(base) and is_http(name) else name
    if not is_http(base):
        return posixpath.join(base, name)
    head, mark, query = base.partition("?")
    path, own_mark, own_query = name.partition("?")
    if own_mark and "=" not in own_query:  # a question mark in the name of a file
        path, own_mark = name, ""
    if own_mark:
        mark, query = own_mark, own_query
    return posixpath.join(head, _quoted(path)) + mark + query


def _with_credentials_of(base: str, url: str) -> str:
    ours, theirs = urlsplit(base), urlsplit(url)
    own_host, host = ours.netloc.rpartition("@")[2], theirs.netloc.rpartition("@")[2]
    if (ours.scheme, own_host) != (theirs.scheme, host):
        return url
    if "@" in ours.netloc and "@" not in theirs.netloc:
        url = url.replace(f"://{host}", f"://{ours.netloc}", 1)
    if "?" not in url and "?" in base:
        url += "?" + base.partition("?")[2]
    return url


def request_url(url: str) -> str:
    """Return the web address as it goes over the wire.

    The query is sent byte for byte, because a signature covers it. In the path, only what no URL may hold is encoded;
    `#` is part of a name, since a fragment has no meaning for a file.
    """
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    if "?" in host:
        host, slash, path = *host.split("?", 1)[:1], "/?", rest.partition("?")[2]
        return f"{scheme}://{host}{slash}{_quoted_query(path)}"
    path, mark, query = path.partition("?")
    return f"{scheme}://{host}{slash or '/'}{_quoted(path)}{mark}{_quoted_query(query)}"


def _quoted(path: str) -> str:
    whole = re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", path)
    return quote(whole, safe="%/:@!$&'()*+,;=~", errors="surrogateescape")


def _quoted_query(query: str) -> str:
    return re.sub(r"[^\x21-\x7e]|#", lambda match: quote(match[0], errors="surrogateescape"), query)
