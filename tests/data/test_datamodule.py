"""The data module in a Trainer: what is read, counted, held out, refused, and resumed."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import dpo_lightning.cli
import dpo_lightning.data.datamodule
import dpo_lightning.data.stock
import dpo_lightning.data.table
from dpo_lightning.batch import Window
from dpo_lightning.data.chat import Chat
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.files import Files
from dpo_lightning.data.formats import Pairs
from dpo_lightning.data.mixture import Mixture, Part
from dpo_lightning.data.rankings import Columns, Rankings
from dpo_lightning.data.samples import Samples
from dpo_lightning.data.sources import Rows
from dpo_lightning.data.supervised import Texts
from dpo_lightning.errors import UsageError


def pairs(num: int, prompt: str = "p") -> list[dict[str, str]]:
    return [{"prompt": f"{prompt}{number}", "chosen": " good", "rejected": " bad"} for number in range(num)]


@pytest.fixture
def data(makes):
    """A data module by its arguments, the tokenizer given."""
    return lambda *args, **kwargs: PreferenceDataModule(*args, **{"tokenizer": makes["llama"].tokenizer, **kwargs})


@pytest.fixture
def messages(monkeypatch) -> list[str]:
    """What the data module prints."""
    printed: list[str] = []
    for module in (dpo_lightning.data.datamodule, dpo_lightning.data.stock):
        monkeypatch.setattr(module, "rank_zero_info", printed.append)
    return printed


# A module that validates may be fitted without validation data.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


class Recorder(LightningModule):
    """Learns nothing and remembers the rows that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[list[int]]] = {"train": [], "val": [], "test": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch.row.tolist())
        return self.weight

    def validation_step(self, batch, batch_idx):
        self.seen["val"].append(batch.row.tolist())

    def test_step(self, batch, batch_idx):
        self.seen["test"].append(batch.row.tolist())

    def predict_step(self, batch, batch_idx):
        return batch.row.tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["num_seen"] = len(self.seen["train"])


def trainer(**kwargs) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Trainer(accelerator="cpu", **{"enable_checkpointing": False, "max_epochs": 1, **quiet, **kwargs})


def rows_of(module: PreferenceDataModule, split: str) -> list[int]:
    return [example.row for example in module.examples[split]]


# Reading and counting.


def test_counts_are_printed_once_and_add_up(data, messages):
    rows = [
        *pairs(3),
        {"prompt": "p", "chosen": "same", "rejected": "same"},
        {"prompt": "p", "chosen": "good", "rejected": ""},
        {"prompt": "p" * 50, "chosen": "good", "rejected": "bad"},
        {"prompt": "p", "chosen": "g" * 50, "rejected": "bad"},
        {"prompt": "xa", "chosen": "b", "rejected": "c"},
        {"prompt": "p", "chosen": "\ud800", "rejected": "bad"},
    ]
    module = data(rows, pairs(2), max_length=16)
    for _ in range(2):
        module.setup("fit")
    module.setup("validate")
    module.train_dataloader()
    train, val = module.reports
    assert messages[:2] == [str(train), str(val)]
    assert (train.rows, train.kept, val.rows, val.kept) == (9, 5, 2, 2)
    assert train.rows == train.kept + train.num_dropped
    assert rows_of(module, "train") == [1, 2, 3, 7, 8]
    assert {reason: (drop.count, drop.rows) for reason, drop in train.dropped.items()} == {
        "equal responses": (1, [4]),
        "empty response": (1, [5]),
        "nothing left to score": (1, [6]),
        "text with half a character (a lone surrogate)": (1, [9]),
    }
    assert (train.noted["merged"], train.noted["cut_responses"]) == (1, 1)


def test_a_fit_prints_each_report_once(data, messages):
    trainer(max_epochs=2).fit(Recorder(), datamodule=data(pairs(4), pairs(2, prompt="q")))
    assert [message.splitlines()[0] for message in messages] == ["train: 4 rows in memory", "val: 2 rows in memory"]


def test_only_what_a_stage_needs_is_read(data):
    module = data(pairs(4), pairs(3), pairs(2))
    for stage, splits in [
        ("predict", {"test"}),
        ("test", {"test"}),
        ("validate", {"test", "val"}),
        ("fit", {"test", "val", "train"}),
    ]:
        module.setup(stage)
        assert set(module.examples) == splits


def test_rows_of_a_file_have_the_numbers_of_its_lines(data, tmp_path):
    lines = [json.dumps(row) for row in pairs(3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(["", lines[0], "", "", lines[1], '{"prompt": "p"}']))
    with pytest.raises(UsageError, match=r"rows\.jsonl, row 6: missing column: there is no column 'chosen'"):
        data(str(path), strict=True).setup("fit")
    path.write_text("\n".join(["", lines[0], "", "", lines[1], lines[2]]))
    module = data(Files(str(path)))
    module.setup("fit")
    assert rows_of(module, "train") == [2, 5, 6]
    assert (module.reports[0].rows, module.reports[0].kept) == (3, 3)
    assert sorted(row for batch in module.train_dataloader() for row in batch.row.tolist()) == [2, 5, 6]


def test_a_format_can_be_named(data):
    rows = [{"instruction": f"p{number}", "output": ["a", "b", "c"]} for number in range(2)]
    module = data(rows, format=Rankings(prompt="instruction", responses="output"))
    module.setup("fit")
    assert [len(example.response_ids) for example in module.examples["train"]] == [3, 3]
    assert module.reports[0].format == "Rankings (instruction, output)"
    with pytest.raises(UsageError, match="there is no column 'prompt'; the rows have 'instruction', 'output'"):
        data(rows, format=Pairs()).setup("fit")


@pytest.mark.parametrize(("num_responses", "expected"), [(1, 1), (2, 2), (3, 3), (4, 3), (None, 3)])
def test_num_responses_keeps_the_best(data, makes, num_responses, expected):
    module = data([{"prompt": "p", "responses": ["best", "good", "bad"]}], num_responses=num_responses)
    module.setup("fit")
    (batch,) = module.train_dataloader()
    assert batch.length.shape == (1, expected)
    texts = [makes["llama"].tokenizer.decode(ids[:-1]) for ids in module.examples["train"][0].response_ids]
    assert texts == ["best", "good", "bad"][:expected]


def test_one_response_of_equal_ones_is_an_example(data):
    module = data([{"prompt": "p", "chosen": "same", "rejected": "same"}], num_responses=1)
    module.setup("fit")
    assert module.reports[0].kept == 1


def test_a_tokenizer_is_given_by_its_folder(makes, tmp_path):
    makes["llama"].tokenizer.save_pretrained(tmp_path)
    module = PreferenceDataModule(pairs(2), tokenizer=str(tmp_path))
    assert module.tokenizer("p")["input_ids"] == makes["llama"].tokenizer("p")["input_ids"]


# Holding out.


def test_the_held_out_share_is_disjoint_and_complete(data, messages):
    module = data(pairs(50), val_fraction=0.1)
    module.setup("fit")
    train, val = rows_of(module, "train"), rows_of(module, "val")
    assert (len(train), len(val)) == (45, 5)
    assert sorted(train + val) == list(range(1, 51))
    assert messages[1:] == ["  held out for validation 5, left for training 45"]


def test_the_held_out_share_is_the_same_for_every_seed_and_stage(data):
    held_out = []
    for seed, stage in [(1, "fit"), (2, "fit"), (3, "validate")]:
        torch.manual_seed(seed)
        module = data(pairs(50), val_fraction=0.1)
        module.setup(stage)
        held_out.append(rows_of(module, "val"))
    assert held_out[0] == held_out[1] == held_out[2] != list(range(46, 51))


def test_holding_out_leaves_the_random_state_alone(data):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    data(pairs(50), val_fraction=0.5).setup("fit")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("num", "fraction", "held_out"), [(4, 0.1, 0), (4, 0.9, 4), (1, 0.5, 0)])
def test_both_parts_need_an_example(data, num, fraction, held_out):
    with pytest.raises(UsageError) as caught:
        data(pairs(num), val_fraction=fraction).setup("fit")
    assert str(caught.value) == (
        f"`val_fraction` {fraction} of {num} examples with {num} prompts holds out {held_out}; both parts need at "
        "least one."
    )


def prompts(*counts: int) -> list[dict[str, str]]:
    """So many rows of each of several prompts, mixed up."""
    rows = [
        {"prompt": f"p{prompt}", "chosen": f" good{number}", "rejected": " bad"}
        for prompt, count in enumerate(counts)
        for number in range(count)
    ]
    return sorted(rows, key=lambda row: row["chosen"])


def test_examples_of_one_prompt_are_held_out_together(data):
    rows = prompts(*([1, 2, 3, 4] * 10))
    module = data(rows, val_fraction=0.2)
    module.setup("fit")
    train, val = ({rows[row - 1]["prompt"] for row in rows_of(module, split)} for split in ("train", "val"))
    assert not train & val
    assert len(module.examples["val"]) == 20
    assert len(module.examples["train"]) == 80


def test_examples_without_a_prompt_are_held_out_one_by_one(data):
    module = data([{"text": f"Text {number}."} for number in range(20)], val_fraction=0.25)
    module.setup("fit")
    assert (len(module.examples["val"]), len(module.examples["train"])) == (5, 15)


def test_equal_texts_are_held_out_together(data):
    rows = [{"text": f"Text {number // 2}."} for number in range(20)]
    module = data(rows, val_fraction=0.2)
    module.setup("fit")
    train, val = ({rows[row - 1]["text"] for row in rows_of(module, split)} for split in ("train", "val"))
    assert (len(val), train & val) == (2, set())


# What validation shares with training.


LEAK = "val: 2 of 4 examples have a prompt that stands in train too; what is measured there is partly memory."


@pytest.mark.parametrize("stages", [("fit",), ("validate", "fit"), ("test", "fit", "validate", "test")])
def test_prompts_of_validation_that_training_has_are_said_once(data, messages, stages):
    val = [*pairs(1), *pairs(2, "other"), {"prompt": "p3", "chosen": "else", "rejected": "x"}]
    module = data(pairs(4), val, pairs(4))
    for stage in stages:
        module.setup(stage)
    assert [message for message in messages if "partly memory" in message] == [LEAK]
    assert messages.index(LEAK) > max(place for place, message in enumerate(messages) if message.startswith("train:"))


def test_without_shared_prompts_nothing_is_said(data, messages):
    for module in (data(pairs(4), pairs(4, "q")), data(prompts(2, 2, 2, 2), val_fraction=0.5), data(None, pairs(4))):
        module.setup("validate" if "train" not in module.sources else "fit")
    texts = [{"text": "Once."}, {"text": "Twice."}]
    data(texts, [{"text": "Thrice."}]).setup("fit")
    assert not any("partly memory" in message for message in messages)


def test_a_text_that_training_has_is_said(data, messages):
    data([{"text": "Once."}, {"text": "Twice."}], [{"text": "Once."}, {"text": "Thrice."}]).setup("fit")
    assert "val: 1 of 2 examples have a prompt that stands in train too" in messages[-1]


# Samples, which are scored and not learnt from.


SAMPLES = [
    {"prompt": "p", "responses": [" a", " a", "", " b"], "tokens": [2, 2, 1, 2], "finished": [True] * 4},
    {"prompt": "q", "responses": [" a"], "tokens": [2], "finished": [True]},
]


def test_every_sample_is_predicted_by_itself(data, tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SAMPLES))
    for _ in ("made", "found in the cache"):
        module = data(test=str(path))
        module.setup("predict")
        (batch,) = module.predict_dataloader()
        assert batch.length.shape == (4, 1)
        assert list(zip(batch.row.tolist(), batch.response.tolist(), strict=True)) == [(1, 1), (1, 2), (1, 4), (2, 1)]
        (report,) = module.reports
        assert {reason: (drop.count, drop.rows) for reason, drop in report.dropped.items()} == {
            "empty response": (1, [1])
        }
    assert report.origin == "tokens found in the cache"


@pytest.mark.parametrize(
    ("stage", "given"),
    [
        ("fit", {"train": SAMPLES}),
        ("fit", {"train": SAMPLES, "val_fraction": 0.5}),
        ("fit", {"train": SAMPLES, "stream_buffer": 4}),
        ("fit", {"train": pairs(2), "val": SAMPLES}),
        ("fit", {"train": Mixture(parts=[Part(source=Rows(pairs(2))), Part(source=Rows(SAMPLES))])}),
        ("fit", {"train": [{"prompt": ["p"], "responses": [["a", "b"]]}], "format": Columns(rows=Samples())}),
        ("validate", {"val": SAMPLES}),
        ("test", {"test": SAMPLES}),
    ],
)
def test_nothing_is_learnt_from_samples_or_measured_on_them(data, stage, given):
    module = data(**given)
    split = "val" if "val" in given else {"fit": "train"}.get(stage, stage)
    for _ in ("read", "known"):
        with pytest.raises(UsageError) as caught:
            module.setup(stage)
        assert str(caught.value).startswith(f"{split}: ")
        assert "`dpo-lightning label` makes preferences of samples" in str(caught.value)


def test_samples_that_were_predicted_are_not_learnt_from(data, tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SAMPLES))
    module = data(str(path), test=str(path))
    module.setup("predict")
    for stage in ("test", "fit"):
        with pytest.raises(UsageError, match=r"samples\.jsonl holds samples"):
            module.setup(stage)
    module.setup("predict")


def test_samples_for_predict_do_not_hinder_a_fit(data):
    module = data(pairs(4), test=SAMPLES)
    module.setup("fit")
    module.setup("predict")
    assert set(module.examples) == {"train", "test"}


# Nothing dropped in silence.


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "chosen": "same", "rejected": "same"}, "equal responses"),
        ({"prompt": "p", "chosen": "a"}, "missing column: there is no column 'rejected'"),
        ({"prompt": "p", "chosen": "a", "rejected": 3}, "wrong type: column 'rejected' must be text"),
        ({"prompt": "p", "chosen": "a" * 30, "rejected": "b"}, "too long: 2 prompt tokens, 33 with the longest"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_strictly_any_drop_is_an_error_with_file_row_and_reason(data, tmp_path, row, reason, split):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in [*pairs(3), row, *pairs(3)]))
    files = {split: str(path)} | ({"train": pairs(2)} if split == "val" else {})
    settings = {"max_length": 16, "truncation": "drop", "format": Pairs()}
    stage = "fit" if split != "test" else "test"
    data(**files, **settings).setup(stage)
    with pytest.raises(UsageError) as caught:
        data(**files, **settings, strict=True).setup(stage)
    first, last = str(caught.value).splitlines()
    assert first.startswith(f"{path}, row 4: {reason}")
    assert last == "1 of 7 examples cannot be used, and `data.init_args.strict` allows none."


def test_strictly_examples_are_counted_and_not_rows(data):
    rows = [{"prompt": ["a", "b", "c"], "responses": [["x", "y"], ["x", "x"], ["y", "y"]]}]
    with pytest.raises(UsageError, match=r"^1 rows in memory, row 1: equal responses\n2 of 3 examples cannot be used"):
        data(rows, strict=True, format=Columns(rows=Rankings())).setup("fit")


def test_strictly_cutting_and_equal_examples_are_no_drops(data):
    module = data([*pairs(2), *pairs(2)], max_length=6, strict=True)
    module.setup("fit")
    assert module.reports[0].noted["cut_responses"] == 8
    assert module.reports[0].duplicates == 2


# Tokens made once.


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "dpo_lightning"


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """Sources that were tokenised."""
    sources: list[str] = []
    write = dpo_lightning.data.table._write

    def spy(folder, source, *args):
        sources.append(str(source))
        write(folder, source, *args)

    monkeypatch.setattr(dpo_lightning.data.table, "_write", spy)
    return sources


SAME = [
    {"batch_size": 2},
    {"val_batch_size": 1},
    {"num_workers": 1},
    {"num_proc": 2},
    {"strict": True},
    {"val": None, "val_fraction": 0.5},
]


@pytest.mark.parametrize("change", SAME, ids=lambda change: "-".join(change))
def test_what_does_not_change_tokens_finds_them(data, own_cache, written, change):
    usual = {"train": pairs(6), "val": pairs(3, "q")}
    data(**usual).setup("fit")
    assert written == ["6 rows in memory", "3 rows in memory"]
    torch.manual_seed(7)
    again = data(**{**usual, **change})
    again.setup("fit")
    assert written == ["6 rows in memory", "3 rows in memory"]
    assert {report.origin for report in again.reports} == {"tokens found in the cache"}


def test_on_the_command_line_tokens_are_found_too(tiny_llama, tmp_path, own_cache, written, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dpo-lightning"])
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs(6)))
    model = {"policy": {"path": tiny_llama}, "loss": {"class_path": "DPOLoss"}, "lr": 1e-3}
    config = {
        "model": {"class_path": "DPOModule", "init_args": model},
        "data": {"class_path": "PreferenceDataModule", "init_args": {"train": "pairs.jsonl"}},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "log_every_n_steps": 1, "enable_progress_bar": False},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    others = {
        "seed_everything": 3,
        "model.init_args.lr": 0.1,
        "model.init_args.loss.init_args.beta": 0.5,
        "trainer.default_root_dir": "elsewhere",
        "data.init_args.batch_size": 2,
        "data.init_args.val_fraction": 0.5,
        "data.init_args.num_workers": 1,
        "data.init_args.num_proc": 2,
        "data.init_args.strict": "true",
    }
    for flags in ([], [f"--{name}={value}" for name, value in others.items()]):
        cli = dpo_lightning.cli.run(["fit", "--config", "config.yaml", *flags])
        assert written == ["pairs.jsonl"]
    assert cli.datamodule.reports[0].origin == "tokens found in the cache"
    assert list((tmp_path / "elsewhere").rglob("data_report.json"))


def test_what_changes_tokens_makes_them_anew(data, makes, own_cache, written):
    data(pairs(6)).setup("fit")
    changes = [
        {"max_length": 64},
        {"max_prompt_length": 64},
        {"truncation": "drop"},
        {"truncation_side": "right"},
        {"num_responses": 1},
        {"chat": Chat(texts=True, template="package:data/templates/transcript.jinja")},
        {"chat": Chat(texts=True, template="package:data/templates/alpaca.jinja")},
        {"format": Pairs(rejected="chosen", chosen="rejected")},
        {"tokenizer": makes["gpt2"].tokenizer},
        {"train": pairs(7)},
    ]
    for number, change in enumerate(changes, start=2):
        for _ in range(2):
            data(**{"train": pairs(6), **change}).setup("fit")
            assert len(written) == number


def test_a_trainer_prepares_each_source_once(data, own_cache, written):
    module = data(pairs(6), pairs(3, "q"), pairs(2, "t"))
    recorder = Recorder()
    trainer(max_epochs=2).fit(recorder, datamodule=module)
    assert written == ["6 rows in memory", "3 rows in memory"]
    assert not any("found in the cache" in report.origin for report in module.reports)
    trainer().validate(recorder, datamodule=module)
    trainer().fit(recorder, datamodule=module)
    assert len(written) == 2
    trainer().test(recorder, datamodule=module)
    trainer().predict(recorder, datamodule=module)
    assert written[2:] == ["2 rows in memory"]
    assert module.stock._prepared == {}
    other = data(pairs(6), pairs(3, "q"))
    trainer().fit(Recorder(), datamodule=other)
    assert len(written) == 3
    assert {report.origin for report in other.reports} == {"tokens found in the cache"}


class Unnamed(Rows):
    """Rows that nobody can name."""

    def fingerprint(self):
        return None


@pytest.mark.parametrize("how", ["no cache", "no fingerprint"])
def test_without_a_cache_a_trainer_tokenises_once_and_leaves_nothing(data, own_cache, written, how):
    rows = Rows(pairs(6)) if how == "no cache" else Unnamed(pairs(6))
    module = data(rows, Unnamed(pairs(3, "q")), cache=how != "no cache", num_workers=1)
    recorder = Recorder()
    for _ in range(2):
        trainer().fit(recorder, datamodule=module)
        trainer().validate(recorder, datamodule=module)
    assert written == ["6 rows in memory", "3 rows in memory"]
    assert [sorted(batch) for batch in recorder.seen["train"]] == [list(range(1, 7))] * 2
    assert not own_cache.exists()


@pytest.mark.parametrize("limit", [1.0, 1], ids=["all batches", "one batch"])
def test_the_processes_of_loaders_end_with_the_run(data, limit):
    before = set(multiprocessing.active_children())
    recorder = Recorder()
    module = data(pairs(11), pairs(5, "q"), batch_size=4, num_workers=1)
    run = trainer(limit_train_batches=limit)
    run.fit(recorder, datamodule=module)
    assert set(multiprocessing.active_children()) <= before
    assert len(recorder.seen["train"]) == (3 if isinstance(limit, float) else 1)


def test_the_number_of_processes_changes_nothing(data, own_cache):
    rows = [*pairs(3), {"prompt": "p", "chosen": "same", "rejected": "same"}, *pairs(3, "q")]
    modules = [data(rows, cache=False, num_proc=number) for number in (None, 2)]
    for module in modules:
        module.setup("fit")
    assert [len(module.examples["train"].tokens.cache_files) for module in modules] == [1, 2]
    assert list(modules[0].examples["train"]) == list(modules[1].examples["train"])
    assert str(modules[0].reports[0]).splitlines()[4:] == str(modules[1].reports[0]).splitlines()[4:]


@pytest.mark.parametrize("num_proc", [0, -1])
def test_the_number_of_processes_is_checked(data, num_proc):
    with pytest.raises(UsageError, match=f"`num_proc` must be 1 or more, got {num_proc}."):
        data(pairs(2), num_proc=num_proc)


def test_reports_lie_beside_the_logs_of_a_run(data, tmp_path):
    module = data(pairs(4), pairs(2, "q"), pairs(1, "t"))
    fit = trainer(logger=True, default_root_dir=tmp_path / "fit", log_every_n_steps=1)
    fit.fit(Recorder(), datamodule=module)
    saved = json.loads((Path(fit.log_dir) / "data_report.json").read_text())
    assert [(report["split"], report["kept"]) for report in saved] == [("train", 4), ("val", 2)]
    trainer(logger=True, default_root_dir=tmp_path / "test").test(Recorder(), datamodule=module)
    (path,) = (tmp_path / "test").rglob("data_report.json")
    assert [report["split"] for report in json.loads(path.read_text())] == ["train", "val", "test"]


# Two processes.


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs a PyTorch with gloo")
def test_two_ranks_tokenise_once_and_share_every_batch(tmp_path):
    script = Path(__file__).with_name("two_ranks_read.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    environment.pop("PYTEST_CURRENT_TEST", None)
    command = [sys.executable, str(script), str(tmp_path)]
    subprocess.run(command, check=True, env=environment, timeout=120, capture_output=True)
    # Two sources to train on and one to validate, each tokenised by one process and found by the other.
    made = (tmp_path / "made.txt").read_text().splitlines()
    assert sorted(source for source, _ in map(str.split, made)) == ["a.jsonl", "b.jsonl", "val.jsonl"]
    assert {rank for _, rank in map(str.split, made)} == {"0"}
    ranks = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0]["examples"] == ranks[1]["examples"]
    assert [len(ranks[0]["examples"][split]) for split in ("train", "val")] == [12 + 9, 3]
    assert [rank["origins"] for rank in ranks] == [3 * ["tokenised"], 3 * ["tokens found in the cache"]]
    for batches in zip(*(rank["train"] for rank in ranks), strict=True):
        assert [len(batch) for batch in batches] == [2, 2]
    for epoch in (0, 1):  # each 3 + 9 examples, in batches of 4
        seen = [prompt for rank in ranks for batch in rank["train"][3 * epoch : 3 * epoch + 3] for prompt in batch]
        assert len(set(seen)) == 12
        assert Counter(prompt[0] for prompt in seen) == {"a": 3, "b": 9}
    assert sorted(prompt for rank in ranks for batch in rank["val"] for prompt in batch) == ["v0", "v1", "v2"]
    # A stream is read by both, who agree on what is dropped.
    one = [sorted([*first, *second]) for first, second in zip(*(rank["stream"] for rank in ranks), strict=True)]
    assert [len(batch) for batch in one] == [4] * 5
    assert one == json.loads((tmp_path / "alone.json").read_text())
    assert ranks[0]["report"] == ranks[1]["report"]
    assert ranks[0]["report"]["kept"] == 20
    (path,) = tmp_path.rglob("data_report.json")
    assert json.loads(path.read_text()) == [ranks[0]["report"]]


# Refusals.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val": [], "val_fraction": 0.1}, "Both `val` and `val_fraction` are given; keep one of the two."),
        ({"val_fraction": 1.0}, r"`val_fraction` must be in \[0, 1\), got 1.0; 0.1 holds out a tenth."),
        ({"val_fraction": -0.1}, r"`val_fraction` must be in \[0, 1\), got -0.1"),
        ({"batch_size": 0}, "`batch_size` must be 1 or more, got 0."),
        ({"val_batch_size": 0}, "`val_batch_size` must be 1 or more, got 0."),
        ({"micro_batch_tokens": 0}, "`micro_batch_tokens` must be 1 or more, got 0."),
        ({"num_responses": 0}, "`num_responses` must be 1 or more, got 0."),
        ({"max_length": 1}, "`max_length` must be at least 2"),
        ({"max_prompt_length": 600}, r"`max_prompt_length` must be at least 1 and below `max_length` \(512\)"),
        ({"tokenizer": None}, "The model brings no tokenizer; name one by `data.init_args.tokenizer`."),
        ({"tokenizer": "./no-folder"}, "`data.init_args.tokenizer`: ./no-folder is no folder with a tokenizer here"),
    ],
)
def test_arguments_are_checked_at_once(data, arguments, message):
    with pytest.raises(UsageError, match=message):
        data(pairs(4), **arguments)


@pytest.mark.parametrize(
    ("stage", "needs"), [("fit", "train"), ("validate", "val"), ("test", "test"), ("predict", "test")]
)
def test_a_stage_without_data_is_refused_with_the_remedy(data, stage, needs):
    given = {"train": pairs(2), "val": pairs(2), "test": pairs(2)}
    del given[needs]
    message = f"There is no data for {stage}: give `data.init_args.{needs}`."
    with pytest.raises(UsageError) as caught:
        data(**given).setup(stage)
    assert str(caught.value) == message
    with pytest.raises(UsageError) as caught:
        getattr(trainer(), stage)(Recorder(), datamodule=data(**given))
    assert str(caught.value) == message


def test_a_stage_that_is_none_is_refused(data):
    with pytest.raises(UsageError, match=r"There is no stage 'train'; there are fit, validate, test, predict."):
        data(pairs(2)).setup("train")


def test_a_loader_before_setup_is_refused(data):
    with pytest.raises(UsageError, match=r"There are no train examples yet; call `setup` with the stage first."):
        data(pairs(2)).train_dataloader()


def test_a_source_without_rows_is_refused(data):
    with pytest.raises(UsageError, match=r"^0 rows in memory holds no rows\.$"):
        data([]).setup("fit")


def test_a_source_without_examples_is_refused_with_its_counts(data):
    with pytest.raises(UsageError) as caught:
        data([{"prompt": "p", "chosen": "same", "rejected": "same"}]).setup("fit")
    first, *table = str(caught.value).splitlines()
    assert first == "Of 1 rows in memory no row is left to use."
    assert table[0] == "train: 1 rows in memory"
    assert any(line.split() == ["dropped", "1", "equal", "responses", "(row", "1)"] for line in table)


class Ranks:
    """As much of a Trainer on several devices as a loader asks for."""

    limit_train_batches, overfit_batches, accumulate_grad_batches = 1.0, 0.0, 1

    def __init__(self, world_size: int) -> None:
        self.strategy, self.distributed_sampler_kwargs = self, {"rank": 1, "num_replicas": world_size}
        self.root_device = torch.device("cpu")
        self.fit_loop = SimpleNamespace(epoch_progress=SimpleNamespace(current=SimpleNamespace(processed=0)))

    def broadcast(self, seed: int) -> int:
        return seed


def test_batches_that_do_not_divide_among_devices_are_refused(data):
    module = data(pairs(9), pairs(9), batch_size=4, val_batch_size=6)
    module.setup("fit")
    module.trainer = Ranks(3)
    with pytest.raises(UsageError) as caught:
        module.train_dataloader()
    assert str(caught.value) == (
        "A train batch of 4 examples does not divide among 3 devices; change `data.init_args.batch_size`."
    )
    assert len(module.val_dataloader()) == 2
    module.trainer = Ranks(4)
    assert len(module.val_dataloader()) == 2  # metrics are sums, to which ranks may add unequally much


def test_a_device_gets_its_share(data):
    module = data(pairs(8), pairs(3), batch_size=4)
    module.setup("fit")
    module.trainer = Ranks(2)
    assert [len(batch.row) for batch in module.train_dataloader()] == [2, 2]
    assert [batch.row.tolist() for batch in module.val_dataloader()] == [[2]]


def test_a_device_without_examples_runs_batches_of_none(data):
    module = data(pairs(1), batch_size=64)
    module.setup("fit")
    module.trainer = Ranks(2)
    (batch,) = module.train_dataloader()
    assert (len(batch.row), batch.window) == (0, Window(1, int(module.examples["train"].num_scored()[0]), 1))


# In a Trainer.


def test_every_stage_runs_in_a_plain_trainer(data):
    recorder, module = Recorder(), data(pairs(11), pairs(5), pairs(7), batch_size=4, val_batch_size=3)
    trainer(max_epochs=2, num_sanity_val_steps=1).fit(recorder, datamodule=module)
    for epoch in (recorder.seen["train"][:3], recorder.seen["train"][3:]):
        assert [len(batch) for batch in epoch] == [4, 4, 3]
        assert sorted(row for batch in epoch for row in batch) == list(range(1, 12))
    assert recorder.seen["train"][:3] != recorder.seen["train"][3:]
    assert recorder.seen["val"] == [[1, 2, 3], *2 * [[1, 2, 3], [4, 5]]]
    trainer().validate(recorder, datamodule=module)
    assert recorder.seen["val"][5:] == [[1, 2, 3], [4, 5]]
    trainer().test(recorder, datamodule=module)
    assert recorder.seen["test"] == [[1, 2, 3], [4, 5, 6], [7]]
    assert trainer().predict(recorder, datamodule=module) == [[1, 2, 3], [4, 5, 6], [7]]


def test_a_fit_needs_no_validation_data(data):
    recorder = Recorder()
    trainer().fit(recorder, datamodule=data(pairs(4), format=Pairs()))
    assert (len(recorder.seen["train"]), recorder.seen["val"]) == (1, [])


def test_validation_batches_are_twice_as_large_unless_named(data):
    module = data(pairs(20), pairs(20), pairs(20), batch_size=4)
    module.setup("fit")
    module.setup("test")
    loaders = (
        module.train_dataloader(),
        module.val_dataloader(),
        module.test_dataloader(),
        module.predict_dataloader(),
    )
    assert [len(next(iter(loader)).row) for loader in loaders] == [4, 8, 8, 8]


def test_the_seed_of_the_run_fixes_the_order(data):
    orders = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        recorder = Recorder()
        trainer().fit(recorder, datamodule=data(pairs(11), batch_size=4))
        orders.append(recorder.seen["train"])
    assert orders[0] == orders[1] != orders[2]


def test_overfitting_takes_the_same_batches_in_every_epoch(data):
    recorder = Recorder()
    trainer(max_epochs=3, overfit_batches=2).fit(recorder, datamodule=data(pairs(11), batch_size=4))
    assert recorder.seen["train"] == 3 * [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_loaders_made_anew_go_on_with_the_epochs(data):
    recorders = [Recorder(), Recorder()]
    for recorder, kwargs in zip(recorders, ({}, {"reload_dataloaders_every_n_epochs": 1}), strict=True):
        torch.manual_seed(0)
        trainer(max_epochs=3, **kwargs).fit(recorder, datamodule=data(pairs(11), batch_size=4))
    assert recorders[0].seen == recorders[1].seen


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    ("kwargs", "num_batches", "num_steps"),
    [
        ({}, 9, 9),
        ({"val_check_interval": 1}, 9, 9),
        ({"accumulate_grad_batches": 2}, 9, 6),
        ({"limit_train_batches": 2}, 6, 6),
        ({"limit_train_batches": 0.7}, 6, 6),
    ],
    ids=str,
)
def test_a_resumed_run_sees_the_very_next_batch(data, tmp_path, kwargs, num_batches, num_steps):
    def run(seed, ckpt_path=None, **more):
        torch.manual_seed(seed)
        recorder = Recorder()
        module = data(pairs(11), pairs(3), batch_size=4)
        trainer(max_epochs=3, **kwargs, **more).fit(recorder, datamodule=module, ckpt_path=ckpt_path)
        return recorder.seen["train"]

    every_step = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    uninterrupted = run(0, callbacks=[every_step], enable_checkpointing=True)
    paths = list(tmp_path.glob("*.ckpt"))
    assert (len(uninterrupted), len(paths)) == (num_batches, num_steps)
    for path in paths:
        done = torch.load(path, weights_only=True)["num_seen"]
        assert uninterrupted[:done] + run(7, ckpt_path=path) == uninterrupted


def test_texts_are_examples_of_one_response(data):
    module = data([{"text": "Once."}, {"text": "Twice."}], format=Texts())
    module.setup("fit")
    (batch,) = module.train_dataloader()
    assert batch.length.tolist() in ([[6], [7]], [[7], [6]])
