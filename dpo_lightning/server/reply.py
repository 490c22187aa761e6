"""What a server replied, whose parts are of the kinds that they should be or make no sense."""

import json
import time
from typing import Any, TypeVar

Part = TypeVar("Part")


def receive(method: Any, within: float, errors: Any, **request: Any) -> Any:
    """The reply to a request as plain data.

    Args:
        method: What makes it, of a client of openai's, as in client.completions.
        within: Seconds until all of it has to be there; one that trickles in is given up within twice that.
        errors: The library, whose errors are raised.
        **request: What is asked.

    Raises:
        ValueError: If it is no JSON.
        openai.APIError: If there is none, or it says that something is wrong.
    """
    end = time.monotonic() + within
    body = bytearray()
    try:
        with method.with_streaming_response.create(**request) as response:
            for piece in response.iter_bytes():
                body += piece
                if time.monotonic() > end:
                    raise errors.APITimeoutError(request=response.http_request)
    except errors.APIError:
        raise
    except Exception as error:  # that of the library below, where a body breaks off, that of an error too
        if (asked := getattr(error, "request", None)) is None:
            raise
        kind = errors.APITimeoutError if "Timeout" in type(error).__name__ else errors.APIConnectionError
        raise kind(request=asked) from error
    return json.loads(bytes(body))


def part(reply: Any, *path: str | int, kind: type[Part]) -> Part:
    """A part of a reply.

    Args:
        reply: Plain data.
        path: Names of fields and places in lists that lead to it.
        kind: What it has to be.

    Raises:
        ValueError: If it is not there, or something else.
    """
    found = reply
    for name in path:
        try:
            found = found[name]
        except (LookupError, TypeError):
            raise ValueError(f"{'.'.join(map(str, path))} is missing in {json.dumps(reply)[:80]}") from None
    if not isinstance(found, kind) or isinstance(found, bool):
        raise ValueError(f"{'.'.join(map(str, path)) or 'the whole'} is {json.dumps(found)[:80]}")
    return found
