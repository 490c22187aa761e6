"""This library, TRL's DPOTrainer and a textbook loop side by side: the same model, pairs, optimizer and precision.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/throughput.py --size 28M --precision fp32             # who is how fast
    python benchmarks/throughput.py --size 28M --precision fp32 --memory    # who takes how much memory
    python benchmarks/throughput.py --size 28M --precision fp32 --scaling   # ours, with batches and prompts that grow

In every round each contender trains anew from the same weights on the same pairs, in one process, in an order that
rotates; the first round and the first step of every run are not counted. TRL's best setting is found first, unless
named. Lengths are those of HH harmless-base unless --prompt, or --data, say otherwise; tokens are random.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib.metadata
import json
import logging
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from contenders import Case, Pair, Run, ours, save_tokenizer, textbook, trl
from flops import Work, product_rates, useful_flops
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig
from transformers import logging as transformers_logging

from dpo_lightning import PreferenceDataModule
from dpo_lightning.cpu import keep_freed_memory
from dpo_lightning.references import AdaptersOff, Cached, FrozenCopy

# Tokens of (prompt, chosen, rejected), end tokens counted, under gpt2's tokenizer in the test split of HH-RLHF
# harmless-base: one pair out of each 64th by their sum, drawn so that means, deviations and the padding of random
# batches of 8 are those of all 2,303 to 3 %.
HH_LENGTHS = [
    (12, 14, 9), (15, 14, 18), (18, 7, 24), (18, 6, 33), (17, 25, 18), (17, 21, 28), (29, 16, 24),
    (21, 33, 21), (16, 19, 43), (22, 36, 24), (19, 8, 60), (14, 22, 55), (17, 32, 45), (45, 48, 4),
    (79, 4, 22), (19, 45, 42), (21, 29, 62), (72, 27, 18), (73, 12, 35), (85, 18, 22), (28, 61, 38),
    (20, 103, 10), (86, 22, 30), (24, 49, 67), (13, 69, 61), (68, 31, 47), (117, 16, 18), (17, 95, 47),
    (70, 57, 34), (128, 19, 19), (107, 15, 49), (156, 8, 12), (133, 39, 6), (67, 52, 65), (164, 7, 21),
    (131, 30, 33), (166, 19, 18), (142, 11, 51), (140, 18, 55), (22, 141, 55), (110, 15, 96), (166, 10, 56),
    (167, 20, 47), (178, 26, 40), (229, 9, 15), (83, 59, 122), (17, 171, 81), (258, 19, 6), (116, 86, 95),
    (189, 7, 101), (212, 38, 67), (205, 40, 78), (188, 31, 121), (211, 95, 47), (135, 53, 171), (316, 37, 21),
    (226, 105, 70), (364, 53, 11), (273, 94, 72), (380, 40, 43), (177, 184, 165), (468, 94, 18), (355, 4, 259),
    (485, 73, 268),
]  # fmt: skip
Lengths = tuple[int, int, int]
CONTEXT = 8_192
BATCHES, PROMPTS = (8, 32, 128, 512), (128, 512, 1_024, 2_048, 4_096)
PIECE = 8_192  # tokens that are run at once where batches grow
VERSIONS = ("torch", "transformers", "lightning", "trl")


@dataclass(frozen=True)
class Size:
    """Shape of a Llama, and whether adapters alone are trained, over weights in bf16."""

    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    lora: bool = False

    @property
    def dtype(self) -> str:
        """Of the weights."""
        return "bfloat16" if self.lora else "float32"

    def config(self) -> LlamaConfig:
        """One that both libraries load."""
        return LlamaConfig(
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=not self.lora,
            dtype=self.dtype,
            bos_token_id=None,
            eos_token_id=0,
        )


SIZES = {
    "28M": Size(512, 1_408, 8, 8, 8, 6_400),
    "135M": Size(576, 1_536, 30, 9, 3, 49_152),  # SmolLM2-135M
    "1B": Size(2_048, 8_192, 16, 32, 8, 128_256),  # Llama 3.2 1B
    "7B": Size(4_096, 14_336, 32, 32, 8, 32_000, lora=True),  # Mistral 7B
}
FROZEN, CACHED = "ours, frozen", "ours, cached"
KEPT: dict[str, Any] = {"gradient_checkpointing": False}
BEST: dict[str, tuple[dict[str, Any], bool]] = {  # fields of DPOConfig, and whether lengths are grouped
    "no checkpointing": (KEPT, False),
    "lengths grouped": ({}, True),
    "no checkpointing, lengths grouped": (KEPT, True),
    "no checkpointing, lengths grouped, liger": (KEPT | {"use_liger_kernel": True}, True),
}


class Contender(NamedTuple):
    """How one is run, on which case, and the one of ours that knows the reference in the same way."""

    train: Callable[[Case], Run]
    case: Case
    rival: str

    def run(self) -> Run:
        """A run that leaves no memory behind."""
        run = self.train(self.case)
        gc.collect()
        if self.case.device == "cuda":
            torch.cuda.empty_cache()
        return run


def contenders(case: Case, best: str) -> dict[str, Contender]:
    """All that are compared; ``best`` names TRL's best setting."""
    settings, is_grouped = BEST[best]
    ordered = grouped(case) if is_grouped else case
    scored_before = partial(ours, reference=Cached(dir=str(case.scratch / "scores")))
    found = {
        FROZEN: Contender(ours_frozen, case, FROZEN),
        CACHED: Contender(scored_before, case, CACHED),
        "TRL, defaults": Contender(trl, case, FROZEN),
        "TRL, best": Contender(partial(trl, **settings), ordered, FROZEN),
        "TRL, best, precomputed": Contender(partial(trl, precompute=True, **settings), ordered, CACHED),
    }
    return found if case.lora else found | {"textbook": Contender(textbook, case, FROZEN)}


def ours_frozen(case: Case) -> Run:
    """Ours with the weights that training begins with as reference."""
    return ours(case, AdaptersOff() if case.lora else FrozenCopy())


def grouped(case: Case) -> Case:
    """The same pairs behind the first batch, with those of like length in one batch.

    So TRL's ``train_sampling_strategy="group_by_length"`` leaves thousands of pairs; a round has too few for it.
    """
    first, rest = case.pairs[: case.batch_size], case.pairs[case.batch_size :]
    return case._replace(pairs=[*first, *sorted(rest, key=Pair.longest)])


def best_of_trl(case: Case) -> str:
    """The setting with which TRL is fastest on the pairs of a round."""
    seconds = {}
    for name, (settings, is_grouped) in BEST.items():
        # Without a GPU, or without its package, transformers refuses Liger.
        with contextlib.suppress(ImportError, torch.OutOfMemoryError):
            run = Contender(partial(trl, **settings), grouped(case) if is_grouped else case, FROZEN).run()
            seconds[name] = sum(run.seconds)
            print(f"TRL, {name}: {seconds[name]:.2f} s", file=sys.stderr)
    return min(seconds, key=lambda name: seconds[name])


class Rounds(NamedTuple):
    """Runs of every contender, and FLOP/s of matrix products, forward and backward and forward alone."""

    runs: dict[str, list[Run]]
    rate: float
    forward_rate: float

    def seconds(self, name: str) -> float:
        """Of a round: the sum over its steps of the median over rounds."""
        return sum(map(statistics.median, zip(*(run.seconds for run in self.runs[name]), strict=True)))

    def ratios(self, name: str, rival: str) -> list[float]:
        """Seconds of a contender over those of another, of each round."""
        both = zip(self.runs[name], self.runs[rival], strict=True)
        return [sum(run.seconds) / sum(other.seconds) for run, other in both]


def rounds_of(chosen: dict[str, Contender], config: PretrainedConfig, number: int) -> Rounds:
    """So many rounds, with one before them that is not counted."""
    runs: dict[str, list[Run]] = {name: [] for name in chosen}
    rates, case = [], next(iter(chosen.values())).case
    tokens = work_of(case).tokens // (len(case.pairs) // case.batch_size - 1)
    for turn in range(number + 1):
        names = list(chosen)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            runs[name].append(chosen[name].run())
            print(f"round {turn}, {name}: {sum(runs[name][-1].seconds):.2f} s", file=sys.stderr)
        rates.append(product_rates(config, tokens, torch.bfloat16 if case.bf16 else torch.float32, case.device))
    rate, forward_rate = map(statistics.median, zip(*rates[1:], strict=True))
    return Rounds({name: of_one[1:] for name, of_one in runs.items()}, rate, forward_rate)


def work_of(case: Case) -> Work:
    """That of the steps that are counted."""
    return Work.of(case.pairs[case.batch_size :])


def speeds(case: Case, config: PretrainedConfig, best: str, number: int, left_out: Sequence[str] = ()) -> Iterator[str]:
    """The contenders side by side, line by line."""
    everyone = contenders(case, best)
    chosen = {name: contender for name, contender in everyone.items() if name not in left_out}
    rounds = rounds_of(chosen, config, number)
    expected, ordered = rounds.runs[FROZEN][0].losses, everyone["TRL, best"].case
    expected_of_best = expected if ordered is case else chosen[FROZEN]._replace(case=ordered).run().losses
    yield f"TRL's best setting: {best}. {_rates(rounds)}"
    yield ""
    yield "| contender | pairs/s | tokens/s | utilisation | its time over ours (lowest, highest) | losses differ by |"
    yield "|---|--:|--:|--:|--:|--:|"
    work, pairs = work_of(case), len(case.pairs) - case.batch_size
    for name, contender in chosen.items():
        seconds, ratios = rounds.seconds(name), rounds.ratios(name, contender.rival)
        flops = useful_flops(config, work, reference=contender.rival == FROZEN, lora=case.lora)
        losses = expected if contender.case is case else expected_of_best
        cells = [
            f"{pairs / seconds:.2f}",
            f"{work.tokens / seconds:,.0f}",
            f"{flops / seconds / rounds.rate:.2f}",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})",
            # Adapters begin with random weights, other ones in either library.
            "" if case.lora else f"{loss_difference(rounds.runs[name], losses):.1e}",
        ]
        yield f"| {name} | {' | '.join(cells)} |"


def loss_difference(runs: list[Run], expected: list[float]) -> float:
    """The largest of a step."""
    return max(abs(loss - other) for run in runs for loss, other in zip(run.losses, expected, strict=True))


def _rates(rounds: Rounds) -> str:
    return f"Products of a layer: {rounds.rate / 1e9:,.0f} GFLOP/s, {rounds.forward_rate / 1e9:,.0f} forward alone."


def scaling(case: Case, options: argparse.Namespace, config: PretrainedConfig) -> Iterator[str]:
    """What a pair costs ours with a frozen copy, and what it has to, as batches and prompts grow."""
    case = case._replace(micro_batch_tokens=PIECE)
    steps = len(case.pairs) // case.batch_size - 1

    def larger(batch_size: int) -> Case:
        count = batch_size * (1 + max(1, steps * case.batch_size // batch_size))
        return case._replace(pairs=make_pairs(HH_LENGTHS, count, config.vocab_size), batch_size=batch_size)

    def longer(prompt: int) -> Case:
        lengths = [(prompt, options.response, options.response)]
        return case._replace(pairs=make_pairs(lengths, len(case.pairs), config.vocab_size))

    kinds = {
        "batch": {f"batch {size}": larger(size) for size in BATCHES},
        "prompt": {f"prompt {tokens}": longer(tokens) for tokens in PROMPTS},
    }
    chosen = {name: Contender(ours_frozen, point, name) for points in kinds.values() for name, point in points.items()}
    rounds = rounds_of(chosen, config, options.rounds)
    yield _rates(rounds)
    yield ""
    yield "| | tokens a pair | GFLOP a pair | ms a pair | FLOP over the first | time over the first | utilisation |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for points in kinds.values():
        first = None
        for name, point in points.items():
            pairs, work = len(point.pairs) - point.batch_size, work_of(point)
            flops = useful_flops(config, work, reference=True, lora=case.lora) / pairs
            seconds = rounds.seconds(name) / pairs
            first = first or (flops, seconds)
            cells = [
                f"{work.tokens / pairs:.0f}",
                f"{flops / 1e9:.1f}",
                f"{seconds * 1e3:.1f}",
                f"{flops / first[0]:.2f}",
                f"{seconds / first[1]:.2f}",
                f"{flops / seconds / rounds.rate:.2f}",
            ]
            yield f"| {name} | {' | '.join(cells)} |"


def memory(case: Case, best: str, left_out: Sequence[str] = ()) -> Iterator[str]:
    """Peak memory of each contender, in a process of its own."""
    yield f"TRL's best setting: {best}."
    yield ""
    yield "| contender | weights, gradients, optimizer, reference, GB | above them at the peak, GB | ours over it |"
    yield "|---|--:|--:|--:|"
    above: dict[str, float] = {}
    for name, contender in contenders(case, best).items():
        if name in left_out:
            continue
        command = [sys.executable, *sys.argv, "--model", case.model, "--best", best, "--one", name]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        state, peak = json.loads(answer)
        above[name] = (peak - state) / 1e9
        yield f"| {name} | {state / 1e9:.2f} | {above[name]:.2f} | {above[contender.rival] / above[name]:.2f} |"


def measure_memory(contender: Contender) -> str:
    """Bytes that a contender cannot do without, and those at its peak, less those of a process without a model."""
    before = _resident("VmRSS")
    state = contender.run().state_bytes
    on_gpu = contender.case.device == "cuda"
    return json.dumps([state, torch.cuda.max_memory_allocated() if on_gpu else _resident("VmHWM") - before])


def _resident(field: str) -> int:
    """Bytes of this process; the peak of ``resource.getrusage`` may be that of the one that started it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def lengths_of(path: str, tokenizer: str, count: int) -> list[Lengths]:
    """Of pairs of a file, evenly spread over it."""
    data = PreferenceDataModule(path, tokenizer=tokenizer, num_responses=2, max_length=CONTEXT, cache=False)
    return [(len(e.prompt_ids), len(e.response_ids[0]), len(e.response_ids[1])) for e in data.inspect(count)]


def make_pairs(lengths: list[Lengths], count: int, vocabulary: int) -> list[Pair]:
    """Random tokens in a random order of the lengths, which are gone through again and again."""
    generator = torch.Generator().manual_seed(0)

    def tokens(number: int) -> list[int]:
        return torch.randint(1, vocabulary, (number,), generator=generator).tolist()

    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(len(lengths), generator=generator).tolist()
    chosen = (lengths[place] for place in order[:count])
    return [Pair(tokens(p), [*tokens(c - 1), 0], [*tokens(r - 1), 0]) for p, c, r in chosen]


def save_model(config: LlamaConfig, folder: str) -> None:
    """Random weights and a tokenizer."""
    torch.manual_seed(0)
    LlamaForCausalLM._from_config(config, dtype=config.dtype).save_pretrained(folder)
    save_tokenizer(config.vocab_size, folder)


def heading(options: argparse.Namespace) -> str:
    """When, where, with what, and how."""
    machine = torch.cuda.get_device_name() if options.device == "cuda" else _cpu()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS)
    command = shlex.join(["python", "benchmarks/throughput.py", *sys.argv[1:]])
    return (
        f"{datetime.date.today()}, {machine}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"{versions}; glibc's way with freed memory: {options.malloc}. `{command}`"
    )


def _cpu() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="28M", help="7B trains adapters")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="in a round, the first not counted among them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, help="tokens of every prompt")
    parser.add_argument("--response", type=int, default=100, help="tokens of every response, where --prompt is given")
    parser.add_argument("--data", help="a file of pairs; their lengths are taken")
    parser.add_argument("--tokenizer", help="the one that counts them")
    parser.add_argument("--best", choices=BEST, help="TRL's best setting; found unless given")
    parser.add_argument("--leave_out", nargs="*", default=(), help="contenders that do not fit into memory")
    parser.add_argument("--malloc", choices=("keep", "default"), default="keep", help="glibc's way with freed memory")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_case(options: argparse.Namespace, scratch: str) -> Case:
    """What the options ask for, in a folder of its own."""
    size = SIZES[options.size]
    count = options.batch_size * (options.steps + 1)
    lengths = HH_LENGTHS
    if options.prompt:
        lengths = [(options.prompt, options.response, options.response)]
    elif options.data:
        lengths = lengths_of(options.data, options.tokenizer, count)
    return Case(
        model=options.model or scratch,
        pairs=make_pairs(lengths, count, size.vocabulary),
        batch_size=options.batch_size,
        scratch=Path(scratch),
        bf16=options.precision == "bf16",
        device=options.device,
        dtype=size.dtype,
        lora=size.lora,
    )


def main() -> None:
    options = arguments()
    if options.malloc == "keep":
        keep_freed_memory()
    be_quiet()
    config = SIZES[options.size].config()
    with tempfile.TemporaryDirectory() as scratch:
        case = make_case(options, scratch)
        if options.one:
            print(measure_memory(contenders(case, options.best)[options.one]))
            return
        save_model(config, scratch)
        print(heading(options), end="\n\n")
        if options.scaling:
            lines = scaling(case, options, config)
        else:
            best = options.best or best_of_trl(case)
            lines = (
                memory(case, best, options.leave_out)
                if options.memory
                else speeds(case, config, best, options.rounds, options.leave_out)
            )
        for line in lines:
            print(line, flush=True)


def be_quiet() -> None:
    datasets.disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"


if __name__ == "__main__":
    main()
