"""What the processor and its C library can do for training on a CPU."""

from __future__ import annotations

import ctypes
import functools
import platform

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # names and values of malloc.h


@functools.cache
def keep_freed_memory() -> bool:
    """Have the C library keep freed memory instead of handing it back to the system.

    Memory that comes fresh from the system costs a fault for each of its pages when it is first written, and by default
    that is so for most activations of every training step. Kept memory is used again without. Holds for the whole
    process.

    Returns:
        Whether the C library can: that of GNU.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    never = -1
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, never) and mallopt(M_TOP_PAD, 64 * 2**20))


def multiplies_bfloat16_faster() -> bool:
    """Whether the processor has instructions for matrix products in bfloat16 (AMX or AVX-512 BF16; NEON's BF16)."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(found.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))
