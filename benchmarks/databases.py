"""A fresh database for each benchmark, dropped after: a SQLite file, PostgreSQL, MariaDB."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import URL, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from benchmarks import raw
from benchmarks.jobs import Base
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
    with _made(kind) as url:
        engine = create_engine(url)
        if kind == "sqlite":
            configure(engine, pragmas)
        create_tables(engine)
        Base.metadata.create_all(engine)
        driver = raw.connect(kind, url, pragmas)
        try:
            yield Place(kind, engine, driver)
        finally:
            driver.close()
            engine.dispose()


def configure(engine: Engine, pragmas: tuple[str, ...]) -> None:
    """Set ``pragmas`` on each connection of an engine on SQLite."""

    @event.listens_for(engine, "connect")
    def set_them(connection: raw.DBAPI, _record: object) -> None:
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}")


@contextmanager
def _made(kind: str) -> Iterator[URL]:
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
