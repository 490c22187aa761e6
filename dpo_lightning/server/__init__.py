"""Chat completions from servers that speak OpenAI's protocol."""

from dpo_lightning.server.line import Answer, Messages, Spent
from dpo_lightning.server.settings import Server

__all__ = ["Answer", "Messages", "Server", "Spent"]
