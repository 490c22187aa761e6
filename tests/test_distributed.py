"""Two processes on one machine, over gloo: the same global batches give the same run as one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("two_ranks.py")


OBJECTIVES = ("dpo", "sft", "lora", "lora_sft", "cached", "synced", "bco")
IN_PIECES = ("pieces", "pieces_sft", "pieces_accumulated")


@pytest.fixture(scope="module")
def runs(tiny_llama, tmp_path_factory):
    """Folders of all objectives, by one process and by two."""
    folders = {devices: tmp_path_factory.mktemp(f"devices_{devices}") for devices in (1, 2)}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_CURRENT_TEST", None)
    for devices, folder in folders.items():
        subprocess.run(
            [sys.executable, str(SCRIPT), tiny_llama, str(folder), str(devices), *OBJECTIVES, *IN_PIECES],
            check=True, env=environment, timeout=480, capture_output=True,
        )  # fmt: skip
    return folders


def read(folder):
    return json.loads((folder / "metrics.json").read_text()), torch.load(folder / "weights.pt", weights_only=True)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs a PyTorch with gloo")
@pytest.mark.parametrize("objective", OBJECTIVES + IN_PIECES)
def test_two_ranks_equal_one(runs, objective):
    (one, one_weights), (two, two_weights) = (read(runs[devices] / objective) for devices in (1, 2))
    assert one["reference_unchanged"] is two["reference_unchanged"] is (objective != "synced")
    torch.testing.assert_close(two_weights, one_weights, rtol=0, atol=2e-5)
    # Seven validation rows on two ranks: four and three, none counted twice.
    assert two["logged"] == pytest.approx(one["logged"], rel=1e-4)
    assert two["gradient_buckets"] == one["trainable"]
    assert two["sums"] == pytest.approx(one["sums"], rel=1e-4)
    if objective == "cached":  # each rank has scored its share
        assert (one["scored"], sorted(two["scored"])) == ([31], [15, 16])


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs a PyTorch with gloo")
@pytest.mark.parametrize(
    ("objective", "steps"), [("dpo", 6), ("pieces", 6), ("pieces_sft", 6), ("pieces_accumulated", 3)]
)
def test_gradients_are_reduced_once_a_step(runs, objective, steps):
    (one, _), (two, _) = (read(runs[devices] / objective) for devices in (1, 2))
    assert set(one["pieces"]) == {1}
    assert set(two["pieces"]) == {2 if objective.startswith("pieces") else 1}
    assert two["reductions"] == steps
