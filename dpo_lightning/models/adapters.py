"""Low-rank adapters by peft: the policy is frozen weights with a few trained ones beside them."""

from __future__ import annotations

import copy
import functools
import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
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
        settings = self.settings()
        return bool(getattr(settings, "use_dora", False)) or changes_base(settings)

    def add(self, model: PreTrainedModel) -> None:
        """Put the adapter into a model, where it alone is trained.

        Raises:
            UsageError: If peft refuses the settings, or there is no such adapter.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        model.requires_grad_(False)
        with _refusals_in_words():
            if self.path is not None:
                _load_adapter(model, resolve(self.path))
            else:
                model.add_adapter(self.settings(), TRAINED)
        if isinstance(model.get_output_embeddings(), BaseTunerLayer):
            raise UsageError(
                "`policy.lora`: log-probabilities are computed in chunks from the weight of the output head alone, so "
                "it takes no adapter. Leave it out of `target_modules`; `options: {modules_to_save: [lm_head]}` "
                "trains it whole."
            )
        for weight in model.parameters():
            if weight.requires_grad:  # 16 bits would round its updates away
                weight.data = weight.data.float()

    def settings(self) -> Any:
        """What peft is told: these settings, or those of the adapter at the path.

        Raises:
            UsageError: If peft refuses them, or there is no such adapter.
        """
        import peft

        settings = {"r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout}
        targets = {"target_modules": self.target_modules, "task_type": "CAUSAL_LM"}
        with _refusals_in_words():
            if self.path is not None:
                return peft.PeftConfig.from_pretrained(resolve(self.path))
            return peft.LoraConfig(**{**settings, **targets, **self.options})


@contextmanager
def _refusals_in_words() -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"`policy.lora`: peft does not take this: {error}") from error


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
    return re.sub(rf"(\.base_layer|\.original_module|\.modules_to_save\.{TRAINED})+\.", ".", name)


def adapter_weights(model: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Weights of an adapter, by their names without the adapter's."""
    return ((f"{name}.".replace(f".{adapter}.", "."), weight) for name, weight in _named(model, adapter))


def _named(model: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, weight) for name, weight in model.named_parameters() if is_of_adapter(name, adapter))


def is_of_adapter(name: str, adapter: str) -> bool:
    """Whether a weight of this name is one of an adapter."""
    return f".{adapter}." in f"{name}."


def base_fingerprint(model: nn.Module) -> str:
    """Digest of the weights below the adapters."""
    adapters = {name for adapter in (TRAINED, REFERENCE) for name, _ in _named(model, adapter)}
    return digest_of((name, weight) for name, weight in model.named_parameters() if name not in adapters)


def changes_base(settings: Any) -> bool:
    """Whether an adapter of these settings begins by changing the weights below it, as PiSSA does."""
    return getattr(settings, "init_lora_weights", True) not in (True, False, None, "gaussian", "orthogonal")


def outline_adapter(model: PreTrainedModel, settings: Any) -> None:
    """Put an adapter into a model without storage: its parts and their names, not the weights that it begins with."""
    settings = copy.deepcopy(settings)
    if changes_base(settings):
        settings.init_lora_weights = True
    with torch.device("meta"), _refusals_in_words():
        model.add_adapter(settings, TRAINED)


class Step(NamedTuple):
    """How some weights of a plain model come from those of a model with adapters.

    Attributes:
        outputs: Names in the plain model.
        inputs: Names in the model with adapters.
        make: The one from the other.
    """

    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    make: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

    @property
    def merges(self) -> bool:
        """Whether an adapter is involved."""
        return self.outputs != self.inputs


def merging_steps(model: PreTrainedModel) -> Iterator[Step]:
    """What it takes to let weights take up the trained adapter, layer by layer.

    Args:
        model: The model with its adapter; weights are not looked at, so it may be without storage.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    found: dict[str, Any] = {
        n: part for n, part in model.named_modules() if isinstance(part, (BaseTunerLayer, ModulesToSaveWrapper))
    }
    outermost = {n: part for n, part in found.items() if not any(n.startswith(f"{other}.") for other in found)}
    for name, part in outermost.items():
        if isinstance(part, ModulesToSaveWrapper):
            keys = part.modules_to_save[TRAINED].state_dict()
            outputs = tuple(f"{name}.{key}" for key in keys)
            inputs = tuple(f"{name}.modules_to_save.{TRAINED}.{key}" for key in keys)
            yield Step(outputs, inputs, functools.partial(_renamed, dict(zip(inputs, outputs, strict=True))))
        else:
            outputs = tuple(f"{name}.{key}" for key in part.get_base_layer().state_dict())
            inputs = tuple(f"{name}.{key}" for key in part.state_dict())
            yield Step(outputs, inputs, functools.partial(_merge, part, f"{name}."))
    below = tuple(f"{name}." for name in outermost)
    for key in model.state_dict():
        if not key.startswith(below):
            yield Step((key,), (key,), dict)


@torch.no_grad()
def _merge(outline: nn.Module, prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a layer that has taken up its adapter, by peft and in fp32, whatever the weights have."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer: Any = copy.deepcopy(outline)
    wide = {
        name: weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True) for name, weight in weights.items()
    }
    layer.load_state_dict({name.removeprefix(prefix): weight for name, weight in wide.items()}, assign=True)
    for part in layer.modules():
        if isinstance(part, BaseTunerLayer):
            part.merge(adapter_names=[TRAINED])
    return {prefix + name: weight for name, weight in layer.get_base_layer().state_dict().items()}


def _renamed(names: Mapping[str, str], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {names[name]: weight for name, weight in weights.items()}


def below_adapters(model: nn.Module) -> dict[str, str]:
    """Weights that are no adapter's, by their names in a model with adapters; their names in the plain model."""
    adapters = (TRAINED, REFERENCE)
    names = (name for name in model.state_dict() if not any(is_of_adapter(name, adapter) for adapter in adapters))
    return {name: name_below_adapters(name) for name in names}


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
    """The model in evaluation mode with its reference adapter, or with none where there is no such adapter.

    For use without gradients.
    """
    training, trained = model.training, [weight for weight in model.parameters() if weight.requires_grad]
    model.eval()
    has_reference = REFERENCE in model.peft_config
    if has_reference:
        model.set_adapter(REFERENCE)
    else:
        model.disable_adapters()
    _train(model, trained)
    try:
        yield
    finally:
        if has_reference:
            model.set_adapter(TRAINED)
        else:
            _enable_adapters(model)
        _train(model, trained)
        model.train(training)


def _train(model: PreTrainedModel, weights: Iterable[nn.Parameter]) -> None:
    """Have some weights be trained, and no others: who switches adapters by peft changes that.

    FSDP2 takes note of what is trained in the first forward, which may be one of the reference.
    """
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)


def _enable_adapters(model: PreTrainedModel) -> None:
    """As ``model.enable_adapters()``, which forgets the modules that are trained whole."""
    from peft.utils import ModulesToSaveWrapper

    model.enable_adapters()
    for layer in model.modules():
        if isinstance(layer, ModulesToSaveWrapper):
            layer.enable_adapters(enabled=True)
