"""Between log lines a training step asks the device for nothing, so that it never waits for it."""

import traceback
from pathlib import Path

import pytest
import small_runs
import torch
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode

import dpo_lightning
from dpo_lightning import DPOModule, SFTModule
from dpo_lightning.callbacks import ProgressBar
from dpo_lightning.losses import BCOPairLoss, DPOLoss, TDPO2Loss, WPOLoss
from dpo_lightning.models.adapters import LoRA
from dpo_lightning.modules import guard
from dpo_lightning.references import AdaptersOff, Cached, Synced

ASKING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
PACKAGE = str(Path(dpo_lightning.__file__).parent)
# What asks on the CPU alone, where nothing is waited for.
ON_CPU_ALONE = {
    "functional/layout.py",  # attention by blocks, laid out on the host; on a GPU a kernel takes the spans as they are
    "references/cached.py",  # finds out which rows have no score; on a GPU those are nan
}


class Synchronisations(TorchDispatchMode):
    """Notes which file of the package makes the host wait; of what is called from none, the file that does."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in ASKING:
            files = [frame.filename for frame in traceback.extract_stack() if frame.filename != __file__]
            own = [file.removeprefix(f"{PACKAGE}/") for file in files if file.startswith(PACKAGE)]
            self.asked.append(own[-1] if own else files[-1])
        return func(*args, **(kwargs or {}))


class Watch(Callback):
    """What asked, step by step."""

    def __init__(self):
        self.asked = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.mode = Synchronisations()
        self.mode.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.mode.__exit__(None, None, None)
        self.asked.append([place for place in self.mode.asked if place not in ON_CPU_ALONE])


def watched(tiny_llama, tmp_path, module, **kwargs):
    watch = Watch()
    # The bar comes first, so that what it does after a batch is counted.
    fit = small_runs.trainer(
        tmp_path, max_steps=6, log_every_n_steps=4, callbacks=[ProgressBar(), watch], gradient_clip_val=1.0,
        enable_progress_bar=True,
    )  # fmt: skip
    fit.fit(module, small_runs.data(tiny_llama, **kwargs))
    return watch.asked


@pytest.mark.parametrize(
    "loss", [DPOLoss(), BCOPairLoss(), WPOLoss(), TDPO2Loss()], ids=lambda loss: type(loss).__name__
)
def test_a_step_between_log_lines_never_waits_for_the_device(tiny_llama, tmp_path, loss):
    first, *others = watched(tiny_llama, tmp_path, small_runs.module(tiny_llama, loss=loss))
    assert "modules/dpo.py" in first  # the check of the reference, once: asking is noticed
    assert [asked for step, asked in enumerate(others, start=2) if step != 4] == [[], [], [], []]


@pytest.mark.parametrize("reference", ["cached", "synced", "adapters"])
def test_no_reference_makes_a_step_wait(tiny_llama, tmp_path, reference):
    lora = LoRA(rank=2) if reference == "adapters" else None
    recipe = {"cached": Cached(dir=f"{tmp_path}/cache"), "synced": Synced(interval=2), "adapters": AdaptersOff()}
    module = small_runs.module(tiny_llama, recipe[reference], lora)
    _, *others = watched(tiny_llama, tmp_path, module)
    assert [asked for step, asked in enumerate(others, start=2) if step != 4] == [[], [], [], []]


@pytest.mark.parametrize("cls", [DPOModule, SFTModule])
def test_batches_in_pieces_make_no_step_wait(tiny_llama, tmp_path, cls):
    responses = 2 if cls is DPOModule else 1
    module = small_runs.module(tiny_llama, cls=cls)
    _, *others = watched(tiny_llama, tmp_path, module, micro_batch_tokens=60, num_responses=responses)
    assert [asked for step, asked in enumerate(others, start=2) if step != 4] == [[], [], [], []]


def test_a_step_is_read_when_the_device_has_been_given_the_next_one(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "reads_late", lambda norm, optimizer: guard.takes_flag(optimizer))
    events = []
    for cls, name in ((guard.Number, "read"), (DPOModule, "backward")):
        method = getattr(cls, name)
        monkeypatch.setattr(cls, name, lambda *args, name=name, method=method: events.append(name) or method(*args))
    asked = watched(tiny_llama, tmp_path, small_runs.module(tiny_llama), train=24)
    assert events == ["backward", *["backward", "read"] * 5, "read"]
    assert [places for step, places in enumerate(asked, start=1) if step not in (1, 4)] == [[], [], [], []]
