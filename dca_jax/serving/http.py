"""OpenAI's protocol over the engine: routes, streams and errors."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.serving.engine import Delta, Engine
from dca_jax.serving.forms import ChatForm, Choice, CompletionForm, Form, Tokens, usage
from dca_jax.serving.guard import Guard, problem
from dca_jax.serving.metrics import Metrics, Watch
from dca_jax.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    Generation,
    TokenizeRequest,
)
from dca_jax.serving.scheduler import QueueFullError

BODY = 2**20, 32  # maximum bytes of a request: a base, and more per token of the context
GONE = 499  # the status if the client has disconnected

INVALID = "invalid_request_error"


def make_app(engine: Engine, name: str, *, key: str | None = None) -> FastAPI:
    """Creates the application.

    Args:
        engine: the engine, already started.
        name: the model's name for clients.
        key: the key that clients must send; None for no key.
    """
    metrics, begun = Metrics(), int(time.time())
    app = FastAPI(title="dca_jax", docs_url=None, redoc_url=None)
    room = Room(engine, name, metrics)
    model = {"id": name, "object": "model", "created": begun, "owned_by": "dca_jax"}
    model |= {"max_model_len": engine.context}

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await room.answer(ChatForm, body, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await room.answer(CompletionForm, body, request)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        room.check_model(body.model)
        tokens = await run_in_threadpool(body.tokens, engine.llm)
        return {"count": len(tokens), "max_model_len": engine.context, "tokens": tokens}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{wanted:path}")
    async def one_model(wanted: str) -> dict[str, Any]:
        room.check_model(wanted)
        return model

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if engine.alive else 503)

    @app.get("/metrics")
    async def told() -> Response:
        return Response(metrics.written(engine.counts()), media_type=CONTENT_TYPE_LATEST)

    _answer_errors(app)
    paths = frozenset(
        "/v1/chat/completions /v1/completions /tokenize /v1/models /health /metrics".split()
    )
    some, each = BODY
    largest = some + each * engine.context
    app.add_middleware(Guard, key=key, largest=largest, metrics=metrics, paths=paths)
    return app


class Room:
    """Turns requests into texts of the engine, and texts into answers."""

    def __init__(self, engine: Engine, name: str, metrics: Metrics) -> None:
        self._engine, self._name, self._metrics = engine, name, metrics
        self._tokens = Tokens(engine.llm)

    def check_model(self, wanted: str | None) -> None:
        """Raises HTTPException for a model that is not served."""
        if wanted not in (None, self._name):
            raise HTTPException(404, f"this server only has the model {self._name}")

    async def answer(
        self, form: Callable[..., Form], body: Generation, request: Request
    ) -> Response:
        """A whole answer, or a stream of its pieces."""
        self.check_model(body.model)
        loop = asyncio.get_running_loop()
        answer = await run_in_threadpool(Answer, self._engine, self._metrics, body, loop)
        written = form(self._name, self._tokens, answer.top)
        if body.stream:
            return Stream(answer, written, usage=body.with_usage)
        try:
            return await _unless_gone(request, _whole(answer, written))
        finally:
            answer.close()


class Answer:
    """The texts of one request as they are generated; must always be closed.

    Attributes:
        choices: the texts so far.
        top: as in `Wanted`.

    Raises:
        InputError, QueueFullError: as in `Generation.wanted` and `Engine.submit`.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        body: Generation,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._engine, self._metrics, self._loop = engine, metrics, loop
        self._watch = Watch(metrics)
        self._queue: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        wanted = body.wanted(engine.llm, engine.context)
        self._per_prompt, self.top = wanted.choices, wanted.top
        self.choices = [Choice() for _ in range(len(wanted.prompts) * wanted.choices)]
        self._jobs = engine.submit(
            wanted.prompts,
            wanted.options,
            [partial(self._put, index) for index in range(len(self.choices))],
            choices=wanted.choices,
            logprobs=wanted.top is not None,
            ignore_stop_ids=body.ignore_eos,
        )

    def _put(self, index: int, delta: Delta) -> None:
        """Called in the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, delta))

    async def pieces(self) -> AsyncIterator[tuple[int, Delta]]:
        """Every update of every text, with the number of its choice; an error comes last."""
        left = len(self.choices)
        while left:
            index, delta = await self._queue.get()
            self.choices[index].take(delta)
            if delta.token is not None:
                self._watch.token(index)
            left -= delta.finish_reason is not None
            yield index, delta
            if delta.error is not None:
                return

    def close(self) -> None:
        """Cancels unfinished texts, and counts the request."""
        self._engine.cancel(self._jobs)
        errors = sum(choice.error is not None for choice in self.choices)
        unfinished = sum(choice.finish_reason is None for choice in self.choices)
        self._metrics.failed.inc(errors)
        self._metrics.cancelled.inc(unfinished)
        told = self.usage()
        self._metrics.prompt_tokens.inc(told["prompt_tokens"])
        self._metrics.cached_tokens.inc(told["prompt_tokens_details"]["cached_tokens"])
        self._watch.end()

    def usage(self) -> dict[str, Any]:
        """Tokens so far."""
        return usage(self._jobs, self.choices, self._per_prompt)


class Stream(StreamingResponse):
    """An answer in pieces, as server-sent events."""

    def __init__(self, answer: Answer, form: Form, *, usage: bool) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        events = _events(answer, form, usage=usage)
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends the stream; if the client disconnects, cancels the rest."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


async def _whole(answer: Answer, form: Form) -> Response:
    async for _, delta in answer.pieces():
        if delta.error is not None:
            return JSONResponse(problem(delta.error, "server_error"), 500)
    return JSONResponse(form.whole(answer.choices, answer.usage()))


async def _events(answer: Answer, form: Form, *, usage: bool) -> AsyncIterator[str]:
    for index in range(len(answer.choices)):
        if (opening := form.opening(index)) is not None:
            yield _event(opening)
    async for index, delta in answer.pieces():
        if delta.error is not None:
            yield _event(problem(delta.error, "server_error"))
        elif delta.text or delta.logprobs is not None or delta.finish_reason is not None:
            yield _event(form.chunk(index, delta, usage=usage))
    if usage:
        yield _event(form.last(answer.usage()))
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _unless_gone(request: Request, answer: Any) -> Response:
    """The answer; if the client disconnects first, its generation is cancelled."""

    async def until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    writing, watching = asyncio.ensure_future(answer), asyncio.ensure_future(until_gone())
    try:
        await asyncio.wait({writing, watching}, return_when=asyncio.FIRST_COMPLETED)
        return writing.result() if writing.done() else Response(status_code=GONE)
    finally:
        for task in (writing, watching):
            task.cancel()
        await asyncio.gather(writing, watching, return_exceptions=True)


def _answer_errors(app: FastAPI) -> None:
    """Returns all errors in OpenAI's format."""

    @app.exception_handler(InputError)
    async def input_error(_: Request, error: InputError) -> Response:
        return JSONResponse(problem(str(error), INVALID), 400)

    @app.exception_handler(QueueFullError)
    async def queue_full(_: Request, error: QueueFullError) -> Response:
        told = problem(str(error), "rate_limit_error", code="queue_full")
        return JSONResponse(told, 429, {"Retry-After": "1"})

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return JSONResponse(_invalid(error.errors()), 400)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        code = "model_not_found" if error.status_code == 404 else None
        return JSONResponse(
            problem(str(error.detail), INVALID, code=code), error.status_code, error.headers
        )

    @app.exception_handler(Exception)
    async def failure(_: Request, error: Exception) -> Response:
        return JSONResponse(problem("the server failed on this request", "server_error"), 500)


def _invalid(errors: Sequence[Any]) -> dict[str, Any]:
    """Describes the first invalid field of a body."""
    first, where = errors[0], errors[0]["loc"][1:2]
    if first["type"] == "json_invalid":
        return problem(f"the body is not JSON: {first['ctx']['error']}", INVALID)
    message = first["msg"].removeprefix("Value error, ")
    if sum(error["loc"][1:2] == where for error in errors) > 1:  # of several kinds it is none
        message = f"of a kind that is not taken: {shown(first['input'])}"
    name = str(where[0]) if where else None
    return problem(message if name is None else f"{name}: {message}", INVALID, param=name)
