"""Model families that the tests of the engine go through."""

STREAM = [
    "llama",
    "gpt2",
    "gpt_neox",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "opt",
    "granite",
    "cohere2",
    "gpt_oss",
]
ROWS = ["gptj", "bloom", "mamba"]
