"""A network between workers and their server, in which the reply to a COMMIT is lost."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from contextlib import suppress

from sqlalchemy import URL

# A simple query of PostgreSQL, and COM_QUERY of MariaDB: each a message by itself, as drivers wait for its reply.
COMMITS = (b"Q\x00\x00\x00\x0bCOMMIT\x00", b"\x07\x00\x00\x00\x03COMMIT")

UNSAID = "unsaid"  # it never reached the server
UNHEARD = "unheard"  # it happened, and the reply was lost
LATE = "late"  # the client has given up, and connected anew, before it reached the server
LATE_SECONDS = 0.05

PORTS = {"postgresql": 5432, "mysql": 3306}


class Proxy:
    """Passes everything on, but cuts the connection at some of the COMMITs, in each of the three ways."""

    def __init__(self, url: URL, *, chance: random.Random) -> None:
        self.server = (url.host, url.port or PORTS[url.get_backend_name()])
        self.chance = chance
        self.share = 0.0  # of the COMMITs to be cut
        self.most = 0
        self.cuts: Counter[str] = Counter()
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        listening = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop)
        self._listener = listening.result(20)
        self.url = url.set(host="127.0.0.1", port=self._listener.sockets[0].getsockname()[1])
        if url.get_backend_name() == "postgresql":  # a COMMIT that is encrypted could not be told from anything else
            self.url = self.url.update_query_dict({"sslmode": "disable", "gssencmode": "disable"})

    def cut(self, share: float, most: int) -> None:
        """Cut this share of the COMMITs from now on, until there were ``most``."""
        self.share, self.most = share, most

    def close(self) -> None:
        async def end():
            self._listener.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # --- one connection

    async def _serve(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._tasks.add(task)
        server = None
        try:
            from_server, server = await asyncio.open_connection(*self.server)
            back = asyncio.ensure_future(_pass_on(from_server, client))
            try:
                await self._pass_on_until_cut(reader, client, from_server, server, back)
            finally:
                back.cancel()
                await asyncio.gather(back, return_exceptions=True)
        except OSError:
            pass
        finally:
            self._tasks.discard(task)
            for each in filter(None, (client, server)):
                each.transport.abort()

    async def _pass_on_until_cut(self, reader, client, from_server, server, back) -> None:
        while data := await reader.read(1 << 16):
            fate = self._fate() if data in COMMITS else None
            if fate is None:
                server.write(data)
                await server.drain()
                continue
            back.cancel()
            await asyncio.gather(back, return_exceptions=True)
            if fate == LATE:
                client.transport.abort()
                await asyncio.sleep(self.chance.uniform(0, LATE_SECONDS))
            if fate != UNSAID:
                server.write(data)
                await from_server.read(1 << 16)
            self.cuts[fate] += 1
            return

    def _fate(self) -> str | None:
        if self.cuts.total() >= self.most or self.chance.random() >= self.share:
            return None
        return self.chance.choice([UNSAID, UNHEARD, LATE])


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()
