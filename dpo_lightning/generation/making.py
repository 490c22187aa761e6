"""The samples of a file are made: whatever is not there yet, by all ranks, and then put in order."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from dpo_lightning.errors import UsageError
from dpo_lightning.generation.output import Key, Output
from dpo_lightning.generation.plan import Chunk, Sampling
from dpo_lightning.generation.progress import Progress, summary, warn_where_cut
from dpo_lightning.generation.prompts import Asked
from dpo_lightning.generation.samples import samples_of
from dpo_lightning.generation.sampling import sample
from dpo_lightning.journal import Row

Add = Callable[[list[Row]], None]
Write = Callable[[Sequence[Chunk], Sequence[Asked], Sampling, Add], None]


def make(
    path: Path,
    settings: dict[str, Any],
    asked: Sequence[Asked],
    chunks: Sequence[Chunk],
    sampling: Sampling,
    fabric: Fabric,
    begin: Callable[[], Write],
    overwrite: bool,
) -> Path | None:
    """Make the rows that are not there yet, and put all of them in order.

    Args:
        path: The file.
        settings: What its rows depend on.
        asked: Prompts.
        chunks: All of them in chunks, at every temperature.
        sampling: How they are continued.
        fabric: The ranks, each of which has its share of the chunks.
        begin: Gives what makes the rows of chunks, and hands them on as they come.
        overwrite: Begin anew, whatever lies there.

    Returns:
        The file; None where it was complete, and on ranks but the first.
    """
    order: list[Key] = [(temperature, one.row) for temperature in sampling.temperatures for one in asked]
    first = fabric.is_global_zero
    with contextlib.closing(Output(path, settings, order, fabric, overwrite)) as output:
        if output.complete:
            if first:
                print(f"{path} is complete: {summary(output.finish())}. To make it anew give --overwrite.")
            return None
        todo = [c for c in chunks if any((c.temperature, asked[place].row) not in output.done for place in c.places)]
        mine = todo[fabric.global_rank :: fabric.world_size]
        write = begin() if mine else None
        with Progress(len(order), len(output.done), shown=first) as progress:

            def add(rows: list[Row]) -> None:
                progress.add([*output.append(rows), *(output.of_others() if first else [])])

            if write is not None:
                write(mine, asked, sampling, add)
            output.wait()
            if not first:
                return None
            progress.add(list(output.of_others()))
        rows = output.finish()
    print(f"{summary(rows)}, {progress.tokens_per_second():,.0f} tokens/s")
    warn_where_cut(rows, sampling.max_new_tokens)
    return path


def continue_by_model(
    chunks: Sequence[Chunk],
    asked: Sequence[Asked],
    sampling: Sampling,
    add: Add,
    *,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
) -> None:
    """Rows of chunks by a model on this machine.

    Raises:
        UsageError: If the model does not know so many positions, or the device has too little memory.
    """
    _check_lengths(model, asked, sampling.max_new_tokens)
    count = sampling.num_samples
    for chunk in chunks:
        prompts = [asked[place] for place in chunk.places]
        repeated = [one.ids for one in prompts for _ in range(count)]
        try:
            found = sample(
                model,
                tokenizer,
                repeated,
                max_new_tokens=sampling.max_new_tokens,
                temperature=chunk.temperature,
                top_p=sampling.top_p,
                seed=chunk.seed,
                batch_size=len(repeated),
                ends=sampling.ends,
                stop=sampling.stop,
            )
        except torch.OutOfMemoryError as error:
            raise UsageError(
                f"The device has too little memory for {len(repeated)} completions of prompts of up to "
                f"{len(repeated[0]):,} tokens: {error}. Lower --batch_size or --batch_tokens."
            ) from error
        groups = [found[start : start + count] for start in range(0, len(found), count)]
        add(
            [
                samples_of(one.row, one.prompt, chunk.temperature, group)
                for one, group in zip(prompts, groups, strict=True)
            ]
        )


def ranks(accelerator: str, devices: int | str, num_nodes: int) -> Fabric:
    """The ranks of a call, those of torchrun where that has started it.

    Raises:
        UsageError: If there are no such devices.
    """
    if TorchElasticEnvironment.detect():
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        devices, num_nodes = local, int(os.environ["WORLD_SIZE"]) // local
    try:
        return Fabric(accelerator=accelerator, devices=devices, num_nodes=num_nodes)
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        raise UsageError(f"--accelerator {accelerator} --devices {devices} --num_nodes {num_nodes}: {error}") from error


def _check_lengths(model: PreTrainedModel, asked: Sequence[Asked], max_new_tokens: int) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(asked, key=lambda one: len(one.ids))
    if context is not None and len(longest.ids) + max_new_tokens > context:
        raise UsageError(
            f"row {longest.row}: the prompt has {len(longest.ids):,} tokens, and with {max_new_tokens:,} new ones that "
            f"is more than the {context:,} positions that the model knows. Lower --max_new_tokens, or cut prompts by "
            f"--max_prompt_length {max(1, context - max_new_tokens)}."
        )
