"""A text classifier as a scorer."""

# Annotations are not postponed: jsonargparse reads those of a base class with the names of the subclass's file.
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

from dpo_lightning.errors import UsageError
from dpo_lightning.scorers.base import Prompt, Scorer, Unscored

log = logging.getLogger(__name__)
LONGEST = 1_000_000  # what tokenizers that know no limit say is more


@dataclass(frozen=True, kw_only=True)
class Classifier(Scorer):
    """A text-classification model of transformers, as a sentiment classifier is.

    Args:
        path: Folder or hub name.
        label: Which of its labels the score is of; a model with one label gives its output as it is.
        output: The label's log-odds against the others, which tells responses apart where probabilities are all but 1;
            its log-probability, or its probability.
        scores: What it reads: prompt and response joined (messages by the tokenizer's chat template), or the response.
        max_length: Most tokens; what the model can take unless given.
        truncation_side: Where longer texts are cut.
        batch_size: Texts at a time, of similar length.
        dtype: Dtype of its weights.
        device: Where it runs, as in cuda:0; a GPU where there is one unless given.
    """

    path: str
    label: str = "POSITIVE"
    output: Literal["logit", "log_probability", "probability"] = "logit"
    scores: Literal["prompt_and_response", "response"] = "prompt_and_response"
    max_length: int | None = None
    truncation_side: Literal["left", "right"] = "left"
    batch_size: int = 32
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None

    ASIDE: ClassVar[tuple[str, ...]] = ("batch_size", "device")

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"`batch_size` must be 1 or more, got {self.batch_size}.")
        if self.max_length is not None and self.max_length < 1:
            raise UsageError(f"`max_length` must be 1 or more, got {self.max_length}.")

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """The label's log-odds, log-probability or probability for each response."""
        import torch

        model = self._model
        ids = [self._read(*item) for item in enumerate(zip(prompts, responses, strict=True))]
        self._say_what_is_cut(ids)
        ids = [self._cut(row) for row in ids]
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]), reverse=True)
        scores = [0.0] * len(ids)
        # transformers cannot pool padded rows of a model that has no padding token.
        size = self.batch_size if self._pad is not None else 1
        with torch.inference_mode():
            for start in range(0, len(order), size):
                places = order[start : start + size]
                rows = [ids[place] for place in places]
                width = max(map(len, rows))
                batch = torch.tensor([row + [self._pad or 0] * (width - len(row)) for row in rows])
                mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
                logits = model(input_ids=batch.to(model.device), attention_mask=mask.to(model.device)).logits.float()
                for place, score in zip(places, self._of_label(logits).tolist(), strict=True):
                    scores[place] = score
        return scores

    @cached_property
    def _model(self) -> Any:
        import torch
        from transformers import AutoModelForSequenceClassification

        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            model = AutoModelForSequenceClassification.from_pretrained(self.path, dtype=getattr(torch, self.dtype))
        except (OSError, ValueError) as error:
            raise UsageError(f"{self.path} could not be loaded as a text-classification model: {error}") from error
        if model.config.num_labels == 1 and self.output != "logit":
            raise UsageError(f"{self.path} has one label, whose output is no {self.output}; set `output` to logit.")
        return model.to(device).eval()

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.path)
        except (OSError, ValueError) as error:
            raise UsageError(f"{self.path} has no tokenizer that could be loaded: {error}") from error

    @property
    def _pad(self) -> int | None:
        return self._model.config.get_text_config().pad_token_id

    @cached_property
    def _index(self) -> int:
        labels = self._model.config.label2id
        if self.label not in labels:
            known = ", ".join(map(repr, sorted(labels, key=labels.get)))
            raise UsageError(
                f"{self.path} has no label {self.label!r}; it has {known}. Set `label` to the one that is good."
            )
        return int(labels[self.label])

    @cached_property
    def _told(self) -> list[str]:
        """What was said once."""
        return []

    @cached_property
    def _limit(self) -> int:
        """Most tokens that the model takes."""
        config = self._model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        if positions and "roberta" in config.model_type:  # its positions begin behind that of padding
            positions -= config.pad_token_id + 1
        known = [limit for limit in (self._tokenizer.model_max_length, positions) if limit and limit < LONGEST]
        if self.max_length is not None:
            known.append(self.max_length)
        return min(known, default=LONGEST)

    def _read(self, place: int, pair: tuple[Prompt, str]) -> list[int]:
        """Tokens of a text, whole."""
        prompt, response = pair
        ids: list[int]
        if self.scores == "response" or isinstance(prompt, str):
            text = response if self.scores == "response" else f"{prompt}{response}"
            ids = self._tokenizer(text, verbose=False)["input_ids"]
        elif self._tokenizer.chat_template is None:
            raise Unscored(
                place,
                f"the prompt is messages, and the tokenizer of {self.path} has no chat template to write them by; set "
                "`scores` to response.",
            )
        else:
            messages = [*prompt, {"role": "assistant", "content": response}]
            ids = self._tokenizer.apply_chat_template(messages, return_dict=False)
        if not ids:
            raise Unscored(place, f"there is nothing in it for {self.path} to read.")
        return ids

    def _cut(self, ids: list[int]) -> list[int]:
        """The most that the model takes, with the special tokens that the tokenizer puts around a text."""
        over = len(ids) - self._limit
        if over <= 0:
            return ids
        special = set(self._tokenizer.all_special_ids)
        head = next((place for place, token in enumerate(ids) if token not in special), 0)
        tail = next((place for place, token in enumerate(reversed(ids)) if token not in special), 0)
        inner = ids[head : len(ids) - tail]
        kept = inner[over:] if self.truncation_side == "left" else inner[: len(inner) - over]
        return ids[:head] + kept + ids[len(ids) - tail :]

    def _say_what_is_cut(self, ids: list[list[int]]) -> None:
        cut = sum(len(row) > self._limit for row in ids)
        if cut and not self._told:
            self._told.append("cut")
            log.warning(
                "%s: %d of the first %d texts were cut to %d tokens at their %s; of later ones it is not said.",
                *(self.path, cut, len(ids), self._limit, self.truncation_side),
            )

    def _of_label(self, logits: Any) -> Any:
        import torch

        if logits.shape[-1] == 1:
            return logits[:, 0]
        odds = logits[:, self._index]
        if self._model.config.problem_type != "multi_label_classification":  # there each label has odds of its own
            others = [place for place in range(logits.shape[-1]) if place != self._index]
            odds = odds - logits[:, others].logsumexp(-1)
        outputs = {
            "logit": odds,
            "log_probability": torch.nn.functional.logsigmoid(odds),
            "probability": odds.sigmoid(),
        }
        return outputs[self.output]
