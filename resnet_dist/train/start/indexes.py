"""The indexes of a run, as its ranks read them: remote ones once a node, and never another one than the run began with."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from resnet_dist.config import Data
from resnet_dist.data.shards.index import Index, IndexMismatch, read_index
from resnet_dist.data.storage.node_copy import NodeCopies
from resnet_dist.data.storage.urls import is_local, shown
from resnet_dist.runs.folder import read_run
from resnet_dist.runs.storage.protocol import Storage
from resnet_dist.system.files import expanded


def indexes_of(data: Data, run: Storage) -> tuple[Index, Index]:
    """Return the indexes of the training and the evaluation set of a run.

    Raises IndexMismatch where one is missing, or is not the one that the driver has recorded for the run.
    """
    locations = (data.train, data.eval)
    if all(map(is_local, locations)):
        return read_index(data.train), read_index(data.eval)
    found = read_run(run)
    digests: Iterator[str] = iter(found.data if found is not None else ())
    train, evaluation = (
        _read(location, digest, expanded(data.shard_cache))
        for location, digest in zip_longest(locations, digests, fillvalue="")
    )
    return train, evaluation


def _read(location: str, digest: str, cache: Path) -> Index:
    if is_local(location) or not digest:  # A loop that no driver has started has no record.
        return read_index(location)
    copies = NodeCopies(cache, digest)
    try:
        index = read_index(location, copies.read)
        if index.digest() == digest:
            return index
    except IndexMismatch:
        pass
    # The copy may be damaged: nothing has verified it since it was written.
    copies.forget()
    index = read_index(location)
    if index.digest() != digest:
        raise IndexMismatch(
            f"{shown(location)}: has changed since the run began with it; start a new run, or bring it back"
        )
    return index
