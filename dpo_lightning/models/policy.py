"""The log-prob engine: any Hugging Face decoder, a batch in, summed log-probabilities of its responses out."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from dpo_lightning.batch import Logps, PreferenceBatch
from dpo_lightning.errors import UsageError
from dpo_lightning.functional.head import Outputs
from dpo_lightning.functional.layout import RaggedLayout
from dpo_lightning.functional.logps import sum_by_owner, token_logps
from dpo_lightning.functional.vocabulary import log_collision, token_kl
from dpo_lightning.models.seam import ATTENTION, stream_mask
from dpo_lightning.models.shard import is_sharded

log = logging.getLogger(__name__)
Layout = Literal["stream", "rows"]


class CausalPolicy(nn.Module):
    """A causal language model that scores responses.

    Args:
        model: A Hugging Face model with a language-modelling head.
        layout: How tokens are laid out for the model. ``stream`` runs each prompt once and needs a model whose
            attention goes through transformers' attention interface; ``rows`` pads every sequence into a row of
            its own and works for any decoder. Whether a family may use ``stream`` is not a matter of its name:
            :func:`dpo_lightning.models.selfcheck.choose_layout` finds out.
    """

    def __init__(self, model: PreTrainedModel, layout: Layout = "stream") -> None:
        super().__init__()
        self.model = model
        self.layout: Layout = layout
        self.logit_scale, self.logit_softcap = logit_constants(model.config)
        self._takes_positions = "position_ids" in inspect.signature(model.base_model.forward).parameters
        self._context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if layout == "stream":
            model.set_attn_implementation(ATTENTION)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Buffers move with the weights but keep their precision: in bf16 rotary frequencies are radians off."""
        exact = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            owner, _, attribute = name.rpartition(".")
            module = self.get_submodule(owner)
            setattr(module, attribute, buffer.to(getattr(module, attribute).device))
        return self

    def forward(
        self,
        batch: PreferenceBatch,
        reference: Outputs | None = None,
        collision: bool = False,
        outputs_alone: bool = False,
    ) -> Logps | Outputs:
        """Log-probabilities of every response, fp32 or wider.

        Args:
            batch: What to score.
            reference: What a reference says of the same batch, where the divergence from it is asked for.
            collision: Whether the collision probability at every token is asked for.
            outputs_alone: Give what log-probabilities are computed from instead, as :meth:`outputs` does.
        """
        outputs = self.compute_outputs(batch)
        if outputs_alone:
            if is_sharded(self) and outputs.weight is not None:  # what is gathered may be gone behind the forward
                outputs = outputs._replace(weight=outputs.weight.clone())
            return outputs
        logps = score(outputs, batch)
        if is_sharded(self):  # whose hooks on what is returned a view would lose
            logps = logps._replace(total=logps.total.clone())
        return logps._replace(
            collision=log_collision(outputs) if collision else None,
            kl=None if reference is None else token_kl(reference, outputs),
        )

    def outputs(self, batch: PreferenceBatch) -> Outputs:
        """Hidden states that predict the scored tokens, in the order of ``batch.target``, and the output head."""
        return self(batch, outputs_alone=True)

    def generate(self, **kwargs: Any) -> Any:
        """What the model's own ``generate`` does; with divided weights all ranks have to call it alike."""
        together = {"synced_gpus": True} if is_sharded(self) else {}  # who comes to an end waits for the others
        return self.model.generate(**together, **kwargs)  # type: ignore[operator]

    def compute_outputs(self, batch: PreferenceBatch) -> Outputs:
        """What :meth:`outputs` gives; a policy of another kind overrides this."""
        hidden, source = self.read(batch)
        head = self.model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        return Outputs(hidden.index_select(0, source), head.weight, bias, self.logit_scale, self.logit_softcap)

    def read(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """Hidden states as they are laid out, and where in them the predictors of response tokens stand, (N,)."""
        if self._context is not None and batch.max_key > self._context:
            _warn_of_length(batch.max_key, self._context)
        return self._read_stream(batch) if self.layout == "stream" else self._read_rows(batch)

    def _read_stream(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """Hidden states of the stream, (T, D), and where in them the predictors of response tokens stand, (N,)."""
        layout = RaggedLayout(batch.spans, batch.key_index, batch.max_query, batch.max_key)
        output = self.model.base_model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            attention_mask=stream_mask(batch.input_ids.device),
            use_cache=False,
            ragged_layout=layout,
        )
        return output.last_hidden_state[0], batch.source

    def _read_rows(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """The same from one padded row a sequence: hidden states (S * L, D) and positions in them (N,)."""
        rows, mask, source = padded_rows(batch)
        inputs: dict[str, Any] = {"input_ids": batch.input_ids[rows], "attention_mask": mask, "use_cache": False}
        if self._takes_positions:
            inputs["position_ids"] = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
        hidden = self.model.base_model(**inputs).last_hidden_state
        return hidden.flatten(0, 1), source


class LogitsPolicy(CausalPolicy):
    """Any module that maps padded rows of tokens to logits; those of all tokens then exist.

    Args:
        model: Its forward takes token ids, shape (rows, columns), and by name attention_mask and position_ids where it
            has them; it returns logits, shape (rows, columns, vocabulary), or an object that has them as logits.
    """

    def __init__(self, model: nn.Module) -> None:
        nn.Module.__init__(self)
        self.model = model  # type: ignore[assignment]
        self.layout = "rows"
        self._takes = frozenset(inspect.signature(model.forward).parameters)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As the module does it."""
        return nn.Module._apply(self, fn, recurse)

    def compute_outputs(self, batch: PreferenceBatch) -> Outputs:
        """Logits that predict the scored tokens, in the order of ``batch.target``.

        Raises:
            UsageError: If the module returns something else.
        """
        rows, mask, source = padded_rows(batch)
        positions = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
        offered = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
        returned = self.model(
            batch.input_ids[rows], **{name: value for name, value in offered.items() if name in self._takes}
        )
        logits = getattr(returned, "logits", returned)
        if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != rows.shape:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(returned).__name__
            raise UsageError(
                f"{type(self.model).__name__} returns {found} for token ids of shape {tuple(rows.shape)}; its forward "
                "must return logits of shape (rows, columns, vocabulary), or an object that has them as `logits`."
            )
        return Outputs(logits.flatten(0, 1).index_select(0, source), None)


def score(outputs: Outputs, batch: PreferenceBatch) -> Logps:
    """Log-probabilities of a batch's responses from what a model says of it."""
    hidden, weight, bias, scale, softcap = outputs
    token = token_logps(hidden, batch.target, weight, bias, scale=scale, softcap=softcap)
    return Logps(sum_by_owner(token, batch.owner, batch.length.shape), batch.length, token, batch.owner)


@functools.cache
def _warn_of_length(length: int, context: int) -> None:
    log.warning(
        f"A prompt with its response has {length:,} tokens, but the model's config knows {context:,} positions: unless "
        "its positions are scaled, what it says of them is worthless. Lower `data.init_args.max_length`."
    )


def padded_rows(batch: PreferenceBatch) -> tuple[Tensor, Tensor, Tensor]:
    """A stream unrolled into one row a sequence, padded at the right, without a word to the host.

    Returns:
        Flat stream positions, shape ``(S, max_key)`` (padding repeats position 0); the attention mask, int64, same
        shape; and for every response token the flat position in these rows that predicts it, shape ``(N,)``.
    """
    start, end, prefix_start, prefix_end = batch.spans.unbind(1)
    length = end - start + prefix_end - prefix_start
    column = torch.arange(batch.max_key, device=length.device)
    mask = column < length[:, None]
    offset = torch.cumsum(length, 0) - length
    index = torch.where(mask, offset[:, None] + column, 0)
    rows = index if batch.key_index is None else batch.key_index[index]

    # A token's position in its sequence is its column.
    row_of_response = torch.cumsum(batch.length.flatten() > 0, 0) - 1
    source = row_of_response[batch.owner] * batch.max_key + batch.position_ids[batch.source]
    return torch.where(mask, rows, 0), mask.long(), source


def logit_constants(config: PretrainedConfig) -> tuple[float, float | None]:
    """Factor and final softcap that a family applies between its output head and its logits.

    Cohere and Cohere 2 multiply (``logit_scale``), Falcon-H1 multiplies (``lm_head_multiplier``), Granite divides
    (``logits_scaling``); Gemma 2, Gemma 3 and RecurrentGemma cap. That nothing is missing here is what
    the self-check finds out.
    """
    config = config.get_text_config()
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    return float(scale), softcap
