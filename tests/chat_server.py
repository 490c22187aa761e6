"""A real server of chat completions in a thread, whose answers a test makes up."""

import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from dpo_lightning.server import Server
from dpo_lightning.server.asking import EASY


class Reply(NamedTuple):
    text: str = ""
    status: int = 200
    headers: dict = {}  # noqa: RUF012
    after: float = 0.0
    body: str | None = None
    counts: bool = True
    drops: list[bytes] | None = None  # which come one by one
    promised: int | None = None  # bytes that are said to come, where it breaks off before


class ChatServer:
    """Serves while it is entered; ``reply(number, question, body)`` gives a text or a Reply to each request."""

    def __init__(self, reply: Callable):
        self.reply, self.lock = reply, threading.Lock()
        self.bodies, self.headers, self.now, self.most_at_once = [], [], 0, 0

    def server(self, **settings) -> Server:
        known = {"url": self.url, "model": "judge", "first_wait": 0.001, "timeout": 5.0, "concurrency": 4}
        return Server(**{**known, **settings})

    @property
    def questions(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.bodies]

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                pass

            def do_GET(self):
                self._send(200, json.dumps({"object": "list", "data": [{"id": "judge", "object": "model"}]}), {})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer.lock:
                    outer.bodies.append(body)
                    outer.headers.append(dict(self.headers))
                    outer.now += 1
                    outer.most_at_once = max(outer.most_at_once, outer.now)
                    number = len(outer.bodies)
                try:
                    reply = outer.reply(number, body["messages"][-1]["content"], body)
                    reply = Reply(reply) if isinstance(reply, str) else reply
                    time.sleep(reply.after)
                    if reply.drops is not None:
                        self._drip(reply)
                    else:
                        self._send(reply.status, completion(reply) if reply.body is None else reply.body, reply.headers)
                finally:
                    with outer.lock:
                        outer.now -= 1

            def _drip(self, reply):
                try:
                    self.send_response(reply.status)
                    for name, value in {"content-type": "application/json", **reply.headers}.items():
                        self.send_header(name, value)
                    self.send_header("content-length", str(reply.promised or sum(map(len, reply.drops))))
                    self.end_headers()
                    for drop in reply.drops:
                        self.wfile.write(drop)
                        self.wfile.flush()
                        time.sleep(0.1)
                    time.sleep(reply.after)
                    self.close_connection = reply.promised is not None
                except OSError:  # the other side waited no longer
                    self.close_connection = True

            def _send(self, status, text, headers):
                data = text.encode()
                try:
                    self.send_response(status)
                    for name, value in {"content-type": "application/json", **headers}.items():
                        self.send_header(name, value)
                    self.send_header("content-length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # the other side waited no longer
                    self.close_connection = True

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._http.handle_error = lambda *request: None  # the other side was killed
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        return self

    def __exit__(self, *error):
        self._http.shutdown()
        self._http.server_close()


def completion(reply: Reply) -> str:
    whole = {
        "id": "1", "object": "chat.completion", "created": 1, "model": "judge-2026",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply.text}}],
    }  # fmt: skip
    if reply.counts:
        whole["usage"] = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return json.dumps(whole)


def shown(question: str) -> tuple[str, str]:
    """The responses that one of our questions shows as A and B."""
    place = r"(?:Reply|Summary) A:\n(.*?)\n\n(?:Reply|Summary) B:\n(.*?)\n\nFirst write"
    return re.search(place, question, re.DOTALL).groups()


def longer(number, question, body):
    """A judge that prefers the longer response, whatever the order."""
    if question == EASY[0]["content"]:
        return "A"
    first, second = shown(question)
    better = "tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B"
    return f"One says more.\n{better}"


def first_shown(number, question, body):
    """A judge that prefers what it reads first."""
    return "The first one has me convinced.\nA"
