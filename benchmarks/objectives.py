"""Every loss and every reference of configs/ on the quickstart's data: validation accuracy before and after an epoch.

python benchmarks/objectives.py            # all of them, about half a minute each
python benchmarks/objectives.py dpo simpo  # some
"""

import logging
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path

from dpo_lightning import cli

ROOT = Path(__file__).parent.parent
OVERLAYS = [*sorted((ROOT / "configs/losses").glob("*.yaml")), *sorted((ROOT / "configs/references").glob("*.yaml"))]


def command(overlay: Path) -> list[str]:
    """What the first line of an overlay says, made quiet."""
    configs = re.findall(r"--config (\S+)", overlay.read_text().splitlines()[0])
    quiet = ["--trainer.logger=false", "--trainer.callbacks=null", "--trainer.enable_progress_bar=false"]
    quiet += ["--trainer.enable_checkpointing=false", "--trainer.enable_model_summary=false"]
    return ["fit", *(f"--config={ROOT / config}" for config in configs), *quiet]


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    wanted = sys.argv[1:]
    sys.argv = sys.argv[:1]
    print("| overlay | accuracy | margin | loss | seconds |\n|---|--:|--:|--:|--:|")
    for overlay in OVERLAYS:
        if wanted and overlay.stem not in wanted:
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            places = [f"--trainer.default_root_dir={folder}"]
            places += [f"--model.init_args.reference.dir={folder}"] if overlay.stem == "cached" else []
            trainer = cli.run([*command(overlay), *places]).trainer
        values = trainer.callback_metrics
        numbers = [values[f"val/{name}"].item() for name in ("rewards/accuracies", "rewards/margins", "loss")]
        cells = [f"{number:.3f}" for number in numbers] + [f"{time.perf_counter() - start:.0f}"]
        print(f"| {overlay.parent.name}/{overlay.stem} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
