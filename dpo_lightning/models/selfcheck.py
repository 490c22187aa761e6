"""Whether a model may read streams: proved on a small random model of the same config, never taken from a name.

The small model has every kind of layer of the large one, few layers, a small vocabulary and a sliding window
shorter than its rows. Its weights are drawn so that log-probabilities depend strongly on what attends to what, and
the yardstick is the harm that deliberately wrong attention does: the stream may differ from plain rows by no more
than a hundredth of the least harmful of several wrong layouts.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from dpo_lightning.batch import PreferenceBatch, lay_out
from dpo_lightning.errors import UsageError
from dpo_lightning.functional.attention import RaggedLayout, causal_mask, plain_attention, ragged_causal_attention
from dpo_lightning.models.policy import CausalPolicy, Layout

SENSITIVITY = 100.0
ROUNDING = 1e-3  # nats a token that fp32 rounding explains
VOCABULARY, WINDOW = 128, 8
LARGEST = 5e8  # parameters of the small model
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
    with torch.random.fork_rng(forked), on_cpu, plain, torch.no_grad(), _quiet():
        torch.manual_seed(0)
        try:
            model = miniature(config, trust_remote_code)
            model.to(device)  # type: ignore[arg-type]
        except LookupError as error:
            return Verdict("rows", family, reason=str(error))
        batch = _batch(device)
        expected = own_logps(model, batch)
        rows = _rms(CausalPolicy(model, "rows").token_logps(batch), expected)
        if not rows <= ROUNDING:
            raise UsageError(
                f"{family}: log-probabilities from hidden states and output head differ from the model's own logits "
                f"by {rows:.1e} nats a token, so this family does something between the two that dpo_lightning does "
                "not know. Please open an issue that names the model."
            )
        try:
            stream = CausalPolicy(model, "stream")
            difference = _rms(stream.token_logps(batch), expected)
        except Exception as error:  # families fail in their own ways; what counts is that this one did
            return Verdict("rows", family, reason=f"its code fails on one ({type(error).__name__}: {error})")
        harm = [_rms(stream.token_logps(wrong), expected) for wrong in wrong_batches(batch)]
        wider = _wrong_windows(model, trust_remote_code)
        harm += [_rms(stream.token_logps(batch), expected) for stream in wider]
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


def miniature(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """A small random model with every kind of layer of the config, in evaluation mode, fp32.

    Raises:
        LookupError: If no model of less than :data:`LARGEST` parameters has every kind of layer.
    """
    with torch.device("meta"):
        kinds = _module_kinds(_build(_shrink(config, width=False, layers=None), trust_remote_code))
    trouble = "none has the same kinds of layer"
    # One layer of each kind where the config lists kinds; where it counts them by periods, as many as it takes.
    for width, layers in itertools.product((True, False), (0, 4, 8, 16)):
        small = _shrink(config, width=width, layers=layers)
        try:
            with torch.device("meta"):
                plan = _build(small, trust_remote_code)
            if _module_kinds(plan) == kinds and plan.num_parameters() < LARGEST:
                return _far_from_flat(_build(small, trust_remote_code).eval())
        except Exception as error:  # sizes hang together in ways that only the family knows: then change fewer
            trouble = f"{type(error).__name__}: {error}"
    raise LookupError(f"no small model has every kind of layer of {config.model_type} ({trouble})")


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
        mask = causal_mask(query.shape[1], key.shape[1], window, query.device)
        outputs.append(plain_attention(query, key, value, mask, scale=query.shape[-1] ** -0.5).transpose(0, 1))
    return torch.cat(outputs)


def _batch(device: torch.device) -> PreferenceBatch:
    """The stream of :data:`EXAMPLES`, random tokens; low ids are special tokens in many families."""

    def tokens(count: int) -> list[int]:
        return torch.randint(8, VOCABULARY, (count,)).tolist()

    batch = lay_out([(tokens(prompt), [tokens(response) for response in responses]) for prompt, responses in EXAMPLES])
    moved = {name: part.to(device) for name, part in batch._asdict().items() if isinstance(part, Tensor)}
    return batch._replace(**moved)  # type: ignore[arg-type]


def _shrink(config: PretrainedConfig, *, width: bool, layers: int | None) -> PretrainedConfig:
    """A copy with a small vocabulary and window; narrower on request.

    ``layers`` are kept, but all where it is ``None``, and at least one of each kind that the config lists.
    """
    small = copy.deepcopy(config.get_text_config())
    small.vocab_size = VOCABULARY
    small.tie_word_embeddings = False
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        token = getattr(small, name, None)
        if not isinstance(token, int) or token >= VOCABULARY:
            setattr(small, name, None)
    if getattr(small, "sliding_window", None):
        small.sliding_window = WINDOW
    if layers is not None:
        _keep_layers(small, layers)
    if width:
        _narrow(small)
    return small


def _keep_layers(config: PretrainedConfig, at_least: int) -> None:
    count = config.num_hidden_layers
    lists = {name: value for name, value in vars(config).items() if isinstance(value, list) and len(value) == count}
    kinds = [repr(kind) for kind in zip(*lists.values(), strict=True)] or [""] * count
    first_of_kind = {kinds.index(kind) for kind in kinds}
    others = (index for index in range(count) if index not in first_of_kind)
    chosen = sorted([*first_of_kind, *itertools.islice(others, max(0, max(2, at_least) - len(first_of_kind)))])
    config.num_hidden_layers = len(chosen)
    for name, value in lists.items():
        setattr(config, name, [value[index] for index in chosen])


def _narrow(config: PretrainedConfig) -> None:
    """At most two key-value heads of the same size and grouping, and the widths that follow from them."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    hidden, few = config.hidden_size, min(kv_heads, 2 if heads // kv_heads <= 4 else 1)
    config.num_attention_heads = heads // kv_heads * few
    if getattr(config, "num_key_value_heads", None):
        config.num_key_value_heads = few
    config.hidden_size = size * config.num_attention_heads
    if getattr(config, "word_embed_proj_dim", None) == hidden:
        config.word_embed_proj_dim = config.hidden_size
    for name in ("intermediate_size", "ffn_dim", "n_inner", "moe_intermediate_size"):
        if getattr(config, name, None):
            setattr(config, name, 2 * config.hidden_size)
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if getattr(config, name, None):
            setattr(config, name, min(getattr(config, name), 8))
    if getattr(config, "num_experts_per_tok", None):
        config.num_experts_per_tok = min(config.num_experts_per_tok, 2)


def _build(config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """Random weights, and plain attention written out, which is what the stream is measured against."""
    # A deep copy: models write into the config that they are given.
    return AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation="eager", dtype=torch.float32, trust_remote_code=trust_remote_code
    )


def _module_kinds(model: nn.Module) -> set[type[nn.Module]]:
    return {type(module) for module in model.modules()}


@torch.no_grad()
def _far_from_flat(model: PreTrainedModel) -> PreTrainedModel:
    """Weights under which attention decides what is predicted: a pretrained model's scale would hide wrong masks."""
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    logits = model(input_ids=_batch(torch.device("cpu")).input_ids[None], use_cache=False).logits
    head = model.get_output_embeddings().weight
    if head is not model.get_input_embeddings().weight:
        head.mul_(2 / logits.std())
    return model


def _wrong_windows(model: PreTrainedModel, trust_remote_code: bool) -> Iterator[CausalPolicy]:
    """The stream of the same weights with a window one position too wide, where there is a window."""
    # Some configs name a window that, by their own list, no layer uses.
    unused = set(getattr(model.config, "layer_types", None) or ()) == {"full_attention"}
    if unused or not getattr(model.config, "sliding_window", None):
        return
    config = copy.deepcopy(model.config)
    config.sliding_window += 1
    wider = _build(config, trust_remote_code).eval()
    wider.load_state_dict(model.state_dict())
    wider.to(model.device)
    yield CausalPolicy(wider, "stream")


def _rms(values: Tensor, expected: Tensor) -> float:
    return float((values.float() - expected).square().mean().sqrt())


@contextmanager
def _quiet() -> Iterator[None]:
    """No word from transformers about models that are made to be thrown away."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
