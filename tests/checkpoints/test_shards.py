"""What a list of contents may ask for."""

import pickle
from pathlib import Path

import pytest
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from dpo_lightning.checkpoints.reading import SHARDS
from dpo_lightning.checkpoints.shards import ShardReader

METADATA = b"ctorch.distributed.checkpoint.metadata\n"


def contents(folder: Path, written: bytes):
    (folder / SHARDS).write_bytes(written)
    return ShardReader(folder).contents


def test_members_of_an_enum_are_read_as_every_python_writes_them(tmp_path):
    member = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    by_getattr = b"cbuiltins\ngetattr\n(" + METADATA + b"_MEM_FORMAT_ENCODING\nVTORCH_CONTIGUOUS_FORMAT\ntR."
    assert contents(tmp_path, by_getattr) is member  # Python 3.11.0 to 3.11.3
    assert contents(tmp_path, pickle.dumps(member)) is member


@pytest.mark.parametrize(
    ("kind", "name"), [("Metadata", "__init__"), ("_MEM_FORMAT_ENCODING", "__class__"), ("_MEM_FORMAT_ENCODING", "mro")]
)
def test_nothing_but_members_is_had_by_getattr(tmp_path, kind, name):
    with pytest.raises(pickle.UnpicklingError, match=f"asks for '{name}' of"):
        contents(tmp_path, b"cbuiltins\ngetattr\n(" + METADATA + kind.encode() + b"\nV" + name.encode() + b"\ntR.")
