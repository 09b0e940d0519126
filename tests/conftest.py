from __future__ import annotations

from datetime import UTC, datetime

import pytest
from sqlalchemy import make_url
from sqlalchemy.orm import Session, sessionmaker

from future_jobs import Scheduler, create_tables
from tests import databases, jobs, shop


def pytest_addoption(parser):
    parser.addoption("--plan-rows", type=int, default=20_000, help="future and finished jobs in tests/test_plans.py")


def _kinds(kinds):
    return [pytest.param(kind, id=kind) for kind in kinds]


@pytest.fixture(scope="session", autouse=True)
def servers_as_they_were():
    """Leave no database behind."""
    yield
    databases.drop_all()


@pytest.fixture(params=_kinds(databases.KINDS))
def kind(request):
    """Each database in turn."""
    if reason := databases.missing(request.param):
        pytest.skip(reason)
    return request.param


@pytest.fixture(params=_kinds(databases.SHARED))
def shared_kind(request):
    """Each database that several processes can open, in turn."""
    if reason := databases.missing(request.param):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def empty_engine(kind, tmp_path):
    """An engine on an empty database."""
    with databases.fresh_url(kind, tmp_path) as url:
        engine = databases.make_engine(url)
        yield engine
        engine.dispose()


@pytest.fixture
def engine(kind, tmp_path):
    """An engine on a database with the library's tables and those of the shop."""
    if kind in databases.SHARED:
        with databases.prepared_url(kind, tmp_path) as url:
            engine = databases.make_engine(url)
            yield engine
            engine.dispose()
    else:
        engine = databases.make_engine(make_url("sqlite://"))
        create_tables(engine)
        shop.Base.metadata.create_all(engine)
        yield engine
        engine.dispose()


@pytest.fixture
def shared_url(shared_kind, tmp_path):
    """The URL of a database with the tables, for tests with several processes."""
    with databases.prepared_url(shared_kind, tmp_path) as url:
        yield url.render_as_string(hide_password=False)


@pytest.fixture
def new_session(engine):
    return sessionmaker(engine)


@pytest.fixture
def session(new_session):
    with new_session() as session:
        yield session


@pytest.fixture
def scheduler(session):
    return Scheduler(session)


@pytest.fixture
def now():
    return datetime.now(UTC)


@pytest.fixture
def calls():
    """What the handlers of `tests.jobs` were called with, in order."""
    jobs.CALLS.clear()
    yield jobs.CALLS
    jobs.CALLS.clear()


@pytest.fixture
def other(engine) -> Session:
    """A Session of somebody else on the same database."""
    with Session(engine) as session:
        yield session
