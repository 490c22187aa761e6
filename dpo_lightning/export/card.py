"""The model card: what is known of a run, and nothing else."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import ModelCardData

from dpo_lightning.errors import UsageError
from dpo_lightning.losses import PreferenceLoss
from dpo_lightning.models.reward import OFFSET
from dpo_lightning.modules.base import PROVENANCE
from dpo_lightning.paths import PACKAGE, resolve
from dpo_lightning.recipes import from_plain

PACKAGES = ("dpo-lightning", "torch", "lightning", "transformers", "peft")
LOCAL = (".", "/", "~")  # how paths begin
PAPER = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def model_card(record: Mapping[str, Any], data: Mapping[str, Any], *, base: str, alone: bool) -> str:
    """A model card in Markdown, its front matter in YAML.

    Args:
        record: What a checkpoint holds besides weights.
        data: What its data module said of itself.
        base: Where the base model comes from.
        alone: Whether there are adapters alone.
    """
    settings: Mapping[str, Any] = record.get("hyper_parameters", {})
    name, rewards = _name(base), OFFSET in record
    tags = ["dpo_lightning", *(part.removesuffix("Loss").lower() for part in _classes(settings.get("loss")))]
    datasets = {source["dataset"]: None for source in data.get("sources", []) if source["dataset"]}
    front = ModelCardData(
        library_name="peft" if alone else "transformers",
        pipeline_tag="text-classification" if rewards else "text-generation",
        base_model=base if _is_on_hub(base) else None,
        datasets=list(datasets) or None,
        tags=list(dict.fromkeys(tags)),
    )
    sections = {
        "Method": _method(settings, record, alone),
        "Data": _data(data),
        "Validation": _validation(record),
        "Use": _use(base if _is_on_hub(base) else "the base model", alone, rewards),
        "Versions": ", ".join(f"{package} {version(package)}" for package in _used_packages(alone)),
    }
    body = [f"## {title}\n\n{text}" for title, text in sections.items() if text]
    title = f"# {name}, {'adapters' if alone else 'trained further'}"
    return "\n\n".join([f"---\n{front.to_yaml()}\n---", title, _summary(name, record, alone), *body]) + "\n"


def _summary(name: str, record: Mapping[str, Any], alone: bool) -> str:
    module = _own(record).get("module")
    by = f" by `{module}`" if module else ""
    what = f"Adapters for `{name}`" if alone else f"`{name}`"
    return f"{what}, trained with dpo_lightning (PyTorch Lightning modules for preference optimisation){by}."


def _method(settings: Mapping[str, Any], record: Mapping[str, Any], alone: bool) -> str:
    lines = []
    loss = settings.get("loss")
    if loss is not None:
        lines.append(f"Loss: `{_shown(loss)}`")
        lines += [f"`{name}`: {text}" for name, text in _descriptions(loss)]
        if (reference := settings.get("reference")) is not None and _compares(loss):
            lines.append(f"Reference: `{_shown(reference)}`")
    policy = settings.get("policy", {}).get("init_args", {})
    if lora := policy.get("lora"):
        lines.append(f"Adapters, {'alone in this folder' if alone else 'taken up by the weights'}: `{_shown(lora)}`")
    if policy.get("quantize"):
        lines.append(f"Weights below the adapters were quantised to {policy['quantize']} in training")
    rates = {"learning rate": "lr", "warm-up steps": "warmup_steps", "schedule": "schedule"}
    given = [f"{what} {settings[key]}" for what, key in rates.items() if settings.get(key) is not None]
    if given:
        lines.append(f"Optimisation: {', '.join(given)}")
    if (offset := record.get(OFFSET)) is not None:
        lines.append(f"Offset of the rewards, whose mean over the reference set is then 0: {offset['value']:.6g}")
    if "global_step" in record:
        lines.append(f"Optimizer steps: {record['global_step']:,}")
    return "\n".join(f"- {line}" for line in lines)


def _data(data: Mapping[str, Any]) -> str:
    columns = ("split", "source", "read", "rows", "kept")
    rows = [f"| {' | '.join(_cell(source[column]) for column in columns)} |" for source in data.get("sources", [])]
    head = ["| split | source | read as | rows | examples kept |", "|---|---|---|--:|--:|"]
    parts = ["\n".join([*head, *rows])] if rows else []
    if data.get("chat_template"):
        parts.append("Messages were written by the chat template that lies with the tokenizer.")
    if variables := data.get("chat_variables"):
        parts.append(f"The chat template was given `{variables}`.")
    return "\n\n".join(parts)


def _validation(record: Mapping[str, Any]) -> str:
    last = _own(record).get("validation")
    if not last:
        return ""
    rows = [f"| {name} | {value:.4g} |" for name, value in last["metrics"].items()]
    return "\n".join([f"After optimizer step {last['step']:,}:", "", "| metric | value |", "|---|--:|", *rows])


def _use(base: str, alone: bool, rewards: bool) -> str:
    auto, label = ("AutoModelForSequenceClassification", ", num_labels=1") if rewards else ("AutoModelForCausalLM", "")
    head = f"from transformers import {auto}, AutoTokenizer"
    place = 'folder = "."  # this folder, or its name on the hub'
    lines = [f"model = {auto}.from_pretrained(folder)"]
    if alone:
        head = f"from peft import PeftModel\n{head}"
        lines = [f'base = {auto}.from_pretrained("{base}"{label})', "model = PeftModel.from_pretrained(base, folder)"]
    lines.append("tokenizer = AutoTokenizer.from_pretrained(folder)")
    if rewards and not alone:
        lines += [
            'inputs = tokenizer([prompt + response + tokenizer.eos_token], padding=True, return_tensors="pt")',
            "reward = model(**inputs).logits[:, 0] - model.config.reward_offset",
        ]
    return "\n".join(["```python", head, "", place, *lines, "```"])


def _own(record: Mapping[str, Any]) -> Mapping[str, Any]:
    own: Mapping[str, Any] = record.get(PROVENANCE) or {}
    return own


def _used_packages(alone: bool) -> Iterator[str]:
    return (package for package in PACKAGES if package != "peft" or alone)


def _is_on_hub(path: str) -> bool:
    local = path.startswith((PACKAGE, *LOCAL)) or path.count("/") > 1
    return not local and not Path(resolve(path)).exists()


def _name(base: str) -> str:
    """A hub name, or the last part of a path."""
    return base if _is_on_hub(base) else PurePath(base.removeprefix(PACKAGE)).name


def _recipes(plain: Any) -> Iterator[Mapping[str, Any]]:
    """A recipe as plain data, and those inside of it."""
    if isinstance(plain, Mapping) and "class_path" in plain:
        yield plain
        plain = list(plain.get("init_args", {}).values())
    if isinstance(plain, list):
        for item in plain:
            yield from _recipes(item)


def _classes(plain: Any) -> list[str]:
    names = [recipe["class_path"].rpartition(".")[2] for recipe in _recipes(plain)]
    return [name for name in names if name.endswith("Loss")]


def _loss(plain: Mapping[str, Any]) -> PreferenceLoss | None:
    """The loss itself, where its class is at hand."""
    with suppress(UsageError, TypeError):
        return from_plain(dict(plain), PreferenceLoss)  # type: ignore[type-abstract]
    return None


def _compares(loss: Mapping[str, Any]) -> bool:
    built = _loss(loss)
    return built is None or bool(built.needs_reference)


def _descriptions(plain: Any) -> Iterator[tuple[str, str]]:
    """Every loss of a mixture, and what its class says of itself, papers linked."""
    for recipe in _recipes(plain):
        loss = _loss(recipe)
        if loss is not None and (text := inspect.getdoc(type(loss))):
            sentence = " ".join(text.partition("\n\n")[0].split())
            yield type(loss).__name__, PAPER.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", sentence)


def _shown(value: Any) -> str:
    """A recipe as one would write it in Python."""
    if isinstance(value, Mapping) and "class_path" in value:
        arguments = {name: item for name, item in value.get("init_args", {}).items() if item is not None}
        inside = ", ".join(f"{name}={_shown(item)}" for name, item in arguments.items())
        return f"{value['class_path'].rpartition('.')[2]}({inside})"
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    # Where things lie on someone's machine is nobody's business.
    return repr(PurePath(value).name if isinstance(value, str) and value.startswith(LOCAL) else value)


def _cell(value: str | int) -> str:
    text = f"{value:,}" if isinstance(value, int) else value
    return text.replace("|", "\\|").replace("\n", " ")
