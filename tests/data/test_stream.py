"""A stream is read in an order that the seed fixes, a bounded part of it at a time, and goes on where it stopped."""

from __future__ import annotations

import json
import random
import warnings
from collections import Counter
from itertools import islice

import datasets
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import dpo_lightning.data.datamodule
import dpo_lightning.data.stock
from dpo_lightning.data import reading, stream
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.formats import Pairs
from dpo_lightning.data.mixture import Mixture, Part
from dpo_lightning.data.rankings import Columns, Rankings
from dpo_lightning.data.report import DataReport
from dpo_lightning.data.sources import Rows, Source
from dpo_lightning.data.stream import ShuffledStream, StreamLoader, first_examples
from dpo_lightning.data.tokenize import Tokenization
from dpo_lightning.errors import UsageError

# A module that validates may be fitted without validation data.
pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def pairs(num: int, prompt: str = "p") -> list[dict[str, str]]:
    return [{"prompt": f"{prompt}{number}", "chosen": " good", "rejected": " bad"} for number in range(num)]


def flawed(num: int) -> list[dict[str, str]]:
    """Every third row cannot be used."""
    return [{**row, "rejected": " good"} if number % 3 == 1 else row for number, row in enumerate(pairs(num))]


class Endless(Source):
    """Rows that never end, and how many of them were read."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self):
        while True:
            self.read += 1
            yield {"prompt": f"p{self.read}", "chosen": " good", "rejected": " bad"}

    def __str__(self):
        return "endless"


@pytest.fixture
def made(makes):
    """A stream by its rows or sources, and what is other than usual."""

    def make(*sources, weights=(), batch_size=4, buffer=5, seed=0, shape=None, **kwargs):
        tokenization = Tokenization(tokenizer=makes["llama"].tokenizer, max_length=64)
        found = [source if isinstance(source, Source) else Rows(source) for source in sources]
        parts = [
            Part(source=source, weight=weight, format=shape)
            for source, weight in zip(found, weights or [None] * len(found), strict=True)
        ]
        return ShuffledStream(parts, tokenization, batch_size, buffer, seed, **kwargs)

    return make


def rows_of(batches, num: int) -> list[list[int]]:
    """Row numbers of the first batches."""
    return [(batch.batch if hasattr(batch, "batch") else batch).row.tolist() for batch in islice(batches, num)]


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


# Order.


def test_the_order_depends_on_the_seed_alone(made):
    state = random.getstate(), torch.get_rng_state()
    first = rows_of(made(pairs(20)), 12)
    random.seed(7)
    torch.manual_seed(7)
    assert rows_of(made(pairs(20)), 12) == first
    assert rows_of(made(pairs(20), seed=1), 12) != first
    random.setstate(state[0])
    before = random.random()
    random.setstate(state[0])
    rows_of(made(pairs(20)), 3)
    assert random.random() == before


@pytest.mark.parametrize("buffer", [1, 2, 5, 20, 100])
def test_every_pass_holds_every_row_once_in_an_order_of_its_own(made, buffer):
    read = flat(rows_of(made(pairs(20), buffer=buffer), 20))
    passes = [read[start : start + 20] for start in range(0, 80, 20)]
    assert [sorted(one) for one in passes] == [list(range(1, 21))] * 4
    if buffer == 1:
        assert passes == [list(range(1, 21))] * 4
    else:
        assert len(set(map(tuple, passes))) == 4
        assert list(range(1, 21)) not in passes


def test_a_row_is_late_but_never_earlier_than_the_buffer_allows(made):
    order = flat(rows_of(made(pairs(200), buffer=10, batch_size=10), 20))
    assert all(row <= place + 10 for place, row in enumerate(order, start=1))
    assert max(place - row for place, row in enumerate(order)) > 10


def test_a_large_buffer_shuffles_well(made):
    firsts = Counter(flat(rows_of(made(pairs(4), buffer=4, seed=seed, batch_size=1), 1))[0] for seed in range(200))
    assert min(firsts[row] for row in (1, 2, 3, 4)) > 25


@pytest.mark.parametrize("buffer", [1, 3, 16])
def test_the_buffer_is_bounded(made, monkeypatch, buffer):
    monkeypatch.setattr(reading, "NUM_ROWS", 1)  # read at once, to find the shape
    source = Endless()
    items = made(source, buffer=buffer)._mixed()
    for taken in range(1, 50):
        next(items)
        assert source.read == taken + buffer


def test_a_batch_is_the_same_for_every_number_of_ranks(made):
    def streams(world_size):
        return [iter(made(flawed(20), rank=rank, world_size=world_size)) for rank in range(world_size)]

    whole, halves, quarters = (streams(world_size) for world_size in (1, 2, 4))
    for _ in range(12):
        (one,) = (next(rank) for rank in whole)
        for ranks in (halves, quarters):
            shares = [next(rank) for rank in ranks]
            assert {share.taken for share in shares} == {one.taken}
            assert all(share.records == one.records and share.rows == one.rows for share in shares)
            size = 4 // len(shares)
            assert [len(share.batch.row) for share in shares] == [size] * len(shares)
            assert sorted(row for share in shares for row in share.batch.row.tolist()) == sorted(one.batch.row.tolist())


def test_heavy_batches_come_in_pieces(made, messages):
    table = [{"prompt": "p" * (1 + 5 * (n % 3)), "chosen": "good", "rejected": "bad"} for n in range(20)]
    whole, split = (made(table, most_tokens=most) for most in (None, 20))
    for one, other in islice(zip(whole, split, strict=True), 8):
        assert len(other.batch.pieces) > 1
        assert one.taken == other.taken
        together = [row for piece in other.batch.pieces for row in piece.row.tolist()]
        assert sorted(together) == sorted(one.batch.row.tolist())
        assert all(len(piece.input_ids) <= 20 or len(piece.row) == 1 for piece in other.batch.pieces)
    assert messages == []
    list(StreamLoader(split, 8, [report()]))
    (message,) = messages  # once, for what is too long by itself
    assert message.startswith("train: an example has 2")
    assert "more than the 20 that are to be run at once" in message


def test_batches_are_full_whatever_is_dropped(made):
    batches = list(islice(made(flawed(20), batch_size=7), 10))
    assert [len(batch.batch.row) for batch in batches] == [7] * 10
    assert not any(row % 3 == 2 for batch in batches for row in batch.batch.row.tolist())
    kept = [[item["row"] for item in batch.records[0].to_pylist() if not item["reason"]] for batch in batches]
    assert kept == [batch.batch.row.tolist() for batch in batches]
    assert batches[-1].taken == sum(len(batch.records[0]) for batch in batches) == sum(sum(b.rows) for b in batches)


@pytest.mark.parametrize("position", [1, 2, 7])
def test_what_was_taken_is_left_out(made, position):
    batches = list(islice(made(flawed(20)), 10))
    again = islice(made(flawed(20), taken=batches[position - 1].taken), 10 - position)
    assert rows_of(again, 10) == rows_of(batches[position:], 10)


def test_rows_of_several_examples_count_once(made):
    table = [
        {"prompt": [f"p{n}", f"q{n}", f"r{n}"], "responses": [["x", "y"], ["x", "x"], ["z", "y"]]} for n in range(9)
    ]
    source = made(table, shape=Columns(rows=Rankings()), batch_size=4)
    batches = list(islice(source, 9))  # two good examples a row: two passes are 36
    assert Counter(flat(rows_of(batches, 9))) == dict.fromkeys(range(1, 10), 4)
    assert sum(batch.rows[0] for batch in batches) == 18
    assert sum(len(batch.records[0]) for batch in batches) == batches[-1].taken == 54


def test_mixed_streams_keep_their_weights_and_their_passes(made):
    source = made(pairs(7, "a"), pairs(31, "b"), weights=(3, 1), batch_size=10, buffer=4)
    batches = list(islice(source, 100))
    drawn = [[item["row"] for batch in batches for item in batch.records[part].to_pylist()] for part in (0, 1)]
    assert len(drawn[0]) + len(drawn[1]) == 1000
    assert 700 < len(drawn[0]) < 800
    for rows, size in zip(drawn, (7, 31), strict=True):
        for start in range(0, len(rows) - size, size):
            assert sorted(rows[start : start + size]) == list(range(1, size + 1))
    assert [batch.rows for batch in batches] == [[len(part) for part in batch.records] for batch in batches]


def test_parts_that_are_alike_have_orders_of_their_own(made):
    batches = list(islice(made(pairs(20), pairs(20), weights=(1, 1), batch_size=10, buffer=20), 6))
    one, other = ([item["row"] for batch in batches for item in batch.records[part].to_pylist()] for part in (0, 1))
    assert one[:15] != other[:15]


def test_which_part_is_next_depends_on_the_seed(made):
    def drawn(seed):
        batches = islice(made(pairs(9), pairs(9), weights=(1, 1), batch_size=1, seed=seed), 50)
        return [len(batch.records[0]) for batch in batches]

    assert drawn(0) == drawn(0) != drawn(1)


def test_a_dataset_that_is_a_stream_is_read_anew(made):
    rows = Rows(datasets.IterableDataset.from_generator(lambda: iter(pairs(9))))
    read = flat(rows_of(made(rows, batch_size=3), 9))
    assert [sorted(read[start : start + 9]) for start in (0, 9, 18)] == [list(range(1, 10))] * 3


# Refusals.


def test_a_buffer_holds_something(made):
    with pytest.raises(UsageError) as caught:
        made(pairs(3), buffer=0)
    assert str(caught.value) == "`stream_buffer` must be 1 or more, got 0."


def test_mixed_streams_need_weights(made):
    with pytest.raises(UsageError) as caught:
        made(pairs(3), pairs(3))
    assert str(caught.value) == (
        "A mixture of streams needs a `weight` for every part: how long they are nobody knows."
    )
    made(pairs(3))


@pytest.mark.parametrize("batch_size", [4, 300])
def test_a_stream_without_a_usable_row_ends(made, monkeypatch, batch_size):
    monkeypatch.setattr(stream, "MAX_FRUITLESS", 100)
    same = [{"prompt": "p", "chosen": "same", "rejected": "same"}]
    with pytest.raises(UsageError) as caught:
        next(iter(made(same, shape=Pairs(), batch_size=batch_size)))
    seen = {4: "104", 300: "300"}[batch_size]
    assert str(caught.value) == f"Of the last {seen} rows of the stream none could be used: equal responses"


def test_one_usable_row_in_many_is_enough(made, monkeypatch):
    monkeypatch.setattr(stream, "MAX_FRUITLESS", 100)
    rows = [*pairs(1), *([{"prompt": "p", "chosen": "same", "rejected": "same"}] * 90)]
    assert rows_of(made(rows, shape=Pairs(), buffer=1), 3) == [[1] * 4] * 3


def test_a_source_without_rows_is_refused(made):
    with pytest.raises(UsageError, match=r"^0 rows in memory holds no rows\.$"):
        next(iter(made([])))


def test_first_examples_are_those_of_the_parts_in_turn(made):
    source = made(flawed(9), Endless(), pairs(1), weights=(1, 1, 1))

    def first(num):
        return [(e.row, len(e.response_ids)) for e in first_examples(source.parts, source.tokenization, num)]

    assert first(0) == []
    assert first(6) == [(1, 2), (3, 2), (1, 2), (2, 2), (1, 2)]  # the last has one alone
    assert first(2) == [(1, 2), (1, 2)]


def test_first_examples_of_nothing_usable_are_none(made, monkeypatch):
    monkeypatch.setattr(stream, "MAX_FRUITLESS", 100)
    source = Endless()
    nothing = made(source, shape=Pairs(chosen="prompt", rejected="prompt"))
    assert first_examples(nothing.parts, nothing.tokenization, 3) == []
    assert source.read <= 100


# The loader.


def report(batch_size: int = 4) -> DataReport:
    return DataReport("train", "stream", "Pairs", [], batch_size)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_hands_out_the_stream_epoch_by_epoch(made, num_workers):
    expected = rows_of(made(flawed(20)), 6)
    loader = StreamLoader(made(flawed(20)), 2, [report()], num_workers=num_workers)
    assert len(loader) == 2
    assert [rows_of(loader, 9) for _ in range(3)] == [expected[:2], expected[2:4], expected[4:]]


def test_an_epoch_left_early_is_followed_by_a_whole_one(made):
    expected = rows_of(made(flawed(20)), 8)
    loader = StreamLoader(made(flawed(20)), 3, [report()])
    assert rows_of(loader, 2) == expected[:2]
    assert rows_of(loader, 9) == expected[2:5]
    assert rows_of(loader, 9) == expected[5:]


def test_a_loader_in_use_can_be_put_back(made):
    expected = rows_of(made(flawed(20)), 6)
    loader = StreamLoader(made(flawed(20)), 6, [report()])
    begun = iter(loader)
    rows_of(begun, 1)
    state = loader.state_dict()
    rows_of(begun, 3)
    loader.load_state_dict(state)
    assert rows_of(loader, 9) == expected[1:]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_goes_on_with_the_very_next_batch(made, num_workers):
    expected = rows_of(made(flawed(20)), 6)
    for position in range(7):
        loader = StreamLoader(made(flawed(20)), 6, [report()], num_workers=num_workers)
        begun = iter(loader)
        rows_of(begun, position)
        state = json.loads(json.dumps(loader.state_dict()))
        assert state["position"] == position
        after = StreamLoader(made(flawed(20), seed=9), 6, [report()], num_workers=num_workers)
        after.load_state_dict(state)
        left = rows_of(after, 6)
        assert left == (expected[position:] if position < 6 else rows_of(made(flawed(20)), 12)[6:])


def test_the_state_counts_what_was_handed_out(made):
    loader = StreamLoader(made(flawed(20), seed=3), 6, [report()])
    fixed = {"seed": 3, "batch_size": 4, "buffer": 5}
    assert loader.state_dict() == {"position": 0, "taken": 0, **fixed}
    begun, stands = iter(loader), [batch.taken for batch in islice(made(flawed(20), seed=3), 3)]
    for position, taken in enumerate(stands, start=1):
        next(begun)
        assert loader.state_dict() == {"position": position, "taken": taken, **fixed}


@pytest.mark.parametrize(
    ("name", "key", "value"), [("batch_size", "batch_size", 2), ("buffer", "stream_buffer", 7), ("buffer", "", None)]
)
def test_another_order_cannot_be_continued(made, name, key, value):
    loader = StreamLoader(made(pairs(9)), 6, [report()])
    state = {**loader.state_dict(), name: value}
    if value is None:  # a checkpoint of data that were no stream
        state.pop(name)
    with pytest.raises(UsageError) as caught:
        loader.load_state_dict(state)
    key, now = key or "stream_buffer", getattr(loader.stream, name)
    assert str(caught.value) == (
        f"The checkpoint stands in data with `data.init_args.{key}` {value}, now it is {now}: the order would be "
        "another. Use the same, or start anew from its weights."
    )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_report_is_that_of_what_was_handed_out(made, num_workers):
    source = made(flawed(9), pairs(7, "b"), weights=(1, 1))
    reports = [report(), report()]
    loader = StreamLoader(source, 5, reports, num_workers=num_workers)
    batches = list(loader)
    assert sum(one.kept for one in reports) == 20
    assert sum(one.stream_tokens for one in reports) == sum(len(batch.input_ids) for batch in batches)
    assert [one.rows for one in reports] == [one.kept + one.num_dropped for one in reports]
    assert sum(one.rows for one in reports) == loader.state_dict()["taken"]
    assert set(reports[0].dropped["equal responses"].rows) <= {2, 5, 8}
    assert reports[1].num_dropped == 0
    responses = sum((batch.length > 0).sum().item() for batch in batches)
    assert sum(k * n for one in reports for k, n in one.responses.items()) == responses


def test_the_report_of_rows_of_several_examples(made):
    table = [{"prompt": ["p", "q", "r"], "responses": [["x", "y"], ["x", "x"], ["z", "y"]]}]
    counted = report()
    list(StreamLoader(made(table, shape=Columns(rows=Rankings())), 5, [counted]))
    assert (counted.rows, counted.kept) == (10, 20)  # ten passes; the last may end before what is dropped of it
    assert counted.num_dropped in (9, 10)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_strictly_the_first_flaw_is_an_error(made, num_workers):
    loader = StreamLoader(made(flawed(9), buffer=1, shape=Pairs()), 5, [report()], strict=True, num_workers=num_workers)
    with pytest.raises(UsageError, match=r"^stream, row 2: equal responses\n"):
        list(loader)
    loader = StreamLoader(made(pairs(9)), 5, [report()], strict=True, num_workers=num_workers)
    assert len(list(loader)) == 5


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_mistake_is_told_in_its_own_words(made, monkeypatch, num_workers):
    monkeypatch.setattr(stream, "MAX_FRUITLESS", 10)
    rows = [*pairs(3), *([{"prompt": "p", "chosen": "same", "rejected": "same"}] * 50)]
    loader = StreamLoader(made(rows, buffer=1, batch_size=1), 60, [report()], num_workers=num_workers)
    with pytest.raises(UsageError) as caught:
        list(loader)
    assert str(caught.value) == "Of the last 11 rows of the stream none could be used: equal responses"
    assert loader.state_dict()["taken"] == 3


def test_one_process_reads_a_stream(made):
    with pytest.raises(UsageError) as caught:
        StreamLoader(made(pairs(9)), 6, [report()], num_workers=2)
    assert str(caught.value) == "A stream is read by one process: `num_workers` must be 0 or 1, got 2."


# In a Trainer.


class Recorder(LightningModule):
    """Learns nothing and remembers the rows that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.seen, self.tokens = torch.nn.Parameter(torch.zeros(())), [], 0

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.row.tolist())
        self.tokens += len(batch.input_ids)
        return self.weight

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["num_seen"] = len(self.seen)


@pytest.fixture
def data(makes):
    """A data module with a stream by its rows or sources."""
    usual = {"tokenizer": makes["llama"].tokenizer, "batch_size": 4, "stream_buffer": 5}
    return lambda *args, **kwargs: PreferenceDataModule(*args, **(usual | kwargs))


@pytest.fixture
def messages(monkeypatch) -> list[str]:
    """What the data module prints."""
    printed: list[str] = []
    for module in (dpo_lightning.data.datamodule, dpo_lightning.data.stock, stream):
        monkeypatch.setattr(module, "rank_zero_info", printed.append)
    return printed


def trainer(**kwargs) -> Trainer:
    usual = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_steps": 5}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Trainer(accelerator="cpu", **({"enable_checkpointing": False} | usual | kwargs))


def fitted(module: PreferenceDataModule, seed: int = 0, ckpt_path=None, **kwargs) -> Recorder:
    torch.manual_seed(seed)
    recorder = Recorder()
    trainer(**kwargs).fit(recorder, datamodule=module, ckpt_path=ckpt_path)
    return recorder


def test_a_fit_takes_as_many_batches_as_steps_need(data):
    recorder = fitted(data(flawed(20)))
    assert [len(batch) for batch in recorder.seen] == [4] * 5
    recorder = fitted(data(flawed(20)), accumulate_grad_batches=3)
    assert [len(batch) for batch in recorder.seen] == [4] * 15
    assert recorder.trainer.global_step == 5


def test_the_seed_of_the_run_fixes_the_order(data):
    assert fitted(data(flawed(20))).seen == fitted(data(flawed(20))).seen != fitted(data(flawed(20)), seed=1).seen


@pytest.mark.parametrize(
    ("kwargs", "num_workers", "num_batches"),
    [
        ({}, 0, 5),
        ({}, 1, 5),
        ({"accumulate_grad_batches": 2}, 0, 10),
        ({"accumulate_grad_batches": 2}, 1, 10),
        ({"limit_train_batches": 2}, 0, 5),  # epochs of 2, 2 and 1
        ({"limit_train_batches": 2}, 1, 5),
    ],
    ids=str,
)
def test_a_resumed_run_sees_the_very_next_batch(data, tmp_path, kwargs, num_workers, num_batches):
    def run(seed, **more):
        module = data(flawed(20), num_workers=num_workers)
        return fitted(module, seed, **kwargs, **more).seen

    every_step = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    uninterrupted = run(0, callbacks=[every_step], enable_checkpointing=True)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert (len(uninterrupted), len(paths)) == (num_batches, 5)
    for path in paths if num_workers == 0 else paths[1:4:2]:
        done = torch.load(path, weights_only=True)["num_seen"]
        assert uninterrupted[:done] + run(7, ckpt_path=path) == uninterrupted


def test_a_run_that_is_continued_further_goes_on_with_the_stream(data, tmp_path):
    expected = fitted(data(flawed(20)), max_steps=8).seen
    last = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=1)
    fitted(data(flawed(20)), callbacks=[last], enable_checkpointing=True)
    again = fitted(data(flawed(20)), 7, ckpt_path=tmp_path / "last.ckpt", max_steps=8)
    assert again.seen == expected[5:]


def test_at_the_end_the_report_says_what_was_handed_out(data, messages, tmp_path):
    module = data(flawed(20), pairs(2, "v"))
    recorder = fitted(module, logger=True, default_root_dir=tmp_path)
    train, val = module.reports
    assert [message.splitlines()[0] for message in messages] == [
        "train: 20 rows in memory, a stream, read as Pairs (prompt, chosen, rejected)",
        "val: 2 rows in memory",
        "train: 20 rows in memory",
    ]
    assert messages[2] == str(train)
    taken = recorder.trainer.train_dataloader.state_dict()["taken"]
    assert (train.rows, train.kept, train.num_dropped) == (taken, 20, taken - 20)
    assert train.stream_tokens == recorder.tokens
    assert "of a stream, which is tokenised as it is read" in messages[2]
    assert "equal to an earlier one" not in messages[2]
    (saved,) = tmp_path.rglob("data_report.json")
    assert json.loads(saved.read_text()) == json.loads(json.dumps([train.to_json(), val.to_json()]))


def test_a_stream_in_memory_is_trained_on_and_leaves_nothing_on_disk(data, token_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.IterableDataset.from_generator(lambda: iter(flawed(20)))
    for num_workers in (0, 1):
        recorder = fitted(data(rows, num_workers=num_workers))
        assert recorder.seen == fitted(data(flawed(20))).seen
    assert not list(tmp_path.rglob("*.arrow"))


def test_reports_of_a_stream_stand_before_others(data):
    module = data(flawed(20), pairs(2, "v"))
    trainer().validate(Recorder(), datamodule=module)
    fitted(module)
    assert [(report.split, report.kept) for report in module.reports] == [("train", 20), ("val", 2)]


def test_the_shape_of_a_stream_is_found_once(data, monkeypatch):
    found, choose = [], reading.choose
    monkeypatch.setattr(reading, "choose", lambda rows, source: found.append(source) or choose(rows, source))
    module = data(pairs(3))
    fitted(module)
    assert found == ["3 rows in memory"]
    assert module.reports[0].rows > 6


def test_weights_hold_for_streams(data):
    parts = [Part(source=Rows(pairs(9)), weight=1.0), Part(source=Endless(), weight=3.0)]
    module = data(Mixture(parts=parts), batch_size=40)
    fitted(module)
    assert [report.source for report in module.reports] == ["9 rows in memory", "endless"]
    assert sum(report.kept for report in module.reports) == 200
    assert 120 < module.reports[1].kept < 180


def loader_of(module: PreferenceDataModule, **kwargs) -> StreamLoader:
    """The loader without a fit: a mistake found where the Trainer asks for it leaves its patches on DataLoader."""
    module.trainer = trainer(**kwargs)
    module.setup("fit")
    return module.train_dataloader()


@pytest.mark.parametrize(
    ("arguments", "how", "message"),
    [
        ({}, {"max_steps": -1, "max_epochs": 1}, "How long a stream is nobody knows: set `trainer.max_steps`."),
        ({"num_workers": 2}, {}, "A stream is read by one process: `num_workers` must be 0 or 1, got 2."),
        ({}, {"overfit_batches": 2}, "A stream has no batches to overfit; leave out `data.init_args.stream_buffer`."),
    ],
)
def test_what_no_stream_can_do_is_refused(data, arguments, how, message):
    with pytest.raises(UsageError) as caught:
        loader_of(data(flawed(20), **arguments), **how)
    assert str(caught.value) == message


def test_without_a_trainer_the_end_is_not_known(data):
    module = data(flawed(20))
    module.setup("fit")
    with pytest.raises(UsageError, match=r"^How long a stream is nobody knows: set `trainer\.max_steps`\.$"):
        module.train_dataloader()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strict": True}, r"^20 rows in memory, row \d+: equal responses\n\d of \d examples cannot be used"),
        ({"format": Pairs(prompt="question")}, r"there is no column 'question'; the rows have 'prompt', 'chosen'"),
    ],
)
def test_rows_that_are_not_as_they_should_be_end_a_run(data, arguments, message):
    with pytest.raises(UsageError, match=message):
        fitted(data(flawed(20), **arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stream_buffer": 0}, "`stream_buffer` must be 1 or more, got 0."),
        (
            {"val_fraction": 0.1},
            "Nothing can be held out of a stream; give `val` rows of their own, not `val_fraction`.",
        ),
    ],
)
def test_arguments_are_checked_at_once(data, arguments, message):
    with pytest.raises(UsageError) as caught:
        data(pairs(4), **arguments)
    assert str(caught.value) == message


def test_mixed_streams_without_weights_are_refused(data):
    parts = [Part(source=Rows(pairs(4))), Part(source=Rows(pairs(4)))]
    with pytest.raises(UsageError, match="A mixture of streams needs a `weight` for every part"):
        loader_of(data(Mixture(parts=parts)))


def test_what_is_not_trained_on_is_no_stream(data):
    module = data(None, pairs(5), pairs(3))
    trainer().validate(Recorder(), datamodule=module)
    module.setup("test")
    assert [len(batch.row) for batch in module.test_dataloader()] == [3]
    assert [(report.split, report.kept, report.duplicates) for report in module.reports] == [
        ("val", 5, 0),
        ("test", 3, 0),
    ]


def test_one_batch_to_try_is_enough(data):
    assert len(fitted(data(flawed(20)), fast_dev_run=True).seen) == 1


def test_a_stream_of_another_run_cannot_be_continued(data, tmp_path):
    last = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=1)
    fitted(data(flawed(20)), callbacks=[last], enable_checkpointing=True)
    with pytest.raises(
        UsageError, match=r"stands in data with `data.init_args.stream_buffer` 5, now it is 6: the order"
    ):
        fitted(data(flawed(20), stream_buffer=6), ckpt_path=tmp_path / "last.ckpt")
    with pytest.raises(UsageError, match=r"in the middle of an epoch with training examples None, now"):
        fitted(data(flawed(20), stream_buffer=None), ckpt_path=tmp_path / "last.ckpt")
