"""``dpo-lightning sample``: completions of the prompts of a file."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lightning.fabric import Fabric

from dpo_lightning.data.chat import Chat
from dpo_lightning.data.sources import Source
from dpo_lightning.errors import UsageError
from dpo_lightning.generation.loading import DType, load, load_tokenizer, which_model
from dpo_lightning.generation.making import Write, continue_by_model, make, ranks
from dpo_lightning.generation.plan import Sampling, plan
from dpo_lightning.generation.prompts import Asked, PromptEncoding, read_prompts, read_template, unescaped
from dpo_lightning.generation.server import continue_by_server
from dpo_lightning.paths import resolve
from dpo_lightning.server import Connection

LINES = (".jsonl", ".ndjson")


def sample_prompts(
    model: str,
    prompts: str | Source,
    out: str,
    *,
    num_samples: int = 4,
    temperatures: float | list[float] = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 64,
    seed: int = 0,
    stop: str | list[str] = "",
    column: str | None = None,
    max_prompts: int | None = None,
    max_prompt_length: int | None = None,
    template: str = "",
    chat: Chat | None = None,
    batch_size: int = 256,
    batch_tokens: int = 65_536,
    dtype: DType | None = None,
    base: str | None = None,
    trust_remote_code: bool = False,
    accelerator: str = "auto",
    devices: int | str = "auto",
    num_nodes: int = 1,
    server: str | None = None,
    server_model: str | None = None,
    server_key_variable: str | None = None,
    server_timeout: float = 600.0,
    server_retries: int = 5,
    server_concurrency: int = 32,
    overwrite: bool = False,
) -> Path | None:
    """Write completions of every prompt of a file, at one temperature or several, as JSON Lines.

    A killed call goes on where it stopped when it is given again, with the same result.

    Args:
        model: A Hugging Face folder, a name on the hub, package:NAME, or a checkpoint: a .ckpt file or sharded folder.
        prompts: File with a prompt in each row: .jsonl, .json, .csv, .tsv, .parquet, .arrow, also compressed; or any
            source of a data module, such as HubDataset.
        out: File of JSON Lines to write.
        num_samples: Completions of a prompt at each temperature.
        temperatures: One or several; 1 samples from the model's own distribution, 0 takes the likeliest token.
        top_p: Sample from the smallest set of tokens that holds this probability.
        max_new_tokens: Most tokens of a completion.
        seed: Seed of the samples.
        stop: Text, or several, at which a completion ends.
        column: Column of the prompts, each text or messages; prompt unless named, or what a data module would take
            for the prompt.
        max_prompts: Take the first so many prompts.
        max_prompt_length: Most tokens of a prompt, whose beginning is cut off.
        template: A text that each prompt is put into, or a file with it, with {prompt} where the prompt is to stand.
        chat: How messages become text.
        batch_size: Completions made at a time on a device; another one gives other samples.
        batch_tokens: Most tokens of them, prompts and padding included; another one gives other samples.
        dtype: Dtype of the weights; bfloat16 on GPUs and float32 on CPUs unless given.
        base: Of a checkpoint, folder or hub name of the model that training began with, if it is no longer there.
        trust_remote_code: Run model code that comes with the weights.
        accelerator: What to run on: cpu, gpu, or what there is.
        devices: Number of devices on each machine, or which; all that there are unless given.
        num_nodes: Number of machines.
        server: Address of a server that speaks OpenAI's protocol, as http://host:8000/v1, which is asked instead; of
            the model the tokenizer alone is loaded.
        server_model: What the server calls the model.
        server_key_variable: Environment variable with the key of the server.
        server_timeout: Seconds to wait for an answer; one that trickles in is given up within twice that.
        server_retries: How often a request that failed is sent again.
        server_concurrency: Requests at a time.
        overwrite: Begin anew, whatever lies there.

    Returns:
        The file; None where there was nothing to do, and on ranks but the first.
    """
    _check(out, prompts)
    for name, value in (
        ("batch_size", batch_size), ("batch_tokens", batch_tokens), ("max_prompts", max_prompts),
        ("max_prompt_length", max_prompt_length), ("server_concurrency", server_concurrency),
    ):  # fmt: skip
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be 1 or more, got {value}.")
    if server_retries < 0 or server_timeout <= 0:
        raise UsageError(f"--server_retries {server_retries} --server_timeout {server_timeout}: 0 or more, above 0.")
    _check_server(server, server_model, server_key_variable, devices, num_nodes)
    read = read_prompts(prompts, column, max_prompts)
    tokenizer = load_tokenizer(model, base=base, trust_remote_code=trust_remote_code)
    encoding = PromptEncoding(chat or Chat(), max_prompt_length, template=read_template(template))
    sampling = Sampling(
        num_samples=num_samples,
        temperatures=tuple(temperatures if isinstance(temperatures, list) else [temperatures]),
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        seed=seed,
        stop=tuple(unescaped(text) for text in (stop if isinstance(stop, list) else [stop] if stop else [])),
        ends=tuple(encoding.ends(tokenizer, read)),
    )
    asked = encoding.encode(tokenizer, read)
    lengths = [len(one.ids) for one in asked]
    settings = {name: value for name, value in asdict(sampling).items() if name != "ends"}
    settings |= {"column": column, "max_prompts": max_prompts, "max_prompt_length": max_prompt_length}
    settings |= {"template": template, "prompts": _digest(asked, sampling)}
    if server is not None:
        connection = Connection(
            url=server, model=server_model or "", key_variable=server_key_variable, timeout=server_timeout,
            retries=server_retries, concurrency=server_concurrency,
        )  # fmt: skip
        ask = functools.partial(continue_by_server, tokenizer=tokenizer, connection=connection)
        settings = {"server_model": server_model, "tokenizer": model, **settings}
        chunks = plan(lengths, sampling, batch_size=1, batch_tokens=batch_tokens)  # each prompt by itself
        alone = Fabric(accelerator="cpu", devices=1)
        return make(Path(out), settings, asked, chunks, sampling, alone, lambda: ask, overwrite)
    fabric = ranks(accelerator, devices, num_nodes)
    dtype = dtype or ("bfloat16" if fabric.device.type == "cuda" else "float32")
    settings = which_model(model) | settings | {"dtype": dtype, "batch_size": batch_size, "batch_tokens": batch_tokens}
    chunks = plan(lengths, sampling, batch_size, batch_tokens)

    def begin() -> Write:
        loaded = load(model, dtype=dtype, device=fabric.device, base=base, trust_remote_code=trust_remote_code)
        return functools.partial(continue_by_model, model=loaded[0], tokenizer=loaded[1])

    fabric.launch()
    return make(Path(out), settings, asked, chunks, sampling, fabric, begin, overwrite)


def _check(out: str, prompts: str | Source) -> None:
    if Path(out).suffix not in LINES:
        raise UsageError(f"{out}: samples are written as JSON Lines; give a name that ends in {LINES[0]}.")
    same = isinstance(prompts, str) and Path(resolve(prompts)).expanduser().absolute()
    if Path(out).expanduser().absolute() == same:
        raise UsageError(f"{out} is the file of the prompts; name another for the samples.")


def _check_server(
    server: str | None, model: str | None, key_variable: str | None, devices: int | str, num_nodes: int
) -> None:
    if server is None and model is not None:
        raise UsageError("--server_model is the name that a server has for a model; give the address by --server.")
    if server is None:
        return
    if not server.startswith(("http://", "https://")):
        raise UsageError(f"--server is an address as http://host:8000/v1, got {server!r}.")
    if model is None:
        raise UsageError("--server needs --server_model, what the server calls the model.")
    if key_variable is not None and key_variable not in os.environ:
        raise UsageError(f"--server_key_variable: there is no environment variable {key_variable}; set it to the key.")
    if devices != "auto" or num_nodes != 1:
        raise UsageError("--devices and --num_nodes are of a model that runs here; with --server leave them out.")


def _digest(asked: Sequence[Asked], sampling: Sampling) -> str:
    """Changes whenever what the model is given does, or what ends its answers."""
    digest = hashlib.blake2b(json.dumps(sampling.ends).encode(), digest_size=16)
    for one in asked:
        digest.update(json.dumps(one).encode() + b"\n")
    return digest.hexdigest()
