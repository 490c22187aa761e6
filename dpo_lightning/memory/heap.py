"""How far a C library's heap grows beyond the tensors in it, as they come and go."""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Iterable
from statistics import mean
from typing import NamedTuple

MARGIN = 96  # bytes that an aligned allocation asks for beyond its own, and hands back as pieces around it
LEAST = 2**15  # bytes; what is smaller finds a place between the large ones
STEPS = 2  # in the first what later ones find is not there yet
TRIALS = 4

Event = tuple[int, int | None]  # the number of a tensor, and its bytes at its birth, None at its death


class Story(NamedTuple):
    """Births and deaths of tensors in their order: before the first training step, and in each."""

    before: list[Event]
    step: list[Event]


class Heap:
    """The heap of GNU's C library: the smallest hole that is large enough, or the end; holes side by side are one.

    Places of tensors are aligned: the library looks for more than is asked for, and hands back what lies around. Where
    a small object settles in that and stays, the hole that a tensor leaves is too small for the next one of its size.

    Attributes:
        size: Bytes from the first to the end; nothing goes back to the system.
        used: Bytes of tensors that are alive.
        most: Most bytes of tensors that were alive at a time.

    Args:
        settled: Probability that a small object settles beside a tensor.
        seed: Of chance.
    """

    def __init__(self, settled: float, seed: int = 0) -> None:
        self.size, self.used, self.most = 0, 0, 0
        self._settled, self._chance = settled, random.Random(seed)
        self._holes: list[tuple[int, int]] = []  # sizes and addresses, in order
        self._size_at: dict[int, int] = {}
        self._start_of: dict[int, int] = {}  # holes by their ends
        self._tensors: dict[int, tuple[int, int]] = {}  # addresses and sizes

    @property
    def tensors(self) -> list[int]:
        """Those that are alive."""
        return list(self._tensors)

    def play(self, events: Iterable[Event]) -> None:
        """Let tensors come and go; of a death without a birth nothing comes."""
        for tensor, size in events:
            if size is not None:
                self._allocate(tensor, size)
            elif tensor in self._tensors:
                self.free(tensor)

    def free(self, tensor: int) -> None:
        """Leave a hole where a tensor was."""
        address, size = self._tensors.pop(tensor)
        self.used -= size
        self._leave(address, size)

    def _allocate(self, tensor: int, size: int) -> None:
        address, room = self._place(size + MARGIN)
        front = MARGIN // 2
        if self._chance.random() >= self._settled:
            self._leave(address, front)
        self._tensors[tensor] = address + front, size
        self._leave(address + front + size, room - front - size)
        self.used += size
        self.most = max(self.most, self.used)

    def _place(self, size: int) -> tuple[int, int]:
        """Address and size of a hole that is none any more."""
        index = bisect_left(self._holes, (size, 0))
        if index < len(self._holes):
            found, address = self._holes[index]
            self._take(address)
            return address, found
        address = self._start_of.get(self.size, self.size)
        if address < self.size:
            self._take(address)
        self.size = address + size
        return address, size

    def _take(self, address: int) -> int:
        size = self._size_at.pop(address)
        del self._start_of[address + size]
        del self._holes[bisect_left(self._holes, (size, address))]
        return size

    def _leave(self, address: int, size: int) -> None:
        if address in self._start_of:
            before = self._start_of[address]
            address, size = before, size + self._take(before)
        if address + size in self._size_at:
            size += self._take(address + size)
        insort(self._holes, (size, address))
        self._size_at[address], self._start_of[address + size] = size, address


def between(story: Story, settled: float) -> int:
    """Bytes by which a heap outgrows the most that tensors take, as is to be expected in training.

    Args:
        story: What happens to tensors.
        settled: Probability that a small object settles beside a tensor.
    """
    large = {tensor for events in story for tensor, size in events if size is not None and size >= LEAST}
    story = Story(*([event for event in events if event[0] in large] for events in story))
    return round(mean(_grown(story, Heap(settled, seed)) for seed in range(TRIALS)))


def _grown(story: Story, heap: Heap) -> int:
    heap.play(story.before)
    stay = set(heap.tensors)
    for _ in range(STEPS):
        heap.play(story.step)
        for tensor in reversed(heap.tensors):  # as backward does: the last first
            if tensor not in stay:
                heap.free(tensor)
    return heap.size - heap.most
