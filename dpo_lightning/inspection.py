"""What a config makes of its data, shown token by token: `dpo-lightning inspect`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from transformers import PreTrainedTokenizerBase as Tokenizer

from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.example import TokenizedExample
from dpo_lightning.errors import UsageError

# What a token is, and how it is shown: blue, green, yellow; white on magenta for what closes a response.
STYLES = {"prompt": "34", "scored": "32", "not scored": "33", "end token": "97;45"}
UNDERLINED = ";4"  # every second token, so that they can be told apart


class InspectingTrainer(Trainer):
    """A Trainer that can also show the data, which makes that a command beside fit."""

    def inspect(
        self,
        model: LightningModule | None = None,
        datamodule: LightningDataModule | None = None,
        num_examples: int = 3,
    ) -> None:
        """Print the data report of a config and some examples, without loading a model.

        Args:
            model: Not used; the tokenizer came from it.
            datamodule: The data.
            num_examples: Examples to show of the training data, or of what there is.
        """
        if not isinstance(datamodule, PreferenceDataModule):
            raise UsageError(f"`inspect` shows a PreferenceDataModule, not a {type(datamodule).__name__}.")
        if num_examples < 0:
            raise UsageError(f"`num_examples` must be 0 or more, got {num_examples}.")
        examples = datamodule.inspect(num_examples)
        color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(f"\n{len(examples)} examples: {'  '.join(_painted(name, name, color) for name in STYLES)}")
        for example in examples:
            print(f"\n{shown(example, datamodule.tokenizer, color)}")


def shown(example: TokenizedExample, tokenizer: Tokenizer, color: bool) -> str:
    """An example as text, its tokens told apart by color, or by bars and words.

    Args:
        example: The example.
        tokenizer: What made its tokens.
        color: Whether the terminal understands colors.
    """
    num_prompt, num_responses = len(example.prompt_ids), len(example.response_ids)
    parts = [f"row {example.row}: prompt of {num_prompt} tokens"]
    parts.append(_line(tokenizer, example.prompt_ids, ["prompt"] * num_prompt, color))
    for number, ids in enumerate(example.response_ids):
        scored = [True] * len(ids) if example.scored is None else example.scored[number]
        kinds = ["scored" if counts else "not scored" for counts in scored]
        for closing in _closing(tokenizer, ids):
            if scored[closing]:
                kinds[closing] = "end token"
        place = f"response {number + 1} of {num_responses}" if num_responses > 1 else "response"
        best = ", the best" if num_responses > 1 and number == 0 else ""
        parts.append(f"{place}{best}: {len(ids)} tokens, {sum(scored)} scored")
        parts.append(_line(tokenizer, ids, kinds, color))
    return "\n".join(parts)


def _closing(tokenizer: Tokenizer, ids: Sequence[int]) -> Iterator[int]:
    """Places of the special tokens that close a response; a template may put a line's end behind them."""
    added = tokenizer.added_tokens_decoder.items()
    special = set(tokenizer.all_special_ids) | {token for token, content in added if content.special}
    for place in range(len(ids) - 1, max(len(ids) - 4, -1), -1):
        if ids[place] in special:
            yield place


def _line(tokenizer: Tokenizer, ids: Sequence[int], kinds: Sequence[str], color: bool) -> str:
    pieces, kind_before = [], ""
    for number, (text, kind) in enumerate(zip(_texts(tokenizer, ids), kinds, strict=True)):
        if color:
            pieces.append(_painted(text, kind, color, underlined=number % 2 == 1))
        else:
            pieces.append(f"{'' if kind == kind_before else f'[{kind}] '}{text}|")
            kind_before = kind
    return "".join(pieces)


def _texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each token; the first tokens of a character that takes several have none."""
    texts, pending = [], list[int]()
    # Some decoders drop the space that a text begins with, so every token is decoded behind another.
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    width = len(str(tokenizer.decode(before)))
    for token in ids:
        pending.append(token)
        text = str(tokenizer.decode([*before, *pending]))[width:]
        whole = "\N{REPLACEMENT CHARACTER}" not in text or len(pending) > 4
        texts.append(text.replace("\n", "↵\n") if whole else "")
        pending = [] if whole else pending
    if pending:  # a text that was cut within a character
        texts[-1] = text
    return texts


def _painted(text: str, kind: str, color: bool, underlined: bool = False) -> str:
    if not color:
        return f"[{text}]"
    return f"\033[{STYLES[kind]}{UNDERLINED if underlined else ''}m{text}\033[0m"
