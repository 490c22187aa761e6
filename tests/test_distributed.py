"""Two processes on one machine, over gloo: the same global batches give the same run as one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("two_ranks.py")


def run(model, folder, devices, objective):
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_CURRENT_TEST", None)
    subprocess.run(
        [sys.executable, str(SCRIPT), model, str(folder), str(devices), objective],
        check=True, env=environment, timeout=240, capture_output=True,
    )  # fmt: skip
    return json.loads((folder / "metrics.json").read_text()), torch.load(folder / "weights.pt", weights_only=True)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs a PyTorch with gloo")
@pytest.mark.parametrize("objective", ["dpo", "sft"])
def test_two_ranks_equal_one(tiny_llama, tmp_path, objective):
    one, one_weights = run(tiny_llama, tmp_path / "one", 1, objective)
    two, two_weights = run(tiny_llama, tmp_path / "two", 2, objective)
    assert one["reference_unchanged"]
    assert two["reference_unchanged"]
    torch.testing.assert_close(two_weights, one_weights, rtol=0, atol=2e-5)
    # Seven validation rows on two ranks: four and three, none counted twice.
    assert two["logged"] == pytest.approx(one["logged"], rel=1e-4)
    assert two["gradient_buckets"] == one["trainable"]
