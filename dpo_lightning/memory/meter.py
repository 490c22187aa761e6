"""What a computation would take of a device's memory: run on tensors without storage, each followed to its death."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from dpo_lightning.memory.trace import Trace

BLOCK = {"cuda": 512}  # bytes to which an allocator rounds; 64 on a CPU
ASKED = {Tensor.numpy, Tensor.item, Tensor.__bool__, Tensor.__float__, Tensor.__int__}
WHOLE_NUMBERS = (torch.int64, torch.int32, torch.bool)

Bytes = dict[str, int]  # by kind of what they hold
Place = tuple[str, int | str]  # a phase and a position


class Meter(TorchDispatchMode):
    """Makes tensors fake while it is entered, and counts the bytes of those that a device would hold.

    What is computed of whole numbers alone is computed: spans, positions and masks decide what else is. They stay on
    the CPU, and are not counted before they meet a fake tensor.

    Attributes:
        kind: Name under which storages that are born from now on are counted.
        phase: What goes on; while it is None no peak is kept.
        position: Where in the model; while it is None no peak is kept.
        peaks: The bytes of every kind at the moment of each phase and position at which their sum was highest.
        trace: Births and deaths.

    Args:
        device: Tensors on devices of another type are not counted.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.kind = "temporary"
        self.phase: str | None = None
        self.position: int | str | None = None
        self.peaks: dict[Place, Bytes] = {}
        self.trace = Trace()
        self.device = device
        self._fakes = FakeTensorMode()
        self._alive: dict[int, _Storage] = {}
        self._bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # asked for more often than all else together
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        flat, structure = tree_flatten((args, kwargs or {}))
        fake = any(isinstance(part, FakeTensor) for part in flat)
        if not fake and (any(isinstance(part, Tensor) for part in flat) or _counts(func, kwargs or {})):
            return self._computed(func, args, kwargs or {})
        if fake:
            args, kwargs = tree_unflatten([self._faked(part) for part in flat], structure)
        with self._fakes:
            result = func(*args, **(kwargs or {}))
        self._fakes.fake_tensor_converter.tensor_memo.clear()  # weak references, with which modules cannot be cast
        kind = "temporary" if self._casts_a_weight(func, args) else self.kind
        for part in result if isinstance(result, (tuple, list)) else (result,):
            self._count(part, kind)
        if self.device.type == "cpu" and torch.Tag.pointwise in func.tags:
            self._cast_inside(flat)
        return result

    def move(self, position: int | str | None) -> None:
        """Note that the computation has come to another place in the model."""
        self.position = position
        self.trace.mark(self.phase, position)

    def rename(self, tensors: Iterable[Any], kind: str) -> None:
        """Count tensors that are there under another kind."""
        for tensor in tensors:
            storage = self._alive.get(_key(tensor)) if isinstance(tensor, FakeTensor) else None
            if storage is not None:
                self._bytes[storage.kind] -= storage.size
                self._bytes[kind] += storage.size
                storage.kind = kind

    def _computed(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What comes of whole numbers; fractions are made fake, but for single ones."""
        result = func(*args, **(kwargs | {"device": "cpu"} if "device" in kwargs else kwargs))
        is_single = not isinstance(result, Tensor) or result.ndim == 0
        return result if is_single or not result.is_floating_point() else self._faked(result)

    def _faked(self, part: Any) -> Any:
        if not isinstance(part, Tensor) or isinstance(part, FakeTensor):
            return part
        device = "cpu" if part.ndim == 0 else self.device
        with self._fakes:
            fake = torch.empty_strided(part.shape, part.stride(), dtype=part.dtype, device=device)
        self._count(fake, "temporary")
        return fake

    def _count(self, part: Any, kind: str) -> None:
        if not isinstance(part, FakeTensor) or part.fake_device.type != self.device.type:
            return
        key = _key(part)
        if key in self._alive:
            return
        self._alive[key] = _Storage(self, part, kind)
        self._bytes[kind] += self._alive[key].size
        self._keep_peak()

    def _keep_peak(self) -> None:
        if self.phase is None or self.position is None:
            return
        place = self.phase, self.position
        if self._bytes.total() > sum(self.peaks.get(place, {}).values()):
            self.peaks[place] = dict(self._bytes)

    def _forget(self, key: int) -> None:
        storage = self._alive.pop(key)
        self._bytes[storage.kind] -= storage.size
        self.trace.died(storage.number)

    def _cast_inside(self, parts: list[Any]) -> None:
        """On a CPU an operation on numbers of several dtypes holds copies in the widest of them while it runs."""
        tensors = [part for part in parts if isinstance(part, FakeTensor) and part.ndim and part.is_floating_point()]
        widest = max((tensor.dtype.itemsize for tensor in tensors), default=0)
        size = sum(tensor.numel() * widest for tensor in tensors if tensor.dtype.itemsize < widest)
        if size:
            self._bytes["temporary"] += size
            self._keep_peak()
            self._bytes["temporary"] -= size
            self.trace.died(self.trace.born(size))

    def _casts_a_weight(self, func: Any, args: Any) -> bool:
        """Autocast's copies of weights live through the forward and are no activations."""
        if self.phase is None or func is not torch.ops.aten._to_copy.default or not isinstance(args[0], FakeTensor):
            return False
        source = self._alive.get(_key(args[0]))
        return source is not None and source.kind in ("weights", "reference")


class Host(TorchFunctionMode):
    """Answers the host with zeros where it asks what is in a fake tensor, and copies fake tensors deeply."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            return _deep_copy(*args)
        if func not in ASKED or not isinstance(args[0], FakeTensor):
            return func(*args, **(kwargs or {}))
        values = np.zeros(args[0].shape, np.float32 if args[0].is_floating_point() else np.int64)
        return values if func is Tensor.numpy else getattr(values, func.__name__)()


class _Storage:
    """The size of a storage and what it holds, without keeping it alive."""

    def __init__(self, meter: Meter, tensor: FakeTensor, kind: str) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        self.kind = kind
        block = BLOCK.get(meter.device.type, 64)
        self.size = -(-storage.nbytes() // block) * block
        self.number = meter.trace.born(self.size)
        self._death = weakref.ref(storage, lambda _: meter._forget(key))


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _deep_copy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """As torch does it, which reads storages."""
    if id(tensor) not in memo:
        copied = tensor.detach().clone()
        is_weight = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if is_weight else copied
    return memo[id(tensor)]


def _counts(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a function without tensors makes whole numbers."""
    return kwargs.get("dtype") in WHOLE_NUMBERS or func.overloadpacket is torch.ops.aten.arange
