"""Compiled and checkpointed layers give the same numbers, and batches of other lengths compile nothing anew."""

import copy
import random

import pytest
import torch
from small_runs import data, fit, module
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from dpo_lightning.batch import lay_out
from dpo_lightning.errors import UsageError
from dpo_lightning.models.policy import CausalPolicy
from dpo_lightning.models.shard import checkpoint_layers, compile_layers


def random_batch(rng):
    def ids(most):
        return [rng.randrange(8, 60) for _ in range(rng.randint(2, most))]

    return lay_out([(ids(30), [ids(20), ids(20)]) for _ in range(3)])


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def counted():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
    counters.clear()


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("every", [0, pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("family", ["llama", pytest.param("gpt_neox", marks=pytest.mark.slow)])
def test_compiled_layers_give_the_same_gradients_and_compile_once(family, every, tiny_config):
    torch.manual_seed(0)
    plain = CausalPolicy(AutoModelForCausalLM.from_config(tiny_config(family))).train()
    compiled = copy.deepcopy(plain)
    if every:
        checkpoint_layers(compiled.model, every)
    compile_layers(compiled.model)
    rng = random.Random(0)
    for step in range(4):
        batch = random_batch(rng)
        expected, found = plain(batch).total, compiled(batch).total
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        wanted = torch.autograd.grad(expected.sum(), list(plain.parameters()), allow_unused=True)
        given = torch.autograd.grad(found.sum(), list(compiled.parameters()), allow_unused=True)
        for got, want in zip(given, wanted, strict=True):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        if step == 1:
            after_two = graphs()
    assert graphs() == after_two > 0


@pytest.mark.slow
@pytest.mark.usefixtures("counted")
def test_a_spec_compiles_and_so_do_copies_of_what_it_builds(tiny_llama, tmp_path):
    expected = fit(tmp_path / "plain", module(tiny_llama), data(tiny_llama))
    assert not graphs()
    dpo = module(tiny_llama, compile=True)
    found = fit(tmp_path / "compiled", dpo, data(tiny_llama))
    assert graphs()
    assert found.values == pytest.approx(expected.values, abs=1e-4)
    compiled = [m for part in (dpo.policy, dpo.reference_policy) for m in part.modules() if m._compiled_call_impl]
    assert len(compiled) == 2 * len(dpo.policy.model.model.layers)
    assert not any("_orig_mod" in name for name in dpo.state_dict())


def test_what_has_no_layers_is_not_compiled(tiny_config):
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(UsageError, match=r"`policy.compile`: LlamaForCausalLM has no decoder layers"):
        compile_layers(model)


def test_a_model_without_checkpoints_is_named(tiny_config, monkeypatch):
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(UsageError, match=r"`policy.activation_checkpointing`: LlamaForCausalLM does not support"):
        checkpoint_layers(model, 1)
