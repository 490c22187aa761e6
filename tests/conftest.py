"""Fixtures that several tests share: a tiny model with its tokenizer in a folder, and tiny configs of many families."""

import os
import shutil
from pathlib import Path

import datasets
import pytest
import small_runs
import torch
from families import FAMILIES, TINY
from rank_pool import RankPool
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SENTENCES = [
    "the film was a joy and its end is slow",
    "but we all loved every minute of this bad old story",
    "The plot was dull, the actors were superb; nobody laughed.",
    "Human: what did you think of it? Assistant: I would watch it again, gladly!",
]
BEGIN, END, PADDING = "<s>", "</s>", "<pad>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role + ': ' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


if "PYTEST_XDIST_WORKER" in os.environ:  # the cores are shared among the workers
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what tests start


def pytest_collection_modifyitems(config, items):
    """Under pytest-xdist one worker has all tests that share the two processes."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            if "two_ranks" in item.fixturenames:
                item.add_marker(pytest.mark.xdist_group("two_ranks"))


@pytest.fixture(scope="session", autouse=True)
def token_cache(tmp_path_factory):
    """A cache of this session's own, in child processes too: tokens of earlier ones are of earlier code."""
    folder = str(tmp_path_factory.mktemp("datasets_cache"))
    datasets.config.HF_DATASETS_CACHE = Path(folder)
    os.environ["HF_DATASETS_CACHE"] = folder
    return Path(folder)


@pytest.fixture(scope="session")
def two_ranks(token_cache):
    """Two processes that stay for the whole session."""
    pool = RankPool(2, token_cache)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def tiny_config():
    """A function from the name of a family to a tiny config of it, its sliding window shorter than rows."""
    return lambda family, **more: AutoConfig.for_model(family, **{**TINY, **FAMILIES.get(family, {}), **more})


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny random Llama and a byte-level tokenizer that puts a begin token before a text; it can chat."""
    return _save_llama(tmp_path_factory.mktemp("tiny") / "llama", width=32)


@pytest.fixture(scope="session")
def noisy_llama(tiny_llama, tmp_path_factory):
    """The tiny Llama with dropout in its config."""
    folder = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("noisy") / "llama")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"attention_dropout": 0.0', '"attention_dropout": 0.3'))
    return str(folder)


@pytest.fixture(scope="session")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same, wide enough for the blocks of 64 weights that 4 bits share a scale in."""
    return _save_llama(tmp_path_factory.mktemp("wide") / "llama", width=64)


@pytest.fixture
def workplace(tmp_path, tiny_llama, monkeypatch):
    """A folder with pairs.jsonl and config.yaml, as the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dpo-lightning"])
    small_runs.write_workplace(tmp_path, tiny_llama)
    return tmp_path


def _save_llama(folder: Path, width: int) -> str:
    tokenizer = _tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    assert (Path(folder) / "model.safetensors").exists()
    return str(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[PADDING, BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PADDING)
