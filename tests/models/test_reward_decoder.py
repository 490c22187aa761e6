"""Rewards are read at the last token of every response, from the stream as from padded rows."""

import pytest
import torch
from families import FAMILIES, TINY
from transformers import AutoConfig, AutoModelForSequenceClassification

from dpo_lightning import RewardDecoder, RewardSpec
from dpo_lightning.batch import lay_out, nothing
from dpo_lightning.errors import UsageError
from dpo_lightning.models.adapters import LoRA

EXAMPLES = [([5, 6, 7], [[8, 9], [10, 11, 12, 13], [14]]), ([20, 21], [[22, 23, 24], [25]])]


def classifier(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**TINY, **FAMILIES[family]}, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.2)
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3", "mistral", "gemma2", "phi", "opt"])
@pytest.mark.parametrize("layout", ["stream", "rows"])
def test_rewards_are_those_of_each_sequence_alone(family, layout):
    model = classifier(family)
    expected = torch.zeros(2, 3)
    with torch.no_grad():
        for example, (prompt, responses) in enumerate(EXAMPLES):
            for place, response in enumerate(responses):
                expected[example, place] = model(input_ids=torch.tensor([prompt + response])).logits[0, 0]
        found = RewardDecoder(model, layout)(lay_out(EXAMPLES))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert expected[0].std() > 0.03


def test_the_last_token_counts_whether_it_is_scored_or_not():
    decoder = RewardDecoder(classifier("llama"))
    masks = [[[True, False], [False, True, True, False], [True]], None]
    with torch.no_grad():
        assert torch.equal(decoder(lay_out(EXAMPLES, scored=masks)), decoder(lay_out(EXAMPLES)))


@pytest.mark.parametrize("layout", ["stream", "rows"])
def test_of_no_examples_there_are_no_rewards_and_gradients_of_zero(layout):
    decoder = RewardDecoder(classifier("llama"), layout)
    rewards = decoder(nothing(3))
    assert rewards.shape == (0, 3)
    rewards.sum().backward()
    assert decoder.head.weight.grad.abs().sum() == 0


def test_autocast_leaves_the_head_in_float32():
    decoder = RewardDecoder(classifier("llama"))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert decoder(lay_out(EXAMPLES)).dtype == torch.float32


def test_a_recipe_trains_the_head_beside_adapters_and_what_else_is_asked_for(tiny_llama):
    spec = RewardSpec(path=tiny_llama, lora=LoRA(rank=2, options={"modules_to_save": ["embed_tokens"]}))
    trained = {name for name, weight in spec.build().named_parameters() if weight.requires_grad and "lora" not in name}
    assert trained == {f"model.{part}.modules_to_save.default.weight" for part in ("score", "model.embed_tokens")}


def test_an_adapter_of_a_language_model_is_refused(tiny_llama, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    settings = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, settings).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="is of no reward model: it has no score"):
        RewardSpec(path=tiny_llama, lora=LoRA(path=str(tmp_path))).build()


def test_what_drawing_the_head_takes_is_nobody_elses(tiny_llama):
    torch.manual_seed(5)
    RewardSpec(path=tiny_llama).build()
    found = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(found, torch.rand(1))
