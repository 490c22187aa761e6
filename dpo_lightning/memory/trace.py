"""Births and deaths of tensors in a rehearsal, with where the layers of the models stand in them."""

from __future__ import annotations

from typing import NamedTuple

from dpo_lightning.memory.heap import Event, Story


class Trace:
    """What happens to tensors, in its order; more layers can be put between those that were rehearsed.

    Attributes:
        events: Numbers of tensors with their bytes where they are born, with None where they die.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._marks: list[_Mark] = []
        self._count = 0

    def born(self, size: int) -> int:
        """Note a birth, and give the tensor a number."""
        self._count += 1
        self.events.append((self._count, size))
        return self._count

    def died(self, tensor: int) -> None:
        """Note a death."""
        self.events.append((tensor, None))

    def mark(self, phase: str | None, position: int | str | None) -> None:
        """Note where a computation stands; layers between the first period and the last have no position."""
        self._marks.append(_Mark(len(self.events), phase, position))

    def deepened(self, times: int) -> Story:
        """What happens up to where backward leaves the last period, with layers between the first and the last.

        Args:
            times: How often the forward of those is to happen that were rehearsed between.
        """
        begin = next(mark.event for mark in self._marks if mark.phase == "forward")
        step: list[Event] = []
        done, renamed = begin, dict[int, int]()
        for start, middle, end in self._passes():
            step += _renamed(self.events[done:end], renamed)
            again = self.events[middle:end]
            before, births = _births(self.events[start:middle]), _births(again)
            last = births
            for _ in range(times - 1):
                now = range(self._count + 1, self._count + 1 + len(births))
                self._count += len(births)
                # A layer ends lives that began in itself or in the one before it; what else dies in it is dead already.
                names = dict(zip(before, last, strict=False)) | dict(zip(births, now, strict=True))
                step += [(names[tensor], size) for tensor, size in again if tensor in names]
                last = list(now)
            renamed |= dict(zip(births, last, strict=True))
            done = end
        return Story(self.events[:begin], step + _renamed(self.events[done : self._left()], renamed))

    def _passes(self) -> list[tuple[int, int, int]]:
        """Of every forward pass where the first period begins, where the layers between, and where the last period."""
        found, start, middle = [], 0, None
        for event, phase, position in self._marks:
            if phase != "forward":
                continue
            if position == 0:
                start = event
            elif position is None:
                middle = event if middle is None else middle
            elif middle is not None:
                found.append((start, middle, event))
                middle = None
        return found

    def _left(self) -> int:
        """Where backward leaves the last period, or ends."""
        inner = (mark.event for mark in self._marks if mark.phase == "backward" and mark.position is None)
        return next(inner, self._marks[-1].event)


class _Mark(NamedTuple):
    event: int
    phase: str | None
    position: int | str | None


def _births(events: list[Event]) -> list[int]:
    return [tensor for tensor, size in events if size is not None]


def _renamed(events: list[Event], names: dict[int, int]) -> list[Event]:
    return [(names.get(tensor, tensor), size) for tensor, size in events]
