"""Start an adapter in the environment of its system, and hear what it reports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from benchmarks.peers import stores
from benchmarks.peers.protocol import Report, parse
from benchmarks.peers.systems import REQUIREMENTS, System

ROOT = Path(__file__).parents[2]
VENVS = ROOT / ".benchmark-venvs"
SECONDS = 60.0  # what takes longer has failed


class Failed(Exception):
    """A system could not do what it was asked for; the message goes into the table."""


def python_of(adapter: str) -> Path:
    """Return the interpreter that has what the adapter needs."""
    return VENVS / adapter / "bin" / "python" if adapter in REQUIREMENTS else Path(sys.executable)


def install(adapter: str) -> None:
    """Make the environment of an adapter anew."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", VENVS / adapter], check=True)
    command = [str(python_of(adapter)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, *REQUIREMENTS[adapter]], check=True)


def measure(system: System, work: str, count: int) -> Report:
    """Let ``system`` do a work on a fresh store; raise `Failed` with what it said last if it does not."""
    if not python_of(system.adapter).exists():
        raise Failed("not installed")
    if not stores.is_there(system.store):
        raise Failed(f"no {system.store}")
    with stores.fresh(system.store) as target, tempfile.TemporaryFile("w+") as output:
        module = f"benchmarks.peers.adapters.{system.adapter}"
        process = subprocess.Popen(
            [python_of(system.adapter), "-m", module, work, str(count), target, json.dumps(dict(system.options))],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired as error:
            raise Failed(f"not done after {SECONDS:.0f} s") from error
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it has forked
            process.wait()
        output.seek(0)
        try:
            return parse(output.read())
        except ValueError as error:
            raise Failed(str(error)) from error
