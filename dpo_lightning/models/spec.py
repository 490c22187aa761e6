"""How a policy is built: a cheap recipe that YAML injects; the weights come when a strategy asks for them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.hub import cached_file

from dpo_lightning.errors import UsageError
from dpo_lightning.models.adapters import LoRA, name_below_adapters
from dpo_lightning.models.materialize import (
    Reader,
    copy_weights,
    fill,
    from_meta,
    take_random_state_of_first_rank,
    to_meta,
    without_storage,
)
from dpo_lightning.models.policy import CausalPolicy, Layout
from dpo_lightning.models.selfcheck import Verdict, choose_layout
from dpo_lightning.models.shard import Sharding, checkpoint_layers, compile_layers, shard_layers
from dpo_lightning.models.weight_files import stored_weights
from dpo_lightning.paths import PACKAGE, resolve

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PolicySpec:
    """A causal language model and how it is loaded.

    Args:
        path: A Hugging Face folder, the name of a model on the hub, or package:NAME for one that this package brings.
        revision: Branch, tag or commit on the hub.
        tokenizer: Folder or hub name of the tokenizer, if it does not lie with the model.
        dtype: Dtype of the weights. Train float32 weights with `trainer.precision: bf16-mixed`: updates at the
            learning rates of preference optimisation are smaller than bfloat16 can add to a weight.
        random_init: Start from random weights of the same config instead of the pretrained ones.
        layout: stream runs every prompt once, rows pads each response into a row; auto takes the stream where a
            check on a small random model of the same config proves it right.
        activation_checkpointing: Compute activations again in backward instead of keeping them: of every layer, or
            of every n-th.
        compile: Compile the decoder layers, which takes a minute at the start and then saves about a tenth of a step.
        dropout: Keep the config's dropout; off by default, since its noise enters the log-ratios.
        lora: Train low-rank adapters instead of the weights themselves.
        quantize: Keep the weights in 8 or 4 bits, by bitsandbytes; to be trained, they need adapters.
        trust_remote_code: Run model code that comes with the weights.
        allow_pickle: Also load weights that are not safetensors; such files can run code.
    """

    can_be_rebuilt: ClassVar[bool] = True  # from where its weights came
    auto: ClassVar[Any] = AutoModelForCausalLM  # the class of transformers that loads it
    engine: ClassVar[type[CausalPolicy]] = CausalPolicy  # what runs it on batches

    path: str
    revision: str | None = None
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    random_init: bool = False
    layout: Literal["auto", "stream", "rows"] = "auto"
    activation_checkpointing: bool | int = False
    compile: bool = False
    dropout: bool = False
    lora: LoRA | None = None
    quantize: Literal["8bit", "4bit"] | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        if self.activation_checkpointing < 0:
            raise UsageError(
                "`policy.activation_checkpointing` is true, false, or n for every n-th layer, got "
                f"{self.activation_checkpointing}."
            )
        if self.quantize is not None and importlib.util.find_spec("bitsandbytes") is None:
            raise UsageError('`quantize` needs bitsandbytes: pip install -c constraints.txt -e ".[quantize]".')
        if self.quantize is not None and self.random_init:
            raise UsageError("Random weights cannot be quantised: leave out `policy.quantize` or `policy.random_init`.")

    @property
    def origin(self) -> str:
        """Where it comes from, in messages."""
        return self.path

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained on frozen weights."""
        return self.lora is not None

    @property
    def has_trained_adapter(self) -> bool:
        """Whether training goes on with an adapter that changes the model already."""
        return self.lora is not None and self.lora.path is not None

    def check(self) -> None:
        """Something must be there to train."""
        if self.quantize is not None and self.lora is None:
            raise UsageError("Quantised weights cannot be trained: add adapters by `policy.lora`, or do not quantise.")

    def at(self, path: str, revision: str | None) -> PolicySpec:
        """The same recipe for another model, as it stands."""
        return dataclasses.replace(self, path=path, revision=revision, random_init=False, lora=None)

    def build(
        self,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype | None = None,
        sharding: Sharding | None = None,
        weights: CausalPolicy | None = None,
    ) -> CausalPolicy:
        """The policy in training mode, on the CPU: the strategy moves it.

        Args:
            device: Where it will run, which is where the layout is checked.
            compute_dtype: Dtype of its matrix products, if not that of its weights.
            sharding: How its weights are divided among ranks, on whose devices they then lie; no rank holds all.
            weights: A policy that was built with the same sharding, whose weights it takes.

        Raises:
            UsageError: If there is no such model.
        """
        # Under a Trainer the default device is a GPU's, and transformers would look for accelerate to load there.
        with torch.device("cpu"):
            config = self.load_config()
            layout = weights.layout if weights is not None else self._layout(config, device, compute_dtype)
            if sharding is None:
                return self.assemble(self._load_model(config), layout)
            return self._build_sharded(config, layout, sharding, weights)

    def assemble(self, model: PreTrainedModel, layout: Layout) -> CausalPolicy:
        """The policy in training mode, of a model to which adapters, checkpoints and compilation are still owed."""
        if self.lora is not None:
            self.lora.add(model)
        policy = self.engine(model, layout)
        if self.activation_checkpointing:
            checkpoint_layers(policy.model, int(self.activation_checkpointing))
        if self.compile:
            compile_layers(policy.model)
        return policy.train()

    def load_config(self) -> PretrainedConfig:
        """The model's config, dropout set to zero unless it is kept."""
        config = self._from_pretrained(AutoConfig, self.path)
        if not self.dropout:
            _set_dropout_to_zero(config.get_text_config())
        return config

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that belongs to the model."""
        if self.tokenizer is None:
            return self._from_pretrained(AutoTokenizer, self.path)
        return self._from_pretrained(AutoTokenizer, self.tokenizer, key="policy.tokenizer", revision=None)

    def load_model(self) -> PreTrainedModel:
        """The model alone, as it lies at the path, on the CPU."""
        with torch.device("cpu"):
            return self._load_model(self.load_config())

    def file(self, name: str) -> Path | None:
        """A file of the model by its name, had from the hub where that is its place; None where there is none."""
        try:
            found = cached_file(Path(resolve(self.path)).expanduser(), name, revision=self.revision)
        except OSError:
            return None
        return None if found is None else Path(found)

    def _layout(
        self, config: PretrainedConfig, device: torch.device | str, compute_dtype: torch.dtype | None
    ) -> Layout:
        dtype = compute_dtype or getattr(torch, self.dtype)
        verdict = choose_layout(config, device=device, dtype=dtype, trust_remote_code=self.trust_remote_code)
        if self.layout == "stream" and verdict.layout != "stream":
            raise UsageError(f"`policy.layout: stream` was asked for, but {verdict} Use `layout: auto`.")
        if self.layout == "auto":
            _say_once(verdict)
        return verdict.layout if self.layout == "auto" else self.layout

    def _build_sharded(
        self, config: PretrainedConfig, layout: Layout, sharding: Sharding, weights: CausalPolicy | None
    ) -> CausalPolicy:
        if self.quantize is not None or getattr(config, "quantization_config", None) is not None:
            where = "`policy.quantize`" if self.quantize is not None else f"`policy.path`: {self.path} is quantised"
            raise UsageError(f"{where}: packed weights cannot be divided among devices; use `strategy: ddp`.")
        take_random_state_of_first_rank(sharding.device)
        model, readers = self._without_storage(config, read=weights is None)
        if model is None:
            _say_that_ranks_load_all(config.model_type)
            model = self._load_model(config)
        policy = self.assemble(model, layout)
        real = to_meta(policy.model)
        shard_layers(policy, policy.model, sharding)
        from_meta(policy)
        if weights is not None:
            copy_weights(weights, policy)
        else:
            below = {name: name_below_adapters(name) for name in policy.model.state_dict()}
            missed = fill(policy.model, {name: readers[plain] for name, plain in below.items() if plain in readers})
            if missed - real:
                raise UsageError(f"`policy.path`: {self.path} lacks weights: {', '.join(sorted(missed - real)[:3])}.")
        return policy

    def _without_storage(
        self, config: PretrainedConfig, read: bool
    ) -> tuple[PreTrainedModel | None, Mapping[str, Reader]]:
        """A model without weights and how each of them is read, where there is such a way."""
        drawn = self.random_init or (self.lora is not None and self.lora.begins_from_weights)
        model = None if drawn and read else without_storage(lambda: self._from_config(config))
        if model is None or not read:
            return model, {}
        stored = stored_weights(model, self.file)
        if stored is None:
            return None, {}
        return model, {name: weight.read for name, weight in stored.items()}

    def _from_config(self, config: PretrainedConfig) -> PreTrainedModel:
        """Random weights."""
        dtype = getattr(torch, self.dtype)
        # A deep copy: models write into the config that they are given.
        model: PreTrainedModel = self.auto.from_config(
            copy.deepcopy(config), dtype=dtype, trust_remote_code=self.trust_remote_code
        )
        return model

    def _load_model(self, config: PretrainedConfig) -> PreTrainedModel:
        dtype = getattr(torch, self.dtype)
        if self.random_init:
            return self._from_config(config)
        options: dict[str, Any] = {} if self.allow_pickle else {"use_safetensors": True}
        if self.quantize is not None:
            bits = {"load_in_8bit": self.quantize == "8bit", "load_in_4bit": self.quantize == "4bit"}
            options["quantization_config"] = BitsAndBytesConfig(**bits, bnb_4bit_compute_dtype=dtype)
        model: PreTrainedModel = self._from_pretrained(self.auto, self.path, config=config, dtype=dtype, **options)
        return model

    def _from_pretrained(self, auto: Any, path: str, key: str = "policy.path", **kwargs: Any) -> Any:
        location = Path(resolve(path)).expanduser()
        local = location.is_dir()
        if not local and (path.count("/") > 1 or path.startswith((PACKAGE, ".", "/", "~"))):
            raise UsageError(f"`{key}`: there is no folder {path}, and it is no name on a hub (owner/model).")
        try:
            return auto.from_pretrained(
                str(location) if local else path,
                local_files_only=local,
                trust_remote_code=self.trust_remote_code,
                **{"revision": self.revision, **kwargs},
            )
        except (OSError, ValueError) as error:
            where = f"folder {path}" if local else f"{path}, which is no folder here and could not be had from a hub"
            pickles = "use_safetensors" in kwargs and "safetensors" in str(error)
            remedy = " Pickled weights can run code: load them by `policy.allow_pickle: true`, if you trust them."
            raise UsageError(
                f"`{key}`: cannot load {auto.__name__} from {where}: {error}{remedy if pickles else ''}"
            ) from error


@functools.cache
def _say_once(verdict: Verdict) -> None:
    """One message a family, however many copies of a model are built, and on one rank."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        log.log(logging.INFO if verdict.layout == "stream" else logging.WARNING, str(verdict))


@functools.cache
def _say_that_ranks_load_all(family: str) -> None:
    log.warning(
        f"{family}: every rank loads the whole model before it keeps its part: random weights, adapters that are made "
        "of the weights below them, files that are not safetensors, and families that are stored in another form need "
        "that. The memory of the machine has to hold one model a rank."
    )


def _set_dropout_to_zero(config: PretrainedConfig) -> None:
    for name, value in vars(config).items():
        if isinstance(value, float) and "drop" in name:  # dropout, attn_pdrop, layerdrop
            setattr(config, name, 0.0)
