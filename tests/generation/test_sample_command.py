"""The file of samples is the same however often it was begun, and by how many processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import two_ranks_sample
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo_lightning.cli
from dpo_lightning.errors import UsageError
from dpo_lightning.generation import making, read_samples, sample
from dpo_lightning.generation.command import sample_prompts
from dpo_lightning.generation.plan import seed_of

WORDS = "the film was a joy and its end is slow but we all loved every minute of this bad old story".split()  # noqa: SIM905
SETTINGS = {"temperatures": [1.0, 0.5], "max_new_tokens": 8, "batch_size": 12, "accelerator": "cpu"}
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with prompts of many lengths, some of them twice."""
    monkeypatch.chdir(tmp_path)
    prompts = [" ".join(WORDS[: 1 + number % 17]) for number in range(20)]
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return tmp_path


@pytest.fixture
def whole(here, tiny_llama):
    """The file of a call that nothing has stopped."""
    assert sample_prompts(tiny_llama, "prompts.jsonl", "whole.jsonl", **SETTINGS) == Path("whole.jsonl")
    return Path("whole.jsonl").read_bytes()


def killed_after(monkeypatch, number):
    """Have the model fail, once, behind so many chunks."""
    calls = []

    def sample_or_not(*args, **kwargs):
        calls.append(1)
        if len(calls) == number + 1:
            raise KeyboardInterrupt
        return sample(*args, **kwargs)

    monkeypatch.setattr(making, "sample", sample_or_not)
    return calls


def test_every_prompt_has_its_completions_at_every_temperature_in_order(here, whole, capsys):
    found = read_samples("whole.jsonl")
    prompts = [json.loads(line)["prompt"] for line in Path("prompts.jsonl").read_text().splitlines()]
    assert [(one.temperature, one.row, one.prompt) for one in found] == [
        (temperature, row, prompt) for temperature in (1.0, 0.5) for row, prompt in enumerate(prompts, start=1)
    ]
    assert all(len(one.responses) == len(one.tokens) == len(one.finished) == 4 for one in found)
    assert all(tokens == 8 or ended for one in found for tokens, ended in zip(one.tokens, one.finished, strict=True))
    texts = [text for one in found for text in one.responses]
    assert len(set(texts)) > 0.9 * len(texts)
    assert sorted(path.name for path in here.iterdir()) == ["prompts.jsonl", "whole.jsonl", "whole.jsonl.settings.json"]


def test_completions_are_those_of_sample(here, whole, tiny_llama):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    rows = read_samples("whole.jsonl")[:20]
    longest = sorted(rows, key=lambda one: -len(tokenizer(one.prompt)["input_ids"]))[:3]
    expected = sample(
        model, tokenizer, [one.prompt for one in longest for _ in range(4)], max_new_tokens=8, seed=seed_of(0, 1.0, 0)
    )
    assert [text for one in longest for text in one.responses] == [continuation.text for continuation in expected]


@pytest.mark.parametrize("chunks", [0, 1, 6, 13])
def test_a_killed_call_goes_on_and_ends_as_if_it_had_not_been(here, whole, tiny_llama, monkeypatch, chunks):
    with monkeypatch.context() as patch:
        killed_after(patch, chunks)
        with pytest.raises(KeyboardInterrupt):
            sample_prompts(tiny_llama, "prompts.jsonl", "out.jsonl", **SETTINGS)
    torn = Path("out.jsonl").read_bytes()
    assert len(torn.splitlines()) == sum([3, 3, 3, 3, 3, 3, 2, 3, 3, 3, 3, 3, 3, 2][:chunks])
    Path("out.jsonl").write_bytes(torn[: len(torn) - len(torn.splitlines(keepends=True)[-1]) // 2 if torn else 0])
    calls = killed_after(monkeypatch, 99)
    sample_prompts(tiny_llama, "prompts.jsonl", "out.jsonl", **SETTINGS)
    assert Path("out.jsonl").read_bytes() == whole
    assert len(calls) == 14 - max(0, chunks - 1)  # the chunk that was cut short is made again


def test_a_complete_file_is_left_alone(here, whole, tiny_llama, monkeypatch, capsys):
    calls, before = killed_after(monkeypatch, 0), Path("whole.jsonl").stat()
    assert sample_prompts(tiny_llama, "prompts.jsonl", "whole.jsonl", **SETTINGS) is None
    assert "whole.jsonl is complete: 160 completions of 20 prompts" in capsys.readouterr().out
    assert (Path("whole.jsonl").stat().st_mtime_ns, calls) == (before.st_mtime_ns, [])


def test_a_complete_file_that_was_not_yet_put_in_order_is(here, whole, tiny_llama, capsys):
    Path("whole.jsonl").write_bytes(b"".join(reversed(whole.splitlines(keepends=True))))
    sample_prompts(tiny_llama, "prompts.jsonl", "whole.jsonl", **SETTINGS)
    assert Path("whole.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 1}, "seed"),
        ({"temperatures": 1.0}, "temperatures"),
        ({"batch_size": 8}, "batch_size"),
        ({"max_prompts": 3}, "max_prompts"),
        ({"template": "Q: {prompt}"}, "template"),
        ({"dtype": "bfloat16"}, "dtype"),
    ],
)
def test_another_call_does_not_go_on(here, whole, tiny_llama, change, name):
    with pytest.raises(UsageError, match=f"was begun with {name} = .*--overwrite"):
        sample_prompts(tiny_llama, "prompts.jsonl", "whole.jsonl", **{**SETTINGS, **change})
    assert Path("whole.jsonl").read_bytes() == whole
    sample_prompts(tiny_llama, "prompts.jsonl", "whole.jsonl", overwrite=True, **{**SETTINGS, **change})
    found = json.loads(Path("whole.jsonl.settings.json").read_text())[name]
    assert found == (change[name] if name != "temperatures" else [1.0])


def test_other_prompts_are_another_call(here, whole, tiny_llama):
    Path("prompts.jsonl").write_text(Path("prompts.jsonl").read_text().replace("film", "end"))
    with pytest.raises(UsageError, match="was begun with prompts = "):
        sample_prompts(tiny_llama, "prompts.jsonl", "whole.jsonl", **SETTINGS)


def test_two_ranks_write_the_file_of_one(here, whole, tiny_llama, two_ranks):
    two_ranks.run(two_ranks_sample.run, str(here), tiny_llama, SETTINGS)
    assert Path("out.jsonl").read_bytes() == whole
    assert not list(here.glob("out.jsonl.rank*"))


@pytest.mark.slow
def test_one_rank_goes_on_where_two_were_killed_and_two_where_one_was(here, whole, tiny_llama, two_ranks, monkeypatch):
    two_ranks.run(two_ranks_sample.run_until, str(here), tiny_llama, SETTINGS, 2)
    assert len(Path("out.jsonl").read_text().splitlines()) == 6
    assert len(Path("out.jsonl.rank1").read_text().splitlines()) == 6
    calls = killed_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        sample_prompts(tiny_llama, "prompts.jsonl", "out.jsonl", **SETTINGS)
    assert len(calls) == 4
    assert not list(here.glob("out.jsonl.rank*"))
    two_ranks.run(two_ranks_sample.run, str(here), tiny_llama, SETTINGS)
    assert Path("out.jsonl").read_bytes() == whole


def test_a_mistake_of_the_first_rank_ends_all(here, whole, tiny_llama, two_ranks):
    Path("out.jsonl").write_text("notes\n")
    first, second = two_ranks.run(two_ranks_sample.mistake, str(here), tiny_llama, SETTINGS)
    assert "was not begun by this command" in first
    assert second == "left"


def test_a_rank_whose_rows_do_not_arrive_is_missed(here, whole, tiny_llama, two_ranks):
    words = two_ranks.run(two_ranks_sample.lose_a_part, str(here), tiny_llama, SETTINGS)[0]
    assert "out.jsonl lacks 20 of 40 rows, which other ranks have made" in words


def test_greedy_takes_one_completion(here, tiny_llama):
    sample_prompts(tiny_llama, "prompts.jsonl", "out.jsonl", num_samples=1, temperatures=[0, 1], accelerator="cpu",
                   max_new_tokens=4)  # fmt: skip
    by_prompt = {}
    for one in read_samples("out.jsonl")[:20]:
        by_prompt.setdefault(one.prompt, set()).add(one.responses[0])
    assert len(by_prompt) == 17
    assert all(len(responses) == 1 for responses in by_prompt.values())


def test_stop_strings_and_a_template_reach_the_model(here, tiny_llama):
    kwargs = {"max_new_tokens": 40, "accelerator": "cpu", "max_prompts": 8}
    sample_prompts(tiny_llama, "prompts.jsonl", "out.jsonl", template="Q: {prompt}\\n", stop=["e", "\\n"], **kwargs)
    sample_prompts(tiny_llama, "prompts.jsonl", "plain.jsonl", **kwargs)
    for one, plain in zip(read_samples("out.jsonl"), read_samples("plain.jsonl"), strict=True):
        assert (one.row, one.prompt) == (plain.row, plain.prompt)
        assert not any("e" in text or "\n" in text for text in one.responses)
        assert one.responses != plain.responses
    assert json.loads(Path("out.jsonl.settings.json").read_text())["stop"] == ["e", "\n"]


def test_completions_are_counted_at_the_end(here, tiny_llama, capsys, caplog):
    sample_prompts(tiny_llama, "prompts.jsonl", "out.jsonl", **SETTINGS)
    captured = capsys.readouterr()
    tokens = [count for one in read_samples("out.jsonl") for count in one.tokens]
    assert f"160 completions of 20 prompts, {sum(tokens) / 160:.1f} tokens on average, " in captured.out
    assert captured.out.rstrip().endswith("tokens/s")
    assert "40/40 prompts" in captured.err
    assert "of the completions were cut at --max_new_tokens 8" in caplog.text


def test_what_does_not_fit_is_said_in_words(here, tiny_llama, monkeypatch):
    with pytest.raises(UsageError, match=r"row \d+: the prompt has \d+ tokens, and with 500 new ones .* 512 positions"):
        sample_prompts(tiny_llama, "prompts.jsonl", "out.jsonl", max_new_tokens=500, accelerator="cpu")

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("64 GiB")

    monkeypatch.setattr(making, "sample", fail)
    with pytest.raises(
        UsageError, match=r"too little memory for 12 completions .*Lower --batch_size or --batch_tokens"
    ):
        sample_prompts(tiny_llama, "prompts.jsonl", "other.jsonl", **SETTINGS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["out.txt"], "give a name that ends in .jsonl"),
        (["out.jsonl", "--batch_size", "0"], "--batch_size must be 1 or more, got 0"),
        (["prompts.jsonl", "--overwrite"], "prompts.jsonl is the file of the prompts; name another"),
        (["out.jsonl", "--server_concurrency", "0"], "--server_concurrency must be 1 or more, got 0"),
        (["out.jsonl", "--server_timeout", "0"], "--server_timeout 0.0: 0 or more, above 0"),
        (["out.jsonl", "--max_prompts", "0"], "--max_prompts must be 1 or more, got 0"),
        (["out.jsonl", "--server_model", "x"], "give the address by --server"),
        (["out.jsonl", "--server", "host:80"], "--server is an address as http://host:8000/v1, got 'host:80'"),
        (["out.jsonl", "--server", "http://host:80/v1"], "--server needs --server_model"),
        (["out.jsonl", "--accelerator", "abacus"], "--accelerator abacus"),
        (["out.jsonl", "--column", "text"], "row 1: column 'text' must hold a prompt"),
        (["out.jsonl", "--temperatures", "[0.5,0]"], "give --num_samples 1"),
        (["out.jsonl", "--tempratures", "1"], "did you mean 'temperatures'?"),
    ],
)
def test_mistakes_end_in_words(here, tiny_llama, monkeypatch, capsys, arguments, words):
    monkeypatch.setattr("sys.argv", ["dpo-lightning", "sample", tiny_llama, "prompts.jsonl", *arguments])
    with pytest.raises(SystemExit, match="2"):
        dpo_lightning.cli.main()
    assert words in capsys.readouterr().err


def test_the_command_writes_the_file_and_names_it(here, tiny_llama, monkeypatch, capsys):
    options = ["--num_samples", "2", "--temperatures", "0.7", "--max_new_tokens", "4", "--accelerator", "cpu"]
    more = ["--template", "### {prompt}", "--stop", "###", "--chat.texts", "true"]
    monkeypatch.setattr(
        "sys.argv", ["dpo-lightning", "sample", tiny_llama, "prompts.jsonl", "new/out.jsonl", *options, *more]
    )
    dpo_lightning.cli.main()
    assert "Written: new/out.jsonl" in capsys.readouterr().out
    assert {(one.temperature, len(one.responses)) for one in read_samples("new/out.jsonl")} == {(0.7, 2)}


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_a_call_that_is_killed_again_and_again_writes_the_file_of_one_that_was_not(here, tiny_llama, devices):
    Path("prompts.jsonl").write_text(Path("prompts.jsonl").read_text() * 20)
    options = ["--max_new_tokens", "32", "--batch_size", "16", "--accelerator", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(out, devices):
        command = ["-m", "dpo_lightning", "sample", tiny_llama, "prompts.jsonl", out, *options]
        with Path("output.txt").open("a") as output:
            return subprocess.Popen(
                [sys.executable, *command, "--devices", str(devices)], env=environment, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip

    def count():
        return sum(path.read_bytes().count(b"\n") for path in here.glob("out.jsonl*") if path.suffix != ".json")

    assert start("whole.jsonl", 1).wait() == 0, Path("output.txt").read_text()
    counts = [0]
    for number in range(3):
        process = start("out.jsonl", devices)
        deadline = time.monotonic() + 120
        while count() < counts[-1] + 20:
            assert process.poll() is None, Path("output.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.05 * number)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        counts.append(count())
    assert counts[-1] < 400, "killed behind the end"
    assert start("out.jsonl", 1).wait() == 0, Path("output.txt").read_text()
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert not list(here.glob("out.jsonl.rank*"))
