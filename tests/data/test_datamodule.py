"""The data module in a Trainer: what is read, counted, held out, refused, and resumed."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import dpo_lightning.data.datamodule
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.files import Files
from dpo_lightning.data.formats import Pairs
from dpo_lightning.data.rankings import Rankings
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
    monkeypatch.setattr(dpo_lightning.data.datamodule, "rank_zero_info", printed.append)
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


# Refusals.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val": [], "val_fraction": 0.1}, "Both `val` and `val_fraction` are given; keep one of the two."),
        ({"val_fraction": 1.0}, r"`val_fraction` must be in \[0, 1\), got 1.0; 0.1 holds out a tenth."),
        ({"val_fraction": -0.1}, r"`val_fraction` must be in \[0, 1\), got -0.1"),
        ({"batch_size": 0}, "`batch_size` must be 1 or more, got 0."),
        ({"val_batch_size": 0}, "`val_batch_size` must be 1 or more, got 0."),
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
    with pytest.raises(UsageError, match="^0 rows in memory holds no rows.$"):
        data([]).setup("fit")


def test_a_source_without_examples_is_refused_with_its_counts(data):
    with pytest.raises(UsageError) as caught:
        data([{"prompt": "p", "chosen": "same", "rejected": "same"}]).setup("fit")
    first, *table = str(caught.value).splitlines()
    assert first == "Of 1 rows in memory no row is left to use."
    assert table[0] == "train: 1 rows in memory"
    assert any(line.split() == "dropped 1 equal responses (row 1)".split() for line in table)


class Ranks:
    """As much of a Trainer on several devices as a loader asks for."""

    global_rank, limit_train_batches, overfit_batches = 1, 1.0, 0.0

    def __init__(self, world_size: int) -> None:
        self.world_size, self.strategy = world_size, self
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
    with pytest.raises(UsageError, match=r"A val batch of 6 .* 4 devices; change `data.init_args.val_batch_size`."):
        module.val_dataloader()


def test_a_device_gets_its_share(data):
    module = data(pairs(8), pairs(3), batch_size=4)
    module.setup("fit")
    module.trainer = Ranks(2)
    assert [len(batch.row) for batch in module.train_dataloader()] == [2, 2]
    assert [batch.row.tolist() for batch in module.val_dataloader()] == [[2]]


def test_rows_too_few_for_a_batch_on_every_device_are_refused(data):
    module = data(pairs(3), batch_size=64)
    module.setup("fit")
    module.trainer = Ranks(2)
    with pytest.raises(UsageError, match="The 3 train examples make no batch that divides among 2 devices; give more"):
        module.train_dataloader()


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
