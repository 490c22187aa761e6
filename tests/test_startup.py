"""What a user waits for before anything happens: imports, and little else."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BARE = ["-c", "import torch, lightning.pytorch"]
FIT = ["-m", "dpo_lightning", "fit"]
CONFIG = ["--config", "configs/quickstart.yaml"]
COMMANDS = {
    "help": ([*FIT, "--help"], 0),
    "print_config": ([*FIT, *CONFIG, "--print_config"], 0),
    "configuration error": ([*FIT, *CONFIG, "--model.init_args.bet", "1"], 2),
}


def seconds(arguments, code):
    start = time.perf_counter()
    run = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, check=False)
    assert run.returncode == code, run.stderr.decode()
    return time.perf_counter() - start


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_answers_within_one_and_a_half_times_the_bare_imports(command):
    seconds(BARE, 0), seconds(*COMMANDS[command])  # from the disk into memory
    ratios = [seconds(*COMMANDS[command]) / seconds(BARE, 0) for _ in range(3)]
    assert statistics.median(ratios) < 1.5
