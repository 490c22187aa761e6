"""Several sources in shares: by weight, without repeating an example, each with a format and a report of its own."""

from __future__ import annotations

import json
import math
from collections import Counter
from fractions import Fraction
from itertools import chain, pairwise

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import dpo_lightning.cli
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.files import Files
from dpo_lightning.data.formats import Pairs
from dpo_lightning.data.mixture import Mixture, Part, as_parts, shares
from dpo_lightning.data.rankings import Rankings
from dpo_lightning.data.sources import Rows
from dpo_lightning.errors import UsageError


def pairs(num: int, prompt: str = "p") -> Rows:
    return Rows([{"prompt": f"{prompt}{number}", "chosen": " good", "rejected": " bad"} for number in range(num)])


def mixture(*parts: tuple[int, float | None]) -> Mixture:
    """Sizes and weights; the prompts of the first begin with a, those of the second with b, ..."""
    names = "abcdef"
    return Mixture(parts=[Part(source=pairs(size, names[n]), weight=weight) for n, (size, weight) in enumerate(parts)])


@pytest.fixture
def tokenizer(makes):
    return makes["llama"].tokenizer


@pytest.fixture
def data(tokenizer):
    """A data module that was set up for a fit."""
    torch.manual_seed(0)

    def make(train, *args, **kwargs):
        module = PreferenceDataModule(train, *args, **{"tokenizer": tokenizer, "batch_size": 4, **kwargs})
        module.setup("fit")
        return module

    return make


def prompts_of(tokenizer, batches) -> list[list[str]]:
    """The prompt of every example, batch by batch, read back from the stream of tokens."""
    found = []
    for batch in batches:
        starts = [start for start, _, begin, stop in batch.spans.tolist() if begin == stop]
        texts = [tokenizer.decode(batch.input_ids[start : start + 6], skip_special_tokens=True) for start in starts]
        found.append([text.split(" ")[0] for text in texts])
    return found


def flat(lists: list[list[str]]) -> list[str]:
    return [*chain.from_iterable(lists)]


# Shares.


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ([10, 4], [None, None], [10, 4]),
        ([10, 4], [1, 1], [4, 4]),
        ([10, 4], [3, 1], [10, 3]),  # 3 1/3, rounded
        ([10, 4], [10, 4], [10, 4]),
        ([100, 100, 7], [2, 1, 1], [14, 7, 7]),
        ([100, 100], [1, 1e-6], [100, 1]),  # every source is there
        ([5], [0.3], [5]),
        ([1, 1000], [1, 3], [1, 3]),
        ([3, 1000], [0.3, 0.7], [3, 7]),
    ],
)
def test_shares_by_hand(sizes, weights, expected):
    assert shares(sizes, weights) == expected


@pytest.mark.parametrize("sizes", [[7, 11, 13], [1000, 10, 300], [50, 50, 50]])
@pytest.mark.parametrize("weights", [[1, 1, 1], [5, 1, 2], [0.2, 0.1, 0.7]])
def test_shares_keep_the_weights_and_use_some_source_up(sizes, weights):
    taken = shares(sizes, weights)
    assert all(0 < number <= size for number, size in zip(taken, sizes, strict=True))
    assert any(number == size for number, size in zip(taken, sizes, strict=True))
    for (one, first), (other, second) in pairwise(zip(taken, weights, strict=True)):
        # Each is rounded, so each may be half an example off.
        ratio = Fraction(first) / Fraction(second)
        assert abs(one - ratio * other) <= 0.5 + 0.5 * ratio


@pytest.mark.parametrize("weight", [0, 0.0, -1.0, math.nan, math.inf])
def test_weights_are_checked(weight):
    with pytest.raises(UsageError) as caught:
        as_parts(mixture((1, weight)), None)
    assert str(caught.value) == f"`weight` must be positive and finite, got {weight}; leave out the source instead."


def test_parts_are_checked():
    with pytest.raises(UsageError, match=r"^A mixture needs at least one part\.$"):
        as_parts(Mixture(parts=[]), None)
    with pytest.raises(UsageError, match=r"^Give every part of a mixture a `weight`, or none\.$"):
        as_parts(mixture((3, 1.0), (3, None)), None)


def test_a_source_alone_is_one_part(tmp_path):
    assert as_parts("a.jsonl", Pairs()) == [Part(source=Files("a.jsonl"), format=Pairs())]
    parts = Mixture(parts=[Part(source="a.jsonl", format=Rankings()), Part(source=pairs(2))])
    assert as_parts(parts, Pairs()) == [
        Part(source=Files("a.jsonl"), format=Rankings()),
        Part(source=pairs(2), format=Pairs()),
    ]
    assert as_parts(parts, None)[1].format is None


# Epochs.


def test_without_weights_an_epoch_is_everything_once(data, tokenizer):
    loader = data(mixture((5, None), (9, None), (1, None))).train_dataloader()
    everything = sorted([f"a{n}" for n in range(5)] + [f"b{n}" for n in range(9)] + ["c0"])
    epochs = [prompts_of(tokenizer, loader) for _ in range(3)]
    assert [sorted(flat(epoch)) for epoch in epochs] == [everything] * 3
    assert epochs[0] != epochs[1]


def test_weights_are_shares_of_an_epoch(data, tokenizer):
    loader = data(mixture((12, 1), (6, 3), (40, 1))).train_dataloader()
    assert len(loader) == 3  # 2 + 6 + 2 examples
    epochs = [flat(prompts_of(tokenizer, loader)) for _ in range(60)]
    for epoch in epochs:
        assert Counter(prompt[0] for prompt in epoch) == {"a": 2, "b": 6, "c": 2}
        assert len(set(epoch)) == 10
    # Epoch by epoch a large source gives others, so that in time all are seen.
    assert {prompt for prompt in flat(epochs) if prompt[0] == "a"} == {f"a{number}" for number in range(12)}
    # Sources are mixed within an epoch, not behind each other.
    places = [place for epoch in epochs for place, prompt in enumerate(epoch) if prompt[0] == "a"]
    assert 3.5 < sum(places) / len(places) < 5.5


def test_the_order_is_fixed_by_the_seed(data, tokenizer):
    orders = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        orders.append(prompts_of(tokenizer, data(mixture((40, 1), (6, 3))).train_dataloader()))
    assert orders[0] == orders[1] != orders[2]


def test_validation_takes_everything_in_order(data, tokenizer):
    module = data(mixture((5, 1.0)), mixture((3, 1.0), (2, 7.0)))
    (batch,) = prompts_of(tokenizer, module.val_dataloader())
    assert batch == ["a0", "a1", "a2", "b0", "b1"]


def test_what_is_held_out_is_of_all_sources_and_shares_are_kept(data, tokenizer):
    module = data(mixture((100, 1), (60, 3)), val_fraction=0.25)
    val = flat(prompts_of(tokenizer, module.val_dataloader()))
    assert len(val) == 40
    assert {prompt[0] for prompt in val} == {"a", "b"}
    left = 60 - sum(prompt[0] == "b" for prompt in val)
    train = flat(prompts_of(tokenizer, module.train_dataloader()))
    assert Counter(prompt[0] for prompt in train) == {"a": round(left / 3), "b": left}
    assert not set(train) & set(val)


def test_a_source_held_out_as_a_whole_is_refused(data):
    # One of two prompts, each all of a source.
    with pytest.raises(UsageError, match=r"`val_fraction` leaves nothing of 1 rows in memory to train on; give `val`"):
        data(mixture((1, 1), (1, 1)), val_fraction=0.5)
    assert sum(size for size, _ in data(mixture((1, None), (1, None)), val_fraction=0.5).stock.sizes["train"]) == 1


def test_each_part_has_its_own_format_and_report(data):
    rankings = Rows([{"prompt": f"r{n}", "responses": ["x", "y", "z"]} for n in range(3)] + [{"prompt": "r"}])
    other = Rows([{"frage": "f", "gut": "x", "schlecht": "y", "id": 3}])
    parts = [
        Part(source=pairs(5)),
        Part(source=rankings),
        Part(source=other, format=Pairs(prompt="frage", chosen="gut", rejected="schlecht")),
    ]
    module = data(Mixture(parts=parts))
    assert [(report.source, report.format) for report in module.reports] == [
        ("5 rows in memory", "Pairs (prompt, chosen, rejected)"),
        ("4 rows in memory", "Rankings (prompt, responses)"),
        ("1 rows in memory", "Pairs (frage, gut, schlecht)"),
    ]
    assert [(report.rows, report.kept, report.num_dropped) for report in module.reports] == [
        (5, 5, 0),
        (4, 3, 1),
        (1, 1, 0),
    ]
    assert [report.unread for report in module.reports] == [[], [], ["id"]]
    assert [dict(report.responses) for report in module.reports] == [{2: 5}, {3: 3}, {2: 1}]
    assert sum(len(batch.row) for batch in module.train_dataloader()) == 9


def test_the_format_of_the_data_holds_for_parts_without_one(data):
    rows = Rows([{"frage": "f", "gut": "x", "schlecht": "y"}])
    named = Pairs(prompt="frage", chosen="gut", rejected="schlecht")
    module = data(Mixture(parts=[Part(source=rows), Part(source=pairs(1), format=Pairs())]), format=named)
    assert [report.format for report in module.reports] == ["Pairs (frage, gut, schlecht)", str(Pairs())]


def test_a_part_without_a_usable_row_is_refused(data):
    same = Rows([{"prompt": "p", "chosen": "same", "rejected": "same"}])
    with pytest.raises(UsageError, match=r"^Of 1 rows in memory no row is left to use\.\ntrain: 1 rows in memory"):
        data(Mixture(parts=[Part(source=pairs(4)), Part(source=same)]))


# In a Trainer.


class Recorder(LightningModule):
    """Learns nothing and remembers the prompts that it was given."""

    def __init__(self, tokenizer) -> None:
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []
        self.read = lambda batch: prompts_of(tokenizer, [batch])[0]

    def training_step(self, batch, batch_idx):
        self.seen.append(self.read(batch))
        return self.weight

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["num_seen"] = len(self.seen)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_a_resumed_run_sees_the_very_next_batch(tokenizer, tmp_path):
    def run(seed, ckpt_path=None, **more):
        torch.manual_seed(seed)
        recorder = Recorder(tokenizer)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        module = PreferenceDataModule(mixture((40, 1), (9, 3)), tokenizer=tokenizer, batch_size=4)
        Trainer(accelerator="cpu", max_epochs=3, **quiet, **more).fit(recorder, datamodule=module, ckpt_path=ckpt_path)
        return recorder.seen

    every_step = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    uninterrupted = run(0, callbacks=[every_step])
    assert len(uninterrupted) == 9  # epochs of 3 + 9 examples
    assert all(Counter(prompt[0] for prompt in flat(uninterrupted[e : e + 3])) == {"a": 3, "b": 9} for e in (0, 3, 6))
    for path in sorted(tmp_path.glob("*.ckpt"))[::2]:
        done = torch.load(path, weights_only=True)["num_seen"]
        assert uninterrupted[:done] + run(7, ckpt_path=path, enable_checkpointing=False) == uninterrupted


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def config(model, data):
    return {
        "model": {
            "class_path": "DPOModule",
            "init_args": {"policy": {"path": model}, "loss": {"class_path": "DPOLoss"}, "lr": 1e-3},
        },
        "data": {"class_path": "PreferenceDataModule", "init_args": data},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "log_every_n_steps": 1, "enable_progress_bar": False},
    }


def test_a_mixture_in_yaml(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dpo-lightning"])
    write(tmp_path / "a.jsonl", pairs(9, "the film"))
    write(tmp_path / "b.jsonl", [{"frage": f"f{n}", "gut": " yes", "schlecht": " no"} for n in range(2)])
    write(tmp_path / "c.jsonl", [{"query": f"q{n}", "outputs": [" x", " y", " z"]} for n in range(4)])
    german = {"class_path": "Pairs", "init_args": {"prompt": "frage", "chosen": "gut", "rejected": "schlecht"}}
    ranked = {"class_path": "Rankings", "init_args": {"prompt": "query", "responses": "outputs"}}
    parts = [
        {"source": "a.jsonl", "weight": 2},
        {"source": {"class_path": "Files", "init_args": {"path": "b.jsonl"}}, "weight": 1.0, "format": german},
        {"source": "c.jsonl", "weight": 2, "format": ranked},
    ]
    val = {"parts": [{"source": "a.jsonl"}, {"source": "c.jsonl"}]}
    data = {"train": {"parts": parts}, "val": val, "batch_size": 5, "num_responses": 2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config(tiny_llama, data)))
    cli = dpo_lightning.cli.run(["fit", "--config", "config.yaml"])
    module = cli.datamodule
    assert module.stock.sizes["train"] == [(9, 4), (2, 2), (4, 4)]
    assert cli.trainer.global_step == 2
    assert [(report.split, report.source, report.kept) for report in module.reports] == [
        ("train", "a.jsonl", 9),
        ("train", "b.jsonl", 2),
        ("train", "c.jsonl", 4),
        ("val", "a.jsonl", 9),
        ("val", "c.jsonl", 4),
    ]
    assert module.reports[4].format == "Rankings (query, outputs)"
    (saved,) = tmp_path.rglob("data_report.json")
    assert [part["source"] for part in json.loads(saved.read_text())] == [report.source for report in module.reports]


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"parts": []}, "A mixture needs at least one part."),
        ({"parts": [{"source": "a.jsonl", "weight": 0}]}, "`weight` must be positive and finite, got 0.0; leave out"),
        (
            {"parts": [{"source": "a.jsonl", "weight": 1}, {"source": "a.jsonl"}]},
            "Give every part of a mixture a `weight`, or none.",
        ),
        ({"parts": [{"source": "none.jsonl"}]}, "There is no data file none.jsonl"),
    ],
)
def test_mistakes_in_yaml_are_explained(tiny_llama, tmp_path, monkeypatch, capsys, train, expected):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", pairs(3))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config(tiny_llama, {"train": train})))
    monkeypatch.setattr("sys.argv", ["dpo-lightning", "fit", "--config", "config.yaml"])
    with pytest.raises(SystemExit):
        dpo_lightning.cli.main()
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error
