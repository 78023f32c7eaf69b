"""examples/serve_ray.py: which replica is asked, what is passed on; and whole, where Ray is."""

import asyncio
import importlib.util
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import openai
import pytest
from serve_ray import Router, beginning, choose
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from dca_jax.inference.options import Options
from dca_jax.serving.server import Server, listen

pytestmark = pytest.mark.examples


def asked(text: str) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": text}]}).encode()


def test_texts_that_begin_alike_go_to_the_same_replica_unless_it_is_far_busier():
    book = "Call me Ishmael. " * 200
    first, second = (beginning(asked(f"{book}{question}")) for question in ("Who?", "Where?"))
    assert first == second != beginning(asked("Another text"))
    assert beginning(b'{"prompt": [1, 2]}') == "[1, 2]"
    assert beginning(b"[") == beginning(b"[]") == beginning(b"\xff") == ""
    wanted = choose(first, [0, 0, 0])
    assert choose(second, [3, 3, 3]) == wanted
    busy = [0, 0, 0]
    busy[wanted] = 50
    assert choose(first, busy) != wanted
    # All get some, and with one more replica most texts stay where they are.
    places = [choose(str(n), [0] * 4) for n in range(400)]
    assert min(places.count(n) for n in range(4)) > 60
    assert sum(choose(str(n), [0] * 5) == place for n, place in enumerate(places)) > 260


class Handle:
    """As Ray's handle of a replica: a method `address`."""

    def __init__(self, address):
        self.address = self
        self._address = address

    async def remote(self):
        return self._address


@pytest.fixture
def addresses():
    """Two servers that say who they are, and what they were asked."""

    def app(number):
        async def whole(request):
            if request.headers.get("authorization") != "Bearer key":
                return JSONResponse({"error": "no key"}, 401)
            return JSONResponse({"number": number, "asked": (await request.body()).decode()})

        async def stream(request):
            async def pieces():
                for n in range(3):
                    yield f"data: {number} {n}\n\n"
                    await asyncio.sleep(0.01)

            return StreamingResponse(pieces(), media_type="text/event-stream")

        routes = [
            Route("/v1/completions", whole, methods=["POST"]),
            Route("/stream", stream, methods=["POST"]),
        ]
        return Starlette(routes=routes)

    running = []
    for number in range(2):
        listening, server = listen("127.0.0.1", 0), Server(app(number))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        running.append((server, thread, listening.getsockname()[1]))
    yield [f"http://127.0.0.1:{port}" for *_, port in running]
    for server, thread, _ in running:
        server.should_exit = True
        thread.join()


def test_requests_and_answers_are_passed_on(addresses):
    gone = "http://127.0.0.1:1"
    router = Router(*map(Handle, addresses))

    async def ask():
        app = Starlette(routes=[Route("/{path:path}", router.__call__, methods=["POST"])])
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            key = {"Authorization": "Bearer key"}
            for number in range(8):
                body = asked(f"text {number}")
                answer = await client.post("/v1/completions", content=body, headers=key)
                expected = choose(beginning(body), [0, 0])
                assert answer.json() == {"number": expected, "asked": body.decode()}
            assert (await client.post("/v1/completions", content=b"{}")).status_code == 401
            answer = await client.post("/stream", content=b"{}")
            number = choose("", [0, 0])
            assert answer.text == "".join(f"data: {number} {n}\n\n" for n in range(3))
            assert answer.headers["content-type"].startswith("text/event-stream")
            router._replicas = [Handle(gone)] * 2
            answer = await client.post("/stream", content=b"{}")
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert router._busy == [0, 0]
        await router._session.close()

    asyncio.run(ask())


@pytest.mark.processes
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray")
def test_two_replicas_answer_as_generate_does_and_each_reads_a_book_once(folder, plain_llm):
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    options = f"--replicas 2 --context 1k --rows 2 --port {port}".split()
    script = Path(__file__).parents[1] / "examples" / "serve_ray.py"
    with subprocess.Popen([sys.executable, script, folder, *options]) as process:
        try:
            _ask_replicas(process, port, folder.name, plain_llm)
        finally:
            process.kill()


def _ask_replicas(process, port, name, llm):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
        end = time.monotonic() + 240
        while True:
            assert process.poll() is None
            assert time.monotonic() < end
            try:
                client.models.list()
                break
            except openai.OpenAIError:
                time.sleep(1)
        books = [f"{n}. Call me Ishmael. " * 30 for n in range(6)]
        for turn in range(2):
            for book in books:
                told = client.completions.create(
                    model=name, prompt=book[: 200 + turn], max_tokens=4, temperature=0
                )
                expected = llm.generate(book[: 200 + turn], Options(max_new_tokens=4))[0]
                assert told.choices[0].text == expected.text
                assert told.usage.prompt_tokens_details.cached_tokens == 128 * turn
