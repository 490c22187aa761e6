"""What is exported is the trained policy: by from_pretrained it gives the same log-probabilities."""

import gc
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import PeftModel
from safetensors import safe_open
from small_runs import data, module, rows, trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import dpo_lightning.cli
from dpo_lightning import PolicySpec, PreferenceDataModule, SFTModule
from dpo_lightning.callbacks import ExportHF
from dpo_lightning.data.chat import Chat
from dpo_lightning.errors import UsageError
from dpo_lightning.export import export, save_policy, writing
from dpo_lightning.models.adapters import LoRA
from dpo_lightning.references import Synced

IDS = torch.tensor([[1, 5, 9, 20, 31, 7, 250, 3]])
ROOT = Path(__file__).parent.parent.parent


@torch.no_grad()
def logps(model):
    """Log-probabilities of all tokens, in evaluation mode."""
    return model.eval()(input_ids=IDS, use_cache=False).logits.log_softmax(-1)


def loaded(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def shard(dpo, folder):
    """A sharded checkpoint, laid out as Lightning does."""
    dcp.save(
        {"state_dict": dpo.state_dict(), "optimizer_0": {"step": torch.ones(1)}}, checkpoint_id=folder, no_dist=True
    )
    record = {"hyper_parameters": dict(dpo.hparams), "global_step": 4, "provenance": dpo.provenance()}
    torch.save(record, folder / "meta.pt")


def as_trained(dpo, path):
    """A module whose weights are such as training might leave, and a checkpoint of it."""
    dpo.configure_model()
    with torch.no_grad():
        for weight in dpo.policy.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.05)
    checkpoint = {"state_dict": dpo.state_dict(), "hyper_parameters": dict(dpo.hparams)}
    dpo.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return dpo


@pytest.fixture(scope="module")
def runs(tiny_llama, tmp_path_factory):
    """A function from a kind to a trained module and its checkpoint."""
    place, done = tmp_path_factory.mktemp("runs"), {}
    kinds = {
        "full": {},
        "lora": {"lora": LoRA(rank=2)},
        "dora and head": {"lora": LoRA(rank=2, options={"use_dora": True, "modules_to_save": ["lm_head"]})},
        "synced": {"reference": Synced(interval=2)},
        "bfloat16": {"dtype": "bfloat16"},
        "sft": {"cls": SFTModule},
    }

    def of(kind):
        if kind not in done:
            torch.manual_seed(0)
            trained = module(tiny_llama, **kinds[kind])
            one = 1 if kind == "sft" else None
            run = trainer(place, max_steps=4)
            run.fit(trained, data(tiny_llama, num_responses=one))
            run.save_checkpoint(place / f"{kind}.ckpt")
            done[kind] = trained, place / f"{kind}.ckpt"
        return done[kind]

    return of


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [("full", 1e-6), ("synced", 1e-6), ("sft", 1e-6), ("bfloat16", 1e-6), ("lora", 1e-5), ("dora and head", 1e-5)],
)
def test_the_exported_model_is_the_trained_policy(runs, tiny_llama, tmp_path, kind, tolerance):
    trained, checkpoint = runs(kind)
    export(str(checkpoint), str(tmp_path / "hf"))
    model, expected = loaded(tmp_path / "hf"), logps(trained.policy.model)
    torch.testing.assert_close(logps(model), expected, atol=tolerance, rtol=0)
    assert (logps(AutoModelForCausalLM.from_pretrained(tiny_llama)) - expected).abs().max() > 1e-2
    assert str(model.dtype) == f"torch.{trained.spec.dtype}"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tiny_llama).get_vocab()
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_llama).chat_template
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert not any("reference" in name or "lora" in name for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("kind", ["lora", "dora and head"])
def test_adapters_alone_are_loaded_by_peft(runs, tiny_llama, tmp_path, kind):
    trained, checkpoint = runs(kind)
    export(str(checkpoint), str(tmp_path / "hf"), adapter="save")
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= names
    assert not {"model.safetensors", "config.json"} & names
    assert json.loads((tmp_path / "hf" / "adapter_config.json").read_text())["base_model_name_or_path"] == tiny_llama
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = PeftModel.from_pretrained(base, str(tmp_path / "hf"))
    torch.testing.assert_close(logps(model), logps(trained.policy.model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_sharded_checkpoint_gives_the_same_files(runs, tmp_path, kind):
    trained, checkpoint = runs(kind)
    shard(trained, tmp_path / "sharded")
    for source, target in ((checkpoint, "one"), (tmp_path / "sharded", "other")):
        export(str(source), str(tmp_path / target), max_shard_size="40KB")
    files = sorted(path.name for path in (tmp_path / "one").glob("model*"))
    assert len(files) > 2
    assert files == sorted(path.name for path in (tmp_path / "other").glob("model*"))
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    tolerance = 1e-6 if kind == "full" else 1e-5
    torch.testing.assert_close(logps(loaded(tmp_path / "other")), logps(trained.policy.model), atol=tolerance, rtol=0)


def test_files_and_index_are_those_of_transformers(runs, tmp_path):
    trained, checkpoint = runs("full")
    export(str(checkpoint), str(tmp_path / "ours"), max_shard_size="40KB")
    trained.policy.model.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    ours, theirs = (tmp_path / name / writing.INDEX for name in ("ours", "theirs"))
    indexes = [json.loads(path.read_text()) for path in (ours, theirs)]
    assert indexes[0]["metadata"] == indexes[1]["metadata"]
    assert indexes[0]["weight_map"].keys() == indexes[1]["weight_map"].keys()
    assert all(path.stat().st_size < 44_000 for path in (tmp_path / "ours").glob("*.safetensors"))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs")]
    assert configs[0] == configs[1]


def test_another_dtype(runs, tmp_path):
    trained, checkpoint = runs("full")
    export(str(checkpoint), str(tmp_path / "hf"), dtype="bfloat16")
    model = loaded(tmp_path / "hf")
    for name, weight in trained.policy.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.bfloat16())


@pytest.fixture
def tied(tmp_path, tiny_llama):
    """A tiny model that has one weight as embeddings and output head."""
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "tied")
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


@pytest.mark.parametrize(
    ("lora", "stays_tied"),
    [
        (None, True),
        (LoRA(rank=2), True),
        (LoRA(rank=2, target_modules=["embed_tokens", "q_proj"]), False),
        (LoRA(rank=2, options={"modules_to_save": ["lm_head"]}), False),
    ],
    ids=["all weights", "adapters", "adapter on embeddings", "whole head"],
)
def test_tied_weights_are_written_once_unless_training_made_them_two(tied, tmp_path, lora, stays_tied):
    trained = as_trained(module(tied, lora=lora), tmp_path / "run.ckpt")
    export(str(tmp_path / "run.ckpt"), str(tmp_path / "hf"))
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not stays_tied  # noqa: SIM118
    model = loaded(tmp_path / "hf")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is stays_tied
    torch.testing.assert_close(logps(model), logps(trained.policy.model), atol=1e-5, rtol=0)


def test_adapters_that_change_the_weights_below_them(tiny_llama, tmp_path):
    pissa = LoRA(rank=2, options={"init_lora_weights": "pissa"})
    trained = as_trained(module(tiny_llama, lora=pissa), tmp_path / "run.ckpt")
    export(str(tmp_path / "run.ckpt"), str(tmp_path / "hf"))
    torch.testing.assert_close(logps(loaded(tmp_path / "hf")), logps(trained.policy.model), atol=2e-5, rtol=0)


FUSED = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt2": {},
    "llama": {},
}


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["all weights", "adapters"])
@pytest.mark.parametrize("family", FUSED)
def test_names_in_files_are_those_that_transformers_writes(tiny_config, tmp_path, tiny_llama, family, lora):
    config = tiny_config(family, num_key_value_heads=2, vocab_size=300, **FUSED[family])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "base")
    trained = as_trained(module(tmp_path / "base", lora=lora), tmp_path / "run.ckpt")
    export(str(tmp_path / "run.ckpt"), str(tmp_path / "hf"))
    files = [safe_open(tmp_path / name / "model.safetensors", "pt") for name in ("base", "hf")]
    assert {*files[0].keys()} == {*files[1].keys()}
    torch.testing.assert_close(logps(loaded(tmp_path / "hf")), logps(trained.policy.model), atol=1e-5, rtol=0)


def test_weights_that_files_hold_joined_are_read_together(tiny_llama):
    from transformers.core_model_loading import Chunk, WeightConverter

    from dpo_lightning.export.base import outline
    from dpo_lightning.models.adapters import Step

    model = outline(PolicySpec(path=tiny_llama).load_config(), torch.float32)
    parts = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    model._weight_conversions = [WeightConverter(["mlp.gate_up_proj.weight"], parts, operations=[Chunk(dim=0)])]
    steps = [Step((name,), (name,), dict) for name in model.state_dict()]
    groups, tensors = writing.divided(model, steps)
    assert len(groups) == 2 + 3  # two layers, and what is in none
    assert tensors["model.layers.1.mlp.gate_up_proj.weight"].shape == (128, 32)
    assert not any(part in name for name in tensors for part in parts)


def anonymous_memory():
    """Bytes that this process holds besides mapped files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


@contextmanager
def growth():
    """A list whose last entry is by how many bytes the process grew at most."""
    start, most, done = anonymous_memory(), [0], threading.Event()

    def watch():
        while not done.wait(0.001):
            most.append(max(most[-1], anonymous_memory() - start))

    thread = threading.Thread(target=watch)
    thread.start()
    yield most
    done.set()
    thread.join()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_holds_a_file_of_weights_and_not_the_model(runs, tiny_llama, tmp_path):
    config = LlamaConfig(
        vocab_size=8000, hidden_size=768, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=12,
        num_key_value_heads=4, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "base")
    sizes = [weight.nbytes for weight in model.parameters()]
    assert sum(sizes) > 200e6
    del model
    for kind, lora in (("full", None), ("lora", LoRA(rank=8))):
        export(str(runs(kind)[1]), str(tmp_path / f"warm_{kind}"))  # what is loaded once, such as peft
        policy = module(tmp_path / "base", lora=lora)
        policy.configure_model()
        record = {"state_dict": policy.state_dict(), "hyper_parameters": dict(policy.hparams)}
        torch.save(record, tmp_path / f"{kind}.ckpt")
        if kind == "full":
            shard(policy, tmp_path / "shards")
        del policy, record
    for name in ("full.ckpt", "lora.ckpt", "shards"):
        gc.collect()
        with growth() as most:
            export(str(tmp_path / name), str(tmp_path / f"hf_{name}"), max_shard_size="50MB")
        assert most[-1] < 1.5 * (50e6 + max(sizes)) < sum(sizes), name


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs a PyTorch with gloo")
def test_two_ranks_with_sharded_weights_write_what_one_does(tiny_llama, tmp_path):
    script = Path(__file__).with_name("two_ranks_export.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, str(script), tiny_llama, str(tmp_path)],
        check=True, timeout=120, capture_output=True, env=environment,
    )  # fmt: skip
    for name in ("full", "lora"):
        whole, sharded = (loaded(tmp_path / name / kind).state_dict() for kind in ("whole", "sharded"))
        assert len(list((tmp_path / name / "sharded").glob("model-*"))) > 2
        assert whole.keys() == sharded.keys()
        assert all(torch.equal(whole[key], sharded[key]) for key in whole)


def card(folder):
    return (folder / "README.md").read_text()


def test_the_card_says_what_is_known(runs, tiny_llama, tmp_path):
    from huggingface_hub import ModelCard

    trained, checkpoint = runs("lora")
    export(str(checkpoint), str(tmp_path / "hf"))
    front, text = ModelCard.load(tmp_path / "hf" / "README.md").data.to_dict(), card(tmp_path / "hf")
    assert front == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["dpo_lightning", "dpo"],
    }  # fmt: skip
    metrics = trained.provenance()["validation"]["metrics"]
    for expected in (
        "`llama`, trained with dpo_lightning",
        "by `DPOModule`",
        "Loss: `DPOLoss(beta=0.5, label_smoothing=0.0)`",
        "Rafailov et al. 2023, [arXiv:2305.18290](https://arxiv.org/abs/2305.18290)",
        "Reference: `FrozenCopy(",
        "taken up by the weights: `LoRA(rank=2, alpha=32.0",
        "learning rate 0.01, warm-up steps 0, schedule constant",
        "Optimizer steps: 4",
        "| train | 16 rows in memory | Pairs (prompt, chosen, rejected) | 16 | 16 |",
        "| val | 5 rows in memory |",
        "After optimizer step 4:",
        f"| rewards/margins | {metrics['rewards/margins']:.4g} |",
        "AutoModelForCausalLM.from_pretrained(folder)",
        f"torch {torch.__version__}",
    ):
        assert expected in text
    assert str(Path(tiny_llama).parent) not in text  # where things lie is nobody's business
    export(str(checkpoint), str(tmp_path / "alone"), adapter="save")
    assert "PeftModel.from_pretrained(base, folder)" in card(tmp_path / "alone")
    assert ModelCard.load(tmp_path / "alone" / "README.md").data.library_name == "peft"


def test_the_card_names_what_lies_on_a_hub(monkeypatch):
    from dpo_lightning.export.card import model_card

    loss = {"class_path": "dpo_lightning.losses.SimPOLoss", "init_args": {}}
    source = {
        "split": "train",
        "source": "owner/pairs (train)",
        "dataset": "owner/pairs",
        "read": "Pairs",
        "rows": 3000,
    }
    record = {"hyper_parameters": {"loss": loss, "reference": {"class_path": "a.FrozenCopy"}}}
    text = model_card(record, {"sources": [{**source, "kept": 2999}]}, base="owner/model", alone=False)
    assert "base_model: owner/model\ndatasets:\n- owner/pairs\n" in text
    assert "| 3,000 | 2,999 |" in text
    assert "arXiv:2405.14734" in text
    assert "Reference" not in text  # the loss has none
    own = {"class_path": "somewhere.MyLoss", "init_args": {"scale": 0.5}}
    text = model_card({"hyper_parameters": {"loss": own}}, {}, base="owner/model", alone=False)
    assert "Loss: `MyLoss(scale=0.5)`" in text
    assert not any(section in text for section in ("## Data", "## Validation", "Optimi", "Reference"))


def test_a_shard_that_is_lost_is_named(runs, tmp_path):
    shard(runs("full")[0], tmp_path / "sharded")
    next((tmp_path / "sharded").glob("*.distcp")).unlink()
    with pytest.raises(UsageError, match=r"sharded: state_dict\.policy.* cannot be read: .*No such file.*Take another"):
        export(str(tmp_path / "sharded"), str(tmp_path / "hf"))


@pytest.mark.parametrize("by", ["checkpoint", "callback"])
def test_the_chat_template_of_the_run_is_exported(tiny_llama, tmp_path, by):
    template = tmp_path / "mine.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}")
    chat = Chat(template=str(template), variables={"plain": True}, texts=True)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows(8)))
    source = PreferenceDataModule(str(pairs), tokenizer=tiny_llama, batch_size=4, chat=chat)
    run = trainer(tmp_path, max_steps=2, callbacks=[ExportHF(str(tmp_path / "hf"))])
    run.fit(module(tiny_llama), source)
    expected = template.read_text()
    template.unlink()
    run.save_checkpoint(tmp_path / "run.ckpt")
    if by == "checkpoint":
        export(str(tmp_path / "run.ckpt"), str(tmp_path / "hf"), overwrite=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template == expected
    text = card(tmp_path / "hf")
    assert "| train | pairs.jsonl | Pairs (prompt, chosen, rejected) | 8 | 8 |" in text
    assert "The chat template was given `{'plain': True}`." in text
    assert str(tmp_path) not in text


def test_the_last_validation_is_kept_when_a_run_goes_on(runs, tiny_llama, tmp_path):
    trained, checkpoint = runs("full")
    resumed = module(tiny_llama)
    run = trainer(tmp_path, max_steps=5, limit_val_batches=0)
    run.fit(resumed, data(tiny_llama), ckpt_path=checkpoint, weights_only=True)
    assert resumed.provenance() == trained.provenance()
    assert resumed.provenance()["validation"]["step"] == 4


def test_nothing_is_left_of_what_cannot_be_written_and_the_model_before_it_stays(runs, tmp_path, monkeypatch):
    _, checkpoint = runs("full")
    export(str(checkpoint), str(tmp_path / "hf"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    calls = itertools.count()

    def full_disk(tensors, path, metadata, save=writing.save_file):
        if next(calls) == 1:
            raise OSError(28, "No space left on device")
        save(tensors, path, metadata=metadata)

    monkeypatch.setattr(writing, "save_file", full_disk)
    with pytest.raises(UsageError, match=r"Cannot write .*model-00002.*No space left on device\. Is there room"):
        export(str(checkpoint), str(tmp_path / "hf"), max_shard_size="40KB", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()} == before


def test_an_earlier_model_is_replaced_when_asked_for(runs, tmp_path):
    _, checkpoint = runs("lora")
    folder = tmp_path / "hf"
    export(str(checkpoint), str(folder), max_shard_size="40KB")
    with pytest.raises(UsageError, match=r"The folder .*hf is not empty; name another, or say --overwrite"):
        export(str(checkpoint), str(folder))
    export(str(checkpoint), str(folder), overwrite=True)
    assert [path.name for path in folder.glob("model*")] == ["model.safetensors"]
    export(str(checkpoint), str(folder), adapter="save", overwrite=True)
    assert not list(folder.glob("model*"))
    assert not {"config.json", "generation_config.json"} & {path.name for path in folder.iterdir()}
    assert (folder / "adapter_model.safetensors").exists()


class Code:
    def __reduce__(self):
        return print, ("run",)


def spoil(kind, checkpoint, folder):
    """A checkpoint with something wrong, and what else is asked for."""
    path, options = folder / "bad.ckpt", {}
    content = torch.load(checkpoint, weights_only=True)
    if kind == "absent":
        return path, options
    if kind == "text":
        path.write_text("hello")
        return path, options
    if kind == "cut":
        path.write_bytes(checkpoint.read_bytes()[:-1000])
        return path, options
    if kind in ("no folder of shards", "half a folder", "code"):
        path.mkdir()
        if kind != "no folder of shards":
            (path / ".metadata").write_bytes(pickle.dumps(Code()))
        if kind == "code":
            torch.save({}, path / "meta.pt")
        return path, options
    if kind == "foreign":
        content["hyper_parameters"] = {"lr": 1}
    elif kind == "code in a file":
        content["hyper_parameters"]["code"] = Code()
    elif kind == "weights missing":
        del content["state_dict"]["policy.model.model.norm.weight"]
    elif kind == "no base":
        content["hyper_parameters"]["policy"]["init_args"]["path"] = "/nowhere/llama"
    elif kind == "dtype of adapters":
        options = {"dtype": "float16", "adapter": "save"}
    elif kind == "no place":
        (folder / "a file").touch()
        options = {"folder": str(folder / "a file" / "hf")}
    elif kind == "size":
        options = {"max_shard_size": "big"}
    torch.save(content, path)
    return path, options


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent", r"There is no checkpoint .*bad\.ckpt"),
        ("text", r"bad\.ckpt is no checkpoint: either no Trainer wrote it, or it is cut short"),
        ("cut", r"bad\.ckpt is no checkpoint: either no Trainer wrote it, or it is cut short"),
        (
            "no folder of shards",
            r"is a folder without a sharded checkpoint: there is no \.metadata and no meta\.pt in it",
        ),
        ("half a folder", r"bad\.ckpt lacks meta\.pt: the run was stopped before it was written whole\. Take another"),
        ("code", r"bad\.ckpt cannot be read: its list of contents asks for builtins\.print\. Take another checkpoint"),
        ("code in a file", r"bad\.ckpt cannot be read: Weights only load failed.*Take another checkpoint"),
        ("foreign", r"bad\.ckpt was not saved by a module of this package: it holds no policy"),
        ("weights missing", r"1 weights of the model are missing, such as model\.norm\.weight"),
        ("no base", r"The model that training began with is not found: .*/nowhere/llama.*say --base where it is now"),
        ("dtype of adapters", r"--dtype is of a whole model, --adapter save writes adapters as they were trained"),
        ("no place", r"Cannot write .*a file/hf/model\.safetensors: .*may you write there"),
        ("size", r"`max_shard_size` is a number with KB, MB, GB or TB, got 'big'"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_words(runs, tmp_path, capfd, kind, message):
    bad, options = spoil(kind, runs("full")[1], tmp_path)
    with pytest.raises(UsageError, match=message):
        export(str(bad), **{"folder": str(tmp_path / "hf"), **options})
    assert not list(tmp_path.glob("hf/*"))
    assert "run" not in capfd.readouterr().out.split()


def test_adapters_are_not_merged_into_other_weights(runs, tiny_llama, tmp_path):
    _, checkpoint = runs("lora")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        model.model.norm.weight[3] += 0.5
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "other")
    with pytest.raises(
        UsageError, match=r"trained on other weights than .*other holds now; say --base where those are"
    ):
        export(str(checkpoint), str(tmp_path / "hf"), base=str(tmp_path / "other"))


def test_adapters_on_random_weights_are_exported_alone(runs, tmp_path):
    content = torch.load(runs("lora")[1], weights_only=True)
    content["hyper_parameters"]["policy"]["init_args"]["random_init"] = True
    torch.save(content, tmp_path / "run.ckpt")
    with pytest.raises(UsageError, match=r"random weights, which nobody kept; write them alone \(--adapter save\)"):
        export(str(tmp_path / "run.ckpt"), str(tmp_path / "hf"))
    export(str(tmp_path / "run.ckpt"), str(tmp_path / "hf"), adapter="save")
    assert (tmp_path / "hf" / "adapter_model.safetensors").exists()


def test_a_folder_that_is_a_file(runs, tmp_path):
    (tmp_path / "hf").touch()
    with pytest.raises(UsageError, match=r"hf is a file; name a folder"):
        export(str(runs("full")[1]), str(tmp_path / "hf"))


def test_code_of_a_model_comes_along(tiny_llama, tmp_path):
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.save_pretrained(base)
    (base / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((base / "config.json").read_text())
    own = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (base / "config.json").write_text(json.dumps({**config, "model_type": "own_llama", "auto_map": own}))
    spec = PolicySpec(path=str(base), trust_remote_code=True)
    save_policy(spec, spec.build(), tmp_path / "hf")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert type(exported).__name__ == "OwnForCausalLM"
    torch.testing.assert_close(logps(exported), logps(model), atol=1e-6, rtol=0)


def test_the_commands_of_the_page_do_what_it_says(runs, tiny_llama, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "runs/best.ckpt").symlink_to(runs("full")[1])
    (tmp_path / "runs/lora.ckpt").symlink_to(runs("lora")[1])
    (tmp_path / "models/sft").symlink_to(tiny_llama)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/export.md").read_text()
    commands = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 4
    for command in commands:
        monkeypatch.setattr("sys.argv", command.split())
        dpo_lightning.cli.main()
        assert f"Written: {command.split()[3]}" in capsys.readouterr().out
    assert loaded("my_model_bf16").dtype == torch.bfloat16
    assert Path("my_adapter/adapter_model.safetensors").exists()
    torch.testing.assert_close(logps(loaded("my_merged_model")), logps(runs("lora")[0].policy.model), atol=1e-5, rtol=0)


def test_help_names_the_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["dpo-lightning"])
    with pytest.raises(SystemExit):
        dpo_lightning.cli.run(["--help"])
    assert "dpo-lightning export CHECKPOINT FOLDER" in " ".join(capsys.readouterr().out.split())


def test_a_mistake_on_the_command_line_ends_with_its_message(tmp_path, monkeypatch, capsys):
    for arguments, message in ((["x.ckpt", "hf"], "error: There is no checkpoint x.ckpt."), (["x.ckpt"], "folder")):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["dpo-lightning", "export", *arguments])
        with pytest.raises(SystemExit) as exit_info:
            dpo_lightning.cli.main()
        assert exit_info.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
