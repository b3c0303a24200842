"""Keep in a run's storage what its page shows besides metrics and model: the data sets, the changed code, failures.

The publisher sends these files when its tracker answers, and `sync` finds them there too.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from resnet_dist.data.shards.index import Index
from resnet_dist.data.storage.urls import folder_of, path_of
from resnet_dist.driver.request import Request
from resnet_dist.errors import ExplainedError
from resnet_dist.runs.folder import RunFolder, failure_name
from resnet_dist.runs.page import CODE_FILE, DATA_FILE, MAX_DIGEST, DataSet, index_file
from resnet_dist.system.provenance import GitState
from resnet_dist.system.redact import redact
from resnet_dist.tracking.origin import (
    ERROR_TAG,
    MAX_ERROR,
    STOPPED_TAG,
    git_of,
    recipe_tags,
    tags_of_origin,
)

CONTEXTS = ("train", "eval")
MAX_SHARDS = 10_000  # that the file of an index lists
MAX_TRACEBACK = 200_000  # characters
MAX_LINE = 300  # characters of a line of a file


def begin_page(run: RunFolder, request: Request, indexes: Sequence[Index]) -> RunFolder:
    """Return the run with the tags of its origin; write the files that describe its data and its code."""
    git = git_of(request.source)
    tags = {
        **tags_of_origin(request.source, request.recipe.description, git),
        **recipe_tags(request.recipe, request.changes),
        **request.tags,
    }
    described = run.with_tags({name: redact(text) for name, text in tags.items()})
    _write_data(described, request, indexes)
    _write_code(described, git)
    return described


def record_failure(run: RunFolder, error: BaseException) -> RunFolder:
    """Return the run with the tag of what ended it; write the traceback unless the run has more about it."""
    kind = "" if isinstance(error, ExplainedError) else f"{type(error).__name__}: "
    text = redact(_cut(f"{kind}{error}", 2 * MAX_ERROR))
    with suppress(
        OSError
    ):  # A full disk, or a run that another driver trains now, must not hide the failure.
        run.check_lease()
        name = failure_name(run.attempt)
        if not run.storage.is_gone() and run.storage.read(name) is None:
            lines = "".join(traceback.format_exception(error))
            if len(lines) > MAX_TRACEBACK:  # Leave out the line that is cut.
                lines = lines[-MAX_TRACEBACK:].partition("\n")[2]
            text_of_file = public_lines(lines)
            run.storage.write(name, text_of_file.encode(errors="backslashreplace"))
    return run.with_tags({ERROR_TAG: text if len(text) <= MAX_ERROR else f"{text[: MAX_ERROR - 1]}…"})


def record_stop(run: RunFolder) -> RunFolder:
    """Return the run, which ended before its last step, with the tag of the reason for its stop, where one was given."""
    reason = run.stop_reason()
    return run.with_tags({STOPPED_TAG: redact(reason)}) if reason else run


def public_lines(text: str) -> str:
    """Return a text without secrets, its lines cut at MAX_LINE: a search for secrets takes the square of their length."""
    return redact("\n".join(map(_cut, text.split("\n"))))


def _cut(line: str, limit: int = MAX_LINE) -> str:
    """Return the start of a long line, up to a blank: half of a URL would not show that it has a password."""
    if len(line) <= limit:
        return line
    return f"{line[: line.rfind(' ', 0, limit) + 1]}…"


def index_value(index: Index) -> dict[str, Any]:
    """Return an index as its file on the page has it: without passwords, and without shards beyond MAX_SHARDS."""
    shards = [
        {
            "url": redact(shard.url),
            "nsamples": shard.num_samples,
            "filesize": shard.num_bytes,
            "checksum": shard.checksum,
        }
        for shard in index.shards[:MAX_SHARDS]
    ]
    left_out = max(0, len(index.shards) - MAX_SHARDS)
    return {
        "location": redact(index.location),
        "digest": index.digest(),
        "samples": index.num_samples,
        "classes": list(index.classes),
        "shardlist": shards,
        **({"shards_left_out": left_out} if left_out else {}),
    }


def data_sets(request: Request, indexes: Sequence[Index]) -> list[DataSet]:
    """Return the data sets of a run, each under a name of its own: the last folders of its location."""
    source, sets = request.recipe.data.source or "", list[DataSet]()
    for context, index in zip(CONTEXTS, indexes, strict=True):
        name = "/".join(path_of(redact(folder_of(index.location))).rstrip("/").split("/")[-2:]) or context
        # MLflow shows one of two inputs with the same name and digest.
        if name in [other.name for other in sets]:
            name = f"{name} ({context})"
        sets.append(
            DataSet(
                context,
                name,
                index.digest()[:MAX_DIGEST],
                redact(index.location),
                redact(source),
                index.num_samples,
                len(index.classes),
                len(index.shards),
            )
        )
    return sets


def _write_data(run: RunFolder, request: Request, indexes: Sequence[Index]) -> None:
    """Write what the page shows of the data, unless an earlier attempt has: the data of a run never changes."""
    if run.page.read(DATA_FILE) is not None:
        return
    for context, index in zip(CONTEXTS, indexes, strict=True):
        text = json.dumps(index_value(index), indent=1, ensure_ascii=False)
        run.page.write(index_file(context), text.encode(errors="backslashreplace"))
    run.page.write(DATA_FILE, DataSet.to_json(data_sets(request, indexes)).encode(errors="backslashreplace"))


def _write_code(run: RunFolder, git: GitState | None) -> None:
    """Write what the code differs from its commit; each attempt may have changed it, and the newest counts."""
    if git is not None and git.diff:
        run.page.write(CODE_FILE, (public_lines(git.diff) + "\n").encode(errors="backslashreplace"))
    elif run.page.read(CODE_FILE) is not None:
        run.page.delete(CODE_FILE)
