"""The ground-truth reward of the IMDb experiment: a logistic regression on words, from a file."""

import functools
import gzip
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_lightning.scorers import Prompt, Scorer


@dataclass(frozen=True, kw_only=True)
class FittedSentiment(Scorer):
    r"""Probability that a review is positive, prompt and response together.

    .. math:: \sigma\left(b + \frac{\sum_w c_w t_w}{\sqrt{\sum_w t_w^2}}\right), \quad
              t_w = (1 + \log n_w) \, \mathrm{idf}_w

    with the number :math:`n_w` of times that a word stands in the text.

    Args:
        path: Gzipped JSON of ``vocab``, ``{word: [idf, coefficient]}``, of the ``intercept``, and of the
            ``token_pattern`` that finds words in lower case.
    """

    path: str

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """In [0, 1]."""
        return [self._positive(f"{prompt}{response}") for prompt, response in zip(prompts, responses, strict=True)]

    def _positive(self, text: str) -> float:
        fitted = _load(self.path)
        counts = Counter(re.findall(fitted["token_pattern"], text.lower()))
        known = [(1 + math.log(n), *fitted["vocab"][word]) for word, n in counts.items() if word in fitted["vocab"]]
        norm = math.sqrt(sum((tf * idf) ** 2 for tf, idf, _ in known)) or 1.0
        logit = fitted["intercept"] + sum(tf * idf * coefficient for tf, idf, coefficient in known) / norm
        return 1 / (1 + math.exp(-logit))


@functools.cache
def _load(path: str) -> dict[str, Any]:
    fitted: dict[str, Any] = json.loads(gzip.decompress(Path(path).read_bytes()))
    return fitted
