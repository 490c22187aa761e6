"""Reward and KL while a policy trains."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from transformers import PreTrainedTokenizerBase as Tokenizer

from dpo_lightning.callbacks.prompts import encoding_of, numbered
from dpo_lightning.errors import UsageError
from dpo_lightning.evaluation.plot import draw as picture_of
from dpo_lightning.evaluation.points import TRACKED, Point, read_file
from dpo_lightning.evaluation.reward_book import rewarded
from dpo_lightning.evaluation.rewards import Drawing, Drawn, Engine, Score, draw, point_of
from dpo_lightning.journal import write_whole
from dpo_lightning.models.shard import is_sharded
from dpo_lightning.modules.base import PolicyModule
from dpo_lightning.modules.dpo import DPOModule
from dpo_lightning.modules.referenced import ReferencedModule
from dpo_lightning.references.base import FrozenPolicy
from dpo_lightning.references.synced import Synced
from dpo_lightning.scorers import Prompt, Scorer

LOGGED = ("reward", "reward_se", "kl", "kl_se", "length_mean", "finished")


class TrackRewardKL(Callback):
    """Mean reward of held-out samples and their KL to the reference, with standard errors, while a policy trains.

    Logs `frontier/reward`, `frontier/kl` and more, and keeps a line a measurement in `frontier.jsonl` beside the logs,
    which `dpo-lightning frontier` draws. Samples are drawn at temperature 1 from the whole vocabulary. They are drawn
    before training, behind every validation or every n steps, and behind training; that changes nothing in training.
    Prompts become text and are cut as the data module does it.

    Args:
        prompts: Held-out prompts, or the path of a file of rows with a column prompt.
        scorer: What gives a response its reward.
        num_samples: Samples a prompt.
        max_new_tokens: Most tokens of a sample.
        every_n_steps: Optimizer steps between measurements; behind every validation unless given.
        method: What `frontier` calls the method; by default the loss, or the module.
        label: Which run of the method it is, as in "beta 0.1".
        reference: Folder or hub name of the policy that training begins with: needed where the module has no
            reference, one that scores the data alone, or one that follows the policy.
        seed: Seed of the samples.
        batch_size: Samples drawn at a time.
    """

    def __init__(
        self,
        prompts: str | list[Prompt],
        scorer: Scorer,
        num_samples: int = 4,
        max_new_tokens: int = 64,
        every_n_steps: int | None = None,
        method: str | None = None,
        label: str = "",
        reference: str | None = None,
        seed: int = 0,
        batch_size: int = 256,
    ) -> None:
        self.drawing = Drawing(num_samples, max_new_tokens, seed, batch_size)
        self.drawing.check()
        if every_n_steps is not None and every_n_steps < 1:
            raise UsageError(f"`every_n_steps` must be 1 or more, got {every_n_steps}.")
        self.prompts = numbered(prompts)
        self.scorer, self.every_n_steps = scorer, every_n_steps
        self.method, self.label, self.reference = method, label, reference
        self._measured_at = -1
        self._tokenizer: Tokenizer
        self._score_by_reference: Score

    def setup(self, trainer: Trainer, pl_module: PolicyModule, stage: str) -> None:  # type: ignore[override]
        """Say what cannot be measured before anything is trained."""
        if stage != "fit":
            return
        if self.reference is None and not _has_reference(pl_module):
            raise UsageError(
                f"TrackRewardKL measures the KL to a reference, and this {type(pl_module).__name__} has none that "
                "scores samples and stays as it is: name the folder of the policy that training begins with by its "
                "`reference`."
            )
        strategy = trainer.strategy
        if trainer.world_size > 1 and not isinstance(strategy, (DDPStrategy, ModelParallelStrategy)):
            raise UsageError(
                f"TrackRewardKL cannot have a policy write under {type(strategy).__name__}; use `strategy: ddp` or "
                "`strategy: fsdp2`, or leave it out of `trainer.callbacks`."
            )

    def on_train_start(self, trainer: Trainer, pl_module: PolicyModule) -> None:  # type: ignore[override]
        """Measure the policy as training finds it, unless that was done when a run that goes on began."""
        assert pl_module.policy is not None
        if not hasattr(pl_module.policy.model, "generate"):
            raise UsageError(
                f"TrackRewardKL has the policy write, and {pl_module.spec.origin} has no `generate` as Hugging Face "
                "models have; leave it out of `trainer.callbacks`."
            )
        self._tokenizer = pl_module.spec.load_tokenizer()
        with _aside(pl_module):
            self._score_by_reference = self._reference(trainer, pl_module)
        self._measured_at = -1
        if trainer.global_step == 0:
            self._measure(trainer, pl_module)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: PolicyModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure every n steps."""
        step = trainer.global_step
        if self.every_n_steps and step % self.every_n_steps == 0 and step not in (0, self._measured_at):
            with pl_module.untimed():
                self._measure(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: PolicyModule) -> None:  # type: ignore[override]
        """Measure, unless that is done every n steps."""
        if self.every_n_steps is None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: PolicyModule) -> None:  # type: ignore[override]
        """Measure the trained policy."""
        self._measure(trainer, pl_module)

    def _measure(self, trainer: Trainer, module: PolicyModule) -> None:
        step = trainer.global_step
        if step == self._measured_at:
            return
        self._measured_at = step
        with _aside(module), trainer.precision_plugin.forward_context():
            drawn = self._draw(trainer, module)
        point = self._on_first_rank(trainer, module, drawn)
        figures = {f"frontier/{name}": getattr(point, name) for name in LOGGED if getattr(point, name) is not None}
        for logger in trainer.loggers:
            logger.log_metrics(figures, step)
        self._keep(trainer, point)

    def _draw(self, trainer: Trainer, module: PolicyModule) -> list[Drawn]:
        """Samples of all prompts, of which ranks draw a share each if they have whole policies."""
        policy = module.policy
        assert policy is not None
        engine = Engine(
            policy.model,
            self._tokenizer,
            policy.generate,
            module,
            self._score_by_reference,
            lambda batch: module.transfer_batch_to_device(batch, module.device, 0),
            encoding_of(trainer),
        )
        chunks = list(enumerate(self.drawing.chunks(self.prompts)))
        alone = trainer.world_size == 1 or is_sharded(policy)
        own = chunks if alone else chunks[trainer.global_rank :: trainer.world_size]
        drawn = [one for number, chunk in own for one in draw(engine, self.drawing, chunk, number)]
        if alone:
            return drawn
        of_ranks: list[list[Drawn]] = [[] for _ in range(trainer.world_size)]
        torch.distributed.all_gather_object(of_ranks, drawn)
        return sorted(one for ranks in of_ranks for one in ranks)

    def _on_first_rank(self, trainer: Trainer, module: PolicyModule, drawn: list[Drawn]) -> Point:
        """The point; one rank asks the scorer, and where it fails all ranks do."""
        found: Point | UsageError | None = None
        if trainer.is_global_zero:
            named = {"method": self.method or _method(module), "label": self.label, "step": trainer.global_step}
            try:
                with isolate_rng():
                    found = point_of(rewarded(self.scorer, drawn), **named)
            except Exception as error:
                if trainer.world_size == 1:
                    raise
                found = error if isinstance(error, UsageError) else UsageError(f"{type(error).__name__}: {error}")
        found = trainer.strategy.broadcast(found)
        if isinstance(found, UsageError):
            raise found
        assert found is not None
        return found

    def _keep(self, trainer: Trainer, point: Point) -> None:
        """Add the point to those of earlier steps; later ones are of a run that was killed, and are measured again."""
        path = Path(trainer.log_dir or trainer.default_root_dir) / TRACKED  # asked on all ranks: it is broadcast
        if not trainer.is_global_zero:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        earlier = read_file(path) if path.exists() else []
        here = [one for one in earlier if one.run != point.run or (one.step or 0) < (point.step or 0)]
        points = [*here, point]
        write_whole(path, "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in points))
        if importlib.util.find_spec("matplotlib"):
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_figure("frontier", picture_of(points), point.step)

    def _reference(self, trainer: Trainer, module: PolicyModule) -> Score:
        """What gives the reference's log-probabilities."""
        if self.reference is None:
            return module.reference_logps  # type: ignore[return-value]
        policy = module.load(module.spec.at(self.reference, None))
        trainer.precision_plugin.convert_module(policy)
        return FrozenPolicy(policy if is_sharded(policy) else policy.to(module.device))


@contextmanager
def _aside(module: PolicyModule) -> Iterator[None]:
    """Evaluation mode, and random states as if nothing had been drawn."""
    training = module.training
    module.eval()
    with isolate_rng():
        yield
    module.train(training)


def _has_reference(module: PolicyModule) -> bool:
    """Whether a module's reference scores any text, and is the same from the first step to the last."""
    if not isinstance(module, ReferencedModule) or not module.needs_reference:
        return False
    return not module.reference.sums_alone and not isinstance(module.reference, Synced)


def _method(module: PolicyModule) -> str:
    if isinstance(module, DPOModule):
        return type(module.loss).__name__.removesuffix("Loss")
    return type(module).__name__.removesuffix("Module")
