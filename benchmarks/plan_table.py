"""What a GPU would hold in training, planned for models that need not exist here, and how fast it might go.

    python benchmarks/plan_table.py

Nothing is measured: models are built without weights, and a step is rehearsed on tensors without storage. Batches are
of UltraFeedback's lengths; throughput is the operations of a step over those of the GPU at a utilisation that is
assumed.
"""

import argparse
import logging
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from flops import Work, useful_flops
from lightning.pytorch import Trainer
from transformers import LlamaConfig

from dpo_lightning import DPOModule, PolicySpec
from dpo_lightning.losses import DPOLoss
from dpo_lightning.memory.division import Division
from dpo_lightning.memory.plan import GB, plan
from dpo_lightning.memory.rehearsal import Case
from dpo_lightning.memory.shapes import batch_of
from dpo_lightning.models.adapters import LoRA
from dpo_lightning.references import AdaptersOff, Cached, FrozenCopy, Reference

MODELS = {  # the shapes of Llama 3
    "1B": {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 8192, "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336,
    },
    "70B": {
        "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "intermediate_size": 28672,
    },
}  # fmt: skip
DIVISIONS = {
    "one process": Division(),
    "ddp, any number": Division(ranks=8),
    "fsdp2, 8": Division(ranks=8, shards=8),
    "fsdp2, 32": Division(ranks=32, shards=32),
}
PROMPT, RESPONSE = 230, 280  # tokens of an example of UltraFeedback, on the mean, by the tokenizer of Llama 3


class Recipe(NamedTuple):
    """What is trained, and against what."""

    reference: Reference
    lora: LoRA | None = None


RECIPES = {
    "FrozenCopy": Recipe(FrozenCopy()),
    "Cached": Recipe(Cached()),
    "AdaptersOff, rank 16": Recipe(AdaptersOff(), LoRA(rank=16)),
}


def planned(path: str, recipe: Recipe, division: Division, tokens: int) -> int:
    """Bytes of a device at the peak of a step, activations of every layer computed again."""
    policy = PolicySpec(path=path, activation_checkpointing=True, lora=recipe.lora)
    module = DPOModule(policy, DPOLoss(beta=0.1), recipe.reference)
    module.trainer = Trainer(
        accelerator="cpu", devices=1, precision="bf16-mixed", logger=False, enable_checkpointing=False
    )
    module.trainer.strategy.connect(module)
    examples = [(PROMPT, [RESPONSE, RESPONSE])] * (tokens // (PROMPT + 2 * RESPONSE))
    found = plan(module, Case(policy, recipe.reference, batch_of(examples, 2), in_pieces=True), division)
    return found.peak - found.between  # which is of CPUs alone


def pairs_per_second(config: LlamaConfig, flops: float, utilisation: float, *, reference: bool, lora: bool) -> float:
    """Of one GPU; what checkpointed layers compute again is not counted as use, so it lies in the utilisation."""
    work = Work.of([([0] * PROMPT, [0] * RESPONSE, [0] * RESPONSE)])
    return utilisation * flops / useful_flops(config, work, reference=reference, lora=lora)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tokens", type=int, default=8192, help="of a micro-batch")
    parser.add_argument("--flops", type=float, default=989e12, help="of a GPU in bfloat16; an H100's data sheet")
    parser.add_argument("--utilisation", type=float, default=0.3, help="share of them that is assumed to be used")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(f"| model | reference | {' | '.join(DIVISIONS)} | pairs/s a GPU |")
    print(f"|---|---|{'---|' * (len(DIVISIONS) + 1)}")
    for model in args.models:
        config = LlamaConfig(vocab_size=128256, max_position_embeddings=131072, **MODELS[model])
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(Path(folder))
            for name, recipe in RECIPES.items():
                peaks = [planned(folder, recipe, division, args.tokens) for division in DIVISIONS.values()]
                own = not isinstance(recipe.reference, Cached)
                rate = pairs_per_second(
                    config, args.flops, args.utilisation, reference=own, lora=recipe.lora is not None
                )
                cells = " | ".join(f"{peak / GB:,.0f} GB" for peak in peaks)
                print(f"| {model} | {name} | {cells} | {rate:.1f} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
