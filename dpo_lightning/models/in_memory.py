"""A policy that is there already: a model of a user's own, handed over as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from dpo_lightning.errors import UsageError
from dpo_lightning.models.adapters import REFERENCE, TRAINED, adapter_weights
from dpo_lightning.models.policy import CausalPolicy, LogitsPolicy
from dpo_lightning.models.selfcheck import choose_layout
from dpo_lightning.models.shard import Sharding
from dpo_lightning.models.spec import PolicySpec


@dataclass(frozen=True)
class InMemory:
    """A model in memory, which is trained itself, not a copy of it; its dropout and dtype stay as they are.

    Args:
        model: A Hugging Face model, or any module whose forward takes rows of tokens, shape (rows, columns), and
            returns logits, shape (rows, columns, vocabulary), or an object that has them as logits. Rows are padded
            at the right; attention_mask and position_ids are given too where forward names them. A CausalPolicy is
            taken as it stands.
        tokenizer: Its tokenizer, for callbacks that write texts or export the model.
    """

    model: nn.Module
    tokenizer: Tokenizer | None = None

    compile: ClassVar[bool] = False
    can_be_rebuilt: ClassVar[bool] = False
    auto: ClassVar[Any] = AutoModelForCausalLM
    quantize: ClassVar[None] = None
    trust_remote_code: ClassVar[bool] = False

    @property
    def path(self) -> str:
        """Where its weights came from before it was handed over, as far as it knows."""
        return getattr(getattr(self.model, "config", None), "_name_or_path", "") or self.origin

    @property
    def origin(self) -> str:
        """What it is called in messages."""
        return f"the {type(self.model).__name__} in memory"

    @property
    def dtype(self) -> str:
        """Dtype of the weights."""
        weights = (weight.dtype for weight in self.model.parameters() if weight.is_floating_point())
        return str(next(weights, torch.float32)).removeprefix("torch.")

    @property
    def has_adapters(self) -> bool:
        """Whether a Hugging Face model has an adapter by the name default, as ``add_adapter`` calls it."""
        names = set(getattr(self.model, "peft_config", ()))
        return isinstance(self.model, PreTrainedModel) and TRAINED in names and names <= {TRAINED, REFERENCE}

    @property
    def has_trained_adapter(self) -> bool:
        """Whether that adapter changes the model already: a new one has a factor of zeros."""
        return any("lora_B" in name and bool(weight.any()) for name, weight in adapter_weights(self.model, TRAINED))

    def check(self) -> None:
        """Something must be there to train."""
        if not any(weight.requires_grad for weight in self.model.parameters()):
            raise UsageError(f"All weights of {self.origin} are frozen; let some require gradients.")

    def build(
        self,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype | None = None,
        sharding: Sharding | None = None,
        weights: CausalPolicy | None = None,
    ) -> CausalPolicy:
        """The model as a policy, in training mode.

        Args:
            device: Where it will run, which is where a layout is checked.
            compute_dtype: Dtype of its matrix products, if not that of its weights.
            sharding: None: a model that is there already is whole on every rank.
            weights: None.

        Raises:
            UsageError: If it should be divided among ranks.
        """
        if sharding is not None:
            raise UsageError(
                f"`strategy: fsdp2` divides models as they are loaded, and {self.origin} is there already: name its "
                "folder by PolicySpec(path=...), or use `strategy: ddp`."
            )
        if isinstance(self.model, CausalPolicy):
            return self.model.train()
        if not self._is_plain_decoder():
            return LogitsPolicy(self.model).train()
        assert isinstance(self.model, PreTrainedModel)
        dtype = compute_dtype or getattr(torch, self.dtype)
        verdict = choose_layout(self.model.config, device=device, dtype=dtype)
        return CausalPolicy(self.model, verdict.layout).train()

    def at(self, path: str, revision: str | None) -> PolicySpec:
        """Another model, in the same dtype."""
        return PolicySpec(path=path, revision=revision, dtype=self.dtype)  # type: ignore[arg-type]

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that was handed over with the model."""
        if self.tokenizer is None:
            raise UsageError(f"{self.origin} came without a tokenizer: hand over InMemory(model, tokenizer).")
        return self.tokenizer

    def _is_plain_decoder(self) -> bool:
        """Whether the self-check's small model is of the same class, with an output head that is read by itself."""
        if not isinstance(self.model, PreTrainedModel):
            return False
        known: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(self.model.config), None)
        head = self.model.get_output_embeddings()
        return type(self.model) is known and head is not None and not hasattr(head, "base_layer")


PolicyRecipe = PolicySpec | InMemory
if TYPE_CHECKING:
    AnyPolicy = PolicySpec | InMemory | nn.Module
else:
    AnyPolicy = PolicySpec  # what YAML and flags can say
