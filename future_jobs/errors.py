"""Every exception that this library raises on purpose.

The tree (the built-in that each one also is, in brackets)::

    FutureJobsError
    ├── UsageError                      a call that cannot be right; nothing was written
    │   ├── InvalidTime      (ValueError)   when, expires, a duration, a time zone, a rule
    │   ├── InvalidOption    (ValueError)   an option outside its range
    │   ├── InvalidPayload   (ValueError)   arguments too large, too deep or cyclic
    │   ├── InvalidCallable  (ValueError)   not something that can be found again by its path
    │   ├── CallableRefused  (ValueError)   outside the ``allow`` list
    │   ├── CallableNotFound (ImportError)  no such module or attribute
    │   ├── UnknownRecurring (LookupError)  no recurring job has that name
    │   ├── InvalidArgument  (TypeError)    the wrong type, or arguments the handler cannot take
    │   └── UnknownOption    (TypeError)    an option that does not exist
    ├── AlreadyScheduled     (ValueError)   another job has the same ``unique_key``
    ├── PayloadUnreadable    (ValueError)   a stored payload that cannot be decoded
    ├── ObjectMissing        (LookupError)  the object a job is about is gone
    ├── IllegalTransition    (ValueError)   a status change that the table of transitions forbids
    ├── JobTimeout         (TimeoutError) a handler ran longer than the job's ``timeout``
    ├── WaitTimeout        (TimeoutError) a job was not finished in the time that `Scheduler.wait` was given
    ├── JobAborted       (RuntimeError) a handler raised SystemExit or the like; raised by ``run_due`` in its place
    ├── NotSupported         (RuntimeError) a database or configuration that cannot work
    ├── DatabaseBusy         (RuntimeError) locked by others for longer than anybody should wait
    └── SchemaError          (RuntimeError) tables missing, or of another revision

Messages name the argument, show the value (at most 80 characters of it) and say what would work; the
same facts are attributes.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = [
    "AlreadyScheduled",
    "CallableNotFound",
    "CallableRefused",
    "DatabaseBusy",
    "FutureJobsError",
    "IllegalTransition",
    "InvalidArgument",
    "InvalidCallable",
    "InvalidOption",
    "InvalidPayload",
    "InvalidTime",
    "JobAborted",
    "JobTimeout",
    "NotSupported",
    "ObjectMissing",
    "PayloadUnreadable",
    "SchemaError",
    "UnknownOption",
    "UnknownRecurring",
    "UsageError",
    "WaitTimeout",
    "shown",
]

SHOWN = 80


def shown(value: object) -> str:
    """Return ``repr(value)`` on one line, at most 80 characters, whatever its ``__repr__`` does."""
    try:
        text = repr(value[:200] if isinstance(value, str | bytes) else value)
    except Exception as error:
        text = f"<{type(value).__name__} whose repr() raised {type(error).__name__}>"
    text = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


class FutureJobsError(Exception):
    """Base of everything below."""


class UsageError(FutureJobsError):
    """A call that cannot be right. ``argument`` names the parameter at fault, ``value`` is what was given."""

    def __init__(self, message: str, *, argument: str | None = None, value: object = None) -> None:
        super().__init__(message)
        self.argument = argument
        self.value = value


class InvalidTime(UsageError, ValueError):
    """A ``when``, ``expires``, duration, time zone or rule that means nothing, or nothing possible."""


class InvalidOption(UsageError, ValueError):
    """An option outside its range."""


class InvalidPayload(UsageError, ValueError):
    """Arguments too large, too deep, cyclic, or with a value that would not survive storage."""


class InvalidCallable(UsageError, ValueError):
    """Something that cannot be found again by ``module.qualname``: a lambda, a local function, a bad path."""


class CallableRefused(UsageError, ValueError):
    """A callable outside the ``allow`` list."""


class CallableNotFound(UsageError, ImportError):
    """A path whose module or attribute does not exist here."""


class UnknownRecurring(UsageError, LookupError):
    """A recurring job that does not exist; the message names the nearest that does."""


class InvalidArgument(UsageError, TypeError):
    """A value of the wrong type, or arguments which the handler's signature cannot take."""


class UnknownOption(UsageError, TypeError):
    """An option that does not exist; the message names the nearest that does."""


class AlreadyScheduled(FutureJobsError, ValueError):
    """Another job has the same ``unique_key``; nothing was written, and the transaction can go on.

    ``unique_key`` is the key and ``job_id`` the job that has it; None if this transaction cannot see that job, because
    it sees the database as it was before. ``conflicts`` maps the positions in ``calls`` that `schedule_many` could not
    schedule to the jobs that have their keys; None where an earlier one of the same calls has it.
    """

    def __init__(
        self,
        message: str,
        *,
        unique_key: str,
        job_id: int | None = None,
        conflicts: Mapping[int, int | None] | None = None,
    ) -> None:
        super().__init__(message)
        self.unique_key = unique_key
        self.job_id = job_id
        self.conflicts = dict(conflicts or {})


class PayloadUnreadable(FutureJobsError, ValueError):
    """A stored payload that cannot be decoded: damaged, or written by a newer version. It is kept as it is."""


class ObjectMissing(FutureJobsError, LookupError):
    """A mapped object that a job refers to no longer exists. ``entity`` and ``identity`` say which."""

    def __init__(self, entity: str, identity: object) -> None:
        super().__init__(f"{entity} {shown(identity)} no longer exists")
        self.entity = entity
        self.identity = identity


class IllegalTransition(FutureJobsError, ValueError):
    """A status change that is not in the table of transitions. ``source`` and ``target`` say which."""

    def __init__(self, source: str, target: str) -> None:
        super().__init__(f"a job cannot go from {source!r} to {target!r}")
        self.source = source
        self.target = target


class JobTimeout(FutureJobsError, TimeoutError):
    """A handler ran longer than the ``timeout`` of its job, which is here in ``seconds``; the attempt failed."""

    def __init__(self, seconds: float | None = None) -> None:
        super().__init__("it ran for too long" if seconds is None else f"it ran longer than {seconds:g} s")
        self.seconds = seconds


class WaitTimeout(FutureJobsError, TimeoutError):
    """A job was not finished in time. ``job_id`` says which, ``status`` what it was doing then."""

    def __init__(self, job_id: int, status: str, timeout: object) -> None:
        super().__init__(f"job {job_id} is {status} after {timeout}; wait longer, or see why with 'future-jobs show'")
        self.job_id = job_id
        self.status = status


class JobAborted(FutureJobsError, RuntimeError):
    """A handler raised SystemExit, KeyboardInterrupt or the like, which must not end the process that ran it.

    ``job_id`` says which job, ``__cause__`` is what was raised.
    """

    def __init__(self, job_id: int, error: BaseException) -> None:
        super().__init__(f"the handler of job {job_id} raised {type(error).__name__}")
        self.job_id = job_id


class NotSupported(FutureJobsError, RuntimeError):
    """A database version, engine or Session configuration that cannot keep the promises made here."""


class DatabaseBusy(FutureJobsError, RuntimeError):
    """Others have held the database's locks for longer than the library waits; nothing was lost, call again."""


class SchemaError(FutureJobsError, RuntimeError):
    """The tables are missing or of another revision; the message says which command to run."""
