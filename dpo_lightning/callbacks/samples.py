"""What the policy writes before, during and after training."""

from __future__ import annotations

import shutil
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from transformers import PreTrainedTokenizerBase as Tokenizer

from dpo_lightning.callbacks.prompts import encoding_of, numbered
from dpo_lightning.errors import UsageError
from dpo_lightning.evaluation.rewards import log_ratios
from dpo_lightning.generation import Continuation, sample
from dpo_lightning.modules.base import PolicyModule
from dpo_lightning.modules.dpo import DPOModule
from dpo_lightning.scorers import Prompt


class LogSamples(Callback):
    """Continue held-out prompts before training, at every validation and after training.

    Logs samples as text and, as scalars, their mean length, the share of them unlike every other, the
    sequence-level KL to the reference (samples at temperature 1 and top_p 1 only), and what a score function says.
    Prints a table of some of them before and after. Prompts become text and are cut as the data module does it.

    Args:
        prompts: Prompts, text or messages, or the path of a file of rows with a column prompt.
        score: Function from prompt and continuation, joined, to a number; above 0 counts as positive. Of a prompt that
            is messages it is given the continuation alone.
        max_new_tokens: Most tokens of a continuation.
        temperature: 1 samples from the model's own distribution, 0 takes the likeliest token.
        top_p: Sample from the smallest set of tokens that holds this probability.
        num_shown: Continuations in the table and among the logged texts.
        seed: Seed of the samples, the same before and after.
    """

    def __init__(
        self,
        prompts: str | list[Prompt],
        score: Callable[[str], float] | None = None,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        num_shown: int = 6,
        seed: int = 0,
    ) -> None:
        self._numbered = numbered(prompts)
        self.prompts = [prompt for _, prompt in self._numbered]
        self.score = score
        self.max_new_tokens, self.temperature, self.top_p = max_new_tokens, temperature, top_p
        self.num_shown, self.seed = num_shown, seed
        self._sampled_at = -1
        self._tokenizer: Tokenizer
        self.before: tuple[list[Continuation], dict[str, float]] | None = None
        self.after: tuple[list[Continuation], dict[str, float]] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: PolicyModule) -> None:  # type: ignore[override]
        """Sample from the policy as training finds it, if a run that goes on has not done so when it began."""
        if pl_module.policy is not None and not hasattr(pl_module.policy.model, "generate"):
            raise UsageError(
                f"LogSamples has the policy write, and {pl_module.spec.origin} has no `generate` as Hugging Face "
                "models have; leave it out of `trainer.callbacks`."
            )
        self._tokenizer = pl_module.spec.load_tokenizer()
        if self.before is None or trainer.ckpt_path is None:
            self.before = self._sample(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Samples from before training."""
        if self.before is None:
            return {}
        continuations, figures = self.before
        return {"prompts": self.prompts, "before": [tuple(one) for one in continuations], "figures": figures}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them up, unless the prompts are others now."""
        if state_dict.get("prompts") == self.prompts:
            self.before = [Continuation(*one) for one in state_dict["before"]], state_dict["figures"]

    def on_validation_end(self, trainer: Trainer, pl_module: PolicyModule) -> None:  # type: ignore[override]
        """Sample from the policy as it stands."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._sample_after(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: PolicyModule) -> None:  # type: ignore[override]
        """Sample from the trained policy and print the table."""
        self._sample_after(trainer, pl_module)
        if trainer.is_global_zero:
            print(self.table())

    def _sample_after(self, trainer: Trainer, module: PolicyModule) -> None:
        if self._sampled_at != trainer.global_step:
            self._sampled_at = trainer.global_step
            self.after = self._sample(trainer, module)

    def table(self) -> str:
        """Some prompts with their continuations before and after, and what was measured over all of them."""
        assert self.before is not None
        assert self.after is not None
        width = max(60, shutil.get_terminal_size((100, 24)).columns)
        lines = ["", "Held-out prompts, continued before and after training"]
        shown = zip(self.prompts, self.before[0], self.after[0], strict=True)
        for prompt, before, after in list(shown)[: self.num_shown]:
            lines.append(f"\n  {_shown(prompt)} ...")
            for label, continuation in (("before", before), ("after", after)):
                score = "" if self.score is None else f"{self.score(_joined(prompt, continuation.text)):+.2f} "
                head = f"    {label:6} {score}"
                text = "..." + continuation.text.replace("\n", " ")
                lines.append(textwrap.fill(text, width, initial_indent=head, subsequent_indent=" " * len(head)))
        lines.append(f"\n  {'over all ' + str(len(self.prompts)):24}{'before':>10}{'after':>10}")
        names = {"score": "mean score", "positive": "share positive", "positive_distinct": "  unlike each other",
                 "distinct": "share distinct",
                 "kl": "KL to reference, nats", "length": "tokens"}  # fmt: skip
        for name, label in names.items():
            if name in self.after[1]:
                lines.append(f"  {label:24}{self.before[1][name]:10.3f}{self.after[1][name]:10.3f}")
        return "\n".join(lines)

    def _sample(self, trainer: Trainer, module: PolicyModule) -> tuple[list[Continuation], dict[str, float]]:
        assert module.policy is not None
        encoding = encoding_of(trainer)
        continuations = sample(
            module.policy.model,
            self._tokenizer,
            [one.ids for one in encoding.encode(self._tokenizer, self._numbered)],
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            ends=encoding.ends(self._tokenizer, self._numbered),
            generate=module.policy.generate,
        )
        figures = self._measure(module, continuations)
        self._log(trainer, continuations, figures)
        return continuations, figures

    def _measure(self, module: PolicyModule, continuations: Sequence[Continuation]) -> dict[str, float]:
        texts = [continuation.text for continuation in continuations]
        figures = {
            "length": sum(len(continuation.ids) for continuation in continuations) / len(texts),
            "distinct": distinct(texts),
        }
        if self.score is not None:
            scores = [self.score(_joined(prompt, text)) for prompt, text in zip(self.prompts, texts, strict=True)]
            figures["score"] = sum(scores) / len(scores)
            positive = [text for text, score in zip(texts, scores, strict=True) if score > 0]
            figures["positive"] = len(positive) / len(texts)
            figures["positive_distinct"] = distinct(positive)
        whole_distribution = self.temperature == 1 and self.top_p == 1
        if whole_distribution and isinstance(module, DPOModule) and module.loss.needs_reference:
            # A reference that knows sums alone knows no other texts than those of the data.
            figures |= {} if module.reference.sums_alone else {"kl": sequence_kl(module, continuations)}
        return figures

    def _log(self, trainer: Trainer, continuations: Sequence[Continuation], figures: dict[str, float]) -> None:
        step = trainer.global_step
        for logger in trainer.loggers:
            logger.log_metrics({f"samples/{name}": value for name, value in figures.items()}, step)
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                shown = zip(self.prompts[: self.num_shown], continuations, strict=False)
                text = "\n\n".join(
                    f"{_shown(prompt)} **{continuation.text.strip()}**" for prompt, continuation in shown
                )
                logger.experiment.add_text("samples", text, step)


def distinct(texts: Sequence[str]) -> float:
    """Share of texts that are unlike every other."""
    return sum(count == 1 for count in Counter(texts).values()) / max(1, len(texts))


def sequence_kl(module: DPOModule, continuations: Sequence[Continuation]) -> float:
    r"""Estimate of :math:`KL(\pi \| \pi_{ref})` over whole continuations, in nats, from samples of the policy.

    .. math:: \frac{1}{n} \sum_i \log \pi(y_i \mid x_i) - \log \pi_{ref}(y_i \mid x_i)
    """
    training = module.training
    module.eval()
    with module.trainer.precision_plugin.forward_context():
        ratios = log_ratios(
            module,
            module.reference_logps,  # type: ignore[arg-type]
            continuations,
            lambda batch: module.transfer_batch_to_device(batch, module.device, 0),
        )
    module.train(training)
    return sum(ratios) / len(ratios)


def _shown(prompt: Prompt) -> str:
    """A prompt; of messages the last."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _joined(prompt: Prompt, text: str) -> str:
    return prompt + text if isinstance(prompt, str) else text
