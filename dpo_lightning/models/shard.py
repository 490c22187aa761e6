"""What is done to the layers of a model once it is built: activation checkpointing, then compilation."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_lightning.errors import UsageError
from dpo_lightning.models.seam import keep_attention_out_of_graphs


def checkpoint_layers(model: PreTrainedModel, every: int) -> None:
    """Have every n-th decoder layer compute its activations again in backward instead of keeping them."""
    try:
        model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
    except ValueError as error:
        raise UsageError(f"`policy.activation_checkpointing`: {error}") from error


def compile_layers(model: PreTrainedModel) -> None:
    """Compile every decoder layer by itself, for streams of any length; nothing happens before the first forward."""
    keep_attention_out_of_graphs()
    for layer in decoder_layers(model):
        # Nothing is compiled across a checkpoint, so there the parts of the layer are.
        for part in layer.children() if layer.gradient_checkpointing else (layer,):
            part.compile(dynamic=True)


def decoder_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The layers that a model is a stack of.

    Raises:
        UsageError: If there is none that can be told.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UsageError(
            f"`policy.compile`: {type(model).__name__} has no decoder layers that can be compiled one by one; leave it "
            "false."
        )
    return layers
