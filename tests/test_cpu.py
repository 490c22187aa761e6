import logging
import resource
import subprocess
import sys

import pytest
import torch
from small_runs import data, fit, module

from dpo_lightning.cpu import keep_freed_memory, multiplies_bfloat16_faster
from dpo_lightning.modules import precision as precisions

FAULTS = """
import resource, torch
from dpo_lightning.cpu import keep_freed_memory
keep_freed_memory()
for step in range(20):
    if step == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(2**20) for _ in range(64)]
    del activations
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not keep_freed_memory(), reason="needs the C library of GNU")
def test_memory_that_was_freed_is_used_again_without_page_faults():
    faults = int(subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True).stdout)
    assert faults < 64 * 2**22 // resource.getpagesize()  # of one step, in ten


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("musl", "1.2"))
    assert keep_freed_memory.__wrapped__() is False


@pytest.mark.parametrize(("capability", "faster"), [("amx_bf16", True), ("avx512_bf16", True), ("avx2", False)])
def test_products_in_bfloat16_are_faster_where_there_are_instructions_for_them(capability, faster, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True})
    assert multiplies_bfloat16_faster() is faster
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: False})
    assert not multiplies_bfloat16_faster()


@pytest.mark.parametrize(
    ("precision", "parameters", "faster", "said"),
    [
        ("32-true", 1, True, True),
        ("bf16-mixed", 1, True, False),
        ("32-true", 10**6, True, False),
        ("32-true", 1, False, False),
    ],
)
def test_a_large_model_in_float32_is_told_of_bfloat16(
    precision, parameters, faster, said, tiny_llama, tmp_path, caplog, monkeypatch
):
    caplog.set_level(logging.INFO, "dpo_lightning")
    monkeypatch.setattr(precisions, "LARGE", parameters)
    monkeypatch.setattr(precisions, "multiplies_bfloat16_faster", lambda: faster)
    fit(tmp_path, module(tiny_llama), data(tiny_llama), precision=precision, max_steps=1)
    assert ("`trainer.precision: bf16-mixed`" in caplog.text) == said
