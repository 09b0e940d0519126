"""What a worker is given to find its jobs: an Engine, a URL, a maker of Sessions, or where one is."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

from sqlalchemy import URL, create_engine, make_url
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import QueuePool, reset_none

from .dialects import absolute, is_autocommit, keep_for_own
from .errors import InvalidArgument, InvalidOption, shown
from .models import ScheduledJob
from .times import seconds_of

__all__ = ["Maker", "described", "opened", "own_engine", "refuse_small_pool", "seconds_of"]

Maker = Callable[[], Session] | scoped_session[Any]

_PLACE = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*(?:\.[^\W\d]\w*)*)")


def opened(source: Any, *, connections: int = 15) -> tuple[Engine, Maker, bool]:
    """Return the engine, what makes Sessions, and whether the engine was made here, for as many ``connections``."""
    if isinstance(source, str) and (place := _PLACE.fullmatch(source)):
        found: Any = import_module(place[1])
        for part in place[2].split("."):
            found = getattr(found, part)
        return opened(found, connections=connections)
    if isinstance(source, str | URL):
        engine = create_engine(source)
        if isinstance(engine.pool, QueuePool):
            engine.dispose()
            engine = create_engine(source, pool_size=connections)
        return engine, sessionmaker(engine), True
    if isinstance(source, Engine):
        return _checked(source), sessionmaker(source), False
    if isinstance(source, sessionmaker | scoped_session):
        session = source()
        bind = session.get_bind(ScheduledJob)
        if isinstance(source, sessionmaker):
            session.close()
        else:
            source.remove()
        if isinstance(bind, Engine):
            return _checked(bind), source, False
    raise InvalidArgument(
        f"source is {shown(source)}; pass an Engine, a URL, a sessionmaker or scoped_session bound to an Engine, "
        "or 'module:attr'",
        argument="source",
        value=source,
    )


def _checked(engine: Engine) -> Engine:
    if is_autocommit(engine):
        raise InvalidOption(
            "the engine has isolation_level='AUTOCOMMIT', where nothing can be rolled back; pass one without it",
            argument="source",
            value=engine,
        )
    return engine


def described(source: Any) -> str:
    """Return the text by which another process finds the same database; raise `InvalidOption` if there is none.

    Of an Engine that is its URL, and nothing else of it.
    """
    if isinstance(source, Engine):
        source = source.url
    if isinstance(source, str) and _PLACE.fullmatch(source):
        return source
    if isinstance(source, str | URL):
        return absolute(make_url(source)).render_as_string(hide_password=False)
    raise InvalidOption(
        f"source is {shown(source)}, which cannot be found from another process; pass its place as text, "
        "'module:attr', or the Engine's URL",
        argument="source",
        value=source,
    )


def own_engine(engine: Engine) -> Engine:
    """Return an engine on the same database with a pool of its own, so that jobs cannot use up its connections."""
    options = {name: each for name, each in engine.get_execution_options().items() if name != "isolation_level"}
    pool = engine.pool.recreate()
    # What is ours ends each transaction itself; a ROLLBACK after each COMMIT would be one more message to the server.
    pool._reset_on_return = reset_none  # noqa: SLF001 (only the constructor knows it else)
    own = Engine(
        pool,
        engine.dialect,
        engine.url,
        execution_options=options,
        hide_parameters=engine.hide_parameters,
    )
    keep_for_own(own)
    return own


def refuse_small_pool(engine: Engine, slots: int) -> None:
    """Raise `InvalidOption` if jobs would wait for connections of the pool, and fail when they wait too long."""
    pool = engine.pool
    if not isinstance(pool, QueuePool) or pool._max_overflow < 0:  # noqa: SLF001 (only the constructor knows it else)
        return
    connections = pool.size() + pool._max_overflow  # noqa: SLF001
    if connections < slots:
        raise InvalidOption(
            f"queues has {slots} slots, and the engine's pool gives {connections} connections; use "
            f"create_engine(..., pool_size={slots}), or fewer slots",
            argument="queues",
            value=slots,
        )
