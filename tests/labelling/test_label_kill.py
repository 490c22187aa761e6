"""A run of `label` that is killed again and again ends as one that never was."""

import json
import multiprocessing
import os
import random
import sys
import time
from multiprocessing import forkserver

import label_me
import pytest
from chat_server import ChatServer, Reply, longer
from sample_files import row, write

from dpo_lightning.labelling import label

NUM_KILLS = 4


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kill_me", "label_me"])  # a session has one server of forks for all tests
    with pytest.MonkeyPatch.context() as patch:  # it knows no other way to them
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return context


def killed(processes, samples, out, url=None):
    """Kill a run each time it has answered some more, then let it end; how often it was killed."""
    chance, kills = random.Random(0), 0
    answers = out.with_name(out.name + ".answers.jsonl")
    while True:
        size = answers.stat().st_size if answers.exists() else 0
        process = processes.Process(target=label_me.main, args=(samples, str(out), url), daemon=True)
        process.start()
        while kills < NUM_KILLS and process.is_alive():
            if answers.exists() and answers.stat().st_size > size:
                time.sleep(chance.uniform(0, 0.03))
                process.kill()
                break
            time.sleep(0.001)
        process.join()
        if process.exitcode == 0:
            return kills
        assert process.exitcode == -9
        kills += 1


class Killed(BaseException):
    """Ends a run in the place of a signal."""


@pytest.mark.parametrize("kill", [1, 2, 4])
def test_files_as_a_kill_may_leave_them(kill, tmp_path, monkeypatch):
    samples = write(tmp_path / "samples.jsonl", *(row(n, ["a", "bb", "cccc"]) for n in range(1, 301)))
    label(samples, str(tmp_path / "whole.jsonl"), labeller=label_me.scorer())
    calls = []

    def dying():
        calls.append(1)
        if len(calls) == kill:
            raise Killed

    monkeypatch.setattr(label_me, "before", [dying])
    out = tmp_path / "killed.jsonl"
    for cut in (1, 7, 80):
        with pytest.raises(Killed):
            label(samples, str(out), labeller=label_me.scorer())
        calls.clear()
        for path in (out, out.with_name("killed.jsonl.answers.jsonl")):
            path.write_bytes(path.read_bytes()[:-cut])  # of what it was writing, some had not come to the disk
        if kill == 4:
            break  # the next run would end before
    monkeypatch.undo()
    label(samples, str(out), labeller=label_me.scorer())
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert digests(out) == digests(tmp_path / "whole.jsonl")


def digests(out):
    path = out.with_name(out.name + ".answers.jsonl")
    return [json.loads(line)["digest"] for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_labels_of_a_scorer(processes, tmp_path):
    texts = random.Random(1)
    samples = write(
        tmp_path / "samples.jsonl",
        *(row(n, ["x" * texts.randint(1, 4) + str(one) for one in range(4)]) for n in range(1, 1001)),
    )
    assert killed(processes, samples, tmp_path / "killed.jsonl") == NUM_KILLS
    label(samples, str(tmp_path / "whole.jsonl"), labeller=label_me.scorer())
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert digests(tmp_path / "killed.jsonl") == digests(tmp_path / "whole.jsonl")


@pytest.mark.slow
def test_answers_of_a_judge(processes, tmp_path):
    samples = write(tmp_path / "samples.jsonl", *(row(n, ["a", "bb" * (n % 3), "cccc"]) for n in range(1, 41)))

    def at_leisure(number, question, body):
        return Reply(longer(number, question, body), after=0.005)

    with ChatServer(at_leisure) as chat:
        assert killed(processes, samples, tmp_path / "killed.jsonl", chat.url) == NUM_KILLS
        asked = len(chat.bodies)
        label(samples, str(tmp_path / "whole.jsonl"), labeller=label_me.judge(chat.url))
        once = len(chat.bodies) - asked
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(digests(tmp_path / "killed.jsonl")) == sorted(set(digests(tmp_path / "whole.jsonl")))
    assert once <= asked <= once + 4 * NUM_KILLS  # no more than what was on its way when it was killed
