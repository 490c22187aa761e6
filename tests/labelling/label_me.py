"""Runs of `label` to be killed, in processes of their own."""

import sys
import time

from dpo_lightning.judges import LLMJudge
from dpo_lightning.labelling import label
from dpo_lightning.scorers import Function
from dpo_lightning.server import Server

before = []  # what a test has done first


def slowly(prompts, responses):
    """Scores with many ties."""
    for one in before:
        one()
    time.sleep(0.02)
    return [len(response) + len(prompt) % 3 for prompt, response in zip(prompts, responses, strict=True)]


def scorer():
    return Function(path="label_me.slowly", batched=True)


def judge(url):
    return LLMJudge(server=Server(url=url, model="judge", concurrency=4))


def main(samples, out, url):
    sys.stderr = open("/dev/null", "w")  # noqa: SIM115
    label(samples, out, labeller=judge(url) if url else scorer())
