"""Networks without weights, for what needs only their names and shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _SkipDraws(TorchFunctionMode):
    """Draws nothing: on the meta device a normal distribution imports torch's compiler, which takes more than a second."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return args[0]
        return function(*args, **(kwargs or {}))


@contextmanager
def shapes_only() -> Iterator[None]:
    """Let modules be built with names and shapes alone: on the meta device, with no weight drawn."""
    with torch.device("meta"), _SkipDraws():
        yield
