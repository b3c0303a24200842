"""The words for ranks that stand still: who is behind, where, and since when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from resnet_dist.train.watch.positions import Position, Reading

MAX_NAMED = 8  # ranks named in one line, and stacks in one file


@dataclass(frozen=True)
class Stall:
    """Ranks that others wait for: those that do not answer, else those that have entered the fewest phases."""

    ranks: tuple[int, ...]
    reading: Reading
    own_rank: int

    @classmethod
    def of(cls, reading: Reading, own_rank: int) -> Stall:
        ranks = reading.silent
        if not ranks:
            fewest = min(position.moves for position in reading.positions)
            ranks = tuple(rank for rank, position in enumerate(reading.positions) if position.moves == fewest)
        return cls(ranks, reading, own_rank)

    @property
    def moves(self) -> int:
        """The number of phases that the first of them has entered, as far as it is known."""
        return self.reading.positions[self.ranks[0]].moves

    @property
    def of_all(self) -> bool:
        return len(self.ranks) == len(self.reading.positions)

    def is_over(self, now: Reading) -> bool:
        """Report whether these ranks have moved on since, though this rank has not: it waits for others now."""
        if self.of_all or not now.store_answers or not now.is_complete:
            return False
        for rank in self.ranks:
            before, after = self.reading.positions[rank], now.positions[rank]
            answers = rank in self.reading.silent and rank not in now.silent
            if after.moves == before.moves and not answers:
                return False
        return True

    def describe(self, seconds: float) -> str:
        """Return one line: which ranks, on which hosts, have stood still for how long, and where."""
        positions, first = self.reading.positions, self.reading.positions[self.ranks[0]]
        if self.reading.silent:
            last = f", last seen at {first.where}" if first.phase and len(self.ranks) == 1 else ""
            own = positions[self.own_rank]
            here = f", while rank {self.own_rank} is at {own.where}" if own.phase else ""
            return (
                f"{self._names()} {_plural(self.ranks, 'has', 'have')} not answered for {seconds:.0f} s{last}{here}: "
                "stopped, or cut off"
            )
        if len(positions) == 1:
            return f"nothing has moved on {first.host} for {seconds:.0f} s: at {first.where}"
        if not self.of_all:
            return (
                f"{self._names()} {_plural(self.ranks, 'has', 'have')} not moved for {seconds:.0f} s: at {first.where}; "
                "the others wait"
            )
        lines = {position.line for position in positions}
        if len(lines) == 1:
            return f"none of {len(positions)} ranks has moved for {seconds:.0f} s: all are at {first.where}"
        # In one phase, such as the start, some ranks are further on.
        each = _listed([f"{_name(rank, p)} ({p.line or '?'})" for rank, p in enumerate(positions)])
        return f"none of {len(positions)} ranks has moved for {seconds:.0f} s: at step {first.step}, {first.phase}, are {each}"

    def describe_end(self, seconds: float) -> str:
        # A rank that does not answer has published its last position some seconds before it stopped.
        rank = self.own_rank if self.reading.silent else self.ranks[0]
        who = "training" if self.of_all else self._names()
        verb = "moves" if self.of_all or len(self.ranks) == 1 else "move"
        return f"{who} {verb} again, after {seconds:.0f} s without progress at step {self.reading.positions[rank].step}"

    def stacks(self) -> list[str]:
        """Return the stacks of these ranks as lines, innermost last."""
        lines = []
        for rank in self.ranks[:MAX_NAMED]:
            position = self.reading.positions[rank]
            if position.phase:
                known = ", as it was last seen" if rank in self.reading.silent else ""
                lines += [f"{_name(rank, position)}, at step {position.step}, {position.phase}{known}:"]
                lines += [f"  {frame}" for frame in position.stack]
        if len(self.ranks) > MAX_NAMED:
            lines += [f"and {len(self.ranks) - MAX_NAMED} more ranks"]
        return lines

    def _names(self) -> str:
        names = [_name(rank, self.reading.positions[rank]).removeprefix("rank ") for rank in self.ranks]
        return f"{_plural(self.ranks, 'rank', 'ranks')} {_listed(names)}"


def _name(rank: int, position: Position) -> str:
    return f"rank {rank} on {position.host}" if position.host else f"rank {rank}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _plural(items: Sequence[object], one: str, many: str) -> str:
    return one if len(items) == 1 else many
