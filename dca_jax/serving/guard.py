"""Checks before every request: API key and body size; counts the answers."""

import json
import secrets
from typing import Any

from starlette.exceptions import HTTPException

from dca_jax.serving.metrics import Metrics

OPEN = frozenset(["/health"])  # paths that need no key


def problem(
    message: str, kind: str, *, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """An error in the format of OpenAI's clients."""
    told = {"message": message, "type": kind, "param": param, "code": code}
    # The client's input may contain half of a surrogate pair, which is not text.
    plain = {k: v and v.encode(errors="replace").decode() for k, v in told.items()}
    return {"error": plain}


class Guard:
    """An ASGI application that wraps another.

    Args:
        key: the key that clients must send; None for no key.
        largest: maximum bytes of a body.
        paths: paths that are counted by name.
    """

    def __init__(
        self, app: Any, *, key: str | None, largest: int, metrics: Metrics, paths: frozenset[str]
    ) -> None:
        self._app, self._largest = app, largest
        self._key = None if key is None else key.encode()
        self._metrics, self._paths = metrics, paths

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Lets a request through, or answers it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, headers, read = scope["path"], dict(scope["headers"]), 0

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                known = path if path in self._paths else "other"
                self._metrics.requests.labels(known, str(message["status"])).inc()
            await send(message)

        async def limited() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._largest:
                raise HTTPException(400, self._too_large(f"more than {self._largest}"))
            return message

        if path not in OPEN and not self._knows_key(headers.get(b"authorization", b"")):
            told = problem(
                "the API key is missing or wrong", "authentication_error", code="invalid_api_key"
            )
            await _answer(counted, 401, told)
            return
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._largest:
            told = problem(self._too_large(length[:20].decode()), "invalid_request_error")
            await _answer(counted, 400, told)
            return
        await self._app(scope, limited, counted)

    def _knows_key(self, header: bytes) -> bool:
        if self._key is None:
            return True
        scheme, _, given = header.partition(b" ")
        return scheme.lower() == b"bearer" and secrets.compare_digest(given.strip(), self._key)

    def _too_large(self, got: str) -> str:
        return f"the request has {got} bytes, and this server takes at most {self._largest}"


async def _answer(send: Any, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
