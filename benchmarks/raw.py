"""The yardstick: the same statements on the same tables through the bare driver, in the best form known.

Every parameter is made before the clock starts, nothing is checked, and a result is never kept: it is what the
database and its driver need, and no more.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import URL

DBAPI = Any  # a DBAPI connection; the three drivers have no type in common
Record = tuple[Any, ...]

TABLE = "future_jobs_scheduled_job"
COLUMNS = (
    *("callable_name", "args", "kwargs", "content_type", "content_key", "options", "tags", "queue", "priority"),
    *("max_attempts", "run_at", "nominal_at", "expires_at", "created_at"),
    *("status", "attempt", "failures", "losses", "snoozes"),
)
RETURNED = "id, attempt, callable_name, args, kwargs, content_type, content_key, options, run_at"
BATCH = 100
DUE = "status = 'scheduled' AND queue = 'default' AND priority = 0"
TAKEN = "status = 'running', attempt = attempt + 1, leased_by = 'raw'"
DONE = "status = 'complete', leased_by = NULL, leased_until = NULL"


class Raw:
    """What the benchmarks ask of a driver; in the words of SQLite, where the others do not differ."""

    mark = "%s"
    begin = "BEGIN"
    returning = True

    def __init__(self, connection: DBAPI) -> None:
        self.connection = connection
        self.cursor = connection.cursor()
        self.insert = f"INSERT INTO {TABLE} ({', '.join(COLUMNS)}) VALUES ({', '.join([self.mark] * len(COLUMNS))})"

    def close(self) -> None:
        self.connection.close()

    def run(self, sql: str, values: Sequence[Any] = ()) -> DBAPI:
        self.cursor.execute(sql.replace("?", self.mark), values)
        return self.cursor

    def time(self, value: datetime) -> object:
        return value

    def record(self, name: str, n: int, run_at: datetime) -> Record:
        """Return one waiting job, as the library stores it."""
        due, expiry = self.time(run_at), self.time(run_at + timedelta(days=7))
        values = (f"benchmarks.jobs.{name}", f"[{n}]", "{}", None, None, None, None, "default", 0, 1, due, due, expiry)
        return (*values, due, "scheduled", 0, 0, 0, 0)

    def due(self, name: str, count: int) -> list[Record]:
        """Return ``count`` jobs that are due, a microsecond apart."""
        first = datetime.now(UTC) - timedelta(hours=1)
        return [self.record(name, n, first + timedelta(microseconds=n)) for n in range(count)]

    # --- the work

    def insert_each(self, records: Sequence[Record]) -> None:
        """One INSERT and one commit for each job."""
        for each in records:
            self.run(self.begin)
            self.cursor.execute(self.insert, each)
            self.run("COMMIT")

    def insert_all(self, records: Sequence[Record]) -> None:
        """All jobs in one transaction, the fastest way that the driver knows."""
        self.run(self.begin)
        self.cursor.executemany(self.insert, records)
        self.run("COMMIT")

    def drain(self, function: Any, *, merged: bool = True) -> int:
        """Complete the last hundred and claim the next, in one transaction or two, and call ``function`` for each."""
        done: list[int] = []
        count = 0
        while True:
            self.run(self.begin)
            if done:
                self.complete(done)
                if not merged:
                    self.run("COMMIT")
                    self.run(self.begin)
            rows = self.claim()
            self.run("COMMIT")
            if not rows:
                return count
            for row in rows:
                function(row[0])
            done = [row[0] for row in rows]
            count += len(done)

    def drain_with_effect(self) -> int:
        """Claim a hundred; then for each an INSERT and its completion, guarded by the token, in one transaction."""
        count = 0
        while True:
            self.run(self.begin)
            rows = self.claim()
            self.run("COMMIT")
            for row in rows:
                self.run(self.begin)
                self.run("INSERT INTO bench_effect (n) VALUES (?)", (row[0],))
                now = self.time(datetime.now(UTC))
                self.run(
                    f"UPDATE {TABLE} SET {DONE}, finished_at = ? WHERE id = ? AND attempt = ? AND status = 'running'",
                    (now, row[0], row[1]),
                )
                self.run("COMMIT")
            count += len(rows)
            if not rows:
                return count

    # --- claim and complete

    def claim(self) -> list[Any]:
        now = datetime.now(UTC)
        return list(
            self.run(
                f"UPDATE {TABLE} SET {TAKEN}, started_at = ?, leased_until = ? WHERE id IN (SELECT id FROM {TABLE} "
                f"WHERE {DUE} AND run_at <= ? AND (expires_at IS NULL OR expires_at >= ?) "
                f"ORDER BY run_at, id LIMIT {BATCH}) RETURNING {RETURNED}",
                [self.time(each) for each in (now, now + timedelta(minutes=1), now, now)],
            )
        )

    def complete(self, ids: list[int]) -> None:
        self.run(
            f"UPDATE {TABLE} SET {DONE}, finished_at = ? WHERE id IN (SELECT value FROM json_each(?)) "
            "AND attempt = 1 AND status = 'running'",
            (self.time(datetime.now(UTC)), json.dumps(ids)),
        )

    # --- before, meanwhile and after

    def newest(self) -> int:
        """Return the greatest id there is."""
        return int(self.run(f"SELECT coalesce(max(id), 0) FROM {TABLE}").fetchone()[0])

    def unfinished(self, after: int) -> int:
        """Return how many jobs of those added since are not complete; looks at the last of them first."""
        last = self.run(f"SELECT status FROM {TABLE} WHERE id = (SELECT max(id) FROM {TABLE})").fetchone()[0]
        if last != "complete":
            return 1
        left = self.run(f"SELECT count(*) FROM {TABLE} WHERE id > ? AND status <> 'complete'", (after,))
        return int(left.fetchone()[0])

    def clear(self) -> None:
        """Empty the tables."""
        for table in (TABLE, "bench_effect"):
            self.run(f"DELETE FROM {table}")

    def numbers(self, count: int) -> str:
        """Return what follows FROM to get the numbers up to ``count``, as ``i``."""
        return f"(WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count}) SELECT i FROM n) t"

    def load(self, future: int, finished: int) -> None:
        """Add jobs of ten priorities, most of them better than 0, that are not due for a year, and finished ones."""
        later, before = datetime.now(UTC) + timedelta(days=365), datetime.now(UTC) - timedelta(days=30)
        for count, status, run_at in ((future, "scheduled", later), (finished, "complete", before)):
            self.generate(count, self.priority, run_at, status=status)
        self.settle()

    def generate(self, count: int, priority: str, run_at: datetime, *, status: str = "scheduled") -> None:
        """Add jobs that do nothing, without making them here first; for ``priority`` there is the number ``t.i``."""
        values = dict(zip(COLUMNS, self.record("nothing", 1, run_at), strict=True)) | {"status": status}
        del values["priority"]
        marks = ", ".join("?" for _ in values)
        source = f"SELECT {marks}, {priority} FROM {self.numbers(count)}"
        self.run(f"INSERT INTO {TABLE} ({', '.join(values)}, priority) {source}", list(values.values()))

    def settle(self) -> None:
        """Let the database do now what it would do in the background, and so while something else is measured."""

    priority = "t.i % 10"


class SQLite(Raw):
    mark = "?"
    begin = "BEGIN IMMEDIATE"

    def time(self, value: datetime) -> object:
        return value.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds")


class PostgreSQL(Raw):
    priority = "CAST(t.i %% 10 AS smallint)"

    def insert_all(self, records: Sequence[Record]) -> None:
        self.run(self.begin)
        with self.cursor.copy(f"COPY {TABLE} ({', '.join(COLUMNS)}) FROM STDIN") as copy:
            for each in records:
                copy.write_row(each)
        self.run("COMMIT")

    def claim(self) -> list[Any]:
        now = datetime.now(UTC)
        returned = ", ".join(f"job.{name}" for name in RETURNED.split(", "))
        return list(
            self.run(
                f"WITH chosen AS MATERIALIZED (SELECT id FROM {TABLE} WHERE {DUE} AND run_at <= ? "
                "AND (expires_at IS NULL OR expires_at >= ?) "
                f"ORDER BY run_at, id LIMIT {BATCH} FOR UPDATE SKIP LOCKED) "
                f"UPDATE {TABLE} AS job SET status = 'running', attempt = job.attempt + 1, leased_by = 'raw', "
                f"started_at = ?, leased_until = ? FROM chosen WHERE job.id = chosen.id RETURNING {returned}",
                (now, now, now, now + timedelta(minutes=1)),
            )
        )

    def complete(self, ids: list[int]) -> None:
        self.run(
            f"UPDATE {TABLE} SET {DONE}, finished_at = ? WHERE id = ANY(?) AND attempt = 1 AND status = 'running'",
            (datetime.now(UTC), ids),
        )

    def numbers(self, count: int) -> str:
        return f"generate_series(1, {count}) AS t(i)"

    def clear(self) -> None:
        self.run(f"TRUNCATE {TABLE}, bench_effect CASCADE")

    def settle(self) -> None:
        self.run(f"VACUUM (ANALYZE) {TABLE}")


class MariaDB(Raw):
    priority = "t.seq %% 10"

    def time(self, value: datetime) -> object:
        return value.astimezone(UTC).replace(tzinfo=None)

    def claim(self) -> list[Any]:
        now = self.time(datetime.now(UTC))
        rows = list(
            self.run(
                f"SELECT {RETURNED.replace('attempt', 'attempt + 1')} FROM {TABLE} WHERE {DUE} AND run_at <= ? "
                f"AND (expires_at IS NULL OR expires_at >= ?) ORDER BY run_at, id LIMIT {BATCH} FOR UPDATE SKIP LOCKED",
                (now, now),
            )
        )
        if rows:
            marks = ", ".join("?" for _ in rows)
            self.run(
                f"UPDATE {TABLE} SET {TAKEN}, started_at = ?, leased_until = ? WHERE id IN ({marks})",
                (now, self.time(datetime.now(UTC) + timedelta(minutes=1)), *(row[0] for row in rows)),
            )
        return rows

    def complete(self, ids: list[int]) -> None:
        marks = ", ".join("?" for _ in ids)
        self.run(
            f"UPDATE {TABLE} SET {DONE}, finished_at = ? WHERE id IN ({marks}) AND attempt = 1 AND status = 'running'",
            (self.time(datetime.now(UTC)), *ids),
        )

    def numbers(self, count: int) -> str:
        return f"seq_1_to_{count} t"


def connect(kind: str, url: URL, pragmas: Sequence[str]) -> Raw:
    """Return a connection of the bare driver, in autocommit: BEGIN and COMMIT are said aloud."""
    if kind == "sqlite":
        connection = sqlite3.connect(str(url.database), isolation_level=None, check_same_thread=False)
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}")
        return SQLite(connection)
    if kind == "postgresql":
        import psycopg  # noqa: PLC0415 (an extra)

        return PostgreSQL(psycopg.connect(host=url.host, user=url.username, dbname=url.database, autocommit=True))
    import pymysql  # noqa: PLC0415

    maria = pymysql.connect(host=url.host, user=url.username, database=url.database, charset="utf8mb4", autocommit=True)
    maria.cursor().execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
    return MariaDB(maria)
