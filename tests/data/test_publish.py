"""A data report lies beside the logs, and TensorBoard shows it."""

from __future__ import annotations

import json
import warnings
from collections import Counter

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpo_lightning.data.publish import publish
from dpo_lightning.data.report import DataReport


def report(split: str, source: str, **lengths: dict[int, int]) -> DataReport:
    found = DataReport(split, source, "Pairs (a, b)", ["größe"], 4, rows=3, kept=2, stream_tokens=5, padded_tokens=6)
    found.lengths = {name: Counter(counts) for name, counts in lengths.items()}
    return found


REPORTS = [
    report("train", "a.jsonl", prompt={3: 2, 5: 1}, chosen={2: 3}),
    report("train", "b.jsonl", prompt={4: 1}),
    report("val", "c.jsonl", prompt={1: 7}),
]


def trainer(folder, **kwargs) -> Trainer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Trainer(default_root_dir=folder, accelerator="cpu", enable_progress_bar=False, **kwargs)


def test_reports_lie_beside_the_logs(tmp_path):
    for logger in (TensorBoardLogger(tmp_path), CSVLogger(tmp_path)):
        publish(REPORTS, trainer(tmp_path, logger=logger))
        path = next((tmp_path / "lightning_logs").glob(f"version_{logger.version}/data_report.json"))
        assert json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps([r.to_json() for r in REPORTS]))
        assert "größe" in path.read_text(encoding="utf-8")


def test_tensorboard_shows_text_and_lengths(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    publish(REPORTS, trainer(tmp_path, logger=logger))
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0, "tensors": 0}).Reload()
    texts = {
        tag: event.tensor_proto.string_val[0].decode()
        for tag in events.Tags()["tensors"]
        for event in events.Tensors(tag)
    }
    assert texts == {
        "data/train/text_summary": REPORTS[0].markdown(),
        "data/train_2/text_summary": REPORTS[1].markdown(),
        "data/val/text_summary": REPORTS[2].markdown(),
    }
    histograms = {tag: events.Histograms(tag)[0].histogram_value for tag in events.Tags()["histograms"]}
    assert {tag: (value.num, value.min, value.max, value.sum) for tag, value in histograms.items()} == {
        "data/train/prompt_tokens": (3, 3, 5, 11),
        "data/train/chosen_tokens": (3, 2, 2, 6),
        "data/train_2/prompt_tokens": (1, 4, 4, 4),
        "data/val/prompt_tokens": (7, 1, 1, 7),
    }


@pytest.mark.parametrize("how", [{"logger": False}, {"fast_dev_run": True}], ids=str)
def test_without_a_log_folder_nothing_is_written(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    publish(REPORTS, trainer(tmp_path, **how))
    assert list(tmp_path.iterdir()) == []


def test_the_first_rank_alone_writes(tmp_path, monkeypatch):
    other = trainer(tmp_path, logger=CSVLogger(tmp_path))
    monkeypatch.setattr(type(other.strategy), "is_global_zero", False)
    publish(REPORTS, other)
    assert list(tmp_path.rglob("data_report.json")) == []


def test_all_ranks_ask_for_the_folder(tmp_path, monkeypatch):
    # It is broadcast from the first rank, so a rank that does not ask keeps the others waiting.
    other, asked = trainer(tmp_path, logger=CSVLogger(tmp_path)), []
    monkeypatch.setattr(type(other.strategy), "is_global_zero", False)
    monkeypatch.setattr(type(other.strategy), "broadcast", lambda _, value: asked.append(value) or value)
    publish(REPORTS, other)
    assert asked == [other.loggers[0].log_dir]
