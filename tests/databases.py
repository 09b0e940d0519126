"""Fresh databases for tests: in-memory SQLite, a SQLite file, PostgreSQL and MariaDB; dropped afterwards."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from sqlalchemy import URL, create_engine, make_url, text
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool, StaticPool

from future_jobs import create_tables, metadata
from tests import shop

LOOPBACK = {
    "postgresql": "postgresql+psycopg://root@127.0.0.1/postgres",
    "mariadb": "mysql+pymysql://root@127.0.0.1/test",
}
KINDS = ("memory", "file", *LOOPBACK)
SHARED = ("file", *LOOPBACK)  # those which several processes can open


def _admin_urls() -> dict[str, str]:
    urls = dict(LOOPBACK)
    for each in filter(None, os.environ.get("FUTURE_JOBS_TEST_URLS", "").replace(",", " ").split()):
        kind = "postgresql" if make_url(each).get_backend_name() == "postgresql" else "mariadb"
        urls[kind] = each
    return urls


@cache
def missing(kind: str) -> str | None:
    """Return why ``kind`` cannot be tested here, None if it can."""
    if kind not in LOOPBACK:
        return None
    url = make_url(_admin_urls()[kind])
    try:
        with create_engine(url, poolclass=NullPool).connect():
            return None
    except (SQLAlchemyError, ImportError) as error:
        where = url.render_as_string(hide_password=True)
        return f"{kind} does not answer at {where} ({type(error).__name__}); set FUTURE_JOBS_TEST_URLS"


@contextmanager
def fresh_url(kind: str, folder: os.PathLike[str]) -> Iterator[URL]:
    """Make an empty database, yield its URL, drop it."""
    url = _create(kind, folder)
    try:
        yield url
    finally:
        _drop(kind, url)


_prepared: dict[str, list[URL]] = {kind: [] for kind in LOOPBACK}


@contextmanager
def prepared_url(kind: str, folder: os.PathLike[str]) -> Iterator[URL]:
    """Yield the URL of a database with the tables and no rows.

    On a server it is emptied and used again afterwards: making one costs a second of disk, emptying it a few
    milliseconds.
    """
    kept = _prepared.get(kind)
    if kept:
        url = kept.pop()
    else:
        url = _create(kind, folder)
        engine = create_engine(url, poolclass=NullPool)
        create_tables(engine)
        shop.Base.metadata.create_all(engine)
    yield url
    if kept is None:
        _drop(kind, url)
        return
    if kind == "postgresql":
        _execute(
            url,
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{url.database}' "
            "AND pid <> pg_backend_pid()",
        )
    tables = [*reversed(metadata.sorted_tables), *reversed(shop.Base.metadata.sorted_tables)]
    with _engine(url).connect().execution_options(isolation_level="READ COMMITTED") as connection:
        for table in tables:
            connection.execute(text(f"DELETE FROM {table.name}"))
        connection.commit()
    kept.append(url)


def drop_all() -> None:
    """Drop the databases that were kept to be used again."""
    for kind, urls in _prepared.items():
        while urls:
            _drop(kind, urls.pop())


def _create(kind: str, folder: os.PathLike[str]) -> URL:
    name = f"fj_{os.getpid()}_{secrets.token_hex(4)}"
    if kind == "memory":
        return make_url("sqlite://")
    if kind == "file":
        return make_url(f"sqlite:///{os.fspath(folder)}/{name}.db")
    admin = make_url(_admin_urls()[kind])
    _execute(admin, f"CREATE DATABASE {name}")
    if kind == "postgresql":
        # What a crash of the server would lose is nothing that a test needs.
        _execute(admin, f"ALTER DATABASE {name} SET synchronous_commit = off")
    return admin.set(database=name)


def _drop(kind: str, url: URL) -> None:
    if kind in LOOPBACK:
        force = " WITH (FORCE)" if kind == "postgresql" else ""
        _execute(make_url(_admin_urls()[kind]), f"DROP DATABASE {url.database}{force}")


@cache
def _engine(url: URL) -> Engine:
    # Kept, since what an engine asks a server at its first connection takes longer than all else here.
    return create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)


def _execute(url: URL, *statements: str) -> None:
    with _engine(url).connect() as connection:
        for statement in statements:
            connection.execute(text(statement))


def make_engine(url: URL) -> Engine:
    """Return an engine as an application would make it."""
    if url.get_backend_name() == "sqlite" and not url.database:
        return create_engine(url, poolclass=StaticPool, connect_args={"check_same_thread": False})
    return create_engine(url)
