"""Low-rank adapters by peft: the policy is frozen weights with a few trained ones beside them."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dpo_lightning.errors import UsageError
from dpo_lightning.models.fingerprint import digest_of
from dpo_lightning.paths import resolve

TRAINED, REFERENCE = "default", "reference"


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adapters, Hu et al. 2021, arXiv:2106.09685, and their relatives by peft; needs the extra peft.

    Args:
        rank: Rank of the update of a weight.
        alpha: The update counts alpha / rank times.
        dropout: Share of an adapter's inputs that is dropped in training.
        target_modules: Names of the layers that get an adapter, or all-linear: all but the output head.
        options: Whatever else peft.LoraConfig takes, as in {use_dora: true, use_rslora: true}.
        path: Folder or hub name of an adapter to go on training, whose own settings hold instead of all of these.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    options: Mapping[str, Any] = field(default_factory=dict)
    path: str | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"`policy.lora.rank` must be 1 or more, got {self.rank}; 8 to 64 is usual.")
        if importlib.util.find_spec("peft") is None:
            raise UsageError('`policy.lora` needs peft: pip install -c constraints.txt -e ".[peft]".')

    @property
    def begins_from_weights(self) -> bool:
        """Whether what an adapter begins with is computed from the weights below it."""
        start = self.options.get("init_lora_weights")
        return bool(self.options.get("use_dora")) or (isinstance(start, str) and start != "gaussian")

    def add(self, model: PreTrainedModel) -> None:
        """Put the adapter into a model, where it alone is trained.

        Raises:
            UsageError: If peft refuses the settings, or there is no such adapter.
        """
        import peft
        from peft.tuners.tuners_utils import BaseTunerLayer

        model.requires_grad_(False)
        try:
            if self.path is not None:
                _load_adapter(model, resolve(self.path))
            else:
                settings = {"r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout}
                targets = {"target_modules": self.target_modules, "task_type": "CAUSAL_LM"}
                model.add_adapter(peft.LoraConfig(**{**settings, **targets, **self.options}), TRAINED)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise UsageError(f"`policy.lora`: peft does not take this: {error}") from error
        if isinstance(model.get_output_embeddings(), BaseTunerLayer):
            raise UsageError(
                "`policy.lora`: log-probabilities are computed in chunks from the weight of the output head alone, so "
                "it takes no adapter. Leave it out of `target_modules`; `options: {modules_to_save: [lm_head]}` "
                "trains it whole."
            )
        for weight in model.parameters():
            if weight.requires_grad:  # 16 bits would round its updates away
                weight.data = weight.data.float()


def _load_adapter(model: PreTrainedModel, path: str) -> None:
    """By peft itself: ``model.load_adapter`` forgets the magnitudes of DoRA and trains embeddings below adapters."""
    import peft

    config = peft.PeftConfig.from_pretrained(path)
    config.inference_mode = False
    model.add_adapter(config, TRAINED)
    weights = peft.load_peft_weights(path, device="cpu")
    weights = {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}
    result: Any = peft.set_peft_model_state_dict(model, weights, TRAINED)
    if unexpected := result.unexpected_keys:
        raise ValueError(f"{path} holds weights that the model has no place for: {', '.join(unexpected[:3])}")


def name_below_adapters(name: str) -> str:
    """Name that a weight has in a model without adapters."""
    for part in (".base_layer.", f".modules_to_save.{TRAINED}.", ".original_module."):
        name = name.replace(part, ".")
    return name


def adapter_weights(model: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Weights of an adapter, by their names without the adapter's."""
    return ((f"{name}.".replace(f".{adapter}.", "."), weight) for name, weight in _named(model, adapter))


def _named(model: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, weight) for name, weight in model.named_parameters() if f".{adapter}." in f"{name}.")


def base_fingerprint(model: nn.Module) -> str:
    """Digest of the weights below the adapters."""
    adapters = {name for adapter in (TRAINED, REFERENCE) for name, _ in _named(model, adapter)}
    return digest_of((name, weight) for name, weight in model.named_parameters() if name not in adapters)


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model whose weights have taken up the trained adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(adapter_names=[TRAINED])
            whole = layer.get_base_layer()
        elif isinstance(layer, ModulesToSaveWrapper):
            whole = layer.modules_to_save[TRAINED]
        else:
            continue
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, whole)
    model.delete_adapter(list(model.peft_config))
    return model


@torch.no_grad()
def copy_adapter(model: PreTrainedModel) -> None:
    """A second adapter with the weights of the trained one, itself not trained."""
    model.add_adapter(model.peft_config[TRAINED], REFERENCE)
    model.set_adapter(TRAINED)
    trained = dict(adapter_weights(model, TRAINED))
    for name, weight in adapter_weights(model, REFERENCE):
        weight.copy_(trained[name])
        weight.requires_grad_(False)
    model.train(model.training)  # the new parts too


@contextmanager
def as_reference(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode with its reference adapter, or with none where there is no such adapter."""
    training, trained = model.training, [weight for weight in model.parameters() if weight.requires_grad]
    model.eval()
    has_reference = REFERENCE in model.peft_config
    if has_reference:
        model.set_adapter(REFERENCE)
    else:
        model.disable_adapters()
    try:
        yield
    finally:
        if has_reference:
            model.set_adapter(TRAINED)
        else:
            _enable_adapters(model)
        # Who switches adapters by peft changes what is trained.
        model.requires_grad_(False)
        for weight in trained:
            weight.requires_grad_(True)
        model.train(training)


def _enable_adapters(model: PreTrainedModel) -> None:
    """As ``model.enable_adapters()``, which forgets the modules that are trained whole."""
    from peft.utils import ModulesToSaveWrapper

    model.enable_adapters()
    for layer in model.modules():
        if isinstance(layer, ModulesToSaveWrapper):
            layer.enable_adapters(enabled=True)
