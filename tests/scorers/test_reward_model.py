"""A scorer tokenises as training does, whatever it runs together."""

import pytest
import small_runs
import torch

from dpo_lightning import PreferenceDataModule, RewardModule
from dpo_lightning.data.tokenize import Tokenization
from dpo_lightning.errors import UsageError
from dpo_lightning.export import export
from dpo_lightning.scorers import RewardModel
from dpo_lightning.scorers import reward_model as scorers

PROMPTS = ["the film", "the plot", "the film", "it", "the film"]
RESPONSES = [" was good", " is dull", " was bad", "", " was good"]


@pytest.fixture(scope="module")
def exported(tiny_llama, tmp_path_factory):
    """Folder of a reward model whose head is large."""
    place = tmp_path_factory.mktemp("exported")
    reward = small_runs.module(tiny_llama, cls=RewardModule)
    reward.configure_model()
    with torch.no_grad():
        reward.policy.head.weight.mul_(10)
    content = {"state_dict": reward.state_dict(), "hyper_parameters": dict(reward.hparams)}
    reward.on_save_checkpoint(content)
    torch.save(content, place / "it.ckpt")
    return str(export(str(place / "it.ckpt"), str(place / "hf")))


@pytest.mark.parametrize("batch_tokens", [1, 20, 1000])
def test_what_is_run_together_changes_nothing(exported, batch_tokens, monkeypatch):
    monkeypatch.setattr(scorers, "CHUNK", 3 if batch_tokens == 20 else 100)
    found = RewardModel(exported, batch_tokens=batch_tokens).score(PROMPTS, RESPONSES)
    alone = [RewardModel(exported).score([p], [r])[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert found == pytest.approx(alone, abs=1e-5)
    assert found[0] == pytest.approx(found[4], abs=1e-5)
    assert len(set(map(round, [100 * value for value in found]))) == 4


def test_messages_are_written_by_the_chat_template(exported, tiny_llama):
    asked = [{"role": "user", "content": "how is it?"}]
    found = RewardModel(exported).score([asked], ["good"])
    row = {"prompt": asked, "chosen": [{"role": "assistant", "content": "good"}]}
    row["rejected"] = [{"role": "assistant", "content": "bad"}]
    source = PreferenceDataModule(test=[row], tokenizer=tiny_llama)
    source.setup("test")
    (batch,) = source.test_dataloader()
    with torch.no_grad():
        expected = RewardModel(exported)._loaded.model(batch)[0, 0].item()
    assert found == [pytest.approx(expected, abs=1e-5)]


def test_responses_to_one_prompt_share_it(exported):
    tokenization = Tokenization(tokenizer=RewardModel(exported)._loaded.tokenization.tokenizer, max_length=100)
    examples = [
        found
        for found, _ in tokenization(
            [scorers._example(p, r, tokenization) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
        )
    ]
    joined = scorers._joined(examples, most=1000)
    assert [places for _, places in joined] == [[0, 2, 4], [1], [3]]
    assert max(example.num_tokens for example, _ in scorers._joined(examples, most=20)) <= 20


def test_what_cannot_be_scored_is_named(exported, tiny_llama):
    with pytest.raises(UsageError, match=r"Response 2 cannot be scored: .*max_length"):
        RewardModel(exported, max_length=4).score(["it", "the film and its end"], ["", " is good"])
    with pytest.raises(UsageError, match="is no reward model: by its config it is LlamaForCausalLM"):
        RewardModel(tiny_llama).score(["it"], ["is"])
    with pytest.raises(UsageError, match="there is no folder"):
        RewardModel("/nowhere/at/all").score(["it"], ["is"])
    with pytest.raises(UsageError, match="`batch_tokens` must be 1 or more, got 0"):
        RewardModel(exported, batch_tokens=0)
