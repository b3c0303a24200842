"""The files of one shard in the cache: FOLDER/ab/IDENTITY and one of these suffixes, where IDENTITY begins with ab."""

from __future__ import annotations

TAR = ".tar"  # the shard: plain, verified, ready to be read
SUM = ".sum"  # bytes and checksum of a compressed shard as fetched; the compressed bytes are not kept
RAW = ".raw"  # fetched and verified, not yet unpacked or renamed
RAW_PARTIAL = ".raw.partial"  # being fetched
TAR_PARTIAL = ".tar.partial"  # being unpacked
LOCK = ".lock"  # held by the process that fetches the shard
COMING = ".coming"  # the number of bytes that this process has reserved
