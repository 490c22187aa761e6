import math
from dataclasses import replace
from pathlib import Path

import flops
import pytest
import torch
from contenders import Case, Run, ours, save_tokenizer, state_bytes, textbook, trl
from flops import Work, useful_flops
from plan_table import RECIPES, pairs_per_second, planned
from throughput import HH_LENGTHS, Rounds, Size, grouped, make_pairs, ours_frozen, save_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, LlamaForCausalLM

from dpo_lightning.batch import lay_out
from dpo_lightning.memory.division import Division
from dpo_lightning.references import Cached, FrozenCopy

TINY = Size(width=32, inner=56, layers=2, heads=4, kv_heads=2, vocabulary=101)
LENGTHS = [(5, 3, 9), (1, 2, 2), (12, 7, 4), (3, 11, 2), (30, 2, 3)]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_model(TINY.config(), str(folder))
    return Case(str(folder), make_pairs(LENGTHS, 9, TINY.vocabulary), 3, folder, lr=1e-3)


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_flops_are_those_that_torch_counts_in_plain_rows():
    config = TINY.config()
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager")
    tokens = torch.randint(TINY.vocabulary, (1, 40))
    plain = Work(tokens=40, scored=40, visible=40 * 40)  # a plain row computes what its mask hides, and all logits

    forward = counted(lambda: model(tokens))
    both = counted(lambda: model(tokens).logits.sum().backward())
    assert useful_flops(config, plain, reference=False) == pytest.approx(both, rel=1e-3)
    assert useful_flops(config, plain, reference=True) == pytest.approx(both + forward, rel=1e-3)

    model.requires_grad_(False)
    embedded = model.get_input_embeddings()(tokens).requires_grad_()
    below_adapters = counted(lambda: model(inputs_embeds=embedded).logits.sum().backward())
    assert useful_flops(config, plain, reference=False, lora=True) == pytest.approx(below_adapters, rel=1e-3)


def test_work_is_what_the_stream_holds():
    pairs = make_pairs(LENGTHS, 5, TINY.vocabulary)
    batch = lay_out([(pair.prompt, [pair.chosen, pair.rejected]) for pair in pairs])
    visible = 0
    for start, end, prefix_start, prefix_end in batch.spans.tolist():
        prefix = prefix_end - prefix_start
        visible += int(torch.ones(end - start, prefix + end - start).tril(prefix).sum())
    assert Work.of(pairs) == (len(batch.input_ids), len(batch.target), visible)


def test_products_that_take_a_second_an_operation_run_at_one_a_second(monkeypatch):
    monkeypatch.setattr(flops, "_seconds", lambda product, device: counted(product))
    assert flops.product_rates(TINY.config(), 24, torch.float32, "cpu") == (1.0, 1.0)


def test_text_turns_into_the_tokens_of_a_pair(tmp_path):
    save_tokenizer(50, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    (pair,) = make_pairs([(4, 3, 6)], 1, 50)
    row = pair.row()
    assert [len(ids) for ids in pair] == [4, 3, 6]
    assert tokenizer(row["prompt"] + row["chosen"] + tokenizer.eos_token).input_ids == pair.prompt + pair.chosen
    assert tokenizer(row["prompt"] + row["rejected"] + tokenizer.eos_token).input_ids == pair.prompt + pair.rejected


def test_a_round_goes_through_all_lengths_and_grouping_keeps_its_pairs(tmp_path):
    pairs = make_pairs(HH_LENGTHS, len(HH_LENGTHS) + 8, 50)
    assert sorted(tuple(map(len, pair)) for pair in pairs[:64]) == sorted(HH_LENGTHS)
    case = Case("model", pairs, 8, tmp_path)
    ordered = grouped(case).pairs
    assert ordered[:8] == pairs[:8]
    assert sorted(ordered) == sorted(pairs)
    longest = [pair.longest() for pair in ordered[8:]]
    assert longest == sorted(longest)


def test_rounds_take_medians_of_steps_and_ratios_of_rounds():
    runs = {
        "a": [Run([1.0, 2.0], [], 0), Run([1.0, 4.0], [], 0), Run([3.0, 3.0], [], 0)],
        "b": [Run([2.0, 4.0], [], 0), Run([2.0, 2.0], [], 0), Run([3.0, 9.0], [], 0)],
    }
    rounds = Rounds(runs, 1.0, 1.0)
    assert rounds.seconds("a") == 1.0 + 3.0
    assert rounds.ratios("b", "a") == [2.0, 0.8, 2.0]


def test_state_is_weights_gradients_two_moments_and_the_reference():
    policy, reference = nn.Linear(3, 2), nn.Linear(3, 2)  # 8 weights of 4 bytes
    assert state_bytes(policy, None) == 32 * 4
    assert state_bytes(policy, reference) == 32 * 5
    policy.weight.requires_grad_(False)
    assert state_bytes(policy, None) == 24 + 8 * 4


def test_the_textbook_loop_trains_as_ours_does(case):
    expected = ours(case, FrozenCopy())
    run = textbook(case)
    assert len(run.losses) == len(run.seconds) + 1 == 3
    assert abs(run.losses[2] - run.losses[0]) > 1e-4  # training has changed something
    assert run.losses == pytest.approx(expected.losses, abs=2e-5)
    assert run.state_bytes == expected.state_bytes


@pytest.mark.parametrize("precompute", [False, True])
def test_trl_trains_as_ours_does(case, precompute):
    pytest.importorskip("trl", reason="TRL comes with the extra bench")
    reference = Cached(dir=str(Path(case.model) / "scores")) if precompute else FrozenCopy()
    expected = ours(case, reference)
    run = trl(case, precompute=precompute)
    assert run.losses == pytest.approx(expected.losses, abs=2e-5)
    assert run.state_bytes == expected.state_bytes


def test_adapters_are_the_same_in_both(tmp_path):
    pytest.importorskip("trl", reason="TRL comes with the extra bench")
    size = replace(TINY, lora=True)
    save_model(size.config(), str(tmp_path))
    pairs = make_pairs(LENGTHS, 6, size.vocabulary)
    case = Case(str(tmp_path), pairs, 3, tmp_path, bf16=True, dtype=size.dtype, lora=True)
    runs = [ours_frozen(case), trl(case)]
    assert [run.losses[0] for run in runs] == pytest.approx([math.log(2)] * 2)
    assert runs[0].state_bytes == runs[1].state_bytes


def test_the_table_of_plans_knows_shares_and_operations(case):
    alone, share = (planned(case.model, RECIPES["Cached"], Division(ranks=4, shards=n), 800) for n in (1, 4))
    assert share < alone
    config = TINY.config()
    rates = [pairs_per_second(config, 1e12, 0.5, reference=own, lora=False) for own in (True, False)]
    assert rates[1] == pytest.approx(4 / 3 * rates[0])  # a forward pass beside one and a backward pass of two
