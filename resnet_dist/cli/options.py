"""What several commands share: the two consoles, options, defaults."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import unquote, urlsplit

import typer
from rich.console import Console

from resnet_dist.config import Data
from resnet_dist.errors import UserError
from resnet_dist.system.command import DEFAULT_WORKERS
from resnet_dist.system.redact import redact

out = Console(soft_wrap=True, highlight=False, markup=False)
err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)

Output = Annotated[Path, typer.Option(help="Where data, runs and the MLflow store go.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one field.")]
Workers = Annotated[int | None, typer.Option(min=1, help=f"DDP ranks; default: {DEFAULT_WORKERS}.")]
Gpu = Annotated[bool | None, typer.Option("--gpu/--cpu", help="Default: GPUs where there are any.")]
Address = Annotated[str | None, typer.Option(help="A running Ray cluster; default: one here.")]
Name = Annotated[str | None, typer.Option(help="Of the run; one that exists is continued.")]
Split = Literal["train", "eval"]
Crop = Literal["none", "pad-crop", "random-resized-crop"]
Cache = Literal["none", "ram", "device"]
Against = Literal["raw"]
Buffers = Literal["every-step", "none"]

DEFAULT_OUTPUT = Path("output")
DEFAULT_SHARD_CACHE = Path(Data.model_fields["shard_cache"].default)
SHARD_CACHE_BYTES: int = Data.model_fields["shard_cache_bytes"].default
FETCH_TIMEOUT_SECONDS: float = Data.model_fields["fetch_timeout_seconds"].default
RESUMES = "interrupted; the same command goes on with what is not done yet"
STARTS_OVER = "interrupted; the same command begins again"


_LIKE_A_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:{1,2}(/|[a-z0-9]+:)|pipe:|.*://")


def local_folder(text: str, name: str) -> Path:
    """Return a folder on this machine from its path or `file://` URL. name: of the argument, for messages.

    Raises UserError where it is a URL of anything else: as a path it would be a folder such as `./s3:`.
    """
    if text.startswith("file:"):
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise UserError(f"{name} {text!r}: a file:// URL must have three slashes and a whole path")
        return Path(unquote(parts.path, errors="surrogateescape"))
    if _LIKE_A_URL.match(text):
        raise UserError(
            f"{name} {redact(text)!r} is a URL: this command writes to a folder on this machine; give a path, and copy "
            "what it holds afterwards"
        )
    return Path(text).expanduser()


@contextmanager
def on_interrupt(words: str) -> Iterator[None]:
    """Inside, or in the function that this decorates, an interruption says `words` and ends with 130."""
    try:
        yield
    except KeyboardInterrupt:  # Typer would end with 130 and say nothing
        err.print(words)
        raise typer.Exit(130) from None


def use_gpu(asked: bool | None) -> bool:
    """Whether to use this machine's GPUs: as asked, or where there are any. Raises UserError where none is."""
    import torch  # takes seconds

    available = torch.cuda.is_available()
    if asked and not available:
        raise UserError("--gpu: this machine has no CUDA device that torch can use; use --cpu")
    return available if asked is None else asked
