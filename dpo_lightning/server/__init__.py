"""Servers that speak OpenAI's protocol."""

from dpo_lightning.server.asking import Answer, Messages
from dpo_lightning.server.chat import Server
from dpo_lightning.server.line import Connection, Line, Refused
from dpo_lightning.server.spending import NOTHING, Spent

__all__ = ["NOTHING", "Answer", "Connection", "Line", "Messages", "Refused", "Server", "Spent"]
