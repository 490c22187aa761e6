"""A small random model of a config, on which a wrong attention mask shows."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

# Tokens of the small model, its sliding window (where the config has one), and its most parameters.
VOCABULARY, WINDOW, LARGEST = 128, 8, 5e8


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


def with_wider_window(model: PreTrainedModel, trust_remote_code: bool = False) -> PreTrainedModel | None:
    """The same weights with a sliding window one position too wide; ``None`` where no layer has a window."""
    # Some configs name a window that, by their own list, no layer uses.
    unused = set(getattr(model.config, "layer_types", None) or ()) == {"full_attention"}
    if unused or not getattr(model.config, "sliding_window", None):
        return None
    config = copy.deepcopy(model.config)
    config.sliding_window += 1
    wider = _build(config, trust_remote_code).eval()
    wider.load_state_dict(model.state_dict())
    wider.to(model.device)
    return wider


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
    logits = model(input_ids=torch.randint(8, VOCABULARY, (1, 4 * WINDOW)), use_cache=False).logits
    head = model.get_output_embeddings().weight
    if head is not model.get_input_embeddings().weight:
        head.mul_(2 / logits.std())
    return model
