"""Reward and KL of a policy from its own samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase as Tokenizer

from dpo_lightning.data.chat import Chat
from dpo_lightning.data.files import Files
from dpo_lightning.errors import UsageError
from dpo_lightning.evaluation.points import Point, write_points
from dpo_lightning.evaluation.reward_book import RewardBook
from dpo_lightning.evaluation.rewards import (
    BEST_OF_N,
    Drawing,
    Drawn,
    Engine,
    Measured,
    best_of_n_point,
    draw,
    point_of,
)
from dpo_lightning.generation.loading import load
from dpo_lightning.generation.prompts import Numbered, PromptEncoding, read_prompts
from dpo_lightning.journal import Journal, digest_of
from dpo_lightning.models.fingerprint import fingerprint
from dpo_lightning.models.policy import CausalPolicy
from dpo_lightning.models.selfcheck import choose_layout
from dpo_lightning.recipes import to_plain
from dpo_lightning.scorers import Scorer

Model = tuple[CausalPolicy, Tokenizer]


def reward_kl(
    policy: str,
    reference: str,
    prompts: str,
    out: str,
    *,
    scorer: Scorer,
    num_samples: int = 4,
    max_new_tokens: int = 64,
    best_of: list[int] | None = None,
    chooser: Scorer | None = None,
    column: str | None = None,
    max_prompt_length: int | None = None,
    chat: Chat | None = None,
    method: str | None = None,
    label: str = "",
    step: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    device: str | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Mean reward of a policy's samples, and their KL to a reference, with standard errors.

    Samples are drawn at temperature 1 from the whole vocabulary: those of another distribution do not tell the KL.
    They lie beside the result, their rewards in a file of their own: a run that was killed goes on with both, and
    another scorer scores the same samples.

    Args:
        policy: Hugging Face folder, hub name or checkpoint of the policy.
        reference: That of the reference.
        prompts: File of held-out prompts.
        out: JSON file of the result.
        scorer: What gives a response its reward.
        num_samples: Samples a prompt.
        max_new_tokens: Most tokens of a sample.
        best_of: Numbers N, as in [1,2,4,8], for which the best of N samples of the reference is measured too.
        chooser: What picks the best of N, such as a reward model, whose choice the scorer measures; by default the
            scorer itself.
        column: Column of the prompts, each text or messages; prompt unless named, or what a data module would take
            for the prompt.
        max_prompt_length: Most tokens of a prompt, whose beginning is cut off.
        chat: How messages become text.
        method: What the policy was trained by, as in DPO: methods have colours in `frontier`; by default its folder.
        label: Which run of the method it is, as in "beta 0.1".
        step: Optimizer steps it was trained for.
        seed: Seed of the samples.
        batch_size: Samples drawn at a time.
        device: Where to run, as in cuda:1; by default a GPU where there is one.
        overwrite: Begin anew, whatever lies at the place of the result.

    Returns:
        The result, and the samples beside it.

    Raises:
        UsageError: If something is missing, or the two models have different tokens.
    """
    how = Drawing(num_samples, max_new_tokens, seed, batch_size)
    how.check()
    if any(n < 1 for n in best_of or ()):
        raise UsageError(f"`best_of` must be numbers of 1 or more, got {best_of}.")
    if chooser is not None and not best_of:
        raise UsageError("`chooser` picks the best of N samples; say of how many by `best_of`, as in [1,2,4,8].")
    if max_prompt_length is not None and max_prompt_length < 1:
        raise UsageError(f"`max_prompt_length` must be 1 or more, got {max_prompt_length}.")
    asked, target = read_prompts(prompts, column), Path(out)
    if target.suffix != ".json":
        raise UsageError(f"The result is a JSON file; let its name end in .json, as in {target.with_suffix('.json')}.")
    settings = {
        "prompts": prompts,
        "prompts_fingerprint": Files(prompts).fingerprint(),
        "column": column,
        "max_prompt_length": max_prompt_length,
        "temperature": 1.0,
    }
    models = _models(policy, reference, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    most = how._replace(num_samples=max(num_samples, *(best_of or [0])))
    same = policy == reference
    passes = {policy: (most if same else how, target.with_suffix(".samples.jsonl"))}
    if best_of and not same:
        passes[reference] = (most, target.with_suffix(".reference.jsonl"))
    encoding = PromptEncoding(chat or Chat(), max_prompt_length)
    weights = {name: fingerprint(model) for name, (model, _) in models.items()}
    found: list[list[Measured]] = []
    for name, (drawing, path) in passes.items():
        engine = _engine(models[name], models[reference][0], encoding)
        known = {**settings, "policy": name, "reference": reference, **drawing._asdict()}
        known |= {"weights_of_policy": weights[name], "weights_of_reference": weights[reference]}
        known |= {"prompt_tokens": _digest(engine, asked)}
        picked_by = chooser if len(found) == len(passes) - 1 else None  # the last samples are those of best of N
        found.append(_measure(engine, asked, drawing, scorer, picked_by, path, known, overwrite))
    named = {"method": method or Path(policy).name, "label": label, "step": step}
    picked = BEST_OF_N if chooser is None else f"{BEST_OF_N} by {called(chooser)}"
    points = [point_of(found[0], **named), *(best_of_n_point(found[-1], n, picked) for n in sorted(set(best_of or [])))]
    models_and_scorers = {"policy": policy, "reference": reference, "scorer": to_plain(scorer)}
    asked_how = {"chooser": to_plain(chooser), "chat": to_plain(chat), **how._asdict()}
    write_points(target, points, {**settings, **models_and_scorers, **asked_how})
    print("\n".join(map(in_words, points)))
    return [target, *(path for _, path in passes.values())]


def in_words(point: Point) -> str:
    """A point as a line for people."""
    name = ", ".join(filter(None, [point.method, point.label, "" if point.step is None else f"step {point.step}"]))
    kl = f"KL {point.kl:.3f} nats" + (" at most" if point.kl_is_bound else _error(point.kl_se))
    length = "" if point.length_mean is None else f"   {point.length_mean:.1f} tokens, {point.finished:.0%} finished"
    return f"{name:24}   reward {point.reward:.4f}{_error(point.reward_se)}   {kl}{length}"


def called(scorer: Scorer) -> str:
    """Class of a scorer, its path and whatever else it was told, so that two of a class differ.

    Settings that are as by default, or that change no score, are left out.
    """
    told: tuple[Field[Any], ...] = fields(scorer) if is_dataclass(scorer) else ()
    aside = getattr(scorer, "ASIDE", ())
    settings = {field.name: getattr(scorer, field.name) for field in told if field.name not in aside}
    default = {field.name: field.default for field in told}
    own = {name: value for name, value in settings.items() if value != default[name]}
    words = [str(value) if name == "path" else f"{name}={value}" for name, value in own.items()]
    return " ".join([type(scorer).__name__, *words])


def _error(se: float | None) -> str:
    return "" if se is None else f" ± {se:.3f}"


def _models(policy: str, reference: str, device: torch.device) -> dict[str, Model]:
    """Both by their names, once where they are one."""
    models = {name: _load(name, device) for name in dict.fromkeys([policy, reference])}
    vocabularies = [models[name][1].get_vocab() for name in (policy, reference)]
    if vocabularies[0] != vocabularies[1]:
        raise UsageError(
            f"{policy} and {reference} have different tokens, so that neither can score what the other writes. Name "
            "the model that training of the policy began with."
        )
    return models


def _load(path: str, device: torch.device) -> Model:
    model, tokenizer = load(path)
    layout = choose_layout(model.config, device=device, dtype=model.dtype).layout
    return CausalPolicy(model, layout).to(device).eval(), tokenizer


def _engine(model: Model, reference: CausalPolicy, encoding: PromptEncoding) -> Engine:
    policy, tokenizer = model
    device = next(policy.parameters()).device
    return Engine(
        policy.model,
        tokenizer,
        policy.generate,
        policy,
        reference,
        lambda batch: move_data_to_device(batch, device),
        encoding,
    )


def _digest(engine: Engine, prompts: Sequence[Numbered]) -> str:
    """Changes whenever what the policy is given does, or what ends its answers."""
    ids = [one.ids for one in engine.encoding.encode(engine.tokenizer, prompts)]
    return digest_of(ids, engine.encoding.ends(engine.tokenizer, prompts))


def _measure(
    engine: Engine,
    prompts: Sequence[Numbered],
    how: Drawing,
    scorer: Scorer,
    chooser: Scorer | None,
    path: Path,
    settings: dict[str, Any],
    overwrite: bool,
) -> list[Measured]:
    """Measurements of all prompts: those of an earlier run, and the rest now."""
    measured: list[Measured] = []
    rewards = path.with_suffix(".rewards.jsonl")
    with Journal(path, settings, overwrite) as journal, RewardBook(rewards, overwrite) as book:
        known = {row["row"]: Drawn(*(row[name] for name in Drawn._fields)) for row in journal.rows}
        for number, chunk in _shown(how.chunks(prompts), path):
            missing = [row for row, _ in chunk if row not in known]
            if missing:
                new = [one for one in draw(engine, how, chunk, number) if one.row in missing]
                journal.append(one._asdict() for one in new)
                known |= {one.row: one for one in new}
            measured += book.measured([known[row] for row, _ in chunk], scorer, chooser)
    return measured


def _shown(chunks: list[Sequence[Numbered]], path: Path) -> Iterator[tuple[int, Sequence[Numbered]]]:
    return enumerate(tqdm(chunks, desc=path.name, disable=None))
