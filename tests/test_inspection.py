"""What `dpo-lightning inspect` shows is every token, what it counts for, and no model."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from lightning.pytorch import LightningDataModule
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import dpo_lightning.cli
from dpo_lightning.data.example import TokenizedExample
from dpo_lightning.errors import UsageError
from dpo_lightning.inspection import STYLES, InspectingTrainer, shown

PAIRS = [{"prompt": f"the film {i}", "chosen": f" was good {i}", "rejected": f" was bad {i}"} for i in range(12)]


@pytest.fixture
def tokenizer(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    """Spaces as letters, and one before a text, as SentencePiece has them."""
    tokens = ["<s>", "</s>", "<unk>", "▁", *"abcdefgh", "▁a", "▁ab", "ab"]
    merges = [("a", "b"), ("▁", "ab"), ("▁", "a")]
    tokenizer = Tokenizer(models.BPE({token: place for place, token in enumerate(tokens)}, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


# One example.


def test_tokens_are_shown_with_bars_and_words(tokenizer):
    end = tokenizer.eos_token_id
    prompt, good, bad = (ids_of(tokenizer, text) for text in ("the film", " good", " bad"))
    example = TokenizedExample([tokenizer.bos_token_id, *prompt], [[*good, end], [*bad, end]], row=7)
    tokens = [[tokenizer.decode([token]) for token in ids] for ids in (prompt, good, bad)]
    assert all("".join(pieces) == text for pieces, text in zip(tokens, ("the film", " good", " bad"), strict=True))
    assert len(good) > 1
    assert shown(example, tokenizer, color=False).splitlines() == [
        f"row 7: prompt of {1 + len(prompt)} tokens",
        f"[prompt] <s>|{'|'.join(tokens[0])}|",
        f"response 1 of 2, the best: {len(good) + 1} tokens, {len(good) + 1} scored",
        f"[scored] {'|'.join(tokens[1])}|[end token] </s>|",
        f"response 2 of 2: {len(bad) + 1} tokens, {len(bad) + 1} scored",
        f"[scored] {'|'.join(tokens[2])}|[end token] </s>|",
    ]


def test_one_response_is_no_ranking(tokenizer):
    example = TokenizedExample([1], [ids_of(tokenizer, "x")], row=1)
    assert shown(example, tokenizer, color=False).splitlines()[2:] == ["response: 1 tokens, 1 scored", "[scored] x|"]


def test_colors_tell_tokens_apart(tokenizer):
    end = tokenizer.eos_token_id
    example = TokenizedExample(
        ids_of(tokenizer, "abc"), [[*ids_of(tokenizer, "xyz"), end]], 1, [[True, False, True, True]]
    )
    lines = shown(example, tokenizer, color=True).splitlines()
    assert lines[1] == "\033[34ma\033[0m\033[34;4mb\033[0m\033[34mc\033[0m"
    assert lines[2] == "response: 4 tokens, 3 scored"
    assert lines[3] == "\033[32mx\033[0m\033[33;4my\033[0m\033[32mz\033[0m\033[97;45;4m</s>\033[0m"


def test_what_is_not_scored_is_marked(tokenizer):
    example = TokenizedExample([1], [ids_of(tokenizer, "xyzx")], 1, [[True, False, False, True]])
    lines = shown(example, tokenizer, color=False).splitlines()
    assert lines[2:] == ["response: 4 tokens, 2 scored", "[scored] x|[not scored] y|z|[scored] x|"]


def test_the_end_token_may_stand_before_the_end_of_a_line(tokenizer):
    end, line = tokenizer.eos_token_id, ids_of(tokenizer, "\n")
    for number in (1, 2):
        example = TokenizedExample([1], [[*ids_of(tokenizer, "x"), end, *(line * number)]], 1)
        text = shown(example, tokenizer, color=False)
        assert text.endswith("[scored] x|[end token] </s>|[scored] " + "↵\n|" * number)


def test_a_special_token_within_a_response_ends_nothing(tokenizer):
    end, x = tokenizer.eos_token_id, ids_of(tokenizer, "x")
    example = TokenizedExample([1], [[*x, end, *x, *x, *x]], 1)
    assert shown(example, tokenizer, color=False).endswith("[scored] x|</s>|x|x|x|")
    # Of a turn that is not scored it is none either, be it near the end.
    example = TokenizedExample([1], [[*x, end, *x, end]], 1, [[True, False, True, True]])
    assert shown(example, tokenizer, color=False).endswith("[scored] x|[not scored] </s>|[scored] x|[end token] </s>|")


def test_special_tokens_of_templates_end_a_response(tokenizer):
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    assert "<|im_end|>" not in tokenizer.special_tokens_map.values()
    example = TokenizedExample([1], [ids_of(tokenizer, "x<|im_end|>")], 1)
    assert shown(example, tokenizer, color=False).endswith("[scored] x|[end token] <|im_end|>|")


@pytest.mark.parametrize("text", ["é", "aé b", "✓", "🙂", "a🙂🙂é", "世界"])
def test_characters_of_several_tokens_are_shown_once_they_are_whole(tokenizer, text):
    ids = ids_of(tokenizer, text)
    assert len(ids) > len(text)
    line = shown(TokenizedExample(ids, [[5]], 1), tokenizer, color=False).splitlines()[1]
    pieces = line.removeprefix("[prompt] ").removesuffix("|").split("|")
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    assert set(pieces) <= {*text, ""}


def test_a_character_that_was_cut_is_not_hidden(tokenizer):
    ids = ids_of(tokenizer, "a🙂")[:-1]
    line = shown(TokenizedExample(ids, [[5]], 1), tokenizer, color=False).splitlines()[1]
    assert line.startswith("[prompt] a|")
    assert "\N{REPLACEMENT CHARACTER}" in line
    assert line.count("|") == len(ids)


def test_bytes_that_are_no_character_hide_nothing(tokenizer):
    (first,) = ids_of(tokenizer, "a🙂")[1:2]
    ids = [first] * 9 + ids_of(tokenizer, "b")
    line = shown(TokenizedExample(ids, [[5]], 1), tokenizer, color=False).splitlines()[1]
    five, four = "\N{REPLACEMENT CHARACTER}" * 5, "\N{REPLACEMENT CHARACTER}" * 4
    assert line == f"[prompt] ||||{five}|||||{four}b|"


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_spaces_of_sentencepiece_are_shown(scheme):
    tokenizer = metaspace(scheme)
    ids = tokenizer("ab cab a")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁ab", "▁", "c", "ab", "▁a"]
    response = ids_of(tokenizer, "a ab")[1:]
    lines = shown(TokenizedExample(ids, [[*response, 1]], 1), tokenizer, color=False).splitlines()
    assert lines[1] == "[prompt] <s>| ab| |c|ab| a|"
    assert lines[3] == "[scored]  ab|[end token] </s>|"


# The command.


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def inspected(tmp_path, tiny_llama, monkeypatch, capsys, caplog):
    """What the command prints for some data, no weight loaded."""
    monkeypatch.setattr("dpo_lightning.models.spec.PolicySpec.build", lambda *_: pytest.fail("weights were loaded"))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pairs.jsonl", PAIRS)

    def run(*arguments, model=None, trainer=None, **init_args):
        usual = {
            "class_path": "DPOModule",
            "init_args": {"policy": {"path": tiny_llama}, "loss": {"class_path": "DPOLoss"}, "lr": 1e-3},
        }
        config = {
            "model": model or usual,
            "data": {"class_path": "PreferenceDataModule", "init_args": init_args},
            "trainer": trainer or {"max_epochs": 1},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        monkeypatch.setattr("sys.argv", ["dpo-lightning", "inspect", "--config", "config.yaml", *arguments])
        caplog.clear()
        caplog.set_level("INFO")
        dpo_lightning.cli.main()
        return caplog.text + capsys.readouterr().out

    return run


def rows_shown(text: str) -> list[int]:
    return [int(row) for row in re.findall(r"^row (\d+): prompt of \d+ tokens$", text, re.MULTILINE)]


def test_report_and_examples_are_shown_and_nothing_is_written(inspected, tmp_path):
    text = inspected(train="pairs.jsonl")
    assert "train: pairs.jsonl" in text
    assert re.search(r"rows read +12  (tokenised in|tokens found in the cache)", text)
    assert "\n3 examples: [prompt]  [scored]  [not scored]  [end token]\n" in text
    assert rows_shown(text) == [1, 7, 12]  # evenly spread; round(5.5) is 6
    assert "response 1 of 2, the best:" in text
    assert "\033[" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "pairs.jsonl"]


@pytest.mark.parametrize(("number", "rows"), [(0, []), (1, [1]), (2, [1, 12]), (50, list(range(1, 13)))])
def test_the_number_of_examples_is_chosen(inspected, number, rows):
    text = inspected("--num_examples", str(number), train="pairs.jsonl")
    assert rows_shown(text) == rows
    assert f"\n{len(rows)} examples: " in text


def test_a_number_that_is_none_is_a_mistake(inspected, capsys):
    with pytest.raises(SystemExit):
        inspected("--num_examples", "-1", train="pairs.jsonl")
    assert "`num_examples` must be 0 or more, got -1." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "split"), [(("test",), "test"), (("val",), "val"), (("val", "test"), "val"), (("test", "train"), "train")]
)
def test_what_there_is_is_shown(inspected, given, split):
    text = inspected("--num_examples", "1", **dict.fromkeys(given, "pairs.jsonl"))
    assert f"{split}: pairs.jsonl" in text
    assert rows_shown(text) == [1]


def test_samples_to_be_predicted_are_shown(inspected, tmp_path):
    write(
        tmp_path / "samples.jsonl", [{"prompt": "q", "responses": ["x", "y"], "tokens": [2, 2], "finished": [True] * 2}]
    )
    assert rows_shown(inspected(test="samples.jsonl")) == [1, 1]


def test_training_data_are_shown_where_there_are_any(inspected, tmp_path):
    write(tmp_path / "others.jsonl", [{"prompt": "q", "chosen": "x", "rejected": "y"}])
    text = inspected(val="others.jsonl", train="pairs.jsonl", test="others.jsonl")
    assert rows_shown(text) == [1, 7, 12]
    assert "val: others.jsonl" in text


def test_no_data_at_all_is_a_mistake(inspected, capsys):
    with pytest.raises(SystemExit):
        inspected()
    assert "There is no data for fit: give `data.init_args.train`." in capsys.readouterr().err


def test_what_is_held_out_is_not_shown_as_training_data(inspected):
    text = inspected("--num_examples", "50", train="pairs.jsonl", val_fraction=0.5)
    assert len(set(rows_shown(text))) == 6
    assert "held out for validation 6, left for training 6" in text


def test_of_a_stream_the_first_examples_are_shown(inspected):
    text = inspected("--num_examples", "2", train="pairs.jsonl", stream_buffer=4)
    assert "train: pairs.jsonl, a stream, read as Pairs (prompt, chosen, rejected)" in text
    assert rows_shown(text) == [1, 2]


def test_of_a_mixture_all_sources_are_shown(inspected, tmp_path):
    write(tmp_path / "others.jsonl", [{"prompt": "q", "responses": ["x", "y", "z"]}])
    parts = [{"source": "pairs.jsonl", "weight": 1}, {"source": "others.jsonl", "weight": 1}]
    for how in ({}, {"stream_buffer": 4}):
        text = inspected("--num_examples", "2", train={"parts": parts}, **how)
        assert rows_shown(text) == [1, 1]
        assert "response 3 of 3" in text


def test_it_runs_where_the_config_would_not(inspected):
    text = inspected(train="pairs.jsonl", trainer={"accelerator": "cuda", "devices": 8, "strategy": "ddp"})
    assert rows_shown(text)


def test_colors_are_for_terminals_that_want_them(inspected, monkeypatch):
    monkeypatch.setattr("dpo_lightning.inspection.sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = inspected("--num_examples", "1", train="pairs.jsonl")
    assert "  ".join(f"\033[{style}m{name}\033[0m" for name, style in STYLES.items()) in text
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033[" not in inspected("--num_examples", "1", train="pairs.jsonl")


def test_other_data_cannot_be_shown():
    trainer = InspectingTrainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(UsageError, match=r"^`inspect` shows a PreferenceDataModule, not a LightningDataModule\.$"):
        trainer.inspect(datamodule=LightningDataModule())


def test_a_dialogue_is_shown_as_its_template_writes_it(inspected, tmp_path, tiny_llama):
    turns = [("user", "Hm?"), ("assistant", "Yes."), ("user", "Oh."), ("assistant", "No.")]
    write(tmp_path / "chat.jsonl", [{"messages": [{"role": role, "content": text} for role, text in turns]}])
    model = {"class_path": "SFTModule", "init_args": {"policy": {"path": tiny_llama}, "lr": 1e-3}}
    text = inspected(model=model, train="chat.jsonl")
    line = next(line for line in text.replace("↵\n", "↵").splitlines() if "[not scored]" in line and "|" in line)
    kinds = re.split(r"\[(scored|not scored|end token)\] ", line)[1:]
    parts = [(kind, body.replace("|", "")) for kind, body in zip(kinds[::2], kinds[1::2], strict=True)]
    assert parts == [
        ("scored", "Yes.</s>"),
        ("not scored", "user: Oh.↵assistant: "),
        ("scored", "No."),
        ("end token", "</s>"),
    ]
