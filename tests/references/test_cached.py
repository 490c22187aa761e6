"""Scores that were computed once equal those of a model in memory, and no score is served for anything else."""

import math
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_runs import data, fit, module, rows, same, saving, trained, trainer, weights

from dpo_lightning import DPOModule, PolicySpec, PreferenceDataModule
from dpo_lightning.callbacks import LogSamples
from dpo_lightning.data.collate import collate
from dpo_lightning.data.example import TokenizedExample
from dpo_lightning.data.table import record
from dpo_lightning.data.tokenize import Notes
from dpo_lightning.errors import UsageError
from dpo_lightning.losses import DPOLoss, LDDPOLoss, PlackettLuceLoss, TDPO1Loss
from dpo_lightning.models.adapters import LoRA
from dpo_lightning.references import Cached, FrozenCopy, cached
from dpo_lightning.references.base import Run


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def scored(monkeypatch):
    """Number of examples in every batch that is scored."""
    sizes = []
    original = DPOModule._score

    def spy(self, policy, batch):
        sizes.append(batch.length.shape[0])
        return original(self, policy, batch)

    monkeypatch.setattr(DPOModule, "_score", spy)
    return sizes


def files(folder):
    return sorted(folder.rglob("*.parquet"))


def validated(tmp_path, dpo, source, **kwargs):
    return trainer(tmp_path, **kwargs).validate(dpo, source, verbose=False)[0]


@pytest.mark.parametrize("layout", ["stream", "rows"])
def test_losses_equal_those_of_a_frozen_copy(tiny_llama, tmp_path, folder, layout):
    copy, looked_up = (module(tiny_llama, reference, layout=layout) for reference in (None, Cached(dir=str(folder))))
    expected, found = (fit(tmp_path, dpo, data(tiny_llama)) for dpo in (copy, looked_up))
    assert found.values == pytest.approx(expected.values, abs=1e-5)
    assert expected.values[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(expected.values[-1] - math.log(2)) > 1e-2
    metrics = [validated(tmp_path, dpo, data(tiny_llama)) for dpo in (copy, looked_up)]
    assert metrics[1] == pytest.approx(metrics[0], abs=1e-5)


def test_there_is_no_second_model(tiny_llama, tmp_path, folder):
    dpo = module(tiny_llama, Cached(dir=str(folder)))
    fit(tmp_path, dpo, data(tiny_llama))
    assert list(dpo.parameters()) == list(dpo.policy.parameters())
    assert not any("reference" in name for name in dpo.state_dict())


def test_rankings_of_mixed_lengths(tiny_llama, tmp_path, folder):
    loss, source = PlackettLuceLoss(beta=0.5), {"most": 4, "batch_size": 4}
    expected, found = (
        fit(tmp_path, module(tiny_llama, reference, loss=loss), data(tiny_llama, **source))
        for reference in (None, Cached(dir=str(folder)))
    )
    assert found.values == pytest.approx(expected.values, abs=1e-5)
    # Pairs alone, of a folder that knows rankings.
    fit(tmp_path, module(tiny_llama, Cached(dir=str(folder))), data(tiny_llama), max_steps=1)


def test_a_second_run_scores_nothing_wherever_the_folder_lies(tiny_llama, tmp_path, folder, scored):
    fit(tmp_path, module(tiny_llama, Cached(dir=str(folder))), data(tiny_llama), max_steps=1)
    assert sum(scored) == 16 + 5
    scored.clear()
    elsewhere = tmp_path / "lr=0.5" / "moved"
    shutil.move(folder, elsewhere)
    again = module(tiny_llama, Cached(dir=str(elsewhere)), lr=0.5, loss=DPOLoss(beta=0.1))
    fit(tmp_path / "other", again, data(tiny_llama, batch_size=2, val_batch_size=1), seed=1)
    assert not scored
    for _ in range(2):  # nor does the same module in later stages
        validated(tmp_path, again, data(tiny_llama))
    assert not scored


def test_adapters_share_scores_whatever_their_random_weights(tiny_llama, tmp_path, folder, scored):
    for seed in (0, 1):
        dpo = module(tiny_llama, Cached(dir=str(folder)), LoRA(rank=2))
        fit(tmp_path, dpo, data(tiny_llama), seed=seed, max_steps=1)
    assert sum(scored) == 21


def test_a_changed_row_is_scored_anew(tiny_llama, tmp_path, folder, scored):
    fit(tmp_path, module(tiny_llama, Cached(dir=str(folder))), data(tiny_llama), max_steps=1)
    scored.clear()
    changed = rows(16)
    changed[3] = {**changed[3], "rejected": changed[3]["rejected"] + "!"}
    changed[7] = {**changed[7], "chosen": changed[7]["rejected"], "rejected": changed[7]["chosen"]}
    source = {"tokenizer": tiny_llama, "batch_size": 4}
    losses = [
        fit(tmp_path, module(tiny_llama, reference), PreferenceDataModule(changed, **source)).values
        for reference in (Cached(dir=str(folder)), None)
    ]
    assert sum(scored) == 2
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


class Masked:
    """One example of which some tokens are scored, as a data module offers it."""

    def __init__(self, mask):
        example = TokenizedExample([5, 6], [[7, 8, 9], [10]], 1, [mask, [True]])
        digest = record(1, (example, Notes()))["digest"]
        self.batch = collate([example._replace(digest=digest)])

    def digests(self):
        return self.batch.digest.numpy()

    def unscored(self, known, rank, world_size):
        if not np.isin(self.digests(), known).all():
            yield self.batch


def test_other_scored_tokens_of_the_same_response_are_scored_anew(tiny_llama, tmp_path):
    policy, totals, scored = PolicySpec(path=tiny_llama).build(), [], []

    def score(policy, batch):
        scored.append(batch)
        return policy(batch)

    for mask in ([True, True, True], [True, False, True], [True, True, False], [True, False, True]):
        reference = cached.CachedReference(tmp_path / "cache", lambda: policy)
        examples = Masked(mask)
        with torch.no_grad():
            reference.prepare(examples, Run(0, 1, lambda: None, score))
            expected = policy(examples.batch).total
        totals.append(reference(examples.batch).total)
        assert torch.equal(totals[-1], expected)
    assert len(scored) == 3
    assert not torch.equal(totals[1], totals[2])  # of which as many tokens are scored
    assert torch.equal(totals[1], totals[3])


def test_every_weight_dtype_precision_and_layout_has_scores_of_its_own(tiny_llama, tmp_path, folder, scored):
    other = PolicySpec(path=tiny_llama).build()
    with torch.no_grad():
        other.model.lm_head.weight[0, 0] += 1e-3
    other.model.save_pretrained(tmp_path / "other")
    PolicySpec(path=tiny_llama).load_tokenizer().save_pretrained(tmp_path / "other")
    runs = [
        ({}, {}),
        ({"layout": "rows"}, {}),
        ({"dtype": "bfloat16"}, {}),
        ({}, {"precision": "bf16-mixed"}),
        ({}, {"precision": "bf16-true"}),
        ({"path": tmp_path / "other"}, {}),
    ]
    for settings, options in runs:
        dpo = module(**{"path": tiny_llama, **settings}, reference=Cached(dir=str(folder)))
        fit(tmp_path, dpo, data(tiny_llama), max_steps=2, **options)
    assert sum(scored) == len(runs) * 21
    assert len(list(folder.iterdir())) == len(runs)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_sixteen_bits_cost_scores_nothing(tiny_llama, tmp_path, folder, precision):
    copy, looked_up = (module(tiny_llama, reference) for reference in (None, Cached(dir=str(folder))))
    expected, found = (fit(tmp_path, dpo, data(tiny_llama), precision=precision) for dpo in (copy, looked_up))
    assert found.values[0] == pytest.approx(math.log(2), abs=2e-2)
    assert found.values == pytest.approx(expected.values, abs=2e-2)
    totals = looked_up.reference_policy._scores[1]
    assert totals.dtype == torch.float32
    assert not torch.equal(totals, totals.bfloat16().float())


def test_a_run_that_is_killed_goes_on_from_its_last_file(tiny_llama, tmp_path, folder, scored, monkeypatch):
    monkeypatch.setattr(cached, "ROWS_A_FILE", 8)
    spy = DPOModule._score

    def killed(self, policy, batch):
        if sum(scored) >= 16:
            raise KeyboardInterrupt
        return spy(self, policy, batch)

    with monkeypatch.context() as patched:
        patched.setattr(DPOModule, "_score", killed)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            fit(tmp_path, module(tiny_llama, Cached(dir=str(folder))), data(tiny_llama), max_steps=1)
    kept = sum(pq.read_metadata(file).num_rows for file in files(folder))
    assert (kept, len(files(folder))) == (16, 2)
    (files(folder)[0].parent / "half.unfinished").write_bytes(b"PAR1")
    scored.clear()
    fit(tmp_path, module(tiny_llama, Cached(dir=str(folder))), data(tiny_llama), max_steps=1)
    assert sum(scored) == 21 - 16


def full(tiny_llama, tmp_path, folder):
    fit(tmp_path, module(tiny_llama, Cached(dir=str(folder))), data(tiny_llama), max_steps=1)
    (file,) = files(folder)
    return file


def refused(tiny_llama, tmp_path, folder, match):
    with pytest.raises(UsageError, match=match):
        fit(tmp_path, module(tiny_llama, Cached(dir=str(folder))), data(tiny_llama), max_steps=1)


def test_a_damaged_file_is_refused(tiny_llama, tmp_path, folder):
    file = full(tiny_llama, tmp_path, folder)
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[60] ^= 0xFF
    for damage in (bytes(flipped), whole[:-20], whole[: len(whole) // 2], b""):
        file.write_bytes(damage)
        refused(tiny_llama, tmp_path, folder, rf"{file.name} is damaged: .* Delete the file")
    file.unlink()
    full(tiny_llama, tmp_path, folder)


def test_no_flipped_byte_goes_unnoticed(tiny_llama, tmp_path, folder):
    file = full(tiny_llama, tmp_path, folder)
    reference = cached.CachedReference(file.parent, lambda: pytest.fail("scored"))
    whole, expected = file.read_bytes(), reference._read()
    for place in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        file.write_bytes(flipped)
        try:
            table = reference._read()
        except UsageError:
            continue
        assert table.equals(expected), place


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda table: table.replace_schema_metadata({cached.MARK: b"another"}),
            r"\(another in place of [0-9a-f]{32}\)",
        ),
        (lambda table: table.replace_schema_metadata(None), r"\(it names none in place of"),
        (lambda table: table.rename_columns(["digest", "total", "size"]), "does not hold scores of this reference"),
        (lambda table: table.set_column(0, "digest", table["digest"].cast(pa.float64(), safe=False)), "does not hold"),
    ],
)
def test_a_foreign_file_is_refused(tiny_llama, tmp_path, folder, change, match):
    file = full(tiny_llama, tmp_path, folder)
    pq.write_table(change(pq.read_table(file)), file)
    refused(tiny_llama, tmp_path, folder, match)


def test_a_score_that_is_wrong_stops_the_run(tiny_llama, tmp_path, folder):
    file = full(tiny_llama, tmp_path, folder)
    table = pq.read_table(file)
    totals = [[first + 1.0, *others] for first, *others in table["total"].to_pylist()]
    column = pa.array(totals, table.schema.field("total").type)
    pq.write_table(table.set_column(1, table.schema.field("total"), column), file)
    refused(tiny_llama, tmp_path, folder, r"log-probabilities differ by up to 1 nats")


def test_a_score_of_other_lengths_is_never_served(tiny_llama, tmp_path, folder):
    file = full(tiny_llama, tmp_path, folder)
    table = pq.read_table(file)
    lengths = [[first + 1, *others] for first, *others in table["length"].to_pylist()]
    column = pa.array(lengths, table.schema.field("length").type)
    pq.write_table(table.set_column(2, table.schema.field("length"), column), file)
    refused(tiny_llama, tmp_path, folder, "has no scores for the tokens of rows")


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
@pytest.mark.parametrize("keep", [True, False])
def test_a_run_resumes_with_and_without_the_folder(tiny_llama, tmp_path, folder, scored, keep, lora):
    whole = module(tiny_llama, Cached(dir=str(folder)), lora)
    saving(tmp_path, whole, data(tiny_llama))
    key = {path.name for path in folder.iterdir()}
    scored.clear()
    if not keep:
        shutil.rmtree(folder)
    resumed = module(tiny_llama, Cached(dir=str(folder)), lora)
    fit(tmp_path, resumed, data(tiny_llama), tmp_path / "step=3.ckpt", seed=1)
    assert same(trained(resumed), trained(whole))
    assert sum(scored) == (0 if keep else 21)
    assert {path.name for path in folder.iterdir()} == key


@pytest.mark.parametrize("keep", [True, False])
def test_a_loaded_checkpoint_is_measured_against_the_first_weights(tiny_llama, tmp_path, folder, keep):
    dpo = module(tiny_llama, Cached(dir=str(folder)))
    saving(tmp_path, dpo, data(tiny_llama))
    if not keep:
        shutil.rmtree(folder)
    loaded = DPOModule.load_from_checkpoint(tmp_path / "step=6.ckpt", weights_only=True)
    assert torch.equal(weights(loaded), weights(dpo))
    before, after = (validated(tmp_path, m, data(tiny_llama)) for m in (dpo, loaded))
    assert after == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("trained_first", [True, False])
def test_other_stages_score_what_they_need_with_the_first_weights(tiny_llama, tmp_path, folder, scored, trained_first):
    copy, looked_up = module(tiny_llama), module(tiny_llama, Cached(dir=str(folder)))
    source = {"tokenizer": tiny_llama, "val_batch_size": 4}
    results = []
    for dpo in (copy, looked_up):
        if trained_first:
            fit(tmp_path, dpo, data(tiny_llama))
        test = trainer(tmp_path).test(dpo, PreferenceDataModule(test=rows(6, 2), **source), verbose=False)[0]
        batches = trainer(tmp_path).predict(dpo, PreferenceDataModule(test=rows(7, 3), **source))
        results.append((test, torch.cat([batch.rewards for batch in batches])))
    assert results[1][0] == pytest.approx(results[0][0], abs=1e-5)
    torch.testing.assert_close(results[1][1], results[0][1], atol=1e-5, rtol=0)
    assert bool(results[0][1].abs().max() > 0.1) is trained_first
    assert sum(scored) == 13 + 21 * trained_first


def test_a_fit_that_breaks_off_poisons_no_scores(tiny_llama, tmp_path, folder):
    class Broken(Exception):
        pass

    class Breaks(DPOModule):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 3:
                raise Broken
            return super().training_step(batch, batch_idx)

    dpo = Breaks(PolicySpec(path=tiny_llama), DPOLoss(beta=0.5), Cached(dir=str(folder)), lr=1e-2)
    with pytest.raises(Broken):
        fit(tmp_path, dpo, data(tiny_llama))
    source = PreferenceDataModule(test=rows(6, 2), tokenizer=tiny_llama)
    trainer(tmp_path).test(dpo, source, verbose=False)
    (untrained,) = trainer(tmp_path).test(module(tiny_llama, Cached(dir=str(folder))), source, verbose=False)
    assert untrained["test/loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_another_model_may_score(tiny_llama, tmp_path, folder):
    other = PolicySpec(path=tiny_llama).build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    other.model.save_pretrained(tmp_path / "other")
    expected, found = (
        fit(tmp_path, module(tiny_llama, reference), data(tiny_llama)).values
        for reference in (
            FrozenCopy(path=str(tmp_path / "other")),
            Cached(dir=str(folder), path=str(tmp_path / "other")),
        )
    )
    assert found == pytest.approx(expected, abs=1e-5)
    assert abs(found[0] - math.log(2)) > 1e-3


def test_dropout_that_is_kept_is_in_no_score(tiny_llama, tmp_path, folder):
    dpo = module(tiny_llama, Cached(dir=str(folder)), LoRA(rank=2, dropout=0.5), dropout=True)
    fit(tmp_path, dpo, data(tiny_llama), max_steps=1)
    assert dpo.policy.training
    plain = fit(tmp_path, module(tiny_llama, Cached(dir=str(folder))), data(tiny_llama), max_steps=1)
    assert plain.values[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("val", [None, rows(4, 1)])
def test_a_stream_is_refused(tiny_llama, tmp_path, folder, val):
    source = PreferenceDataModule(rows(16), val, tokenizer=tiny_llama, batch_size=4, stream_buffer=4)
    with pytest.raises(UsageError, match=r"examples of a stream cannot be scored before training.*stream_buffer"):
        fit(tmp_path, module(tiny_llama, Cached(dir=str(folder))), source)


def test_plain_loaders_are_refused(tiny_llama, tmp_path, folder):
    source = data(tiny_llama)
    source.setup("fit")
    with pytest.raises(UsageError, match=r"scores the examples of a PreferenceDataModule.*use FrozenCopy"):
        fit(tmp_path, module(tiny_llama, Cached(dir=str(folder))), source.train_dataloader())


def test_outside_of_a_trainer_there_are_no_scores(tiny_llama, folder):
    source = data(tiny_llama)
    source.setup("fit")
    dpo = module(tiny_llama, Cached(dir=str(folder)))
    with pytest.raises(UsageError, match="those in a Trainer"):
        dpo.reference_logps(next(iter(source.train_dataloader())))


@pytest.mark.parametrize("loss", [LDDPOLoss(), TDPO1Loss()])
def test_losses_of_tokens_are_refused_at_once(tiny_llama, loss):
    with pytest.raises(UsageError, match=rf"{type(loss).__name__} needs more .* Cached keeps; use FrozenCopy"):
        module(tiny_llama, Cached(), loss=loss)


def test_a_model_that_does_not_exist_is_found_out_before_weights_are_loaded(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(PolicySpec, "build", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(UsageError, match=r"there is no folder \./no/model"):
        fit(tmp_path, module(tiny_llama, Cached(path="./no/model")), data(tiny_llama))


def test_samples_are_logged_without_a_divergence_from_sums(tiny_llama, tmp_path, folder):
    callback = LogSamples(["the film"], max_new_tokens=3)
    fit(tmp_path, module(tiny_llama, Cached(dir=str(folder))), data(tiny_llama), callbacks=[callback], max_steps=1)
    assert "kl" not in callback.after[1]
