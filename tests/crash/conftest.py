from __future__ import annotations

import random
import sys
from contextlib import ExitStack
from pathlib import Path
from time import monotonic

import pytest
from sqlalchemy import make_url

from future_jobs import create_tables
from tests.crash.lab import Lab
from tests.crash.proxy import Proxy
from tests.crash.servers import SERVERS


@pytest.fixture(autouse=True)
def linux_only():
    if not Path("/proc/self/stat").exists():
        pytest.skip("whether a process is stopped, or dead, is read from /proc")


@pytest.fixture
def is_long(request):
    return request.config.getoption("crash_long")


@pytest.fixture
def seed(request):
    given = request.config.getoption("crash_seed")
    seed = random.SystemRandom().randrange(1 << 32) if given is None else given
    print(f"--crash-seed={seed}")  # shown when the test fails
    return seed


@pytest.fixture
def told(request, is_long):
    """Say how far a long run is, on the terminal, past the capture of pytest."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    is_terminal = sys.__stderr__.isatty()
    told_at = monotonic()

    def told(line, *, end=False):
        nonlocal told_at
        if is_long and (is_terminal or end or monotonic() - told_at > 10):
            told_at = monotonic()
            line = f"{request.node.name}: {line}"
            with capture.global_and_fixture_disabled():
                sys.__stderr__.write(f"\r{line}\033[K" + "\n" * end if is_terminal else f"{line}\n")
                sys.__stderr__.flush()

    return told


@pytest.fixture
def open_lab(tmp_path, seed, told):
    """Open labs, which are closed afterwards."""
    with ExitStack() as stack:

        def open_lab(url, **settings):
            folder = tmp_path / f"lab{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            lab = Lab(str(url), folder, seed=seed, **settings)
            stack.callback(lab.close)
            lab.told = told
            return lab

        yield open_lab


@pytest.fixture
def conclude(is_long, told):
    """Say what was found, in a long run, and hold it to what is promised."""

    def conclude(lab, **settings):
        verdict = lab.verdict(**settings)
        told(verdict, end=True)
        verdict.check(lease=lab.lease, is_long=is_long)
        return verdict

    return conclude


@pytest.fixture
def proxy(shared_kind, shared_url, seed):
    """A network in front of the server."""
    if shared_kind == "file":
        pytest.skip("a file has no network")
    proxy = Proxy(make_url(shared_url), chance=random.Random(seed))
    yield proxy
    proxy.close()


@pytest.fixture
def server(shared_kind):
    """A server of the lab's own, with the tables."""
    if shared_kind == "file":
        pytest.skip("a file has no server")
    if reason := SERVERS[shared_kind].missing():
        pytest.skip(reason)
    from sqlalchemy import create_engine

    server = SERVERS[shared_kind]()
    try:
        engine = create_engine(server.url)
        create_tables(engine)
        engine.dispose()
        yield server
    finally:
        server.remove()
