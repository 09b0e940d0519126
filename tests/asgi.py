"""Drive an ASGI application without a server or a client library."""

from __future__ import annotations

import asyncio
import json
from contextlib import contextmanager


@contextmanager
def served(app):
    """Start ``app``; yield a function that sends it a request and returns the status and the JSON; stop it."""
    with asyncio.Runner() as runner:
        inbox, outbox = asyncio.Queue(), asyncio.Queue()

        async def start():
            scope = {"type": "lifespan", "asgi": {"version": "3.0"}}
            running = asyncio.create_task(app(scope, inbox.get, outbox.put))
            await inbox.put({"type": "lifespan.startup"})
            assert (await outbox.get())["type"] == "lifespan.startup.complete"
            return running

        async def stop(running):
            await inbox.put({"type": "lifespan.shutdown"})
            await running

        running = runner.run(start())
        try:
            yield lambda method, url: runner.run(_answer(app, method, url))
        finally:
            runner.run(stop(running))


async def _answer(app, method, url):
    path, _, query = url.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(b"host", b"testserver")],
        "root_path": "",
        "client": ("127.0.0.1", 1),
        "server": ("testserver", 80),
    }
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    body = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], json.loads(body)
