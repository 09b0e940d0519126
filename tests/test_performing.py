"""One claim that is carried out twice, as an executor does that starts a task anew elsewhere when a host was lost."""

from datetime import timedelta
from functools import partial
from secrets import token_hex

import pytest
from sqlalchemy.orm import Session

from future_jobs import Snooze, claim_statements, execution, lifecycle, statements
from future_jobs.lifecycle import Snoozed
from future_jobs.performing import Performer
from future_jobs.sessions import JobSession
from future_jobs.statements import Token
from future_jobs.units import Units
from tests.shop import Letter, letters


def write_another(session: Session):
    session.add(Letter(text=token_hex(8)))


def write_another_and_wait(session: Session):
    session.add(Letter(text=token_hex(8)))
    return Snooze("1h")


@pytest.fixture
def units(engine):
    return Units(engine)


@pytest.fixture
def claim(units, scheduler, session, now):
    """Schedule a job, and claim it."""

    def claim(function):
        scheduler.schedule(now, function)
        session.commit()

        def work(connection):
            [level] = statements.levels(connection)
            [row] = claim_statements.claim(
                connection,
                level,
                after=(level.first_at, 0),
                newest=1 << 60,
                limit=1,
                now=now,
                worker="a",
                leased_until=now + timedelta(minutes=1),
            )
            return row

        return units.write(work)

    return claim


@pytest.fixture
def performer(units, new_session, scheduler, now):
    def open_session(row):
        hold = partial(statements.hold, token=Token(row.id, row.attempt))
        return JobSession(new_session, units.bind, hold=hold)

    context = execution.Context(
        check=scheduler.check, check_class=scheduler.check_class, time=lambda: now, timezone=scheduler.timezone
    )
    return Performer(units, open_session, context, worker="a")


@pytest.mark.parametrize(("function", "state"), [(write_another, "complete"), (write_another_and_wait, "scheduled")])
def test_a_claim_that_is_carried_out_twice_writes_once(claim, performer, session, function, state):
    if performer.units.is_alone:
        pytest.skip("one connection: nobody else could carry it out")
    row = claim(function)
    assert [performer.perform(row).status for _ in range(2)] == [state, None]
    assert len(letters(session)) == 1


def test_only_a_unit_that_was_tried_before_knows_its_own_commit(claim, units, now):
    row = claim(write_another)
    outcome = Snoozed(now + timedelta(hours=1))
    settle = partial(lifecycle.settle, token=Token(row.id, row.attempt), outcome=outcome, now=now, worker="a")
    assert units.write(settle) == "scheduled"
    assert units.write(partial(settle, again=True)) == "scheduled"
    assert units.write(settle) is None
