"""Those that throughput.py compares: each trains a policy of its own on the same pairs and times its steps."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer, seed_everything
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from dpo_lightning import DPOModule, PolicySpec, PreferenceDataModule
from dpo_lightning.losses import DPOLoss
from dpo_lightning.models.adapters import LoRA
from dpo_lightning.references import Reference

END = "<end>"
BETA, CLIP, LOG_EVERY = 0.1, 1.0, 10  # of the last two, TRL's defaults
ADAPTERS = LoRA()


class Pair(NamedTuple):
    """Tokens of a prompt and of two responses, each of which ends with token 0."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    def longest(self) -> int:
        """Tokens of the prompt with the longer response."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))

    def row(self) -> dict[str, str]:
        """Text of which the tokenizer of :func:`save_tokenizer` makes these tokens; both libraries add the end."""
        prompt, chosen, rejected = (
            " ".join(f"w{token}" for token in ids) for ids in (self.prompt, self.chosen[:-1], self.rejected[:-1])
        )
        return {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}


class Case(NamedTuple):
    """What all contenders are given."""

    model: str
    pairs: Sequence[Pair]
    batch_size: int
    scratch: Path
    bf16: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    lora: bool = False
    lr: float = 1e-5
    micro_batch_tokens: int | None = None  # of ours

    def rows(self) -> list[dict[str, str]]:
        return [pair.row() for pair in self.pairs]

    def batches(self) -> Iterator[Sequence[Pair]]:
        return (self.pairs[i : i + self.batch_size] for i in range(0, len(self.pairs), self.batch_size))


class Run(NamedTuple):
    """What a contender did: seconds of all steps but the first, losses of all, and the bytes that it cannot do without.

    The first step makes the optimizer's state, and ours checks its reference there.
    """

    seconds: list[float]
    losses: list[float]
    state_bytes: int


@dataclass
class Clock:
    """Ends of steps, so that whatever happens between two steps counts."""

    device: str
    ends: list[float] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    def tick(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def run(self, policy: nn.Module, reference: nn.Module | None) -> Run:
        seconds = [end - start for start, end in pairwise(self.ends)]
        return Run(seconds, [loss.item() for loss in self.losses], state_bytes(policy, reference))


def state_bytes(policy: nn.Module, reference: nn.Module | None) -> int:
    """Weights, gradients, the two moments of AdamW, and the weights of the reference."""
    weights = [*policy.parameters(), *(reference.parameters() if reference is not None else ())]
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    return sum(weight.nbytes for weight in weights) + 3 * sum(weight.nbytes for weight in trained)


def save_tokenizer(vocabulary: int, folder: str | Path) -> None:
    """A tokenizer whose words are the numbers of its tokens; token 0 ends a response."""
    words = {END: 0} | {f"w{token}": token for token in range(1, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)


class _LightningClock(Callback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.clock.losses.append(outputs["loss"])
        self.clock.tick()


def ours(case: Case, reference: Reference) -> Run:
    """This library as its users run it."""
    seed_everything(0, verbose=False)
    spec = PolicySpec(path=case.model, dtype=case.dtype, lora=ADAPTERS if case.lora else None)  # type: ignore[arg-type]
    module = DPOModule(spec, DPOLoss(beta=BETA), reference, lr=case.lr)
    data = PreferenceDataModule(
        case.rows(),
        tokenizer=case.model,
        batch_size=case.batch_size,
        max_length=max(pair.longest() for pair in case.pairs),
        micro_batch_tokens=case.micro_batch_tokens,
        cache=False,
    )
    clock = Clock(case.device)
    Trainer(
        max_epochs=1,
        overfit_batches=1.0,  # the order of the rows, so that all see the same batches
        accelerator=case.device,
        devices=1,
        precision="bf16-mixed" if case.bf16 else "32-true",
        gradient_clip_val=CLIP,
        log_every_n_steps=LOG_EVERY,
        inference_mode=False,
        callbacks=[_LightningClock(clock)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, data)
    assert module.policy is not None
    return clock.run(module.policy, module.reference_policy)


class _TransformersClock(TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.tick()


def trl(case: Case, *, precompute: bool = False, **settings: Any) -> Run:
    """TRL's DPOTrainer at its defaults, but for what the case says and what would write or print.

    Rows keep their order, which is a random one already; clipping and logging are TRL's defaults for all contenders.

    Args:
        case: The case.
        precompute: Score with the reference before training.
        **settings: Fields of DPOConfig.
    """
    import peft
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    clock = Clock(case.device)

    class Recorder(DPOTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            clock.losses.append(loss.detach())
            return loss

    config = DPOConfig(
        output_dir=str(case.scratch),
        model_init_kwargs={"dtype": case.dtype},
        per_device_train_batch_size=case.batch_size,
        num_train_epochs=1,
        max_length=None,
        train_sampling_strategy="sequential",
        learning_rate=case.lr,
        lr_scheduler_type="constant",
        beta=BETA,
        bf16=case.bf16,
        use_cpu=case.device == "cpu",
        precompute_ref_log_probs=precompute,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    adapters = {"r": ADAPTERS.rank, "lora_alpha": ADAPTERS.alpha, "target_modules": ADAPTERS.target_modules}
    trainer = Recorder(
        model=case.model,
        args=config,
        train_dataset=Dataset.from_list(case.rows()),
        processing_class=PreTrainedTokenizerFast.from_pretrained(case.model),
        peft_config=peft.LoraConfig(**adapters, task_type="CAUSAL_LM") if case.lora else None,
        callbacks=[_TransformersClock(clock)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.run(trainer.model, trainer.ref_model)


def textbook(case: Case) -> Run:
    """DPO as tutorials write it: a padded row a response, all logits, a frozen copy."""
    policy = AutoModelForCausalLM.from_pretrained(case.model, dtype=case.dtype).to(case.device).train()
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=case.lr, weight_decay=0.0)
    clock = Clock(case.device)
    for batch in case.batches():
        inputs = [part.to(case.device) for part in padded(batch)]
        with torch.autocast(case.device, torch.bfloat16, enabled=case.bf16):
            logps = response_logps(policy, *inputs)
            with torch.no_grad():
                reference_logps = response_logps(reference, *inputs)
        chosen, rejected = (logps - reference_logps).chunk(2)
        loss = -F.logsigmoid(BETA * (chosen - rejected)).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        clock.losses.append(loss.detach())
        clock.tick()
    return clock.run(policy, reference)


def padded(batch: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, attention mask and what is scored: all chosen, then all rejected, shape (2 B, longest) each."""
    responses = [(p.prompt, p.chosen) for p in batch] + [(p.prompt, p.rejected) for p in batch]
    rows = [torch.tensor([*prompt, *response]) for prompt, response in responses]
    scored = [torch.arange(len(row)) >= len(prompt) for row, (prompt, _) in zip(rows, responses, strict=True)]
    mask = [torch.ones_like(row) for row in rows]
    tokens, mask, scored = (pad_sequence(parts, batch_first=True) for parts in (rows, mask, scored))
    return tokens, mask, scored


def response_logps(model: nn.Module, tokens: Tensor, mask: Tensor, scored: Tensor) -> Tensor:
    logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, :-1]
    logps = logits.float().log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return (logps * scored[:, 1:]).sum(-1)
