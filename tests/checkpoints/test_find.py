"""The checkpoint to go on from is the furthest that is whole, whatever it is called."""

import os
import warnings

import torch
from torch.distributed import checkpoint

from dpo_lightning.checkpoints import last_checkpoint


def save(path, step, **more):
    weights = {"policy.weight": torch.zeros(3)}
    kept = {"pytorch-lightning_version": "2.6.6", "state_dict": weights, "global_step": step, "optimizer_states": []}
    torch.save({**kept, **more}, path)
    return path


def shards(folder, step, *missing):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of not being one of several processes
        checkpoint.save({"weight": torch.zeros(3)}, checkpoint_id=folder, no_dist=True)
    torch.save({"pytorch-lightning_version": "2.6.6", "global_step": step}, folder / "meta.pt")
    for name in missing:
        (folder / name).unlink()
    return folder


def test_the_most_steps_count_not_names_or_times(tmp_path):
    assert last_checkpoint(tmp_path) is last_checkpoint(tmp_path / "none") is None
    third = save(tmp_path / "a.ckpt", 30)
    save(tmp_path / "last.ckpt", 20)
    save(tmp_path / "step=99.ckpt", 10)
    assert last_checkpoint(tmp_path) == third
    again = save(tmp_path / "b.ckpt", 30)
    os.utime(again, ns=(0, third.stat().st_mtime_ns + 1))
    assert last_checkpoint(str(tmp_path)) == again


def test_damaged_ones_are_named_and_left_out(tmp_path, caplog):
    good = save(tmp_path / "step=1.ckpt", 1)
    cut = save(tmp_path / "step=2.ckpt", 2)
    cut.write_bytes(cut.read_bytes()[:-20])
    (tmp_path / "step=3.ckpt").write_text("nothing of ours")
    assert last_checkpoint(tmp_path) == good
    assert str(cut) in caplog.text
    assert "step=3.ckpt is no checkpoint" in caplog.text


def test_weights_alone_and_unfinished_files_cannot_be_resumed(tmp_path, caplog):
    weights = save(tmp_path / "weights.ckpt", 9)
    checkpoint = torch.load(weights, weights_only=True)
    del checkpoint["optimizer_states"]
    torch.save(checkpoint, weights)
    save(tmp_path / ".step=8.ckpt.0123.unfinished", 8)
    assert last_checkpoint(tmp_path) is None
    assert not caplog.text


def test_links_are_followed_and_may_lead_nowhere(tmp_path, caplog):
    (tmp_path / "last.ckpt").symlink_to("removed.ckpt")
    assert last_checkpoint(tmp_path) is None
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    target = save(elsewhere / "step=5.ckpt", 5)
    (tmp_path / "other.ckpt").symlink_to(target)
    save(tmp_path / "step=4.ckpt", 4)
    assert last_checkpoint(tmp_path) == target
    assert not caplog.text


def test_folders_of_shards_count_when_they_are_whole(tmp_path, caplog):
    save(tmp_path / "step=1.ckpt", 1)
    whole = shards(tmp_path / "step=2.ckpt", 2)
    shards(tmp_path / "step=3.ckpt", 3, "meta.pt")
    shards(tmp_path / "step=4.ckpt", 4, ".metadata")
    shards(tmp_path / "step=5.ckpt", 5, "__0_0.distcp")
    (shards(tmp_path / "step=6.ckpt", 6) / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert last_checkpoint(tmp_path) == whole
    assert "step=5.ckpt lacks files that ranks have written" in caplog.text
    assert "step=6.ckpt" in caplog.text
    assert "its list of contents asks for os.system" in caplog.text
    (whole / "meta.pt").write_bytes(b"PK")
    assert last_checkpoint(tmp_path).name == "step=1.ckpt"
    assert "step=2.ckpt/meta.pt" in caplog.text
