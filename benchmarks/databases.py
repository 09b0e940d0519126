"""A fresh database for each benchmark, dropped after: a SQLite file, PostgreSQL, MariaDB."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sqlalchemy import URL, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from benchmarks import raw
from benchmarks.jobs import Base
from benchmarks.raw import Raw
from future_jobs import create_tables

SERVERS = {
    "postgresql": "postgresql+psycopg://root@127.0.0.1/postgres",
    "mariadb": "mysql+pymysql://root@127.0.0.1/test",
}
KINDS = ("sqlite", *SERVERS)
WAL = ("journal_mode = WAL", "synchronous = NORMAL", "busy_timeout = 30000")
DEFAULT = ("busy_timeout = 30000",)  # a rollback journal, synced at every commit


@dataclass(frozen=True, slots=True)
class Place:
    """A database with the real schema, and the two ways to it: an engine as an application makes it, and a driver."""

    kind: str
    engine: Engine
    raw: raw.Raw
    connect: Callable[[], Raw]  # one more way of the second kind, for another thread


def answers(kind: str) -> bool:
    """Tell whether this database can be had here."""
    if kind == "sqlite":
        return True
    try:
        with create_engine(SERVERS[kind], poolclass=NullPool).connect():
            return True
    except (SQLAlchemyError, ImportError):
        return False


@contextmanager
def fresh(kind: str, *, pragmas: tuple[str, ...] = WAL) -> Iterator[Place]:
    """Yield a new database with all tables; drop it afterwards."""
    with made(kind) as url:
        engine = engine_on(url, pragmas)
        create_tables(engine)
        Base.metadata.create_all(engine)
        connect = partial(raw.connect, kind, url, pragmas)
        driver = connect()
        try:
            yield Place(kind, engine, driver, connect)
        finally:
            driver.close()
            engine.dispose()


def engine_on(url: URL, pragmas: tuple[str, ...] = WAL) -> Engine:
    """Return an engine with its defaults; on SQLite, with these pragmas on each connection."""
    engine = create_engine(url)
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def configure(connection: raw.DBAPI, _record: object) -> None:
            for pragma in pragmas:
                connection.execute(f"PRAGMA {pragma}")

    return engine


@contextmanager
def made(kind: str) -> Iterator[URL]:
    """Yield where a new, empty database is; drop it afterwards."""
    name = f"fj_bench_{os.getpid()}_{secrets.token_hex(3)}"
    if kind == "sqlite":
        with tempfile.TemporaryDirectory(prefix="fj_bench_") as folder:
            yield make_url(f"sqlite:///{Path(folder) / name}.db")
        return
    admin = create_engine(SERVERS[kind], isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    try:
        yield admin.url.set(database=name)
    finally:
        with admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name}{' WITH (FORCE)' if kind == 'postgresql' else ''}"))
