"""Reward models: a decoder with a scalar head, read at the last token of every response."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from dpo_lightning.batch import PreferenceBatch
from dpo_lightning.errors import UsageError
from dpo_lightning.models.adapters import LoRA
from dpo_lightning.models.in_memory import InMemory
from dpo_lightning.models.materialize import Reader
from dpo_lightning.models.policy import CausalPolicy, Layout
from dpo_lightning.models.selfcheck import choose_layout, quiet
from dpo_lightning.models.shard import Sharding
from dpo_lightning.models.spec import PolicySpec

HEAD = "score"  # what transformers calls it
OFFSET = "reward_offset"  # in configs of exported folders
READING = "reward_reading"  # how training read its texts, likewise


class RewardDecoder(CausalPolicy):
    """A decoder that gives responses rewards; it reads batches as a CausalPolicy does.

    Args:
        model: A Hugging Face model for sequence classification with one label.
        layout: As in CausalPolicy.
    """

    def __init__(self, model: PreTrainedModel, layout: Layout = "stream") -> None:
        super().__init__(model, layout)
        head_of(model)

    @property
    def head(self) -> nn.Linear:
        """The scalar head."""
        return head_of(self.model)

    @property
    def exact_parts(self) -> tuple[nn.Module, ...]:
        """What is never gathered in fewer bits than it has."""
        return (self.head,)

    def forward(self, batch: PreferenceBatch) -> Tensor:  # type: ignore[override]
        """Reward of every response, 0 where it is absent, in the dtype of the head, shape ``(B, K)``."""
        hidden, _ = self.read(batch)
        states = hidden.index_select(0, self._last_tokens(batch))
        with torch.autocast(states.device.type, enabled=False):
            values = self.head(states.to(self.head.weight.dtype))[:, 0]
        present = batch.length > 0
        # Sequences are the responses that are present, in order.
        place = (present.flatten().cumsum(0) - 1).clamp(min=0).view(present.shape)
        return torch.where(present, values[place], 0.0)

    def _last_tokens(self, batch: PreferenceBatch) -> Tensor:
        """Where in the hidden states the last token of each sequence stands, shape ``(S,)``."""
        start, end, prefix_start, prefix_end = batch.spans.unbind(1)
        if self.layout == "stream":
            return end - 1
        length = end - start + prefix_end - prefix_start
        return torch.arange(len(length), device=length.device) * batch.max_key + length - 1


@dataclass(frozen=True, kw_only=True)
class RewardSpec(PolicySpec):
    """A reward model and how it is loaded: a causal language model, such as that of SFT, with a new scalar head.

    A folder with a model for sequence classification with one label brings its head with it.

    Args:
        head_seed: Seed of a new head, whose weights are normal with deviation 1 / sqrt(width + 1).
    """

    auto: ClassVar[Any] = AutoModelForSequenceClassification
    engine: ClassVar[type[CausalPolicy]] = RewardDecoder

    head_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora is not None:
            object.__setattr__(self, "lora", _beside_head(self.lora))

    def load_config(self) -> PretrainedConfig:
        """The model's config, with one label."""
        config = super().load_config()
        if has_head(config) and config.num_labels != 1:
            raise UsageError(
                f"`policy.path`: {self.path} tells {config.num_labels} classes apart, and a reward is one number; name "
                "the language model that it was made of, or one with one label."
            )
        brought = getattr(config, "auto_map", None) or {}
        if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and self.auto.__name__ not in brought:
            raise UsageError(
                f"`policy.path`: transformers has no class for sequence classification with {config.model_type}, so "
                "a reward model of it could be neither built nor exported. Take a model of another family."
            )
        config.num_labels = 1
        return config

    def assemble(self, model: PreTrainedModel, layout: Layout) -> CausalPolicy:
        """The reward model in training mode; refuses an adapter under which the head would not be trained."""
        policy = super().assemble(model, layout)
        if not any(weight.requires_grad for weight in head_of(policy.model).parameters()):
            raise UsageError(
                f"`policy.lora.path`: the adapter {self.lora.path if self.lora else ''} is of no reward model: it has "
                f"no {HEAD}. Let the weights take it up (dpo-lightning export), and give that folder as `policy.path`."
            )
        return policy

    def _load_model(self, config: PretrainedConfig) -> PreTrainedModel:
        return self._with_head(super()._load_model(config))

    def _from_pretrained(self, auto: Any, path: str, key: str = "policy.path", **kwargs: Any) -> Any:
        if auto is not self.auto:
            return super()._from_pretrained(auto, path, key, **kwargs)
        # The language model's head is left over and the scalar one is missing on purpose; for that transformers draws
        # one, which is to be no matter to what is drawn behind it.
        with quiet(), torch.random.fork_rng([]):
            model, info = super()._from_pretrained(auto, path, key, **kwargs, output_loading_info=True)
        if missing := sorted(set(info["missing_keys"]) - {f"{HEAD}.weight"}):
            raise UsageError(f"`{key}`: {path} lacks weights: {', '.join(missing[:3])}.")
        return model

    def _without_storage(
        self, config: PretrainedConfig, read: bool
    ) -> tuple[PreTrainedModel | None, Mapping[str, Reader]]:
        model, readers = super()._without_storage(config, read)
        return model if model is None else self._with_head(model), readers

    def _with_head(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model, its head in float32 and drawn anew unless it was stored."""
        head, weight = head_of(model), head_of(model).weight.detach().float()
        if self.random_init or not has_head(model.config):
            generator = torch.Generator().manual_seed(self.head_seed)
            weight = torch.randn(weight.shape, generator=generator) * (weight.shape[1] + 1) ** -0.5
        head.weight = nn.Parameter(weight)
        return model


@dataclass(frozen=True)
class RewardInMemory(InMemory):
    """A reward model in memory, which is trained itself, not a copy of it.

    Args:
        model: A Hugging Face decoder for sequence classification with one label.
        tokenizer: Its tokenizer, for callbacks that export the model.
    """

    auto: ClassVar[Any] = AutoModelForSequenceClassification

    def build(
        self,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype | None = None,
        sharding: Sharding | None = None,
        weights: CausalPolicy | None = None,
    ) -> CausalPolicy:
        """The model as a reward model, in training mode."""
        if isinstance(self.model, RewardDecoder):
            return self.model.train()
        if sharding is not None or not isinstance(self.model, PreTrainedModel):
            return super().build(device, compute_dtype, sharding, weights)
        head_of(self.model)
        dtype = compute_dtype or getattr(torch, self.dtype)
        verdict = choose_layout(self.model.config, device=device, dtype=dtype)
        return RewardDecoder(self.model, verdict.layout).train()


def head_of(model: PreTrainedModel) -> nn.Linear:
    """The scalar head of a model.

    Raises:
        UsageError: If it has none of which the reward is known: one linear layer without bias at the last token.
    """
    head: Any = getattr(model, HEAD, None)
    brought = getattr(model.config, "auto_map", None) or {}
    is_causal = type(model.config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in brought
    shape = tuple(getattr(getattr(head, "weight", None), "shape", ()))
    if not is_causal or shape[:1] != (1,) or getattr(head, "bias", None) is not None:
        raise UsageError(
            f"{type(model).__name__} is no decoder with a scalar head: rewards are read at the last token by a linear "
            f"layer without bias, called {HEAD}, with one label."
        )
    return head


def has_head(config: PretrainedConfig) -> bool:
    """Whether the weights that a config lies with have a head for classification."""
    return any(name.endswith("ForSequenceClassification") for name in getattr(config, "architectures", None) or ())


def _beside_head(lora: LoRA) -> LoRA:
    """The same adapters, in a model whose head is trained whole."""
    whole = {*(lora.options.get("modules_to_save") or ()), HEAD}
    return dataclasses.replace(lora, options={**lora.options, "task_type": "SEQ_CLS", "modules_to_save": sorted(whole)})


def reward_recipe(policy: Any) -> Any:
    """How a reward model is built, of what a user names: a recipe of a language model, or a model in memory.

    Raises:
        UsageError: If a module in memory is no Hugging Face model.
    """
    if isinstance(policy, dict) and "path" in policy:
        return RewardSpec(**policy)
    if isinstance(policy, PolicySpec) and not isinstance(policy, RewardSpec):
        fields = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
        return RewardSpec(**fields)
    if isinstance(policy, InMemory):
        policy = policy if isinstance(policy, RewardInMemory) else RewardInMemory(policy.model, policy.tokenizer)
    elif isinstance(policy, nn.Module):
        policy = RewardInMemory(policy)
    if isinstance(policy, RewardInMemory) and not isinstance(policy.model, (PreTrainedModel, RewardDecoder)):
        raise UsageError(f"{policy.origin} is no Hugging Face model for sequence classification with one label.")
    return policy


if TYPE_CHECKING:
    AnyReward = PolicySpec | InMemory | nn.Module
else:
    AnyReward = RewardSpec  # what YAML and flags can say
