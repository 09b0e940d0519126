"""What a database can do. The only room that spells a dialect's name.

SQLite, PostgreSQL and MySQL/MariaDB differ in six things that matter here: how a timestamp keeps its
microseconds, which indexes may be partial, how rows are claimed without waiting, how one parameter
holds many rows, when a transaction really begins, and how an error says that trying again may help.
`Backend` answers what can be asked of all three alike; the rest is named after what it is for.
"""

from __future__ import annotations

from .backends import (
    DRIVERS,
    IN_USE,
    MYSQL,
    POSTGRESQL,
    SQLITE,
    Backend,
    absolute,
    backend_of,
    can_listen,
    check_version,
    in_line,
    insert_if_free,
    insert_unless_there,
    is_autocommit,
    is_guided,
    is_repeatable,
    is_single_connection,
    keep_for_own,
    keeps_snapshot,
    received,
)
from .columns import (
    TABLE_OPTIONS,
    BigKey,
    Encoded,
    JSONText,
    LongText,
    Unreadable,
    UTCDateTime,
    claim_indexes,
    concurrency_index,
    partial_index,
)
from .faults import (
    is_away,
    is_disconnect,
    is_lock_error,
    is_missing_table,
)
from .sqlite import (
    begin_before_savepoint,
    begin_lazily,
    cannot_roll_back,
    change_counter,
    configure_sqlite,
    has_written,
    impatient,
    prepare_for_job,
    take_write_lock,
    written_files,
)

__all__ = [
    "DRIVERS",
    "IN_USE",
    "MYSQL",
    "POSTGRESQL",
    "SQLITE",
    "TABLE_OPTIONS",
    "Backend",
    "BigKey",
    "Encoded",
    "JSONText",
    "LongText",
    "UTCDateTime",
    "Unreadable",
    "absolute",
    "backend_of",
    "begin_before_savepoint",
    "begin_lazily",
    "can_listen",
    "cannot_roll_back",
    "change_counter",
    "check_version",
    "claim_indexes",
    "concurrency_index",
    "configure_sqlite",
    "has_written",
    "impatient",
    "in_line",
    "insert_if_free",
    "insert_unless_there",
    "is_autocommit",
    "is_away",
    "is_disconnect",
    "is_guided",
    "is_lock_error",
    "is_missing_table",
    "is_repeatable",
    "is_single_connection",
    "keep_for_own",
    "keeps_snapshot",
    "partial_index",
    "prepare_for_job",
    "received",
    "take_write_lock",
    "written_files",
]
