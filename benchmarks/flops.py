"""What a training step has to compute, and how fast the machine multiplies matrices of its shapes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from contenders import Pair
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig


class Work(NamedTuple):
    """What pairs ask for where each prompt is computed once: tokens, scored tokens, and pairs of a query and a key."""

    tokens: int
    scored: int
    visible: int

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> Work:
        tokens = scored = visible = 0
        for prompt, chosen, rejected in (map(len, pair) for pair in pairs):
            tokens += prompt + chosen + rejected
            scored += chosen + rejected
            visible += _triangle(prompt + chosen) + rejected * prompt + _triangle(rejected)
        return cls(tokens, scored, visible)


def _triangle(side: int) -> int:
    return side * (side + 1) // 2


def layer_shapes(config: PretrainedConfig) -> list[tuple[int, int]]:
    """Outputs and inputs of the linear maps of one decoder layer."""
    with torch.device("meta"):
        layer = AutoModelForCausalLM.from_config(config).model.layers[0]
    return [(linear.out_features, linear.in_features) for linear in layer.modules() if isinstance(linear, nn.Linear)]


def useful_flops(config: PretrainedConfig, work: Work, *, reference: bool, lora: bool = False) -> int:
    """Operations that no way of computing a training step can do without.

    Two a weight and token forward and four backward; two backward below adapters, where weights need no gradient.
    Queries times keys and probabilities times values have two factors that need one. What is computed again, padding,
    and the adapters themselves do not count.
    """
    weights = config.num_hidden_layers * sum(outputs * inputs for outputs, inputs in layer_shapes(config))
    linear = 2 * weights * work.tokens + 2 * config.vocab_size * config.hidden_size * work.scored
    attention = 4 * config.head_dim * config.num_attention_heads * config.num_hidden_layers * work.visible
    policy = linear * (2 if lora else 3) + attention * 3
    return policy + (linear + attention if reference else 0)


def product_rates(config: PretrainedConfig, tokens: int, dtype: torch.dtype, device: str) -> tuple[float, float]:
    """FLOP/s of the products of a layer for so many tokens: forward and backward together, and forward alone."""
    forward = backward = 0.0
    shapes = layer_shapes(config)
    for outputs, inputs in shapes:
        states, gradient, weight = (
            torch.randn(shape, dtype=dtype, device=device)
            for shape in ((tokens, inputs), (tokens, outputs), (outputs, inputs))
        )
        forward += _seconds(lambda a=states, b=weight: a @ b.t(), device)
        backward += _seconds(lambda a=gradient, b=weight: a @ b, device)
        backward += _seconds(lambda a=gradient, b=states: a.t() @ b, device)
    flops = sum(2 * tokens * outputs * inputs for outputs, inputs in shapes)
    return 3 * flops / (forward + backward), flops / forward


def _seconds(product: Callable[[], object], device: str, repeats: int = 7) -> float:
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        product()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
