"""Database servers of the lab's own, which can be stopped without any ceremony. They keep what they have committed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from time import monotonic, sleep

from sqlalchemy import URL, create_engine, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool


class Server(ABC):
    """A server in a folder of its own."""

    user: str  # these servers refuse to run as root

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="future_jobs_crash."))
        self.folder.chmod(0o711)
        self.data = self.folder / self.user / "data"
        self.data.parent.mkdir()
        if os.geteuid() == 0:
            shutil.chown(self.data.parent, self.user)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    url: URL

    @abstractmethod
    def restart(self) -> None:
        """Stop at once, as in a crash, and start again."""

    @abstractmethod
    def stop(self) -> None: ...

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: str | Path) -> None:
        as_user = ["runuser", "-u", self.user, "--"] if os.geteuid() == 0 else []
        log = self.folder / "commands.log"
        with log.open("ab") as out:
            done = subprocess.run([*as_user, *map(str, command)], stdout=out, stderr=out, cwd=self.folder, check=False)
        assert done.returncode == 0, log.read_text()

    def wait_until_it_answers(self) -> None:
        engine, give_up_at = create_engine(self.url, poolclass=NullPool), monotonic() + 60
        while True:
            try:
                engine.connect().close()
            except SQLAlchemyError:
                assert monotonic() < give_up_at
                sleep(0.05)
            else:
                return


class PostgreSQL(Server):
    user = "postgres"

    def __init__(self) -> None:
        super().__init__()
        self.url = make_url(f"postgresql+psycopg://root@127.0.0.1:{self.port}/postgres")
        self.bin = _postgresql_bin()
        self.run(
            self.bin / "initdb", "-D", self.data, "-U", "root", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C"
        )
        # What was given to the kernel survives the server: nothing needs to wait for the disk.
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
        self._control("-o", options, "start")

    def _control(self, *command: str) -> None:
        self.run(self.bin / "pg_ctl", "-D", self.data, "-l", self.data.parent / "log", "-w", "-t", "60", *command)

    def restart(self) -> None:
        self._control("-m", "immediate", "restart")

    def stop(self) -> None:
        self._control("-m", "immediate", "stop")

    @staticmethod
    def missing() -> str | None:
        return None if _postgresql_bin() else "PostgreSQL is not installed, so that no server can be crashed"


class MariaDB(Server):
    user = "mysql"

    def __init__(self) -> None:
        super().__init__()
        self.url = make_url(f"mysql+pymysql://root@127.0.0.1:{self.port}/test")
        user = self.user if os.geteuid() == 0 else _whoami()
        self.options = ["--no-defaults", f"--datadir={self.data}", f"--user={user}"]
        log = self.folder / "install.log"
        with log.open("wb") as out:
            command = [_found("mariadb-install-db"), *self.options, "--auth-root-authentication-method=normal"]
            assert subprocess.run(command, stdout=out, stderr=out, check=False).returncode == 0, log.read_text()
        self._start()

    def _start(self) -> None:
        folder = self.data.parent
        command = [
            *(_found("mariadbd"), *self.options, f"--port={self.port}", "--bind-address=127.0.0.1"),
            *(f"--socket={folder}/socket", f"--pid-file={folder}/pid", "--innodb-flush-log-at-trx-commit=2"),
        ]
        with (self.folder / "log").open("ab") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out)
        self.wait_until_it_answers()

    def restart(self) -> None:
        self.stop()
        self._start()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    @staticmethod
    def missing() -> str | None:
        there = _found("mariadbd") and _found("mariadb-install-db")
        return None if there else "MariaDB is not installed, so that no server can be crashed"


SERVERS = {"postgresql": PostgreSQL, "mariadb": MariaDB}


def _whoami() -> str:
    import getpass

    return getpass.getuser()


def _found(command: str) -> str | None:
    return shutil.which(command, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/usr/local/sbin")


def _postgresql_bin() -> Path | None:
    places = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True), *Path("/usr").glob("pgsql-*/bin")]
    for place in [*places, Path("/usr/local/bin"), Path("/usr/bin")]:
        if (place / "initdb").exists():
            return place
    return None
