"""The state machine against a model of it, and mutants of it that the same test must kill.

Two workers claim, pause, wake up and finish at any time, while jobs are cancelled, retried, expire and are rescued. The
model is a dictionary; after every step the database must agree with it.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test
from sqlalchemy import bindparam, create_engine, delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool

from future_jobs import (
    ScheduledJob,
    Scheduler,
    bulk,
    claim_statements,
    create_tables,
    lifecycle,
    statements,
    unique_statements,
)
from future_jobs.errors import AlreadyScheduled, IllegalTransition
from future_jobs.lifecycle import Completed, Failed, Failure, Retried, Snoozed
from future_jobs.statements import J, Token
from future_jobs.status import ALLOWED, Status, check
from future_jobs.units import Units

START = datetime(2030, 1, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
LEASE = 10 * MINUTE
BROKE = Failure("ValueError", "fail", "ValueError: fail")


OUTCOMES = st.sampled_from(["complete", "complete in a batch", "fail", "retry", "snooze"])


@dataclass
class Model:
    status: str
    run_at: datetime
    expires_at: datetime | None
    attempt: int = 0
    losses: int = 0
    leased_until: datetime | None = None
    asked: bool = False
    effects: int = 0
    key: str | None = None
    until: str | None = None

    @property
    def has_key(self):
        return self.status == "scheduled" or (self.status == "running" and self.until == "finished")


class Lives(RuleBasedStateMachine):
    tokens = Bundle("tokens")
    ids = Bundle("ids")

    def __init__(self):
        super().__init__()
        self.engine = create_engine("sqlite://", poolclass=StaticPool)
        create_tables(self.engine)
        self.units = Units(self.engine)
        self.session = Session(self.engine)
        self.now = START
        self.scheduler = Scheduler(self.session, clock=lambda: self.now)
        self.jobs: dict[int, Model] = {}

    def teardown(self):
        self.session.close()
        self.engine.dispose()

    def other_with(self, key):
        """The id of the job that has the key, if there is one."""
        return next((job_id for job_id, model in self.jobs.items() if key and model.key == key and model.has_key), None)

    def wait_again(self, model, run_at=None):
        """A job waits again only if it was not asked to stop, and no other has a key that it gave up."""
        if model.asked or (model.until == "started" and self.other_with(model.key)):
            model.status = "cancelled"
        else:
            model.status, model.run_at = "scheduled", run_at or model.run_at
        return model.status

    @rule(
        target=ids,
        minutes=st.integers(-5, 10),
        grace=st.sampled_from([None, None, 0, 20]),
        key=st.sampled_from([None, "k"]),
        until=st.sampled_from(["started", "finished"]),
        on_conflict=st.sampled_from(["raise", "return_existing", "replace"]),
    )
    def schedule(self, minutes, grace, key, until, on_conflict):
        run_at = self.now + minutes * MINUTE
        options = {"expires": None if grace is None else grace * MINUTE}
        options |= {"unique_key": key, "unique_until": until, "on_conflict": on_conflict}
        other = self.other_with(key)
        new = Model(
            "scheduled", run_at, None if grace is None else run_at + grace * MINUTE, key=key, until=key and until
        )
        is_waiting = other is not None and self.jobs[other].status == "scheduled"
        if other is not None and (on_conflict == "raise" or (on_conflict == "replace" and not is_waiting)):
            with pytest.raises(AlreadyScheduled) as caught:
                self.scheduler.schedule(run_at, "tests.jobs.record", **options)
            assert caught.value.job_id == other
            return multiple()
        job = self.scheduler.schedule(run_at, "tests.jobs.record", **options)
        self.session.commit()
        if other is None:
            self.jobs[job.id] = new
            return job.id
        assert job.id == other, "a second job with the same key"
        if on_conflict == "replace":
            new.attempt = self.jobs[other].attempt
            self.jobs[other] = new
        return multiple()

    @rule(minutes=st.integers(1, 25))
    def time_passes(self, minutes):
        self.now += minutes * MINUTE

    @rule(target=tokens, worker=st.sampled_from(["a", "b"]))
    def claim(self, worker):
        return self.claim_one(worker)

    def claim_one(self, worker):
        def work(connection):
            for level in statements.levels(connection):
                rows = claim_statements.claim(
                    connection,
                    level,
                    after=(level.first_at, 0),
                    newest=1 << 60,
                    limit=1,
                    now=self.now,
                    worker=worker,
                    leased_until=self.now + LEASE,
                )
                if rows:
                    return rows[0]
            return None

        row = self.units.write(work)
        due = [
            (model.run_at, job_id)
            for job_id, model in self.jobs.items()
            if model.status == "scheduled"
            and model.run_at <= self.now
            and (model.expires_at is None or model.expires_at >= self.now)
        ]
        if not due:
            assert row is None, "a job was claimed that is not due, or too late"
            return multiple()
        assert row is not None
        assert row.id == min(due)[1], "not the first that is due"
        model = self.jobs[row.id]
        model.status, model.attempt, model.asked = "running", model.attempt + 1, False
        model.leased_until = self.now + LEASE
        assert row.attempt == model.attempt
        return Token(row.id, row.attempt)

    @rule(token=tokens, outcome=OUTCOMES)
    def settle_too_late(self, token, outcome):
        """By one who wakes up when another is at it."""
        self.is_given_to_another(token)
        self.settle(token, outcome, 0, again=False)

    @rule(token=tokens, outcome=OUTCOMES, minutes=st.integers(0, 5), again=st.booleans())
    def settle(self, token, outcome, minutes, again):
        """By whoever holds it, or by one who was paused and no longer does."""
        model = self.jobs[token.id]
        holds = (model.status, model.attempt) == ("running", token.attempt)
        run_at = self.now + minutes * MINUTE
        if outcome == "complete in a batch":
            lost = self.units.write(lambda c: lifecycle.complete_all(c, [(token, None)], now=self.now))
            won = not lost
        else:
            written = {
                "complete": Completed("[1]"),
                "fail": Failed(BROKE, ValueError()),
                "retry": Retried(BROKE, run_at),
                "snooze": Snoozed(run_at),
            }[outcome]
            settle = partial(lifecycle.settle, token=token, outcome=written, now=self.now, worker="a", again=again)
            won = self.units.write(settle) is not None
        already = (
            (again or outcome == "complete in a batch")
            and model.attempt == token.attempt
            and {
                "complete": "complete",
                "complete in a batch": "complete",
                "fail": "failed",
                "retry": "scheduled",
                "snooze": "scheduled",
            }[outcome]
            == model.status
        )
        assert won == (holds or already), "an attempt that lost its job finished it, or one that held it could not"
        if not holds:
            return
        if outcome.startswith("complete"):
            model.status = "complete"
            model.effects += 1
            assert model.effects == 1
        elif outcome == "fail":
            model.status = "cancelled" if model.asked else "failed"
        else:
            self.wait_again(model, run_at)

    @rule(token=tokens)
    def release(self, token):
        model = self.jobs[token.id]
        self.units.write(lambda c: lifecycle.release_all(c, [token]))
        if (model.status, model.attempt) == ("running", token.attempt):
            self.wait_again(model)

    @rule(target=tokens, token=tokens)
    def is_given_to_another(self, token):
        """Its worker sleeps past its lease, and does not know."""
        if self.jobs[token.id].status != "running":
            return multiple()
        self.now += 2 * LEASE + MINUTE
        self.rescue()
        return self.claim_one("b")

    @rule()
    def rescue(self):
        rescued = self.units.write(lambda c: lifecycle.rescue(c, now=self.now, grace=LEASE))
        lost = {
            job_id
            for job_id, model in self.jobs.items()
            if model.status == "running" and model.leased_until + LEASE < self.now
        }
        assert {row.id for row, _ in rescued} == lost
        for row, status in rescued:
            model = self.jobs[row.id]
            model.losses += 1
            if model.losses >= lifecycle.MAX_LOSSES and not model.asked:
                model.status = "failed"
            else:
                self.wait_again(model)
            assert status == model.status

    @rule()
    def expire(self):
        def work(connection):
            for level in statements.levels(connection):
                lifecycle.expire(connection, level, now=self.now)

        self.units.write(work)
        for model in self.jobs.values():
            if model.status == "scheduled" and model.expires_at is not None and model.expires_at < self.now:
                if model.run_at <= self.now:
                    model.status = "expired"

    @rule(job_id=ids)
    def cancel(self, job_id):
        model = self.jobs[job_id]
        won = self.scheduler.cancel(job_id)
        self.session.commit()
        can = model.status == "scheduled" or (model.status == "running" and not model.asked)
        assert won == can
        if model.status == "scheduled":
            model.status = "cancelled"
        elif model.status == "running":
            model.asked = True

    @rule(job_id=ids)
    def retry(self, job_id):
        model = self.jobs[job_id]
        job = self.session.get(ScheduledJob, job_id)
        grace = None if model.expires_at is None else job.expires_at - job.nominal_at
        won = self.scheduler.retry(job)
        self.session.commit()
        is_over = model.status in {"failed", "expired", "cancelled"}
        assert won == (is_over and self.other_with(model.key) is None)
        if won:
            model.status, model.run_at, model.losses, model.asked = "scheduled", self.now, 0, False
            model.expires_at = None if grace is None else self.now + grace

    @invariant()
    def the_database_agrees(self):
        with self.engine.connect() as connection:
            rows = connection.execute(select(J.id, J.status, J.attempt, J.losses, J.run_at, J.leased_by))
            for row in rows:
                model = self.jobs[row.id]
                assert (row.status, row.attempt, row.losses) == (model.status, model.attempt, model.losses)
                assert row.run_at == model.run_at
                assert (row.leased_by is not None) == (model.status == "running")
            connection.rollback()


SETTINGS = settings(
    max_examples=120,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_the_database_follows_the_model():
    run_state_machine_as_test(Lives, settings=SETTINGS)


# --- mutants ------------------------------------------------------------------------------------------------------


def finish_by_id_only(monkeypatch):
    def move(connection, token, source, values, *conditions):
        return connection.execute(update(statements.JOBS).where(J.id == token.id).values(**values)).rowcount == 1

    monkeypatch.setattr(statements, "move", move)


def finish_by_status_only(monkeypatch):
    def move(connection, token, source, values, *conditions):
        guard = (J.id == token.id, J.status == source, *conditions)
        return connection.execute(update(statements.JOBS).where(*guard).values(**values)).rowcount == 1

    monkeypatch.setattr(statements, "move", move)


def finish_batches_by_status_only(monkeypatch):
    def complete_all(connection, results, values):
        guard = (J.id.in_([token.id for token in results]), J.status == "running")
        return connection.execute(update(statements.JOBS).where(*guard).values(**values)).rowcount

    monkeypatch.setattr(bulk, "complete_all", complete_all)


def no_expiry_check(monkeypatch):
    due = claim_statements._due.__wrapped__

    def without(*arguments):
        found = due(*arguments)
        kept = [clause for clause in found.whereclause.clauses if "expires_at" not in str(clause)]
        return select(J.id).where(*kept).order_by(J.run_at, J.id).limit(found._limit_clause)

    monkeypatch.setattr(claim_statements, "_due", without)
    claim_statements._claim_at_once.cache_clear()


def cancel_in_any_state(monkeypatch):
    def cancel(connection, job_id, *, now):
        return (
            connection.execute(update(statements.JOBS).where(J.id == job_id).values(status="cancelled")).rowcount == 1
        )

    monkeypatch.setattr(lifecycle, "cancel", cancel)


def wait_again_whoever_has_the_key(monkeypatch):
    monkeypatch.setattr(unique_statements, "key_given_up", lambda *_: None)


def replace_whatever_it_does(monkeypatch):
    statement = update(statements.JOBS).where(J.id == bindparam("_id"), J.unique_key == bindparam("_key"))
    monkeypatch.setattr(unique_statements, "_REPLACE", statement)
    found = unique_statements.Holder
    monkeypatch.setattr(unique_statements, "Holder", lambda job_id, _status: found(job_id, "scheduled"))


def rescue_whatever_the_lease(monkeypatch):
    real = lifecycle.rescue
    monkeypatch.setattr(
        lifecycle, "rescue", lambda connection, *, now, grace: real(connection, now=now, grace=-2 * LEASE)
    )


MUTANTS = [
    finish_by_id_only,
    finish_by_status_only,
    finish_batches_by_status_only,
    no_expiry_check,
    cancel_in_any_state,
    wait_again_whoever_has_the_key,
    replace_whatever_it_does,
    rescue_whatever_the_lease,
]


# The first counter-example is enough: it is not made smaller.
KILL = settings(SETTINGS, max_examples=1_500, phases=[Phase.generate], report_multiple_bugs=False)


@contextmanager
def fresh_statements():
    """Statements that a mutant built must not stay in the caches."""
    rooms = (statements, claim_statements, unique_statements)
    cached = {each for room in rooms for each in vars(room).values() if hasattr(each, "cache_clear")}
    try:
        yield
    finally:
        for each in cached:
            each.cache_clear()


DEATHS = (AssertionError, IntegrityError, pytest.fail.Exception)  # the index of keys kills some of them


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_mutant_dies(mutant, monkeypatch):
    with fresh_statements(), monkeypatch.context() as patch, pytest.raises(DEATHS):
        mutant(patch)
        run_state_machine_as_test(Lives, settings=KILL)


# --- the table ----------------------------------------------------------------------------------------------------


def test_the_table_of_transitions_is_complete():
    assert set(ALLOWED) == set(Status)
    for source in Status:
        for target in Status:
            if target in ALLOWED[source]:
                check(source, target)
            else:
                with pytest.raises(IllegalTransition, match=f"{source}.*{target}"):
                    check(source, target)


def test_deleting_a_row_is_losing_it():
    engine = create_engine("sqlite://", poolclass=StaticPool)
    create_tables(engine)
    with Session(engine) as session:
        job = Scheduler(session).schedule("0s", "tests.jobs.record")
        token = Token(job.id, 0)
        session.execute(delete(ScheduledJob))
        connection = session.connection()
        assert lifecycle.settle(connection, token, Completed(), now=START, worker="a") is None
        assert lifecycle.complete_all(connection, [(token, None)], now=START) == {token}
    engine.dispose()
