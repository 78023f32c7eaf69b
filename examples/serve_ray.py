"""Several servers behind one address with Ray Serve: texts that begin alike go to the same one.

    pip install '.[serve]' 'ray[serve]'
    python examples/serve_ray.py ./Qwen2.5-7B-Instruct-1M --replicas 2 --gpus 1 --context 256k

Each replica is a server like that of `dca-jax serve`, in its own process, on any machine of Ray's
cluster. The ingress forwards a request to the replica that has already read its beginning, if any:
of a hundred questions about a book, one replica reads the book, once. If that replica is much
busier than the others, another one gets the request and reads the beginning too. Clients need
DCA_JAX_API_KEY, as with `dca-jax serve`; set it if the cluster has several machines, since the
replicas then listen on the network. A request without text, such as /metrics, is answered by any
one replica for itself.
"""

import argparse
import hashlib
import json
import os
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

import dca_jax
from dca_jax.lengths import parse_tokens
from dca_jax.serving.engine import Engine
from dca_jax.serving.http import make_app
from dca_jax.serving.server import Server, listen
from dca_jax.serving.sizing import choose_pages

BEGINNING = 2000  # characters of a request's text that determine its replica
UNEVEN = 2  # a replica may have this many times the average number of requests, plus a few
FEW = 4
# Headers of one connection, not of the answer.
HOP = frozenset("connection content-length host keep-alive transfer-encoding upgrade".split())


class Replica:
    """A server of one model, listening on its own address.

    Args:
        alone: whether all replicas are on this machine, so that no other needs to reach them.
    """

    def __init__(
        self, model: str, *, context: int, rows: int, key: str | None, alone: bool
    ) -> None:
        import ray  # pyright: ignore[reportMissingImports]

        llm = dca_jax.load(model, sparse="off")
        pages = choose_pages(llm, context=context, rows=rows)
        self._engine = Engine(llm, context=context, rows=rows, pages=pages)
        self._engine.start()
        listening = listen("127.0.0.1" if alone else ray.util.get_node_ip_address(), 0)
        self._address = "http://{}:{}".format(*listening.getsockname()[:2])
        self._server = Server(make_app(self._engine, Path(model).name, key=key))
        threading.Thread(
            target=self._server.run, kwargs={"sockets": [listening]}, daemon=True
        ).start()

    def address(self) -> str:
        """The address on which it listens."""
        return self._address

    def check_health(self) -> None:
        """Called by Ray, which replaces the replica if this raises."""
        if not self._engine.alive:
            raise RuntimeError("the engine has stopped")


class Router:
    """Forwards requests, those that begin alike to the same replica.

    Args:
        replicas: Ray's handles, with the method `address`.
    """

    def __init__(self, *replicas: Any) -> None:
        self._replicas, self._busy = replicas, [0] * len(replicas)
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, request: Request) -> Response:
        """Has a replica answer a request; a stream is forwarded as it arrives."""
        if self._session is None:  # here, where an event loop runs
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
        body = await request.body()
        number = choose(beginning(body), self._busy)
        self._busy[number] += 1
        try:
            address = await self._replicas[number].address.remote()
            answer = await self._session.request(
                request.method,
                address + request.url.path,
                data=body,
                headers={k: v for k, v in request.headers.items() if k.lower() not in HOP},
            )
        except aiohttp.ClientError as error:
            self._busy[number] -= 1
            told = {"message": f"a replica does not respond: {error}", "type": "server_error"}
            return JSONResponse({"error": told}, 503, {"Retry-After": "1"})
        except BaseException:
            self._busy[number] -= 1
            raise
        kept = {k: v for k, v in answer.headers.items() if k.lower() not in HOP}
        return StreamingResponse(self._passed_on(answer, number), answer.status, kept)

    async def _passed_on(self, answer: aiohttp.ClientResponse, number: int) -> AsyncIterator[bytes]:
        """An answer's bytes; if the client disconnects, the replica's connection is closed too."""
        try:
            async for piece in answer.content.iter_any():
                yield piece
        finally:
            answer.close()
            self._busy[number] -= 1


def beginning(body: bytes) -> str:
    """The beginning of a request's text; empty if it has none."""
    try:
        asked = json.loads(body)
        text = asked.get("messages") or asked.get("prompt")
    except (ValueError, AttributeError):
        return ""
    return json.dumps(text)[:BEGINNING] if text else ""


def choose(text: str, busy: Sequence[int]) -> int:
    """The index of the replica for a text with this beginning.

    Every replica has a rank for every beginning (rendezvous hashing). The first one that is not
    much busier than the others gets the request: the same one as before, and few move if one is
    added.

    Args:
        busy: number of requests at each replica.
    """
    most = UNEVEN * sum(busy) / len(busy) + FEW

    def rank(number: int) -> bytes:
        return hashlib.sha256(f"{number} {text}".encode(errors="replace")).digest()

    able = [number for number, count in enumerate(busy) if count <= most]
    return min(able, key=rank)


def deploy(
    model: str,
    *,
    replicas: int,
    context: int,
    rows: int = 32,
    gpus: float = 0,
    host: str,
    port: int,
) -> None:
    """Starts the replicas and the ingress; returns when they serve."""
    import ray  # pyright: ignore[reportMissingImports]
    from ray import serve  # pyright: ignore[reportMissingImports]

    serve.start(http_options={"host": host, "port": port})
    options: dict[str, Any] = {"context": context, "rows": rows}
    options["key"] = os.environ.get("DCA_JAX_API_KEY")
    options["alone"] = len(ray.nodes()) == 1
    own = serve.deployment(ray_actor_options={"num_gpus": gpus})(Replica)
    several = [
        own.options(name=f"replica-{number}").bind(str(Path(model).absolute()), **options)
        for number in range(replicas)
    ]
    # It only waits; on a small machine the replicas may take all CPUs that Ray counts.
    passing = {"max_ongoing_requests": 10_000, "ray_actor_options": {"num_cpus": 0}}
    serve.run(serve.deployment(**passing)(Router).bind(*several))


def main() -> None:
    """Serves until it is interrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder that exists on every machine of the cluster")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="GPUs per replica")
    parser.add_argument("--context", default="32k", help="tokens of the longest text")
    parser.add_argument("--rows", type=int, default=32, help="simultaneous texts per replica")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options: dict[str, Any] = vars(parser.parse_args())
    options["context"] = parse_tokens(options["context"])
    deploy(**options)
    print(f"{options['replicas']} replicas at http://{options['host']}:{options['port']}/v1")
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main()
