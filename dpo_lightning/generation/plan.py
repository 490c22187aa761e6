"""What is sampled, and in which batches: the same however many processes share them, and wherever one was killed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dpo_lightning.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How prompts are continued.

    Args:
        num_samples: Completions of a prompt at each temperature.
        temperatures: 1 samples from the model's own distribution, 0 takes the likeliest token.
        top_p: Sample from the smallest set of tokens that holds this probability.
        max_new_tokens: Most tokens of a completion.
        seed: Seed of the samples.
        stop: Texts that end a completion.
        ends: Tokens that end a completion.
    """

    num_samples: int = 4
    temperatures: tuple[float, ...] = (1.0,)
    top_p: float = 1.0
    max_new_tokens: int = 64
    seed: int = 0
    stop: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} must be 1 or more, got {getattr(self, name)}.")
        if not self.temperatures or min(self.temperatures) < 0:
            raise UsageError(f"--temperatures are one or more numbers of 0 or more, got {list(self.temperatures)}.")
        if len(set(self.temperatures)) < len(self.temperatures):
            raise UsageError(f"--temperatures {list(self.temperatures)} names one of them twice; leave it out.")
        if 0 in self.temperatures and self.num_samples > 1:
            raise UsageError(
                f"At temperature 0 the likeliest token is taken, so that {self.num_samples} completions of a prompt "
                "would be the same one: give --num_samples 1, or make a file of its own for temperature 0."
            )
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top_p is a probability above 0, 1 at most, got {self.top_p}.")
        if not all(self.stop):
            raise UsageError("--stop must not be empty; leave it out.")


class Chunk(NamedTuple):
    """Prompts that are continued at once.

    Attributes:
        temperature: The temperature.
        seed: Seed of its samples.
        places: Places of the prompts in their list.
    """

    temperature: float
    seed: int
    places: list[int]


def plan(lengths: Sequence[int], sampling: Sampling, batch_size: int, batch_tokens: int) -> list[Chunk]:
    """Chunks of prompts of like length, longest first, so that what does not fit into memory shows at once.

    Args:
        lengths: Tokens of each prompt.
        sampling: How they are continued; all completions of a prompt are in one chunk.
        batch_size: Most completions at once, unless one prompt has more.
        batch_tokens: Most tokens of them, with padding and new ones.
    """
    groups = list(_groups(lengths, sampling, batch_size, batch_tokens))
    return [
        Chunk(temperature, seed_of(sampling.seed, temperature, number), places)
        for temperature in sampling.temperatures
        for number, places in enumerate(groups)
    ]


def seed_of(seed: int, temperature: float, number: int) -> int:
    """A seed of its own for a part of the samples."""
    content = f"{seed} {float(temperature)!r} {number}".encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=4).digest())


def _groups(lengths: Sequence[int], sampling: Sampling, batch_size: int, batch_tokens: int) -> Iterator[list[int]]:
    group: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        completions = (len(group) + 1) * sampling.num_samples
        width = lengths[group[0] if group else place] + sampling.max_new_tokens
        if group and (completions > batch_size or completions * width > batch_tokens):
            yield group
            group = []
        group.append(place)
    if group:
        yield group
