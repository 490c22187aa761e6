"""The model is asked what it was trained on, token by token."""

import gzip
import json

import pytest
from transformers import AutoTokenizer

from dpo_lightning import PreferenceDataModule
from dpo_lightning.data.chat import Chat
from dpo_lightning.data.sources import Rows
from dpo_lightning.errors import UsageError
from dpo_lightning.generation import read_prompts
from dpo_lightning.generation.prompts import PromptEncoding, read_template

TEXTS = ["the film was", "a joy ", "Human: what did you think?\n\nAssistant:", "the film was"]
DIALOGUES = [
    [{"role": "user", "content": "what did you think of it?"}],
    [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "a joy"},
        {"role": "assistant", "content": "was it"},
        {"role": "user", "content": "it was"},
    ],
]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("prompts", "chat", "max_length"),
    [
        (TEXTS, {}, None),
        (TEXTS, {"texts": True}, None),
        (TEXTS, {}, 4),
        (DIALOGUES, {}, None),
        (DIALOGUES, {}, 7),
        (DIALOGUES, {"template": "package:data/templates/transcript.jinja"}, None),
    ],
)
def test_prompts_have_the_tokens_that_the_data_module_gives_them(tokenizer, tmp_path, prompts, chat, max_length):
    rows = [{"prompt": prompt, "chosen": f" a{number}", "rejected": f" b{number}"} for number, prompt in
            enumerate(prompts)]  # fmt: skip
    data = PreferenceDataModule(
        test=rows, tokenizer=tokenizer, chat=Chat(**chat), max_prompt_length=max_length, cache=False
    )
    data.setup("test")
    expected = [example.prompt_ids for example in data.examples["test"].__getitems__([*range(len(rows))])]
    read = read_prompts(write(tmp_path / "rows.jsonl", rows))
    found = PromptEncoding(Chat(**chat), max_length).encode(tokenizer, read)
    assert [one.ids for one in found] == expected
    assert [one.prompt for one in found] == prompts
    assert [one.row for one in found] == [*range(1, len(rows) + 1)]


def test_rows_are_counted_as_lines_and_files_may_be_of_any_kind(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write('{"question": "a"}\n\n{"question": "b"}\n{"question": "a"}\n')
    assert read_prompts(str(path), column="question") == [(1, "a"), (3, "b"), (4, "a")]
    assert read_prompts(str(path), column="question", max_prompts=2) == [(1, "a"), (3, "b")]
    (tmp_path / "rows.csv").write_text("prompt,other\na,1\nb,2\n")
    assert [prompt for _, prompt in read_prompts(str(tmp_path / "rows.csv"))] == ["a", "b"]


def test_messages_of_another_make_are_read_as_the_data_module_reads_them(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": [{"from": "human", "value": "a", "weight": None}]}])
    assert read_prompts(path) == [(1, [{"role": "user", "content": "a"}])]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a"}, r"row 2: column 'prompt' must hold a prompt, text or messages, got None; the row has 'text'"),
        ({"prompt": 3}, r"row 2: column 'prompt' must hold a prompt, text or messages, got 3"),
        ([1], r"row 2: column 'prompt' must hold a prompt.*the row has \[1\]"),
        ({"prompt": [{"role": "user", "content": 3}]}, r"row 2: .*must be text, got int: 3. Name another .* --column"),
        ({"prompt": [{"role": "assistant", "content": "a"}]}, "row 2: the prompt ends with an answer"),
        ({"prompt": "\ud83d"}, "row 2: .*lone surrogate"),
    ],
)
def test_a_row_without_a_prompt_is_named(tmp_path, row, words):
    with pytest.raises(UsageError, match=words):
        read_prompts(write(tmp_path / "rows.jsonl", [{"prompt": "a"}, row]))


def test_a_file_without_prompts_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no prompts"):
        read_prompts(write(tmp_path / "rows.jsonl", []))


def test_an_empty_prompt_is_the_begin_token_where_there_is_one(tokenizer, tmp_path):
    read = read_prompts(write(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": ""}]))
    assert PromptEncoding().encode(tokenizer, read)[1].ids == [tokenizer.bos_token_id]
    without = AutoTokenizer.from_pretrained(tokenizer.name_or_path, bos_token=None)
    without.backend_tokenizer.post_processor = None
    with pytest.raises(UsageError, match="row 2: the prompt is empty, and the tokenizer has no begin token"):
        PromptEncoding().encode(without, read)


def test_messages_need_a_chat_template(tokenizer):
    without = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    without.chat_template = None
    prompts = [(4, "a"), (5, DIALOGUES[0])]
    with pytest.raises(UsageError, match=r"row 5: the prompt is messages.*Give one by --chat.template FILE"):
        PromptEncoding().encode(without, prompts)
    with pytest.raises(UsageError, match="row 4: the prompt is messages"):
        PromptEncoding(Chat(texts=True)).encode(without, prompts)
    refusing = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    refusing.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UsageError, match="row 5: the chat template refuses the messages: no"):
        PromptEncoding().encode(refusing, prompts)


def test_a_template_takes_a_prompt_and_the_last_of_messages(tokenizer, tmp_path):
    (tmp_path / "shots.txt").write_text("Q: a {brace}\nA: b\n\nQ: {prompt}\nA:\n")
    template = read_template(str(tmp_path / "shots.txt"))
    assert template == "Q: a {brace}\nA: b\n\nQ: {prompt}\nA:"
    first, second = PromptEncoding(template=template).encode(tokenizer, [(1, "the end"), (2, DIALOGUES[1])])
    assert tokenizer.decode(first.ids) == "<s>Q: a {brace}\nA: b\n\nQ: the end\nA:"
    assert first.prompt == "the end"
    assert "user: a joy\nassistant: was it</s>user: Q: a" in tokenizer.decode(second.ids)
    assert "Q: it was\nA:" in tokenizer.decode(second.ids)
    assert second.prompt == DIALOGUES[1]


def test_a_template_is_a_text_or_a_file_with_a_place(tmp_path):
    assert read_template("") is None
    assert read_template("{prompt}\\n\\nTL;DR:") == "{prompt}\n\nTL;DR:"
    with pytest.raises(UsageError, match=r"--template 'nowhere.txt' has no \{prompt\} and is no file"):
        read_template("nowhere.txt")
    (tmp_path / "none.txt").write_text("Q: {question}")
    with pytest.raises(UsageError, match=r"none.txt has no \{prompt\}, the place"):
        read_template(str(tmp_path / "none.txt"))


def test_answers_end_as_those_of_training_do(tokenizer):
    assert PromptEncoding().ends(tokenizer, [(1, "a")]) == [tokenizer.eos_token_id]
    assert PromptEncoding().ends(tokenizer, [(1, DIALOGUES[0])]) == [tokenizer.eos_token_id]
    chat = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    chat.add_special_tokens({"additional_special_tokens": ["<think>", "<|im_start|>", "<|im_end|>"]})
    chat.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ '<think>' if m.role == 'assistant' }}{{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
    )
    turn = chat.convert_tokens_to_ids("<|im_end|>")
    assert PromptEncoding().ends(chat, [(1, "a"), (2, DIALOGUES[0])]) == [tokenizer.eos_token_id, turn]
    assert PromptEncoding(Chat(texts=True)).ends(chat, [(1, "a")]) == [tokenizer.eos_token_id, turn]
    assert PromptEncoding().ends(chat, [(1, "a")]) == [tokenizer.eos_token_id]


def test_without_a_column_of_prompts_they_are_what_the_data_module_takes_for_them(tmp_path):
    whole = [
        {"chosen": f"\n\nHuman: {x}?\n\nAssistant: yes", "rejected": f"\n\nHuman: {x}?\n\nAssistant: no"} for x in "ab"
    ]
    prompts = [(1, "\n\nHuman: a?\n\nAssistant:"), (2, "\n\nHuman: b?\n\nAssistant:")]
    assert read_prompts(write(tmp_path / "hh.jsonl", whole)) == prompts
    assert read_prompts(Rows(rows=whole), max_prompts=1) == prompts[:1]
    asked = [{"instruction": "sum", "input": "1 2", "output": "3"}]
    ((_, messages),) = read_prompts(write(tmp_path / "alpaca.jsonl", asked))
    assert [message["role"] for message in messages] == ["user"]


def test_prompts_that_only_tokens_tell_are_asked_for(tmp_path):
    rows = [{"chosen": "It was a good film", "rejected": "It was a bad film"}]
    with pytest.raises(UsageError, match=r"row 1: what is the prompt is only known from the tokens .* --column"):
        read_prompts(write(tmp_path / "shared.jsonl", rows))
