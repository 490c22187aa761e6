"""A checkpoint is whole or not there, whatever happens while it is written; and what is read is said in words."""

import argparse
import os
import resource
import signal
import sys
import types
import zipfile

import pytest
import small_runs
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import save_file

from dpo_lightning.checkpoints import CheckpointFiles
from dpo_lightning.errors import UsageError

files = CheckpointFiles()


def checkpoint(value=1.0, size=1000, **more):
    weights = {"policy.weight": torch.full((size,), value)}
    return {"pytorch-lightning_version": "2.6.6", "state_dict": weights, "global_step": 3, **more}


def value(path):
    return files.load_checkpoint(path)["state_dict"]["policy.weight"][0].item()


def test_a_checkpoint_comes_back_and_takes_the_place_of_another(tmp_path):
    path = tmp_path / "new" / "folder" / "last.ckpt"
    files.save_checkpoint(checkpoint(1.0), path)
    assert value(path) == 1.0
    files.save_checkpoint(checkpoint(2.0), str(path))
    assert value(str(path)) == 2.0
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path):
    files.save_checkpoint(checkpoint(1.0), tmp_path / "step=1.ckpt")
    (tmp_path / "last.ckpt").symlink_to("step=1.ckpt")
    files.save_checkpoint(checkpoint(2.0), tmp_path / "last.ckpt")
    assert (value(tmp_path / "step=1.ckpt"), value(tmp_path / "last.ckpt")) == (1.0, 2.0)
    folder = tmp_path / "sharded.ckpt"
    folder.mkdir()
    (folder / "shard").touch()
    files.save_checkpoint(checkpoint(3.0), folder)
    assert value(folder) == 3.0


def stuck(started):
    """Instead of torch.save: writes a part, says so, and never comes to an end."""

    def save(checkpoint, file):
        file.write(b"PK" * 5000)
        file.flush()
        os.write(started, b".")
        signal.pause()

    return save


def test_a_kill_while_writing_leaves_the_last_one_and_its_leftovers_go(tmp_path):
    path, other = tmp_path / "last.ckpt", tmp_path / "other.ckpt"
    files.save_checkpoint(checkpoint(1.0), path)
    started, start = os.pipe()
    child = os.fork()
    if child == 0:
        torch.save = stuck(start)
        files.save_checkpoint(checkpoint(2.0), path)
        os._exit(1)
    os.read(started, 1)
    files.save_checkpoint(checkpoint(3.0), other)
    assert len(list(tmp_path.iterdir())) == 3  # what another process is writing is left to it
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert value(path) == 1.0
    files.save_checkpoint(checkpoint(4.0), other)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.ckpt", "other.ckpt"]
    assert value(other) == 4.0


def test_a_full_disk_is_said_and_the_last_one_stays(tmp_path):
    path = tmp_path / "last.ckpt"
    files.save_checkpoint(checkpoint(1.0), path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(UsageError) as error:
            files.save_checkpoint(checkpoint(2.0, size=1_000_000, again=[torch.zeros(250_000)]), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"The checkpoint {path} could not be written: File too large. It has about 5 MB, and there" in str(
        error.value
    )
    assert "Checkpoints written before it are as they were" in str(error.value)
    assert value(path) == 1.0
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"could not be written: File exists\. Checkpoints"):
        files.save_checkpoint(checkpoint(), tmp_path / "file" / "last.ckpt")
    with pytest.raises(AttributeError):  # what is no fault of the disk's is not put down to it
        files.save_checkpoint(checkpoint(more=lambda: None), path)


def write(path, kind):
    torch.save(checkpoint(), path)
    whole = path.read_bytes()
    damage = {
        "half": whole[: len(whole) // 2],
        "short": whole[:-10],
        "a few bytes": whole[:100],
        "empty": b"",
        "zeros": b"\0" * 5000,
        "no beginning": b"\0" * 2000 + whole[2000:],
        "text": b"lr: 0.1\n" * 50,
    }
    if kind in damage:
        path.write_bytes(damage[kind])
    elif kind == "safetensors":
        save_file({"weight": torch.zeros(3)}, path)
    elif kind == "archive":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a", "b")
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "none":
        path.unlink()
    else:
        other = {
            "weights": {"a": torch.zeros(3)},
            "tensor": torch.zeros(3),
            "object": checkpoint(x=argparse.Namespace()),
        }
        torch.save(other[kind], path)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("half", "is cut off or damaged"),
        ("short", "is cut off or damaged"),
        ("a few bytes", "is cut off or damaged"),
        ("archive", "is cut off or damaged"),
        *((kind, "torch has not written it so") for kind in ("empty", "zeros", "no beginning", "text", "safetensors")),
        ("weights", "is no checkpoint of a Trainer: it holds 'a'"),
        ("tensor", "is no checkpoint of a Trainer: it holds a Tensor"),
        ("object", "holds more than tensors and plain data (argparse.Namespace)"),
        ("folder", "is a folder, but no sharded checkpoint"),
        ("none", "There is no checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_said(tmp_path, kind, words):
    path = tmp_path / "last.ckpt"
    write(path, kind)
    with pytest.raises(UsageError) as error:
        files.load_checkpoint(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_more_than_plain_data_is_read_where_the_user_says_so(tmp_path):
    path = tmp_path / "last.ckpt"
    write(path, "object")
    assert files.load_checkpoint(path, weights_only=False)["x"] == argparse.Namespace()


def test_a_folder_of_shards_is_read_as_one_file(tmp_path, monkeypatch):
    folder = tmp_path / "step=3.ckpt"
    folder.mkdir()
    (folder / "meta.pt").touch()
    (folder / ".metadata").touch()
    stand_in = types.ModuleType("dpo_lightning.checkpoints.folders")
    stand_in.as_file = lambda path: {"from": path}
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    assert files.load_checkpoint(folder) == {"from": folder}


def test_other_addresses_are_left_to_lightning():
    files.save_checkpoint(checkpoint(5.0), "memory://folder/last.ckpt")
    assert value("memory://folder/last.ckpt") == 5.0


class Another(LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Linear(2, 2)


def test_a_checkpoint_of_another_module_or_model_is_refused(tiny_llama, wide_llama, tmp_path):
    def resumed(path):
        run = {"max_steps": 2, "plugins": [CheckpointFiles()]}
        small_runs.fit(tmp_path, small_runs.module(tiny_llama), small_runs.data(tiny_llama), path, **run)

    trainer = small_runs.trainer(tmp_path, plugins=[CheckpointFiles()])
    trainer.strategy.connect(Another())
    trainer.save_checkpoint(tmp_path / "another.ckpt")
    with pytest.raises(UsageError, match=r"is not of a DPOModule: its weights have names like encoder\.weight"):
        resumed(tmp_path / "another.ckpt")
    small_runs.saving(tmp_path, small_runs.module(wide_llama), small_runs.data(wide_llama), max_steps=1)
    with pytest.raises(UsageError, match=r"another model than .*embed_tokens\.weight has the shape \(\d+, 64\), here"):
        resumed(tmp_path / "step=1.ckpt")
