"""Layers whose products are shared by devices, with and without FSDP2 over others: the run of one process."""

import divided
import pytest
from rank_pool import RankPool
from strategy_runs import largest_difference, train
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dpo_lightning import PolicySpec
from dpo_lightning.models.adapters import LoRA

SETTINGS = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "train_rows": 14}


@pytest.fixture(scope="module")
def save(tiny_llama, tmp_path_factory):
    """A function from a family to the folder of a small model of it with the tokenizer of the tiny Llama."""

    def saved(family, **sizes):
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        known = AutoConfig.from_pretrained(tiny_llama).to_dict()
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "pad_token_id", "bos_token_id", "eos_token_id")  # fmt: skip
        config = AutoConfig.for_model(family, **{**{name: known[name] for name in names}, **sizes})
        folder = tmp_path_factory.mktemp(family)
        divided.torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return saved


@pytest.fixture(scope="module")
def four_ranks(token_cache):
    pool = RankPool(4, token_cache)
    yield pool
    pool.close()


def check(pool, model, folder, together, **kwargs):
    """The runs of one process and of ranks, of which so many share the products, after a comparison."""
    (folder / "one").mkdir()
    options = {**SETTINGS, **kwargs}
    one = train(model, str(folder / "one"), "auto", 1, **options)
    ranks = pool.run(divided.train_in_parallel, model, str(folder), together, pool.size, **options)
    for run in ranks:
        assert run["losses"] == pytest.approx(one["losses"], abs=1e-5)
        assert run["norms"] == pytest.approx(one["norms"], rel=1e-5)
        assert run["logged"] == pytest.approx(one["logged"], rel=1e-4, abs=1e-5)
        assert largest_difference(run["weights"], one["weights"]) <= 1e-5
    rows = [run["rows"] for run in ranks]
    assert rows[::together] == rows[1::together]
    assert sorted(row for own in rows[::together] for row in own) == sorted(one["rows"])
    return one, ranks


def test_two_devices_share_the_products(tiny_llama, two_ranks, tmp_path):
    check(two_ranks, tiny_llama, tmp_path, 2)


def test_what_is_refused(save, two_ranks, tiny_llama):
    def refused(why, path, **options):
        said = two_ranks.run(divided.refusal, PolicySpec(path=path, **options), 2)
        assert all(words is not None and why in words for words in said), said

    refused("qwen3 asks for replicated", save("qwen3", head_dim=8))
    refused("gpt2 has no plan for it", save("gpt2"))
    refused("layers with adapters are not divided", tiny_llama, lora=LoRA())
    refused(
        "does not divide the model's num_key_value_heads 1, intermediate_size 33.",
        save("llama", num_key_value_heads=1, intermediate_size=33),
    )


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["bco", "sft"])
def test_samples_count_once(objective, tiny_llama, two_ranks, tmp_path):
    check(two_ranks, tiny_llama, tmp_path, 2, objective=objective)


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["FrozenCopy", "Cached", "Synced"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_two_by_two(family, reference, save, four_ranks, tmp_path):
    check(four_ranks, save(family), tmp_path, 2, reference=reference)


@pytest.mark.slow
def test_a_divided_model_equals_a_whole_one(save, four_ranks):
    for found in four_ranks.run(divided.compare, PolicySpec(path=save("qwen2", vocab_size=97)), 2):
        logps, share = found.pop("logps"), found.pop("share")
        assert found == {"unequal": [], "twin": [], "fingerprint": True, "base": True}
        assert logps < 1e-5
        assert 0.2 < share < 0.5


@pytest.mark.slow
def test_one_process_goes_on_from_a_checkpoint_of_four(tiny_llama, four_ranks, tmp_path):
    one, _ = check(four_ranks, tiny_llama, tmp_path, 2, save=True, lr=1e-3)
    path = str(tmp_path / "ckpts" / "step=1.ckpt")
    later = train(tiny_llama, str(tmp_path / "later"), "auto", 1, ckpt_path=path, lr=1e-3, **SETTINGS)
    assert later["steps"] == one["steps"]
    assert later["losses"] == pytest.approx(one["losses"][1:], abs=1e-5)
    assert largest_difference(later["weights"], one["weights"]) <= 1e-5
