import json

import pytest

from dpo_lightning.errors import UsageError
from dpo_lightning.generation import Continuation, Samples, read_samples
from dpo_lightning.generation.samples import samples_of

MESSAGES = [{"role": "user", "content": "a"}]
ROW = {
    **{"row": 3, "prompt": MESSAGES, "temperature": 0},
    **{"responses": ["b", ""], "tokens": [2, 1], "finished": [False, True]},
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_what_is_written_is_read(tmp_path):
    continuations = [Continuation([1], [5, 6], "b"), Continuation([1], [2], "", True)]
    row = samples_of(3, MESSAGES, 0.0, continuations)
    assert row == ROW
    assert read_samples(write(tmp_path / "samples.jsonl", row)) == [Samples(**ROW)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"row": "3"}, "row 2: 'row' must be a whole number, got '3'"),
        ({"prompt": None}, "row 2: 'prompt' must be text or messages"),
        ({"temperature": True}, "row 2: 'temperature' must be a number, got True"),
        ({"responses": []}, "row 2: 'responses' must be one text or more"),
        ({"responses": ["a", None]}, "row 2: 'responses' must be one text or more"),
        ({"tokens": [1]}, r"row 2: 'tokens' must be a whole number for each response, got \[1\]"),
        ({"tokens": [1, 1.5]}, "row 2: 'tokens' must be a whole number for each response"),
        ({"finished": [0, 1]}, "row 2: 'finished' must be true or false for each response"),
    ],
)
def test_a_row_that_is_none_is_named(tmp_path, change, words):
    with pytest.raises(UsageError, match=words):
        read_samples(write(tmp_path / "samples.jsonl", ROW, {**ROW, **change}))


def test_a_file_of_something_else_is_refused(tmp_path):
    with pytest.raises(
        UsageError, match=r"row 1 has no 'row': a row of samples has row, prompt, temperature, responses"
    ):
        read_samples(write(tmp_path / "samples.jsonl", {"prompt": "a"}))
    with pytest.raises(UsageError, match="holds no samples"):
        read_samples(write(tmp_path / "samples.jsonl"))
