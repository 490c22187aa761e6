"""Which software has written a checkpoint."""

from __future__ import annotations

import functools
import platform
from importlib.metadata import PackageNotFoundError, version


@functools.cache
def versions() -> dict[str, str]:
    """Versions of this package and of what its numbers depend on."""
    import dpo_lightning

    found = {"python": platform.python_version(), "dpo_lightning": dpo_lightning.__version__}
    for name in ("torch", "lightning", "transformers", "torchmetrics", "peft", "bitsandbytes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
