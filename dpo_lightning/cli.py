"""The command line: LightningCLI, with the data module's tokenizer taken from the model."""

from __future__ import annotations

import inspect
import logging
import signal
import sys
import warnings
from typing import Any, NoReturn

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, LRSchedulerCallable, OptimizerCallable
from transformers.utils import logging as transformers_logging

from dpo_lightning.callbacks import ExportHF, GracefulStop, MemoryPlan, ProgressBar, WriteRewards
from dpo_lightning.data.formats import Format
from dpo_lightning.data.sources import Source
from dpo_lightning.errors import UsageError
from dpo_lightning.explain import explain
from dpo_lightning.inspection import InspectingTrainer
from dpo_lightning.losses import PreferenceLoss
from dpo_lightning.modules.base import PolicyModule
from dpo_lightning.references import Reference
from dpo_lightning.resuming import KeepConfig, go_on, last_of
from dpo_lightning.scorers import Scorer
from dpo_lightning.tools import TOOLS, run_tool, way_on

COMPONENTS = (PreferenceLoss, Reference, Source, Format, Scorer, PolicyModule, LightningDataModule, Callback)
# Callbacks that a command has unless they are given.
ADDED: dict[str | None, tuple[type[Callback], ...]] = {
    "fit": (MemoryPlan, GracefulStop),
    "predict": (WriteRewards,),
}
TOP_LEVEL = (
    *("seed_everything", "model", "data", "optimizer", "lr_scheduler", "trainer", "ckpt_path", "resume"),
    *(f"trainer.{name}" for name in inspect.signature(Trainer.__init__).parameters),
)


class Parser(LightningArgumentParser):
    """A parser that says what is wrong before it says what it would have taken."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with a mistake in words for people; with ``exit_on_error=False``, as the parser does by itself."""
        if not self.exit_on_error:
            super().error(message, ex)
        print(f"error: {explain(message, TOP_LEVEL, COMPONENTS)}", file=sys.stderr)
        sys.exit(2)


class DPOLightningCLI(LightningCLI):
    """LightningCLI with one way in for the optimizer, and a report of what was written where."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """``optimizer`` and ``lr_scheduler`` beside ``model``, as every LightningCLI has them."""
        parser.add_argument(
            "--optimizer", type=OptimizerCallable | None, default=None, help="Instead of AdamW without weight decay."
        )
        parser.add_argument(
            "--lr_scheduler", type=LRSchedulerCallable | None, default=None, help="Instead of warmup_steps, schedule."
        )
        for name in ("optimizer", "lr_scheduler"):
            parser.link_arguments(name, f"model.init_args.{name}")
        parser.add_argument(
            "--resume",
            type=bool,
            default=False,
            help="For fit: go on from the last checkpoint of an earlier run of this command, where there is one.",
        )
        parser.link_arguments("model", "data.init_args.tokenizer", compute_fn=_tokenizer_of, apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """What YAML and flags say holds; a checkpoint's hyperparameters do not override it in silence."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Those of LightningCLI, and ``inspect``."""
        return {**LightningCLI.subcommands(), "inspect": {"model", "datamodule"}}

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer, with a readable progress bar and what a fit or predict needs unless it is given."""
        if self.subcommand == "inspect":  # on a machine that may lack what the config trains on
            return InspectingTrainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        config = self._get(self.config_init, "trainer")
        callbacks: list[Callback] = list(config["callbacks"] or [])
        if config["enable_progress_bar"] is not False and not _has(callbacks, LightningProgressBar):
            callbacks.append(ProgressBar())
        for kind in ADDED.get(self.subcommand, ()):
            if not _has(callbacks, kind):
                callbacks.append(kind())
        config["callbacks"] = callbacks
        if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect() and config["plugins"] is None:
            # Requeueing is the batch script's (configs/slurm): Lightning's would lose the batch in flight.
            config["plugins"] = [SLURMEnvironment(auto_requeue=False)]
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Find the checkpoint to go on from, where one is to be found, before any rank writes."""
        config = self.config_init[self.subcommand]
        resume, path = config["resume"], config["ckpt_path"]
        if resume and path not in (None, "last"):
            raise UsageError("Both `resume` and `ckpt_path` are given; keep one of the two.")
        if resume or path == "last":
            config["ckpt_path"] = go_on(self.trainer, required=not resume)

    def before_validate(self) -> None:
        """Find the last checkpoint, where that is asked for."""
        config = self.config_init[self.subcommand]
        if config["ckpt_path"] == "last":
            config["ckpt_path"] = last_of(self.trainer)

    before_test = before_predict = before_validate

    def after_fit(self) -> None:
        """Say where things were written, on the first rank."""
        log_dir = self.trainer.log_dir  # asked on all ranks, since the Trainer broadcasts it
        if not self.trainer.is_global_zero:
            return
        places = {"Logs": f"{log_dir}   (tensorboard --logdir {log_dir})"}
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ModelCheckpoint):
                score = (
                    ""
                    if callback.best_model_score is None
                    else f"   ({callback.monitor} {callback.best_model_score:.4f})"
                )
                places["Best checkpoint"] = callback.best_model_path + score
                places["Last checkpoint"] = callback.last_model_path
            if isinstance(callback, ExportHF) and callback.written:
                places["Hugging Face folder"] = str(callback.written)
        print("\nWritten")
        for name, place in places.items():
            if place:
                print(f"  {name:20} {place}")


def _has(callbacks: list[Callback], kind: type[Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)


def _tokenizer_of(module: LightningModule) -> Any:
    return module.spec.load_tokenizer() if isinstance(module, PolicyModule) else None


def run(args: list[str] | None = None) -> DPOLightningCLI:
    """Parse arguments (the process's own by default) and do what they say."""
    return DPOLightningCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,  # modules record their own hyperparameters, as plain data
        seed_everything_default=0,
        save_config_callback=KeepConfig,
        save_config_kwargs={"overwrite": True},
        trainer_class=InspectingTrainer,
        trainer_defaults={"inference_mode": False},
        parser_class=Parser,
        parser_kwargs={
            "description": "Preference optimisation of language models: DPO (arXiv:2305.18290) and its family. What "
            "became of it as a Hugging Face folder: dpo-lightning export CHECKPOINT FOLDER."
        },
        args=args,
    )


def main() -> None:
    """Entry point of the command; a mistake of the user's ends with its message alone."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("dpo_lightning").setLevel(logging.INFO)
    transformers_logging.disable_progress_bar()
    # Lightning's advice to install services that log and upload.
    rank_zero = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    rank_zero.addFilter(
        lambda record: "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage()
    )
    # The reference is in evaluation mode on purpose; the other is Lightning's own use of torch.
    warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
    sys.path.append("")  # a user's own classes lie in the folder that the command is started from
    try:
        if sys.argv[1:2] and sys.argv[1] in TOOLS:
            run_tool(sys.argv[1], sys.argv[2:])
        else:
            run()
    except KeyboardInterrupt:
        print(f"\nInterrupted.{way_on(sys.argv[1:])}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        mistake = _usage_error_in(error)
        if mistake is None:
            raise
        print(f"\nerror: {mistake}", file=sys.stderr)
        sys.exit(2)


def _usage_error_in(error: BaseException | None) -> UsageError | None:
    """The user's mistake behind an error, which jsonargparse wraps in errors of its own."""
    while error is not None and not isinstance(error, UsageError):
        error = error.__cause__ or error.__context__
    return error
