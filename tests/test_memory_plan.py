import logging

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from small_runs import data, module, trainer
from transformers import LlamaConfig

from dpo_lightning import PolicySpec
from dpo_lightning.batch import lay_out
from dpo_lightning.callbacks import MemoryPlan
from dpo_lightning.errors import UsageError
from dpo_lightning.memory.division import Division
from dpo_lightning.memory.heap import Heap
from dpo_lightning.memory.meter import Meter
from dpo_lightning.memory.plan import plan
from dpo_lightning.memory.rehearsal import Case, rehearse
from dpo_lightning.memory.shapes import batch_of, lengths_of, longest
from dpo_lightning.models.adapters import LoRA
from dpo_lightning.references import AdaptersOff, Cached, FrozenCopy

LENGTHS = [(20, [5, 9]), (40, [7, 3]), (30, [8, 8]), (10, [4, 6])]


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """The config of a Llama with eight layers, and no weights."""
    folder = tmp_path_factory.mktemp("deep")
    LlamaConfig(
        hidden_size=64, num_hidden_layers=8, num_attention_heads=4, intermediate_size=160, vocab_size=320,
        tie_word_embeddings=True,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def attached(path, tmp_path, reference=None, lora=None, **kwargs):
    """A module with its Trainer, as a callback's setup finds it."""
    made = module(path, reference, lora)
    made.trainer = trainer(tmp_path, **kwargs)
    made.trainer.strategy.connect(made)
    return made


def case(made, lengths=LENGTHS, **kwargs):
    return Case(made.spec, made.reference, batch_of(lengths, 2))._replace(**kwargs)


def parameters(path):
    config = LlamaConfig.from_pretrained(path)
    width, inner = config.hidden_size, config.intermediate_size
    layer = 4 * width * width + 3 * width * inner + 2 * width
    return config.vocab_size * width + config.num_hidden_layers * layer + width


def test_weights_and_state_are_counted_to_the_byte_block(deep, tmp_path):
    made = attached(deep, tmp_path)
    found, weights = plan(made, case(made)), 4 * parameters(deep)
    assert found.weights == pytest.approx(weights, rel=0.01)  # and rotary frequencies
    assert found.reference == pytest.approx(weights, rel=0.01)
    assert found.optimizer == pytest.approx(2 * weights, rel=0.01)
    assert found.peak == sum(found.parts.values())


def in_tensors(found):
    """Without what the C library holds between them."""
    return found.peak - found.between


def test_few_layers_tell_of_many(deep, tmp_path):
    made = attached(deep, tmp_path)
    whole = max(sum(peak.values()) for peak in rehearse(made, case(made)).peaks.values())
    assert in_tensors(plan(made, case(made))) == pytest.approx(whole, rel=0.005)


@pytest.mark.slow
def test_few_layers_tell_of_many_where_every_other_is_checkpointed(deep, tmp_path):
    made = attached(deep, tmp_path)
    policy = PolicySpec(path=str(deep), activation_checkpointing=2)
    whole = max(sum(peak.values()) for peak in rehearse(made, case(made, policy=policy)).peaks.values())
    assert in_tensors(plan(made, case(made, policy=policy))) == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize("precision", [pytest.param("32-true", marks=pytest.mark.slow), "bf16-mixed"])
def test_few_layers_tell_of_many_with_adapters_and_checkpoints(deep, tmp_path, precision):
    made = attached(deep, tmp_path, AdaptersOff(), LoRA(rank=4), precision=precision)
    policy = PolicySpec(path=str(deep), lora=LoRA(rank=4), activation_checkpointing=True)
    whole = max(sum(peak.values()) for peak in rehearse(made, case(made, policy=policy)).peaks.values())
    assert in_tensors(plan(made, case(made, policy=policy))) == pytest.approx(whole, rel=0.01)


def test_references_cost_what_they_hold(deep, tmp_path):
    made = attached(deep, tmp_path)
    frozen, narrow, cached = (
        plan(made, case(made, reference=reference)).reference
        for reference in (FrozenCopy(), FrozenCopy(dtype="bfloat16"), Cached(dir=str(tmp_path)))
    )
    assert narrow == pytest.approx(frozen / 2, rel=0.05)
    assert cached == 0


def test_adapters_alone_have_state(deep, tmp_path):
    made = attached(deep, tmp_path, AdaptersOff(), LoRA(rank=4))
    found = plan(made, case(made))
    assert found.reference == 0
    assert 0 < found.optimizer < 0.25 * found.weights


def test_checkpointing_keeps_less(deep, tmp_path):
    made = attached(deep, tmp_path)
    checkpointed = PolicySpec(path=str(deep), activation_checkpointing=True)
    assert plan(made, case(made, policy=checkpointed)).activations < 0.6 * plan(made, case(made)).activations


def test_pieces_keep_gradients_through_the_forward(deep, tmp_path):
    made = attached(deep, tmp_path)
    whole, piece = plan(made, case(made)), plan(made, case(made, in_pieces=True))
    assert whole.gradients == 0
    assert piece.gradients == pytest.approx(piece.weights, rel=0.01)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_activations_grow_with_the_batch(deep, tmp_path, precision):
    made = attached(deep, tmp_path, precision=precision)
    one, two = (plan(made, case(made, lengths)).activations for lengths in (LENGTHS, LENGTHS * 2))
    assert two == pytest.approx(2 * one, rel=0.05)


def test_a_rehearsal_leaves_nothing_behind(deep, tmp_path):
    made, state = attached(deep, tmp_path), torch.get_rng_state()
    before = set(vars(made))
    plan(made, case(made))
    assert made.policy is None
    assert made.reference_policy is None
    assert set(vars(made)) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert type(torch.zeros(2)) is torch.Tensor


def test_the_meter_follows_storages_to_their_death():
    meter = Meter(torch.device("cpu"))
    with meter:
        meter.phase, meter.position = "here", 0
        first = torch.zeros(1024)
        view = first[:10]
        del first
        second = torch.zeros(512)
        del view
        third = torch.zeros(256)  # the peak stays where the first two were
        del second, third
    assert meter.peaks == {("here", 0): {"temporary": 4 * (1024 + 512)}}


def test_what_an_operation_casts_inside_counts_while_it_runs():
    meter = Meter(torch.device("cpu"))
    with meter:
        wide, narrow = torch.zeros(1024), torch.zeros(1024, dtype=torch.bfloat16)
        meter.phase, meter.position = "here", 0
        wide.add_(narrow)
    assert meter.peaks == {("here", 0): {"temporary": (4 + 2 + 4) * 1024}}


def test_lengths_come_back_from_a_batch():
    assert lengths_of(batch_of(LENGTHS, 2)) == LENGTHS
    rankings = [(3, [2, 4, 1]), (5, [6, 2])]
    assert lengths_of(batch_of(rankings, 3)) == rankings
    assert lengths_of(lay_out([([1] * 4, [[2] * 3])])) == [(4, [3])]
    assert lengths_of(longest(batch_of(LENGTHS, 2), 2)) == [(40, [7, 3]), (30, [8, 8])]


def fit(tiny_llama, tmp_path, callback, made=None, **kwargs):
    made = made or module(tiny_llama)
    run = trainer(tmp_path, max_steps=1, callbacks=[callback])
    run.fit(made, data(tiny_llama, **kwargs))
    return made


def test_the_plan_is_made_before_weights_are_loaded(tiny_llama, tmp_path, caplog):
    made, found = module(tiny_llama), MemoryPlan()
    with caplog.at_level(logging.INFO):
        fit(tiny_llama, tmp_path, found, made)
    weights = sum(weight.nbytes for weight in made.policy.parameters())
    assert found.plan.weights == pytest.approx(weights, rel=0.05)
    assert found.plan.batch.examples == 4
    assert "Memory at the peak of a step, for 4 examples" in caplog.text


def test_what_cannot_fit_is_refused_with_remedies_that_help(tiny_llama, tmp_path, monkeypatch):
    generous = MemoryPlan()
    fit(tiny_llama, tmp_path, generous)
    room = int(0.95 * generous.plan.peak)
    monkeypatch.setattr("dpo_lightning.callbacks.memory_plan.available", lambda device: room)
    made = module(tiny_llama)
    with pytest.raises(UsageError, match=r"Training needs .* GB are free") as refused:
        fit(tiny_llama, tmp_path, MemoryPlan(), made)
    assert made.policy is None
    assert "model.init_args.reference: Cached" in str(refused.value)


@pytest.mark.slow
def test_a_remedy_that_is_on_is_not_named(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_lightning.callbacks.memory_plan.available", lambda device: 1)
    made = module(tiny_llama, Cached(dir=str(tmp_path)))
    with pytest.raises(UsageError) as refused:
        fit(tiny_llama, tmp_path, MemoryPlan(), made)
    assert "Cached" not in str(refused.value)
    assert "take a smaller model" in str(refused.value)


def test_data_without_a_heaviest_batch_is_no_matter(tiny_llama, tmp_path):
    source, callback = data(tiny_llama), MemoryPlan()
    source.prepare_data()
    source.setup("fit")
    Trainer(
        accelerator="cpu", max_steps=1, callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    ).fit(module(tiny_llama), source.train_dataloader())  # fmt: skip
    assert callback.plan is None


class Foreign(LightningModule):
    def __init__(self, error=None):
        super().__init__()
        self.weight, self.error = torch.nn.Parameter(torch.ones(1)), error

    def training_step(self, batch, batch_idx):
        if self.error is not None:
            raise self.error
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_of_a_module_of_somebody_elses_nothing_is_said(tiny_llama, tmp_path):
    callback = MemoryPlan()
    fit(tiny_llama, tmp_path, callback, Foreign())
    assert callback.plan is None
    with pytest.raises(torch.OutOfMemoryError, match="theirs"):
        fit(tiny_llama, tmp_path, callback, Foreign(torch.OutOfMemoryError("theirs")))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        pytest.param(RuntimeError("DefaultCPUAllocator: can't allocate memory"), marks=pytest.mark.slow),
    ],
)
def test_where_memory_runs_out_the_batch_and_remedies_are_named(tiny_llama, tmp_path, caplog, monkeypatch, error):
    made = module(tiny_llama)

    def fail(batch, batch_idx):
        raise error

    monkeypatch.setattr(made, "training_step", fail)
    with pytest.raises(type(error)):
        fit(tiny_llama, tmp_path, MemoryPlan(), made)
    assert "Memory ran out with this batch: 4 examples" in caplog.text
    assert "What helps, and what training would then take" in caplog.text
    assert "micro_batch_tokens" in caplog.text


def around_and_layer(path):
    config = LlamaConfig.from_pretrained(path)
    width, inner = config.hidden_size, config.intermediate_size
    return config.vocab_size * width + width, 4 * width * width + 3 * width * inner + 2 * width


@pytest.mark.parametrize(("precision", "used"), [("32-true", 4), ("bf16-mixed", 2)])
def test_of_divided_weights_a_rank_holds_its_share_and_what_is_gathered(precision, used, deep, tmp_path):
    made = attached(deep, tmp_path, precision=precision)
    alone, found = plan(made, case(made)), plan(made, case(made), Division(ranks=4, shards=4))
    whole = 4 * parameters(deep)
    assert found.weights == pytest.approx(whole / 4, rel=0.01)
    assert found.reference == pytest.approx(whole / 4 * used / 4, rel=0.01)  # in the dtype of products
    assert found.optimizer == pytest.approx(2 * whole / 4, rel=0.01)
    around, layer = around_and_layer(deep)
    forward = used * (2 * around + 2 * layer)  # around the layers of both models; two layers of one of them
    assert found.gathered in (forward, forward + used * (around + layer) + 4 * layer)
    assert found.activations <= 1.01 * alone.activations
    assert found.peak == sum(found.parts.values())


def test_a_reference_without_weights_gathers_none(deep, tmp_path):
    made, division = attached(deep, tmp_path, Cached(dir=str(tmp_path))), Division(ranks=2, shards=2)
    around, layer = around_and_layer(deep)
    forward = 4 * (around + 2 * layer)
    assert plan(made, case(made), division).gathered in (forward, forward + 4 * (around + layer) + 4 * layer)


def test_below_adapters_no_gradients_are_gathered(deep, tmp_path):
    made = attached(deep, tmp_path, AdaptersOff(), LoRA(rank=4))
    found = plan(made, case(made), Division(ranks=2, shards=2))
    around, layer = around_and_layer(deep)
    assert found.gathered == pytest.approx(4 * (around + 2 * layer), rel=0.35)  # and adapters of rank 4 of width 64
    assert found.weights == pytest.approx(4 * parameters(deep) / 2, rel=0.25)


def test_the_strategy_says_among_how_many_weights_are_divided(deep, tmp_path):
    made = attached(deep, tmp_path)
    assert Division.of(made.trainer) == Division(ranks=1, shards=1)
    made.trainer.strategy.shards = 8
    assert Division.of(made.trainer) == Division(ranks=1, shards=8)
    assert plan(made, case(made)).weights == pytest.approx(4 * parameters(deep) / 8, rel=0.01)


def test_ranks_that_hold_all_have_buckets_too(deep, tmp_path):
    made = attached(deep, tmp_path)
    alone, one_of_two = (plan(made, case(made, in_pieces=True), Division(ranks=ranks)) for ranks in (1, 2))
    assert one_of_two.gradients == pytest.approx(2 * alone.gradients, rel=0.01)


def births(story):
    return [size for tensor, size in story.step if size is not None]


def test_layers_put_between_take_and_leave_what_real_ones_do(deep, tmp_path):
    made = attached(deep, tmp_path)
    few, whole = (rehearse(made, case(made), layers).trace.deepened(times) for layers, times in ((3, 6), (8, 1)))
    assert sorted(births(few)) == sorted(births(whole))
    heaps = Heap(settled=0), Heap(settled=0)
    for heap, story in zip(heaps, (few, whole), strict=True):
        heap.play(story.step)
    assert heaps[0].used == heaps[1].used
    assert heaps[0].most == heaps[1].most
    assert heaps[0].size == heaps[1].size


def test_what_lies_between_large_tensors_is_planned_the_same_every_time(deep, tmp_path):
    made = attached(deep, tmp_path)
    lengths = [(200, [50, 90])] * 4
    found = plan(made, case(made, lengths))
    assert 0 < found.between < found.activations
    assert plan(made, case(made, lengths)) == found
