"""Several sources read as one, in fixed shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo_lightning.data.files import as_source
from dpo_lightning.data.formats import Format
from dpo_lightning.data.sources import Source
from dpo_lightning.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Part:
    """A source in a mixture.

    Args:
        source: Path of a file, or any Source.
        weight: Share of the examples of an epoch, relative to the other weights.
        format: What its columns mean; found from the first rows unless named.
    """

    source: str | Source
    weight: float | None = None
    format: Format | None = None

    def opened(self) -> Source:
        """The source, where only its path is given too."""
        return as_source(self.source)


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Several sources, each with a format and a report of its own.

    Without weights an epoch is every example of every source. With weights it is as long as the shares can be kept
    without repeating an example: of larger sources every epoch draws others.

    Args:
        parts: The sources.
    """

    parts: list[Part]

    # Not __post_init__: where a value may be of several types, jsonargparse keeps to itself what one of them raises.
    def check(self) -> None:
        """See that there are parts, and that they can be weighed against each other."""
        if not self.parts:
            raise UsageError("A mixture needs at least one part.")
        if len({part.weight is None for part in self.parts}) > 1:
            raise UsageError("Give every part of a mixture a `weight`, or none.")
        for part in self.parts:
            if part.weight is not None and not 0 < part.weight < math.inf:
                raise UsageError(
                    f"`weight` must be positive and finite, got {part.weight}; leave out the source instead."
                )


def as_parts(value: Any, shape: Format | None) -> list[Part]:
    """The parts of a mixture, or the one source that is given, all as Source."""
    mixture = value if isinstance(value, Mixture) else Mixture(parts=[Part(source=as_source(value))])
    mixture.check()
    return [replace(part, source=as_source(part.source), format=part.format or shape) for part in mixture.parts]


def shares(sizes: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """How many examples of each source an epoch takes."""
    if None in weights:
        return list(sizes)
    given = [weight for weight in weights if weight is not None]
    scale = min(size / weight for size, weight in zip(sizes, given, strict=True))
    return [min(size, max(1, round(scale * weight))) for size, weight in zip(sizes, given, strict=True)]
