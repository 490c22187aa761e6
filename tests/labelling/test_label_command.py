import pytest
from chat_server import ChatServer, longer
from sample_files import row, rows, write

import dpo_lightning.cli
from dpo_lightning.tools import run_tool


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "samples.jsonl", row(1, ["a", "bbb", "cc"]), row(2, ["x", "yy"]))
    return tmp_path


def test_a_scorer_a_judge_and_chance_by_the_command_line(folder, capsys):
    run_tool("label", ["samples.jsonl", "a.jsonl", "--labeller", "Function", "--labeller.path", "builtins.len"])
    assert len(rows(folder / "a.jsonl")) == 4
    assert "Written: a.jsonl" in capsys.readouterr().out
    scorer = '{"class_path": "Function", "init_args": {"path": "builtins.len"}}'
    drawn = ["--labeller", "BradleyTerry", "--labeller.scorer", scorer, "--labeller.temperature", "1e-3"]
    run_tool("label", ["samples.jsonl", "b.jsonl", *drawn])
    assert rows(folder / "b.jsonl") == rows(folder / "a.jsonl")
    with ChatServer(longer) as chat:
        (folder / "judge.yaml").write_text(
            f"labeller:\n  class_path: LLMJudge\n  init_args:\n    server: {{url: {chat.url}, model: judge}}\n"
            "make: comparisons\n"
        )
        run_tool("label", ["samples.jsonl", "c.jsonl", "--config", "judge.yaml"])
    assert [one["label"] for one in rows(folder / "c.jsonl")] == ["output_2", "output_2", "output_1", "output_2"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "known.yaml", "--out", "b.jsonl"],
        ["--config", "known.yaml", "--out=b.jsonl"],
        ["--config", "known.yaml", "--samples", "samples.jsonl", "b.jsonl"],
        ["samples.jsonl", "--config", "known.yaml", "--out", "b.jsonl", "--pairs", "all"],
    ],
)
def test_what_has_a_place_may_have_its_name_over_a_config(folder, arguments):
    (folder / "known.yaml").write_text(
        "samples: samples.jsonl\nout: a.jsonl\nlabeller: {class_path: Function, init_args: {path: builtins.len}}\n"
    )
    run_tool("label", arguments)
    assert (folder / "b.jsonl").exists()
    assert not (folder / "a.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--labeller", "Functio"], "there is no class 'Functio' (did you mean 'Function'?)"),
        (["--labeller", "Function", "--labeller.pat", "x"], "Function has no key 'pat' (did you mean 'path'?)"),
        (["--labeller", "Function"], "Function needs path"),
        (["--labeller", "Function", "--labeller.path", "builtins.len", "--out"], "expected one argument"),
        (["--labeller", "Function", "--labeller.path", "nowhere.score"], "There is no module nowhere"),
        (["--labeller", "Function", "--labeller.path", "builtins.len", "--pairs", "random"], "give both, or neither"),
    ],
)
def test_mistakes_are_explained(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["dpo-lightning", "label", "samples.jsonl", "out.jsonl", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        dpo_lightning.cli.main()
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
