"""Servers that speak OpenAI's protocol."""

from dpo_lightning.server.chat import Answer, Messages, Server, Spent
from dpo_lightning.server.line import Connection, Line, Refused

__all__ = ["Answer", "Connection", "Line", "Messages", "Refused", "Server", "Spent"]
