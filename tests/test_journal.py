import json
import os

import pytest

from dpo_lightning.errors import UsageError
from dpo_lightning.journal import Journal, write_whole

SETTINGS = {"temperature": 1.0, "model": "here"}


def test_rows_are_there_when_append_returns_and_when_it_is_opened_again(tmp_path):
    with Journal(tmp_path / "new/rows.jsonl", SETTINGS) as journal:
        assert journal.rows == []
        journal.append([{"row": 1, "text": "ein Käse\u2028"}, {"row": 2}])
        lines = (tmp_path / "new/rows.jsonl").read_text().split("\n")
        assert [json.loads(line) for line in lines[:-1]] == [{"row": 1, "text": "ein Käse\u2028"}, {"row": 2}]
    with Journal(tmp_path / "new/rows.jsonl", SETTINGS) as journal:
        journal.append([{"row": 3}])
    with Journal(tmp_path / "new/rows.jsonl", SETTINGS) as journal:
        assert journal.rows == [{"row": 1, "text": "ein Käse\u2028"}, {"row": 2}, {"row": 3}]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_row_that_a_kill_cut_short_is_taken_off_and_the_next_stands_in_its_place(tmp_path, cut):
    path = tmp_path / "rows.jsonl"
    with Journal(path, SETTINGS) as journal:
        journal.append([{"row": 1}, {"text": "Käse"}])
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(path, SETTINGS) as journal:
        assert journal.rows == [{"row": 1}]
        journal.append([{"row": 2}])
    with Journal(path, SETTINGS) as journal:
        assert journal.rows == [{"row": 1}, {"row": 2}]


def test_rows_of_other_settings_are_refused_and_named(tmp_path):
    with Journal(tmp_path / "rows.jsonl", SETTINGS) as journal:
        journal.append([{"row": 1}])
    with pytest.raises(UsageError, match=r"begun with temperature = 1.0, and now it is 0.7"):
        Journal(tmp_path / "rows.jsonl", {**SETTINGS, "temperature": 0.7})
    with Journal(tmp_path / "rows.jsonl", {**SETTINGS, "temperature": 0.7}, overwrite=True) as journal:
        assert journal.rows == []


def test_other_settings_are_welcome_where_there_are_no_rows(tmp_path):
    Journal(tmp_path / "rows.jsonl", SETTINGS).close()
    with Journal(tmp_path / "rows.jsonl", {**SETTINGS, "temperature": 0.7}) as journal:
        journal.append([{"row": 1}])
    with pytest.raises(UsageError, match=r"begun with temperature = 0.7"):
        Journal(tmp_path / "rows.jsonl", SETTINGS)


def test_a_file_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "rows.jsonl").write_text("my notes\n")
    with pytest.raises(UsageError, match="was not begun by this command"):
        Journal(tmp_path / "rows.jsonl", SETTINGS)
    assert (tmp_path / "rows.jsonl").read_text() == "my notes\n"


def test_a_damaged_line_is_named(tmp_path):
    with Journal(tmp_path / "rows.jsonl", SETTINGS) as journal:
        journal.append([{"row": 1}])
    (tmp_path / "rows.jsonl").write_text('{"row": 1}\n{"row": \n{"row": 3}\n')
    with pytest.raises(UsageError, match=r"rows.jsonl, line 2 is no JSON"):
        Journal(tmp_path / "rows.jsonl", SETTINGS)


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path):
    with Journal(tmp_path / "rows.jsonl", SETTINGS):
        with pytest.raises(UsageError, match="Another process is writing"):
            Journal(tmp_path / "rows.jsonl", SETTINGS)
        with pytest.raises(UsageError, match="Another process is writing"):
            Journal(tmp_path / "rows.jsonl", SETTINGS, overwrite=True)
    Journal(tmp_path / "rows.jsonl", SETTINGS).close()


def test_half_a_character_is_kept(tmp_path):
    found = [{"row": 1, "text": "Käse \ud83d"}, {"row": 2, "text": "Käse"}]
    with Journal(tmp_path / "rows.jsonl", {"stop": "\ud83d"}) as journal:
        journal.append(found)
    assert "Käse" in (tmp_path / "rows.jsonl").read_text(encoding="utf-8")
    with Journal(tmp_path / "rows.jsonl", {"stop": "\ud83d"}) as journal:
        assert journal.rows == found


def test_a_whole_file_is_on_the_disk_before_it_takes_the_place_of_another(tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (done.append(os.fstat(number).st_size), sync(number)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replaced"), replace(*paths)))
    write_whole(tmp_path / "it.json", "12345")
    assert done == [5, "replaced"]
    assert (tmp_path / "it.json").read_text() == "12345"
