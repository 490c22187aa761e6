"""No rank ever holds a whole model: what four ranks take while policy and reference are built."""

import divided
import pytest
import torch
from rank_pool import RankPool
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

MEGABYTE = 2**20


@pytest.fixture
def four_ranks(token_cache):
    pool = RankPool(4, token_cache)
    yield pool
    pool.close()


@pytest.mark.slow
def test_ranks_hold_their_parts_and_a_layer(tiny_llama, four_ranks, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=12, num_key_value_heads=12,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    sizes = {name: weight.numel() * 4 for name, weight in model.named_parameters()}
    layer = sum(size for name, size in sizes.items() if ".layers.0." in name)
    assert layer > sum(size for name, size in sizes.items() if ".layers." not in name)
    model.save_pretrained(tmp_path / "model", max_shard_size="100MB")
    tokenizer.save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    del model
    needed = 2 * sum(sizes.values()) / 4 + layer
    ranks = four_ranks.run(divided.growth, str(tmp_path / "model"), str(tmp_path))
    shown = [{name: f"{grown / MEGABYTE:.0f}" for name, grown in rank.items()} for rank in ranks]
    print(f"\n{sum(sizes.values()) / MEGABYTE:.0f} MB of weights, needed {needed / MEGABYTE:.0f} MB: {shown}")
    for grown in ranks:
        assert grown["peak"] >= 2 * sum(sizes.values()) / 4  # the measure sees what is there
        assert grown["peak"] <= 1.2 * needed
