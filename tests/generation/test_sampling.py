"""Continuations are what the model itself says, token by token, in any batch; nothing else in the process changes."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from dpo_lightning.data.example import PreferenceExample
from dpo_lightning.data.tokenize import Tokenization
from dpo_lightning.errors import UsageError
from dpo_lightning.generation import Continuation, sample
from dpo_lightning.models.policy import CausalPolicy

LETTERS = "▁abcdefghijklmnopqrstuvwxyz"
PROMPTS = ["a", "once upon a time", "the film", "it was a dark and stormy night in may"]


def letters(template: str = "<s> $A", **names: str | None) -> PreTrainedTokenizerFast:
    """SentencePiece-like: a token a letter, a space before every text that decoding drops."""
    vocab = {token: place for place, token in enumerate(["<pad>", "<s>", "</s>", *LETTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", vocab["<s>"]), ("</s>", vocab["</s>"])]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **names}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return letters()


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    """Random weights, so large that the model has opinions."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=30,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128,
                initializer_range=0.3,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        )


@pytest.fixture(params=["plain", "stream"])
def model(request, llama) -> PreTrainedModel:
    """The model as it is, and with this package's attention."""
    own = copy.deepcopy(llama)
    return own if request.param == "plain" else CausalPolicy(own, "stream").model


@torch.no_grad()
def greedy(model, prompt_ids: list[int], num: int, end: int) -> list[int]:
    """The likeliest token, again and again, from the whole text each time."""
    ids = list(prompt_ids)
    while len(ids) < len(prompt_ids) + num and ids[-1] != end:
        ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[len(prompt_ids) :]


def test_greedy_takes_the_likeliest_token_each_time(model, tokenizer):
    continuations = sample(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=0)
    assert len({tuple(continuation.ids) for continuation in continuations}) == len(PROMPTS)
    for prompt, continuation in zip(PROMPTS, continuations, strict=True):
        assert continuation.prompt_ids == tokenizer(prompt)["input_ids"]
        assert continuation.ids == greedy(model.eval(), continuation.prompt_ids, 12, tokenizer.eos_token_id)


def test_left_padding_changes_nothing(model, tokenizer):
    together = sample(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=0)
    for batch_size in (1, 3):
        assert sample(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=0, batch_size=batch_size) == together


def test_padding_that_is_the_end_token_changes_nothing(llama, tokenizer):
    expected = [c.ids for c in sample(llama, tokenizer, PROMPTS * 10, max_new_tokens=20)]
    assert {ids[-1] == tokenizer.eos_token_id for ids in expected} == {True, False}
    for pad in ("</s>", None):
        continuations = sample(llama, letters(pad_token=pad), PROMPTS * 10, max_new_tokens=20)
        assert [continuation.ids for continuation in continuations] == expected


def test_a_continuation_stops_at_the_end_token(llama, tokenizer):
    continuations = sample(llama, tokenizer, ["a"] * 100, max_new_tokens=20)
    end = tokenizer.eos_token_id
    stopped = [continuation for continuation in continuations if end in continuation.ids]
    assert 10 < len(stopped) < 90
    for continuation in continuations:
        assert end not in continuation.ids[:-1]
        assert continuation.ids[-1] == end or len(continuation.ids) == 20
        assert "</s>" not in continuation.text


def test_without_an_end_token_all_tokens_are_continuation(llama):
    continuations = sample(llama, letters(eos_token=None), ["a"] * 50, max_new_tokens=20)
    assert {len(continuation.ids) for continuation in continuations} == {20}
    assert any(2 in continuation.ids[:-1] for continuation in continuations)  # what is an end token elsewhere


def test_a_seed_fixes_the_samples(llama, tokenizer):
    first, again, other = (sample(llama, tokenizer, PROMPTS, max_new_tokens=12, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_random_state_of_the_caller_is_left_alone(llama, tokenizer):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = sample(llama, tokenizer, PROMPTS, max_new_tokens=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert sample(llama, tokenizer, PROMPTS, max_new_tokens=3) == first


def test_samples_follow_the_models_own_distribution(llama, tokenizer):
    with torch.no_grad():
        logits = llama.eval()(input_ids=torch.tensor([tokenizer("the film")["input_ids"]])).logits[0, -1]
    for temperature in (1.0, 0.5):
        expected = torch.softmax(logits / temperature, -1)
        continuations = sample(llama, tokenizer, ["the film"] * 4000, max_new_tokens=1, temperature=temperature)
        counts = torch.bincount(torch.tensor([c.ids[0] for c in continuations]), minlength=30)
        # Five standard deviations of a binomial, and one count for the rarest.
        assert ((counts / 4000 - expected).abs() < 5 * (expected * (1 - expected) / 4000).sqrt() + 1 / 4000).all()


def test_top_p_takes_the_smallest_set_that_holds_it(llama, tokenizer):
    with torch.no_grad():
        logits = llama.eval()(input_ids=torch.tensor([tokenizer("the film")["input_ids"]])).logits[0, -1]
    probabilities, order = torch.softmax(logits, -1).sort(descending=True)
    size = int((probabilities.cumsum(0) < 0.5).sum()) + 1
    assert 1 < size < 20
    continuations = sample(llama, tokenizer, ["the film"] * 1000, max_new_tokens=1, top_p=0.5)
    assert {c.ids[0] for c in continuations} == set(order[:size].tolist())


@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 12},
        {"suppress_tokens": list(range(3, 20))},
        {"do_sample": True, "temperature": 9.0, "top_k": 3, "top_p": 0.5, "min_p": 0.5},
        {"eos_token_id": list(range(3, 20))},
        {"max_new_tokens": 1, "max_length": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_settings_that_come_with_a_model_are_left_out(llama, tokenizer, own, temperature):
    kwargs = {"max_new_tokens": 12, "temperature": temperature}
    expected = sample(llama, tokenizer, PROMPTS, **kwargs)
    opinionated = copy.deepcopy(llama)
    opinionated.generation_config.update(**own)
    settings = copy.deepcopy(opinionated.generation_config)
    assert sample(opinionated, tokenizer, PROMPTS, **kwargs) == expected
    assert opinionated.generation_config == settings


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored(llama, tokenizer, training):
    model = copy.deepcopy(llama).train(training)
    modes = []
    model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    sample(model, tokenizer, PROMPTS, max_new_tokens=2)
    assert model.training == training
    assert set(modes) == {False}


def test_the_mode_of_the_model_is_restored_after_an_error(llama, tokenizer):
    model = copy.deepcopy(llama).train()
    own = model.generation_config

    def fail(*args):
        raise RuntimeError("out of memory")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        sample(model, tokenizer, PROMPTS)
    assert model.training
    assert model.generation_config is own


def test_a_continuation_keeps_the_space_between_it_and_its_prompt(llama, tokenizer):
    """Decoded by itself, "▁x y" loses the space that stands between prompt and continuation."""
    for continuation in sample(llama, tokenizer, PROMPTS * 5, max_new_tokens=12):
        whole = tokenizer.decode(continuation.prompt_ids + continuation.ids, skip_special_tokens=True)
        assert tokenizer.decode(continuation.prompt_ids, skip_special_tokens=True) + continuation.text == whole
    spaced = [c for c in sample(llama, tokenizer, ["a"] * 200, max_new_tokens=2) if c.ids[0] == 3]
    assert spaced
    assert all(continuation.text.startswith(" ") for continuation in spaced)


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>", "$A"])
def test_a_model_continues_what_it_is_trained_on(llama, template):
    tokenizer = letters(template)
    prompts = ["once upon", "", "a</s>"]
    continuations = sample(llama, tokenizer, prompts, max_new_tokens=2)
    examples = [PreferenceExample(prompt, ("b",), number) for number, prompt in enumerate(prompts)]
    tokenized = list(Tokenization(tokenizer=tokenizer, max_length=64)(examples))
    assert [c.prompt_ids for c in continuations] == [example.prompt_ids for example, _ in tokenized]
    assert continuations[1].prompt_ids == [1]
    assert continuations[2].prompt_ids[-1] == 2


def test_an_empty_prompt_needs_a_begin_token(llama):
    with pytest.raises(UsageError, match="A prompt is empty, and the tokenizer has no begin token to start from; give"):
        sample(llama, letters("$A", bos_token=None), ["a", ""])


def test_no_prompts_have_no_continuations(llama, tokenizer):
    assert sample(llama, tokenizer, []) == []


def test_continuations_stand_in_the_order_of_their_prompts(llama, tokenizer):
    continuations = sample(llama, tokenizer, PROMPTS * 2, max_new_tokens=1, batch_size=3)
    assert all(isinstance(continuation, Continuation) for continuation in continuations)
    assert [c.prompt_ids for c in continuations] == tokenizer(PROMPTS * 2)["input_ids"]


def test_prompts_may_be_token_ids(llama, tokenizer):
    ids = tokenizer(PROMPTS)["input_ids"]
    assert sample(llama, tokenizer, ids, max_new_tokens=12) == sample(llama, tokenizer, PROMPTS, max_new_tokens=12)


def test_what_came_to_its_end_token_is_finished(llama, tokenizer):
    continuations = sample(llama, tokenizer, ["a"] * 50, max_new_tokens=20)
    assert {c.finished for c in continuations} == {True, False}
    assert all(c.finished == (c.ids[-1] == tokenizer.eos_token_id) for c in continuations)


def test_other_tokens_may_end_a_continuation(llama, tokenizer):
    plain = sample(llama, tokenizer, ["a"] * 50, max_new_tokens=20)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("e")]
    for before, now in zip(plain, sample(llama, tokenizer, ["a"] * 50, max_new_tokens=20, ends=ends), strict=True):
        length = next((place for place, token in enumerate(before.ids, start=1) if token in ends), 20)
        assert now.ids == before.ids[:length]
        assert now.finished == (now.ids[-1] in ends)


@pytest.mark.parametrize("stop", [["e"], ["ab", " "], None, ["x y", "zz", "m"]])
def test_a_stop_string_cuts_a_text_and_ends_it(llama, tokenizer, stop):
    plain = sample(llama, tokenizer, PROMPTS * 20, max_new_tokens=20)
    stop = stop or [max((c.text for c in plain), key=len)[4:6]]  # two letters that are there
    stopped = sample(llama, tokenizer, PROMPTS * 20, max_new_tokens=20, stop=stop)
    places = [min((c.text.find(one) + len(one) for one in stop if one in c.text), default=None) for c in plain]
    assert None in places
    assert any(places)
    for before, now, place in zip(plain, stopped, places, strict=True):
        if place is None:
            assert now == before
            continue
        assert now.finished
        assert now.text == min((before.text[:place].partition(one)[0] for one in stop), key=len)
        assert now.ids == before.ids[: len(now.ids)]
        assert sum(token > 2 for token in now.ids) == place  # a token a letter, and some that are no text
        assert now.ids[-1] > 2


def test_nothing_is_computed_behind_a_stop_string(llama, tokenizer):
    model, steps = copy.deepcopy(llama), []
    model.register_forward_pre_hook(lambda module, args: steps.append(1))
    letters_of_all = list("abcdefghijklmnopqrstuvwxyz ")
    assert {c.text for c in sample(model, tokenizer, ["a"] * 9, max_new_tokens=40, stop=letters_of_all)} == {""}
    assert len(steps) == 1


def test_no_mask_is_missed_where_prompts_are_of_one_length(llama, tokenizer):
    """transformers leaves out a mask without padding, and of some families then warns of the pads behind ends."""
    config = GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=64, pad_token_id=0, eos_token_id=2)
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(handler)
    logger.warning_once.cache_clear()
    try:
        found = sample(GPT2LMHeadModel(config), tokenizer, ["a"] * 200, max_new_tokens=4)
        assert any(one.finished for one in found)
        assert said == []
        logger.warning("passing in an `attention_mask`")
        assert len(said) == 1
    finally:
        logger.removeHandler(handler)
