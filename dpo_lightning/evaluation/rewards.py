"""Samples of a policy, their rewards, and the KL to a reference that they tell of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from dpo_lightning.batch import Logps, PreferenceBatch
from dpo_lightning.data.collate import collate
from dpo_lightning.data.example import TokenizedExample
from dpo_lightning.errors import UsageError
from dpo_lightning.evaluation.points import Point
from dpo_lightning.evaluation.statistics import best_of_n, best_of_n_kl, between_groups_sd, clustered_mean
from dpo_lightning.generation import Continuation, sample
from dpo_lightning.generation.prompts import Numbered, PromptEncoding
from dpo_lightning.scorers import Prompt

SCORED_AT_ONCE = 64
BEST_OF_N = "Best of N"

Score = Callable[[PreferenceBatch], Logps]


class Engine(NamedTuple):
    """A policy that writes, and what is said of what it wrote.

    Attributes:
        model: The policy's model, in whose distribution samples are drawn.
        tokenizer: Its tokenizer.
        generate: What generates.
        policy: Gives the policy's log-probabilities of a batch.
        reference: Gives the reference's.
        move: Brings a batch to where both are.
        encoding: How prompts become tokens.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    generate: Callable[..., Any]
    policy: Score
    reference: Score
    move: Callable[[PreferenceBatch], PreferenceBatch]
    encoding: PromptEncoding = PromptEncoding()


class Drawing(NamedTuple):
    """How samples are drawn: at temperature 1 from the whole vocabulary, for else they tell of no KL.

    Attributes:
        num_samples: Samples a prompt.
        max_new_tokens: Most tokens of a sample.
        seed: Seed of the samples.
        batch_size: Samples drawn at a time.
    """

    num_samples: int
    max_new_tokens: int
    seed: int = 0
    batch_size: int = 256

    def check(self) -> None:
        """Say what cannot be drawn."""
        for name in ("num_samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"`{name}` must be 1 or more, got {getattr(self, name)}.")

    def chunks(self, prompts: Sequence[Numbered]) -> list[Sequence[Numbered]]:
        """Prompts that are drawn at a time; a chunk has a seed of its own, so that any may be drawn first."""
        size = max(1, self.batch_size // self.num_samples)
        return [prompts[start : start + size] for start in range(0, len(prompts), size)]

    def seed_of(self, chunk: int) -> int:
        """Seed of a chunk."""
        return self.seed * 1_000_003 + chunk


class Drawn(NamedTuple):
    r"""Samples of a prompt.

    Attributes:
        row: The prompt's number.
        prompt: The prompt.
        responses: Texts of its K samples.
        log_ratios: :math:`\log \pi(y|x) - \log \pi_{ref}(y|x)` of each, in nats.
        tokens: Tokens of each, end token included.
        finished: Whether each came to its end token.
    """

    row: int
    prompt: Prompt
    responses: list[str]
    log_ratios: list[float]
    tokens: list[int]
    finished: list[bool]


class Measured(NamedTuple):
    """Samples of a prompt.

    Attributes:
        drawn: The samples.
        rewards: What each is worth.
        chosen_by: By which numbers the best of N is chosen; the rewards where there are no others.
    """

    drawn: Drawn
    rewards: list[float]
    chosen_by: list[float] | None = None


def draw(engine: Engine, how: Drawing, chunk: Sequence[Numbered], number: int) -> list[Drawn]:
    """Samples of some prompts.

    Args:
        engine: What draws.
        how: How many and how long.
        chunk: The prompts.
        number: Which of the chunks it is.
    """
    count = how.num_samples
    continuations = sample(
        engine.model,
        engine.tokenizer,
        [one.ids for one in engine.encoding.encode(engine.tokenizer, chunk) for _ in range(count)],
        max_new_tokens=how.max_new_tokens,
        seed=how.seed_of(number),
        batch_size=how.batch_size,
        ends=engine.encoding.ends(engine.tokenizer, chunk),
        generate=engine.generate,
    )
    ratios = log_ratios(engine.policy, engine.reference, continuations, engine.move)
    drawn = []
    for index, (row, prompt) in enumerate(chunk):
        own = slice(index * count, (index + 1) * count)
        texts, tokens = [c.text for c in continuations[own]], [len(c.ids) for c in continuations[own]]
        drawn.append(Drawn(row, prompt, texts, ratios[own], tokens, [c.finished for c in continuations[own]]))
    return drawn


@torch.no_grad()
def log_ratios(
    policy: Score,
    reference: Score,
    continuations: Sequence[Continuation],
    move: Callable[[PreferenceBatch], PreferenceBatch],
) -> list[float]:
    r"""Log-ratio of every continuation, :math:`\log \pi(y|x) - \log \pi_{ref}(y|x)`, in nats.

    Their mean over samples of :math:`\pi` estimates :math:`KL(\pi \| \pi_{ref})` without bias, if they are of the
    whole distribution: temperature 1, no token left out. Tokens are scored as they were sampled.

    Args:
        policy: What gives the policy's log-probabilities of a batch.
        reference: What gives the reference's.
        continuations: Samples of the policy.
        move: Brings a batch to where both are.
    """
    ratios: list[float] = []
    for start in range(0, len(continuations), SCORED_AT_ONCE):
        chunk = continuations[start : start + SCORED_AT_ONCE]
        examples = [TokenizedExample(c.prompt_ids, [c.ids], start + row) for row, c in enumerate(chunk, start=1)]
        batch = move(collate(examples))
        ratios += (policy(batch).total - reference(batch).total).double().flatten().tolist()
    return ratios


def point_of(measured: Sequence[Measured], **named: Any) -> Point:
    """Mean reward and KL of a policy from its samples, with standard errors over prompts.

    Args:
        measured: At least one prompt with its samples.
        **named: Method, label and step of the point.
    """
    groups = np.repeat(np.arange(len(measured)), [len(one.rewards) for one in measured])
    reward = clustered_mean(_joined(one.rewards for one in measured), groups)
    kl = clustered_mean(_joined(one.drawn.log_ratios for one in measured), groups)
    return Point(**named, reward=reward.mean, reward_se=reward.se, kl=kl.mean, kl_se=kl.se, **_described(measured))


def best_of_n_point(measured: Sequence[Measured], n: int, method: str = BEST_OF_N) -> Point:
    """What the best of n samples of the reference is worth by the rewards, and the bound of its KL.

    Args:
        measured: Prompts with at least n samples of the reference each.
        n: Number of samples.
        method: Name of the method.
    """
    reward = clustered_mean(
        [best_of_n(one.chosen_by or one.rewards, n, one.rewards) for one in measured], range(len(measured))
    )
    described = _described(measured)
    return Point(
        method=method,
        label=f"N = {n}",
        reward=reward.mean,
        reward_se=reward.se,
        kl=best_of_n_kl(n),
        kl_is_bound=True,
        prompts=described["prompts"],
        samples=described["samples"],
    )


def _described(measured: Sequence[Measured]) -> dict[str, Any]:
    tokens = _joined(one.drawn.tokens for one in measured)
    return {
        "prompts": len(measured),
        "samples": len(tokens),
        "prompt_reward_sd": between_groups_sd(one.rewards for one in measured),
        "length_mean": float(np.mean(tokens)),
        "length_median": float(np.median(tokens)),
        "finished": float(np.mean(_joined(one.drawn.finished for one in measured))),
    }


def _joined(lists: Iterable[Sequence[Any]]) -> list[Any]:
    return [item for items in lists for item in items]
