"""What each of two ranks does, as torchrun starts them."""

import os

from dpo_lightning.errors import UsageError
from dpo_lightning.generation import making, sample
from dpo_lightning.generation.command import sample_prompts


def run(folder, model, settings):
    os.chdir(folder)
    found = sample_prompts(model, "prompts.jsonl", "out.jsonl", **settings)
    assert (found is not None) == (os.environ["RANK"] == "0")


def run_until(folder, model, settings, chunks):
    """As if both had been killed behind so many chunks."""
    calls = []

    def sample_or_not(*args, **kwargs):
        calls.append(1)
        if len(calls) > chunks:
            raise KeyboardInterrupt
        return sample(*args, **kwargs)

    making.sample = sample_or_not
    try:
        run(folder, model, settings)
    except KeyboardInterrupt:
        return
    finally:
        making.sample = sample
    raise AssertionError("not killed")


def mistake(folder, model, settings):
    try:
        run(folder, model, settings)
    except UsageError as error:
        return str(error)
    except SystemExit:
        return "left"


def lose_a_part(folder, model, settings):
    """As where machines do not share a folder."""
    os.chdir(folder)
    own = os.path.join(folder, f"own{os.environ['RANK']}")
    os.makedirs(own, exist_ok=True)
    out = os.path.join(own, "out.jsonl")
    try:
        sample_prompts(model, "prompts.jsonl", out, **settings)
    except UsageError as error:
        return str(error)
