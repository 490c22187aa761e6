"""Whether a model may read streams: proved on a small random model of the same config, never taken from a name.

The small model has every kind of layer of the large one, few layers, a small vocabulary and a sliding window
shorter than its rows. Its weights are drawn so that log-probabilities depend strongly on what attends to what, and
the yardstick is the harm that deliberately wrong attention does: the stream may differ from plain rows by no more
than a hundredth of the least harmful of several wrong layouts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from dpo_lightning.batch import PreferenceBatch, lay_out
from dpo_lightning.errors import UsageError
from dpo_lightning.functional.attention import plain_attention, ragged_causal_attention
from dpo_lightning.functional.layout import RaggedLayout, causal_mask
from dpo_lightning.models.miniature import VOCABULARY, WINDOW, miniature, with_wider_window
from dpo_lightning.models.policy import CausalPolicy, Layout

SENSITIVITY = 100.0
ROUNDING = 1e-3  # nats a token that fp32 rounding explains
# Prompt length and response lengths: several examples and responses, rows longer than the window.
EXAMPLES = ((13, (7, 11, 4)), (5, (6, 9)))


@dataclass(frozen=True)
class Verdict:
    """What the self-check found.

    Args:
        layout: The layout that the model may use.
        family: ``model_type`` of its config.
        difference: Root mean square difference between stream and plain rows, nats a token; ``None`` where the
            model does not run on a stream at all.
        sensitivity: Difference that the least harmful wrong attention makes, nats a token.
        reason: Why the stream was refused; empty where it was not.
    """

    layout: Layout
    family: str
    difference: float | None = None
    sensitivity: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        if self.layout == "stream":
            return f"{self.family}: the stream equals separate rows to {self.difference:.1e} nats a token."
        return (
            f"{self.family} models cannot read the token stream: {self.reason}. Every response is run in a padded row "
            "of its own instead, which is as right, but slower."
        )


def choose_layout(
    config: PretrainedConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> Verdict:
    """Run a small random model of this config on a stream and on plain padded rows, and compare.

    The model is compared in fp32, where rounding cannot hide a wrong mask; for 16-bit computation the attention
    kernel that will be used is compared with attention written out, at the head sizes of the config.

    Args:
        config: Config of the model in question.
        device: Where the model will run.
        dtype: Dtype in which it will compute (autocast's, under autocast).
        trust_remote_code: Whether to run model code that a checkpoint brings.

    Raises:
        UsageError: If even padded rows differ from the model's own logits: the family then does something between
            hidden states and logits that the engine does not know.
    """
    family, device = config.model_type, torch.device(device)
    forked = [device] if device.type == "cuda" else []
    # Made on the CPU, whatever the default device: under a Trainer that is the one that is asked about.
    on_cpu, plain = torch.device("cpu"), torch.autocast(device.type, enabled=False)
    with torch.random.fork_rng(forked), on_cpu, plain, torch.no_grad(), quiet():
        torch.manual_seed(0)
        try:
            model = miniature(config, trust_remote_code)
            model.to(device)  # type: ignore[arg-type]
        except LookupError as error:
            return Verdict("rows", family, reason=str(error))
        batch = _batch(device)
        expected = own_logps(model, batch)
        rows = _rms(CausalPolicy(model, "rows")(batch).token, expected)
        if not rows <= ROUNDING:
            raise UsageError(
                f"{family}: log-probabilities from hidden states and output head differ from the model's own logits "
                f"by {rows:.1e} nats a token, so this family does something between the two that dpo_lightning does "
                "not know. Please open an issue that names the model."
            )
        try:
            stream = CausalPolicy(model, "stream")
            difference = _rms(stream(batch).token, expected)
        except Exception as error:  # families fail in their own ways; what counts is that this one did
            return Verdict("rows", family, reason=f"its code fails on one ({type(error).__name__}: {error})")
        harm = [_rms(stream(wrong).token, expected) for wrong in wrong_batches(batch)]
        wider = with_wider_window(model, trust_remote_code)
        if wider is not None:
            harm.append(_rms(CausalPolicy(wider, "stream")(batch).token, expected))
        sensitivity = min(harm)
        if not difference <= min(ROUNDING, sensitivity / SENSITIVITY):
            reason = (
                f"a small random model of the same config differs from plain rows by {difference:.1e} nats a token "
                f"(wrong attention makes {sensitivity:.1e}), so its attention does not see which tokens belong together"
            )
            return Verdict("rows", family, difference, sensitivity, reason)
        if dtype != torch.float32:
            try:
                wrong_by = kernel_error(model.config, device, dtype)
            except RuntimeError as error:
                reason = f"its {dtype} attention kernel fails on {device} ({error})"
                return Verdict("rows", family, difference, sensitivity, reason)
            if not wrong_by <= 1 / SENSITIVITY:
                reason = f"its {dtype} attention kernel on {device.type} is wrong by a share of {wrong_by:.1e}"
                return Verdict("rows", family, difference, sensitivity, reason)
        return Verdict("stream", family, difference, sensitivity)


def own_logps(model: PreTrainedModel, batch: PreferenceBatch) -> Tensor:
    """Token log-probabilities from the model's own logits, one sequence at a time, shape ``(N,)``."""
    logps = []
    keys = torch.arange(len(batch.input_ids)) if batch.key_index is None else batch.key_index
    lengths = [end - start + stop - begin for start, end, begin, stop in batch.spans.tolist()]
    responses = [length for length in batch.length.flatten().tolist() if length]
    for key, response in zip(keys.split(lengths), responses, strict=True):
        ids = batch.input_ids[key]
        logits = model(input_ids=ids[None], use_cache=False).logits[0, -response - 1 : -1]
        logps.append(logits.float().log_softmax(-1).gather(-1, ids[-response:, None])[:, 0])
    return torch.cat(logps)


def wrong_batches(batch: PreferenceBatch) -> Iterator[PreferenceBatch]:
    """The same tokens with deliberately wrong attention: prefixes dropped; then earlier siblings seen as well."""
    start, end, prefix_start, _ = batch.spans.unbind(1)
    for prefix_end in (prefix_start, start):
        spans = torch.stack([start, end, prefix_start, prefix_end], 1)
        keys = [torch.tensor([*range(begin, stop), *range(first, last)]) for first, last, begin, stop in spans.tolist()]
        yield batch._replace(
            spans=spans, key_index=torch.cat(keys).to(start.device), max_key=max(len(key) for key in keys)
        )


def kernel_error(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> float:
    """How wrong the 16-bit attention kernel is, as a share of what a dropped prefix would make it."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    batch = _batch(device)
    states = [torch.randn(len(batch.input_ids), count, size, device=device) for count in (heads, kv_heads, kv_heads)]
    errors = []
    for window in (None, WINDOW) if getattr(config, "sliding_window", None) else (None,):
        exact, wrong = (
            _written_out(states, spans, window) for spans in (batch.spans, next(wrong_batches(batch)).spans)
        )
        layout = RaggedLayout(batch.spans, batch.key_index, batch.max_query, batch.max_key)
        query, key, value = (part.to(dtype) for part in states)
        out = ragged_causal_attention(query, key, value, layout, scale=size**-0.5, window=window)
        errors.append(_rms(out, exact) / _rms(wrong, exact))
    return max(errors)


def _written_out(states: list[Tensor], spans: Tensor, window: int | None) -> Tensor:
    outputs = []
    for start, end, begin, stop in spans.tolist():
        query = states[0][start:end].transpose(0, 1)
        key, value = (torch.cat([part[begin:stop], part[start:end]]).transpose(0, 1) for part in states[1:])
        column = torch.arange(key.shape[1], device=key.device)
        mask = causal_mask(column[-query.shape[1] :], column, window)
        outputs.append(plain_attention(query, key, value, mask, scale=query.shape[-1] ** -0.5).transpose(0, 1))
    return torch.cat(outputs)


def _batch(device: torch.device) -> PreferenceBatch:
    """The stream of :data:`EXAMPLES`, random tokens; low ids are special tokens in many families."""

    def tokens(count: int) -> list[int]:
        return torch.randint(8, VOCABULARY, (count,)).tolist()

    batch = lay_out([(tokens(prompt), [tokens(response) for response in responses]) for prompt, responses in EXAMPLES])
    moved = {name: part.to(device) for name, part in batch._asdict().items() if isinstance(part, Tensor)}
    return batch._replace(**moved)  # type: ignore[arg-type]


def _rms(values: Tensor | None, expected: Tensor) -> float:
    assert values is not None
    return float((values.float() - expected).square().mean().sqrt())


@contextmanager
def quiet() -> Iterator[None]:
    """No word from transformers, such as about models that are made to be thrown away."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
