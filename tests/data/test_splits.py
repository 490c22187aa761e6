"""What is held out: whole prompts, the same every time, and as many examples as were asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dpo_lightning.data.splits import held_out, shared_prompts
from dpo_lightning.errors import UsageError


def prompts(*counts: int, seed: int = 0) -> np.ndarray:
    """So many examples of each of several prompts, in any order."""
    rng = np.random.default_rng(seed)
    names = rng.choice(2**62, size=len(counts), replace=False) - 2**61
    return rng.permutation(np.repeat(names, counts))


@pytest.mark.parametrize("seed", range(5))
def test_examples_of_one_prompt_stay_on_one_side(seed):
    names = prompts(*np.random.default_rng(seed).integers(1, 6, size=200), seed=seed)
    held = held_out(names, 0.2)
    assert held.shape == names.shape
    assert not set(names[held]) & set(names[~held])
    # With a prompt of one example among those left out, there is always one that fits.
    assert held.sum() == round(0.2 * len(names))


@pytest.mark.parametrize(
    ("counts", "fraction", "expected"),
    [
        ([1] * 10, 0.1, 1),
        ([1] * 10, 0.14, 1),
        ([1] * 10, 0.16, 2),
        ([3, 1], 0.5, 1),  # three are more than two
        ([90, *[1] * 10], 0.1, 10),
        ([2] * 10, 0.25, 4),  # five are no whole prompts
    ],
)
def test_as_many_as_whole_prompts_allow(counts, fraction, expected):
    for seed in range(5):
        assert held_out(prompts(*counts, seed=seed), fraction).sum() == expected


def test_the_draw_depends_on_the_prompts_alone():
    names = prompts(*[2] * 100)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = held_out(names, 0.1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert (held_out(names, 0.1) == first).all()
    # In another order the same prompts are held out.
    order = np.random.default_rng(0).permutation(len(names))
    assert (held_out(names[order], 0.1) == first[order]).all()
    # And they are drawn, not the first or the last.
    ranks = np.searchsorted(np.unique(names), names[first])
    assert 20 < ranks.mean() < 80


@pytest.mark.parametrize(("counts", "fraction"), [([4], 0.5), ([1], 0.5), ([2, 2], 0.25), ([1, 1], 0.9)])
def test_an_empty_part_is_refused(counts, fraction):
    with pytest.raises(UsageError) as caught:
        held_out(prompts(*counts), fraction)
    held = 2 if fraction == 0.9 else 0
    assert str(caught.value) == (
        f"`val_fraction` {fraction} of {sum(counts)} examples with {len(counts)} prompts holds out {held}; both parts "
        "need at least one."
    )


def test_shared_prompts_are_counted_by_example():
    assert shared_prompts(np.array([1, 1, 2, 3]), np.array([1, 3, 5])) == 3
    assert shared_prompts(np.array([1, 2]), np.array([3])) == 0
