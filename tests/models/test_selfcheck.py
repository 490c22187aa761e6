"""The self-check lets through what equals plain rows, and nothing else; it catches every wrong mask put before it."""

import copy
import dataclasses

import pytest
import torch
from families import STREAM
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from dpo_lightning.data.collate import collate
from dpo_lightning.data.example import TokenizedExample
from dpo_lightning.functional.layout import RaggedLayout
from dpo_lightning.models import miniature as miniatures
from dpo_lightning.models import policy, seam, selfcheck
from dpo_lightning.models.miniature import WINDOW, miniature
from dpo_lightning.models.selfcheck import SENSITIVITY, choose_layout, wrong_batches

honest = seam.ragged_causal_attention


def family_config(family, **kwargs):
    """A config of the size at which the family is used; nothing of it but a miniature is ever built."""
    window = {"sliding_window": 4096} if family == "mistral" else {}
    return AutoConfig.for_model(family, **{**window, **kwargs})


@pytest.mark.parametrize("family", STREAM)
def test_families_whose_attention_is_ours_read_the_stream(family):
    verdict = choose_layout(family_config(family))
    assert (verdict.layout, verdict.family, verdict.reason) == ("stream", family, "")
    assert verdict.difference < 2e-5
    assert verdict.sensitivity > SENSITIVITY * verdict.difference
    assert verdict.sensitivity > 0.1  # nats a token: the miniature depends on what attends to what
    assert str(verdict) == f"{family}: the stream equals separate rows to {verdict.difference:.1e} nats a token."


def test_a_family_that_goes_its_own_way_falls_back_with_the_difference_found():
    verdict = choose_layout(family_config("gptj"))
    assert verdict.layout == "rows"
    assert verdict.difference > 0.1
    assert str(verdict).startswith(
        "gptj models cannot read the token stream: a small random model of the same config differs from plain rows by "
        f"{verdict.difference:.1e} nats a token (wrong attention makes {verdict.sensitivity:.1e})"
    )
    assert "Every response is run in a padded row of its own instead, which is as right, but slower." in str(verdict)


@pytest.mark.parametrize(("family", "error"), [("bloom", "ValueError: too many values"), ("mamba", "ValueError: not")])
def test_a_family_that_fails_on_a_stream_falls_back_with_its_error(family, error):
    verdict = choose_layout(family_config(family))
    assert (verdict.layout, verdict.difference) == ("rows", None)
    assert str(verdict).startswith(f"{family} models cannot read the token stream: its code fails on one ({error}")


def with_prefixes(layout, prefix_end):
    """The same queries with other prefixes."""
    start, end, begin, _ = layout.spans.unbind(1)
    spans = torch.stack([start, end, begin, prefix_end(start, begin)], 1)
    keys = [torch.tensor([*range(b, p), *range(s, e)]) for s, e, b, p in spans.tolist()]
    return RaggedLayout(spans, torch.cat(keys), layout.max_query, max(map(len, keys)))


def prefix_dropped(query, key, value, layout, **kwargs):
    return honest(query, key, value, with_prefixes(layout, lambda start, begin: begin), **kwargs)


def sibling_seen(query, key, value, layout, **kwargs):
    return honest(query, key, value, with_prefixes(layout, lambda start, begin: start), **kwargs)


def prefix_short_by_one(query, key, value, layout, **kwargs):
    shorter = with_prefixes(layout, lambda start, begin: torch.maximum(layout.spans[:, 3] - 1, begin))
    return honest(query, key, value, shorter, **kwargs)


def window_shifted(by):
    def wrong(query, key, value, layout, *, window, **kwargs):
        return honest(query, key, value, layout, window=None if window is None else window + by, **kwargs)

    return wrong


def window_forgotten(query, key, value, layout, *, window, **kwargs):
    return honest(query, key, value, layout, **kwargs)


def without(name):
    def wrong(query, key, value, layout, **kwargs):
        return honest(query, key, value, layout, **{**kwargs, name: None})

    return wrong


def default_scale(query, key, value, layout, *, scale, **kwargs):
    return honest(query, key, value, layout, scale=query.shape[-1] ** -0.5, **kwargs)


@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        ("llama", prefix_dropped),
        ("llama", sibling_seen),
        ("llama", prefix_short_by_one),
        ("gemma3_text", prefix_dropped),
        ("gpt_oss", sibling_seen),
        ("mistral", window_shifted(1)),
        ("mistral", window_shifted(-1)),
        ("mistral", window_forgotten),
        ("gemma3_text", window_shifted(1)),
        ("gpt_oss", without("sinks")),
        ("gemma2", without("softcap")),  # which at 50 hardly bends the scores
        ("granite", default_scale),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__qualname__.split(".")[0],
)
def test_wrong_attention_is_caught(family, wrong, monkeypatch):
    config = family_config(family, **({"attention_multiplier": 0.015625} if family == "granite" else {}))
    monkeypatch.setattr(seam, "_attend", wrong)
    verdict = choose_layout(config)
    assert verdict.layout == "rows"
    assert verdict.difference > SENSITIVITY * 2e-5  # a hundredfold of what rounding makes


def test_wrong_positions_are_caught(monkeypatch):
    # A stream whose positions run on behind a response, instead of restarting behind the prompt.
    read = policy.CausalPolicy._read_stream
    monkeypatch.setattr(
        policy.CausalPolicy,
        "_read_stream",
        lambda self, batch: read(self, batch._replace(position_ids=torch.arange(len(batch.position_ids)))),
    )
    assert choose_layout(family_config("llama")).layout == "rows"


@pytest.mark.parametrize(
    ("family", "known"), [("llama", (2.0, None)), ("gemma2", (1.0, None)), ("cohere2", (1.0, None))]
)
def test_a_family_that_does_something_unknown_to_its_logits_is_refused(family, known, monkeypatch):
    monkeypatch.setattr(policy, "logit_constants", lambda config: known)
    with pytest.raises(ValueError, match=rf"{family}: .*differ from the model's own logits by .* nats.*open an issue"):
        choose_layout(family_config(family))


def test_a_window_that_no_layer_uses_does_not_refuse_the_stream():
    config = family_config("qwen2", use_sliding_window=True, sliding_window=4096, max_window_layers=32)
    assert set(config.layer_types) == {"full_attention"}
    assert config.sliding_window == 4096
    assert choose_layout(config).layout == "stream"


def test_the_window_counts_where_a_layer_uses_it(monkeypatch):
    config = family_config("qwen2", use_sliding_window=True, sliding_window=4096, max_window_layers=16)
    assert choose_layout(config).layout == "stream"
    monkeypatch.setattr(seam, "_attend", window_forgotten)
    assert choose_layout(config).layout == "rows"


def test_a_miniature_on_which_the_window_makes_no_difference_proves_nothing(monkeypatch):
    monkeypatch.setattr(miniatures, "WINDOW", 64)  # longer than every row
    verdict = choose_layout(family_config("mistral"))
    assert verdict.layout == "rows"
    assert verdict.sensitivity < 1e-4


def test_wrong_attention_by_hand():
    # The stream is p p a a b b b | p a: first the prompt is hidden from b, then a is shown to b.
    batch = collate([TokenizedExample([8, 9], [[10, 11], [12, 13, 14]], 1), TokenizedExample([15], [[16]], 2)])
    dropped, sibling = wrong_batches(batch)
    assert dropped.spans.tolist() == [[0, 4, 0, 0], [4, 7, 0, 0], [7, 9, 7, 7]]
    assert dropped.key_index.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert dropped.max_key == 4
    assert sibling.spans.tolist() == [[0, 4, 0, 0], [4, 7, 0, 4], [7, 9, 7, 7]]
    assert sibling.key_index.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert sibling.max_key == 7


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_the_callers_random_state_is_left_alone(family):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    choose_layout(family_config(family))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("level", [transformers_logging.INFO, transformers_logging.CRITICAL])
def test_the_callers_logging_is_left_alone(level):
    before = transformers_logging.get_verbosity()
    try:
        transformers_logging.set_verbosity(level)
        choose_layout(family_config("gpt2"))
        assert transformers_logging.get_verbosity() == level
    finally:
        transformers_logging.set_verbosity(before)


def test_the_config_is_left_alone_and_the_verdict_is_the_same_twice():
    config = family_config("gemma3_text")
    before = copy.deepcopy(config.to_dict())
    first, second = choose_layout(config), choose_layout(config)
    assert dataclasses.asdict(first) == dataclasses.asdict(second)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("family", "kwargs", "attention"),
    [
        ("gemma3_text", {}, {"sliding_attention", "full_attention"}),
        ("gpt_oss", {}, {"sliding_attention", "full_attention"}),
        ("cohere2", {}, {"sliding_attention", "full_attention"}),
        ("qwen3_moe", {"decoder_sparse_step": 3}, set()),  # the first two layers are dense
        ("qwen3_moe", {"mlp_only_layers": [0]}, set()),
    ],
)
def test_a_miniature_has_every_kind_of_layer_and_is_small(family, kwargs, attention):
    config = family_config(family, **kwargs)
    small = miniature(config)
    with torch.device("meta"):
        full = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    assert {type(module) for module in small.modules()} == {type(module) for module in full.modules()}
    assert set(getattr(small.config, "layer_types", ())) == attention
    assert small.config.num_hidden_layers <= 4 < config.num_hidden_layers
    assert small.num_parameters() < full.num_parameters() / 50
    if getattr(config, "sliding_window", None):
        assert small.config.sliding_window == WINDOW
        assert max(sum((prompt, *responses)) for prompt, responses in selfcheck.EXAMPLES) > WINDOW


def test_a_family_without_a_small_model_falls_back(monkeypatch):
    monkeypatch.setattr(miniatures, "LARGEST", 1)
    verdict = choose_layout(family_config("llama"))
    assert (verdict.layout, verdict.difference) == ("rows", None)
    assert "llama models cannot read the token stream: no small model has every kind of layer of llama" in str(verdict)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_attention_is_right_within_its_rounding(family, dtype):
    assert choose_layout(family_config(family), dtype=dtype).layout == "stream"


def test_a_wrong_sixteen_bit_kernel_is_caught(monkeypatch):
    monkeypatch.setattr(selfcheck, "ragged_causal_attention", window_shifted(1))  # in fp32 all is well
    assert choose_layout(family_config("mistral")).layout == "stream"
    verdict = choose_layout(family_config("mistral"), dtype=torch.bfloat16)
    assert verdict.layout == "rows"
    assert "its torch.bfloat16 attention kernel on cpu is wrong by a share of" in str(verdict)


def test_code_of_a_checkpoint_is_trusted_for_every_model_or_for_none(monkeypatch):
    build, trusted = miniatures._build, []
    monkeypatch.setattr(miniatures, "_build", lambda config, trust: trusted.append(trust) or build(config, trust))
    for trust in (True, False):
        choose_layout(family_config("mistral"), trust_remote_code=trust)
        assert set(trusted) == {trust}
        trusted.clear()
