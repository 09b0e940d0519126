"""Recurring jobs on every database: declared, ticked, caught up with, operated."""

from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from dateutil.relativedelta import relativedelta
from dateutil.rrule import MONTHLY, rrule
from sqlalchemy import event, select, update
from sqlalchemy.orm import Session

from future_jobs import (
    InvalidArgument,
    InvalidCallable,
    InvalidOption,
    InvalidTime,
    RecurringJob,
    ScheduledJob,
    Scheduler,
    SchemaError,
    UnknownOption,
    UnknownRecurring,
    events,
    plans,
    recurring,
    ticks,
)
from future_jobs.units import Units
from tests import jobs, shop

NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
STOCKHOLM = ZoneInfo("Europe/Stockholm")


class Clock:
    def __init__(self, now):
        self.now = now

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock(NOON)


@pytest.fixture
def scheduler(session, clock):
    return Scheduler(session, timezone=UTC, clock=clock)


@pytest.fixture
def hourly(scheduler, session):
    """Declare an hourly job, of which the first is due at one o'clock."""

    def declare(**settings):
        found = scheduler.recurring("hourly", "0 * * * *", jobs.record, **settings)
        session.commit()
        return found

    return declare


@pytest.fixture
def heard():
    """What the events ``missed`` and ``tick_failed`` said."""
    found = []
    listeners = {
        name: partial(lambda name, **data: found.append((name, data)), name) for name in ("missed", "tick_failed")
    }
    for name, listener in listeners.items():
        events.listen(name, listener)
    yield found
    for name, listener in listeners.items():
        events.unlisten(name, listener)


@pytest.fixture
def writes(engine):
    """The statements that write."""
    found = []

    def note(connection, cursor, statement, *_):
        if statement.lstrip().upper().startswith(("INSERT", "UPDATE", "DELETE")) and "id IS NULL" not in statement:
            found.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    yield found
    event.remove(engine, "before_cursor_execute", note)


def made(session, *columns):
    columns = columns or (ScheduledJob.nominal_at,)
    found = session.execute(
        select(*columns).where(ScheduledJob.recurring_id.is_not(None)).order_by(ScheduledJob.nominal_at)
    )
    rows = [tuple(row) for row in found]
    session.rollback()
    return [row[0] for row in rows] if len(columns) == 1 else rows


def counters(found):
    return found.fired, found.missed, found.skipped


# --- declaring ----------------------------------------------------------------------------------------------------


def test_a_declared_job_is_a_row_that_says_when_it_is_next(scheduler, session):
    found = scheduler.recurring(
        "report", "0 9 * * mon-fri", jobs.record, args=[1], kwargs={"k": 2}, timezone="Europe/Stockholm", queue="slow"
    )
    assert isinstance(found, RecurringJob)
    session.commit()
    found = session.scalar(select(RecurringJob))
    assert (found.name, found.rule, found.timezone) == ("report", "0 9 * * mon-fri", "Europe/Stockholm")
    assert found.next_run_at == datetime(2026, 6, 2, 9, tzinfo=STOCKHOLM)
    assert (found.callable_name, found.args, found.kwargs) == ("tests.jobs.record", [1], {"k": 2})
    assert found.options == {"queue": "slow", "priority": 0, "max_attempts": 1, "expires": "1w"}
    assert (found.catch_up, found.overlap, counters(found)) == ("latest", "skip", (0, 0, 0))


def test_declaring_it_again_writes_nothing(scheduler, session, writes):
    def declare():
        scheduler.recurring(
            "r", "15m", jobs.record, args=[{"b", "a"}], start=NOON, jitter="30s", tags=["x"], expires="2h", limit=9
        )
        session.commit()

    declare()
    assert len(writes) == 1
    row = session.execute(select(RecurringJob.__table__)).one()
    session.rollback()
    declare()
    assert len(writes) == 1
    assert session.execute(select(RecurringJob.__table__)).one() == row


def test_a_rollback_takes_the_declaration_with_it(scheduler, session):
    scheduler.recurring("r", "@daily", jobs.record)
    session.rollback()
    assert session.scalar(select(RecurringJob)) is None


def test_what_the_caller_had_pending_survives_the_declaration(scheduler, session, new_session):
    session.add(shop.Letter(text="pending"))
    scheduler.recurring("r", "@daily", jobs.record)
    session.commit()
    with new_session() as other:
        assert shop.letters(other) == ["pending"]


def test_a_new_rule_moves_the_next_time_and_keeps_the_history(hourly, scheduler, session, clock):
    found = hourly()
    clock.now += HOUR
    scheduler.run_due()
    clock.now += timedelta(minutes=5)
    again = scheduler.recurring("hourly", "30 * * * *", jobs.record)
    session.commit()
    assert again is found
    assert found.next_run_at == NOON + timedelta(minutes=90)
    assert (found.fired, found.last_run_at, found.created_at) == (1, NOON + HOUR, NOON)
    assert found.updated_at == clock.now
    assert made(session) == [NOON + HOUR]


def test_new_arguments_do_not_move_the_next_time(hourly, scheduler, session, clock, calls):
    hourly(args=[1])
    clock.now += 2 * HOUR
    hourly(args=[2])
    scheduler.run_due()
    assert (calls, made(session)) == ([(2,)], [NOON + 2 * HOUR])


def test_an_interval_is_anchored_at_the_first_declaration(scheduler, session, clock):
    for _ in range(50):
        found = scheduler.recurring("r", "24h", jobs.record)
        session.commit()
        assert found.next_run_at == NOON + timedelta(hours=24)
        clock.now += timedelta(minutes=20)


def test_an_interval_counts_from_the_second_of_its_declaration(scheduler, clock):
    clock.now += timedelta(seconds=7, microseconds=89)
    assert scheduler.recurring("r", "15m", jobs.record).next_run_at == NOON + timedelta(minutes=15, seconds=7)


def test_an_rrule_without_a_start_is_at_midnight_as_on_its_own(scheduler):
    found = scheduler.recurring("r", "FREQ=MONTHLY;BYDAY=-1FR", jobs.record, timezone="Europe/Stockholm")
    assert found.next_run_at == datetime(2026, 6, 26, tzinfo=STOCKHOLM)
    scheduler.recurring("r", "FREQ=DAILY;INTERVAL=2", jobs.record, timezone="Europe/Stockholm")
    assert found.next_run_at == datetime(2026, 6, 3, tzinfo=STOCKHOLM)


def test_a_calendar_interval_keeps_the_last_day_of_the_month(scheduler):
    scheduler.recurring("r", "1mo", jobs.record, start=datetime(2027, 1, 31, 9, tzinfo=UTC))
    assert [at.day for at in scheduler.preview("r", 4)] == [31, 28, 31, 30]


def test_a_start_is_itself_a_time(scheduler):
    found = scheduler.recurring("r", "36h", jobs.record, start="2026-06-10T09:00")
    assert found.next_run_at == datetime(2026, 6, 10, 9, tzinfo=UTC)


def test_rules_of_every_kind_are_stored_as_text(scheduler, session):
    monthly = rrule(MONTHLY, bymonthday=1, dtstart=datetime(2026, 1, 1, 9))
    for name, rule in (("rrule", monthly), ("delta", timedelta(hours=36)), ("calendar", relativedelta(months=1))):
        scheduler.recurring(name, rule, jobs.record, timezone="Europe/Stockholm")
    session.commit()
    rules = {each.name: each.rule for each in session.scalars(select(RecurringJob))}
    assert (rules["delta"], rules["calendar"]) == ("1d12h", "1mo")
    assert scheduler.preview("rrule", 1)[0].isoformat() == "2026-07-01T09:00:00+02:00"


def test_a_bound_method_and_its_object(scheduler, session, clock):
    order = shop.Order(customer="Ada")
    session.add(order)
    session.flush()
    scheduler.recurring("invoices", "@hourly", order.send_invoice)
    session.commit()
    clock.now += HOUR
    scheduler.run_due()
    assert shop.letters(session) == ["invoice for Ada x1"]


BAD = [
    ({"name": ""}, InvalidOption, "name is ''"),
    ({"name": " a"}, InvalidOption, "no space at the ends"),
    ({"name": "a\nb"}, InvalidOption, "printable"),
    ({"name": "n" * 201}, InvalidOption, "1 to 200"),
    ({"name": 3}, InvalidArgument, "pass text"),
    ({"rule": "61 * * * *"}, InvalidTime, "minute '61'"),
    ({"rule": "0 0 30 2 *"}, InvalidTime, "never fires"),
    ({"rule": "FREQ=DAILY;COUNT=0"}, InvalidTime, "never fires"),
    ({"rule": 15}, InvalidArgument, "rule must be"),
    ({"callable": "tests.jobs.missing"}, ImportError, "has no 'missing'"),
    ({"callable": lambda: None}, InvalidCallable, "lambda"),
    ({"args": "text"}, InvalidArgument, "list or tuple"),
    ({"args": [object()]}, TypeError, r"args\[0\]"),
    ({"timezone": "Europe/Stockhlm"}, InvalidTime, "did you mean 'Europe/Stockholm'"),
    ({"timezone": __import__("datetime").timezone(HOUR)}, InvalidTime, "no name"),
    ({"catch_up": "al"}, InvalidOption, "did you mean 'all'"),
    ({"catch_up": None}, InvalidOption, "'latest', 'all', 'skip'"),
    ({"catch_up_window": "soon"}, InvalidTime, "catch_up_window"),
    ({"overlap": "wait"}, InvalidOption, "'skip', 'queue', 'allow'"),
    ({"jitter": 3}, InvalidArgument, "jitter"),
    ({"jitter": timedelta(-1)}, InvalidTime, "backwards"),
    ({"start": "3d"}, InvalidTime, "move with every declaration"),
    ({"end": HOUR}, InvalidTime, "move with every declaration"),
    ({"start": "2026-02-30"}, InvalidTime, "start"),
    ({"start": "2027-01-01T00:00", "end": "2026-01-01T00:00"}, InvalidTime, "before the start"),
    ({"limit": 0}, InvalidOption, "use 1 to"),
    ({"limit": 1.5}, InvalidArgument, "whole number"),
    ({"limit": True}, InvalidArgument, "whole number"),
    ({"expires": datetime(2027, 1, 1)}, InvalidTime, "pass a duration"),
    ({"priority": 1000}, InvalidOption, "-100 to 100"),
    ({"expire": "3d"}, UnknownOption, "'expires'"),
]


@pytest.mark.parametrize(
    ("settings", "error", "words"), BAD, ids=[f"{next(iter(s))}-{n}" for n, (s, *_) in enumerate(BAD)]
)
def test_what_cannot_be_is_refused_before_anything_is_written(scheduler, session, writes, settings, error, words):
    given = {"name": "r", "rule": "@daily", "callable": jobs.record, **settings}
    with pytest.raises(error, match=words):
        scheduler.recurring(given.pop("name"), given.pop("rule"), given.pop("callable"), **given)
    assert writes == []


# --- @recurring ---------------------------------------------------------------------------------------------------


@pytest.fixture
def declared(monkeypatch):
    monkeypatch.setattr(plans, "DECLARED", found := {})
    monkeypatch.setattr("future_jobs.schedules.DECLARED", found)
    return found


def test_decorated_functions_are_synchronised_by_one_call(scheduler, session, declared, writes):
    assert recurring("0 9 * * *", args=[1], queue="slow")(jobs.record) is jobs.record
    recurring("@hourly", name="samples")(jobs.sample_job)
    found = scheduler.sync_recurring()
    session.commit()
    assert [each.name for each in found] == ["tests.jobs.record", "samples"]
    assert [each.rule for each in found] == ["0 9 * * *", "0 * * * *"]
    assert found[0].options["queue"] == "slow"
    writes.clear()
    assert scheduler.sync_recurring() == found
    session.commit()
    assert writes == []


def test_two_functions_cannot_have_one_name(declared):
    recurring("@daily", name="r")(jobs.record)
    recurring("@daily", name="r")(jobs.record)
    with pytest.raises(InvalidOption, match=r"tests\.jobs\.record has already"):
        recurring("@daily", name="r")(jobs.sample_job)


def test_an_unknown_setting_of_the_decorator_names_the_nearest(declared):
    with pytest.raises(UnknownOption, match="did you mean 'overlap'"):
        recurring("@daily", overlaps="skip")


# --- ticks --------------------------------------------------------------------------------------------------------


def test_a_due_time_becomes_a_job_that_knows_its_time(hourly, scheduler, session, clock, calls):
    found = hourly(args=["x"], expires="2h", queue="q", priority=3, tags=["t"], max_attempts=2)
    assert scheduler.run_due().job_ids == []
    clock.now += HOUR + timedelta(seconds=7)
    report = scheduler.run_due(clock.now)
    job = session.get(ScheduledJob, report.job_ids[0])
    assert (job.status, calls) == ("complete", [("x",)])
    assert job.run_at == job.nominal_at == NOON + HOUR
    assert (job.started_at, job.expires_at) == (clock.now, NOON + 3 * HOUR)
    assert (job.queue, job.priority, job.tags, job.max_attempts) == ("q", 3, ["t"], 2)
    assert (job.recurring_id, job.late_by) == (found.id, timedelta(seconds=7))
    assert (found.next_run_at, found.last_run_at, counters(found)) == (NOON + 2 * HOUR, NOON + HOUR, (1, 0, 0))


def test_a_time_is_ticked_once(hourly, scheduler, session, clock):
    hourly()
    clock.now += HOUR
    assert scheduler.run_due().complete == 1
    assert scheduler.run_due().complete == 0
    assert made(session) == [NOON + HOUR]


def test_a_tick_that_was_seen_by_two_is_written_by_one(hourly, scheduler, session, new_session, clock):
    recurring_id = hourly().id
    session.commit()
    clock.now += HOUR
    with new_session() as other:
        # Each saw the same row as due; the second finds it moved.
        units = Units(other.get_bind())
        seen, spans = units.read(partial(ticks._read, recurring_id=recurring_id))
        assert scheduler.run_due().complete == 1
        decided = ticks.decide(plans.Plan.of(seen), seen.next_run_at, now=clock.now, fired=0, spans=spans)
        rows = {at: ticks.job_row(seen, at, now=clock.now) for at in decided.fire}
        assert units.write(partial(ticks._write, seen=seen, decided=decided, rows=rows)) is None
    assert made(session) == [NOON + HOUR]


def test_nothing_is_written_when_nothing_is_due(hourly, scheduler, writes):
    hourly()
    writes.clear()
    scheduler.run_due()
    assert writes == []


def test_now_is_an_argument(hourly, scheduler, session):
    hourly()
    for hours in range(1, 4):
        scheduler.run_due(NOON + hours * HOUR)
    assert made(session) == [NOON + hours * HOUR for hours in range(1, 4)]


def test_jitter_moves_the_run_and_not_its_time_the_same_way_every_time(hourly, scheduler, session):
    hourly(jitter="10m", overlap="allow")
    for hours in range(1, 6):
        scheduler.run_due(NOON + hours * HOUR)
    found = made(session, ScheduledJob.nominal_at, ScheduledJob.run_at)
    delays = [run_at - nominal_at for nominal_at, run_at in found]
    assert all(timedelta(0) <= delay < timedelta(minutes=10) for delay in delays)
    assert len(set(delays)) == 5


def test_start_end_and_limit_bound_it(scheduler, session):
    bounds = {"start": NOON + 2 * HOUR, "end": NOON + 5 * HOUR}
    scheduler.recurring("bounded", "0 * * * *", jobs.record, **bounds)
    limited = scheduler.recurring("limited", "30 * * * *", jobs.record, limit=2)
    session.commit()
    for hours in range(1, 9):
        scheduler.run_due(NOON + hours * HOUR)
    at = made(session)
    assert [each for each in at if each.minute == 0] == [NOON + hours * HOUR for hours in (2, 3, 4, 5)]
    assert [each for each in at if each.minute == 30] == [NOON + hours * HOUR / 2 for hours in (1, 3)]
    assert (limited.next_run_at, limited.fired) == (None, 2)
    scheduler.recurring("limited", "30 * * * *", jobs.record, limit=3)
    assert limited.next_run_at == NOON + HOUR / 2  # by the clock, which stood still


# --- after downtime -----------------------------------------------------------------------------------------------


def test_latest_runs_once_for_all_that_was_missed(hourly, scheduler, session, heard):
    found = hourly()
    scheduler.run_due(NOON + 5.5 * HOUR)
    assert made(session) == [NOON + 5 * HOUR]
    assert (found.next_run_at, counters(found)) == (NOON + 6 * HOUR, (1, 4, 0))
    assert heard == [("missed", {"recurring_id": found.id, "recurring": "hourly", "missed": 4, "skipped": 0})]


def test_all_runs_each_that_was_missed(hourly, scheduler, session):
    found = hourly(catch_up="all")
    assert scheduler.run_due(NOON + 5.5 * HOUR).complete == 5
    assert made(session) == [NOON + hours * HOUR for hours in range(1, 6)]
    assert counters(found) == (5, 0, 0)


def test_all_goes_back_as_far_as_its_window(hourly, scheduler, session):
    found = hourly(catch_up="all", catch_up_window="3h")
    scheduler.run_due(NOON + 10 * HOUR)
    assert made(session) == [NOON + hours * HOUR for hours in (7, 8, 9, 10)]
    assert counters(found) == (4, 6, 0)


def test_all_comes_spread_over_several_passes(hourly, scheduler, session):
    found = hourly(catch_up="all", expires=None)
    passes = [scheduler.run_due(NOON + 250 * HOUR).complete for _ in range(4)]
    assert passes == [100, 100, 50, 0]
    assert made(session) == [NOON + hours * HOUR for hours in range(1, 251)]
    assert counters(found) == (250, 0, 0)


def test_skip_leaves_what_was_missed(hourly, scheduler, session):
    found = hourly(catch_up="skip")
    scheduler.run_due(NOON + 5.5 * HOUR)
    assert (made(session), counters(found)) == ([], (0, 5, 0))
    scheduler.run_due(NOON + 6 * HOUR + timedelta(seconds=61))  # as late as a crontab makes it
    assert (made(session), counters(found)) == ([NOON + 6 * HOUR], (1, 5, 0))


def test_skip_can_be_told_how_late_is_too_late(hourly, scheduler, session):
    found = hourly(catch_up="skip", catch_up_window="20m")
    scheduler.run_due(NOON + 2 * HOUR + timedelta(minutes=15))
    assert (made(session), counters(found)) == ([NOON + 2 * HOUR], (1, 1, 0))


def test_a_year_of_seconds_is_not_walked_through(scheduler, session):
    found = scheduler.recurring("r", "1s", jobs.record)
    session.commit()
    scheduler.run_due(NOON + timedelta(days=365))
    assert made(session) == [NOON + timedelta(days=365)]
    assert counters(found) == (1, 10_000, 0)
    assert found.next_run_at == NOON + timedelta(days=365, seconds=1)


# --- while the last one still runs --------------------------------------------------------------------------------


def hold(session, finished_at=None):
    """Let the latest run be running, as if by another process; or let it end."""
    values = {
        "status": "running",
        "leased_by": "another",
        "leased_until": NOON + timedelta(days=9),
        "finished_at": None,
    }
    if finished_at is not None:
        values = {"status": "complete", "leased_by": None, "finished_at": finished_at}
    latest = session.scalar(select(ScheduledJob.id).order_by(ScheduledJob.nominal_at.desc()).limit(1))
    session.execute(update(ScheduledJob).where(ScheduledJob.id == latest).values(**values))
    session.commit()


def test_skip_leaves_out_what_comes_due_while_the_last_one_runs(hourly, scheduler, session):
    found = hourly()
    scheduler.run_due(NOON + HOUR)
    hold(session)
    scheduler.run_due(NOON + 2 * HOUR)
    scheduler.run_due(NOON + 3 * HOUR)
    assert (made(session), counters(found)) == ([NOON + HOUR], (1, 0, 2))
    hold(session, finished_at=NOON + 3.5 * HOUR)
    scheduler.run_due(NOON + 4 * HOUR)
    assert (made(session), counters(found)) == ([NOON + HOUR, NOON + 4 * HOUR], (2, 0, 2))


def test_what_nobody_looked_at_while_the_last_one_overran_is_skipped_and_not_missed(hourly, scheduler, session):
    found = hourly()
    scheduler.run_due(NOON + HOUR)
    hold(session, finished_at=NOON + 3.5 * HOUR)
    scheduler.run_due(NOON + 3.6 * HOUR)
    assert (made(session), counters(found)) == ([NOON + HOUR], (1, 0, 2))


def test_what_was_missed_after_the_last_one_ended_is_missed(hourly, scheduler, session):
    found = hourly()
    scheduler.run_due(NOON + HOUR)
    hold(session, finished_at=NOON + 2.5 * HOUR)
    scheduler.run_due(NOON + 5.5 * HOUR)
    assert made(session) == [NOON + HOUR, NOON + 5 * HOUR]
    assert counters(found) == (2, 2, 1)


def test_queue_runs_them_one_after_another(hourly, scheduler, session):
    found = hourly(overlap="queue")
    scheduler.run_due(NOON + HOUR)
    hold(session)
    scheduler.run_due(NOON + 3.2 * HOUR)
    assert (made(session), found.next_run_at) == ([NOON + HOUR], NOON + 2 * HOUR)
    hold(session, finished_at=NOON + 3.3 * HOUR)
    scheduler.run_due(NOON + 3.4 * HOUR)
    assert made(session) == [NOON + HOUR, NOON + 2 * HOUR]
    scheduler.run_due(NOON + 3.5 * HOUR)
    assert made(session) == [NOON + HOUR, NOON + 2 * HOUR, NOON + 3 * HOUR]
    assert counters(found) == (3, 0, 0)


def test_queue_after_downtime_follows_catch_up(hourly, scheduler, session):
    found = hourly(overlap="queue")
    scheduler.run_due(NOON + HOUR)
    scheduler.run_due(NOON + 5.5 * HOUR)
    assert (made(session), counters(found)) == ([NOON + HOUR, NOON + 5 * HOUR], (2, 3, 0))


def test_allow_does_not_look(hourly, scheduler, session):
    found = hourly(overlap="allow")
    scheduler.run_due(NOON + HOUR)
    hold(session)
    scheduler.run_due(NOON + 2 * HOUR)
    assert (made(session), counters(found)) == ([NOON + HOUR, NOON + 2 * HOUR], (2, 0, 0))


# --- operating ----------------------------------------------------------------------------------------------------


def test_a_paused_job_waits_and_then_follows_catch_up(hourly, scheduler, session):
    found = hourly()
    assert scheduler.pause("hourly")
    assert not scheduler.pause("hourly")
    session.commit()
    scheduler.run_due(NOON + 3 * HOUR)
    assert made(session) == []
    assert scheduler.resume("hourly")
    assert not scheduler.resume("hourly")
    session.commit()
    scheduler.run_due(NOON + 4.5 * HOUR)
    assert (made(session), counters(found)) == ([NOON + 4 * HOUR], (1, 3, 0))


def test_declaring_a_paused_job_does_not_resume_it(hourly, scheduler, session):
    hourly()
    scheduler.pause("hourly")
    assert hourly(args=[2]).paused_at == NOON


def test_trigger_runs_it_now_beside_the_rhythm(hourly, scheduler, session, clock, calls):
    found = hourly(args=["x"])
    clock.now += timedelta(minutes=10)
    job = scheduler.trigger("hourly")
    session.commit()
    assert (job.run_at, job.recurring_id, job.status) == (clock.now, found.id, "scheduled")
    assert scheduler.run_due().job_ids == [job.id]
    assert (calls, found.next_run_at, counters(found)) == ([("x",)], NOON + HOUR, (0, 0, 0))


def test_two_triggers_at_a_due_instant_do_not_take_its_place(hourly, scheduler, session, clock):
    found = hourly()
    clock.now += HOUR
    ids = {scheduler.trigger("hourly").id, scheduler.trigger("hourly").id}
    session.commit()
    assert len(ids) == 2
    assert set(scheduler.run_due().job_ids) == ids  # the third would overlap with them
    assert counters(found) == (0, 0, 1)


def test_preview_reads_ahead_in_the_zone_of_the_rule(scheduler, session, writes):
    scheduler.recurring("r", "30 2 * * *", jobs.record, timezone="Europe/Stockholm", limit=3)
    session.commit()
    writes.clear()
    found = scheduler.preview("r", 10)
    assert [at.isoformat() for at in found] == [f"2026-06-0{day}T02:30:00+02:00" for day in (2, 3, 4)]
    assert scheduler.preview("r", 0) == []
    assert writes == []
    for count in (-1, "3", 10_001, True):
        with pytest.raises(InvalidOption, match="count"):
            scheduler.preview("r", count)


def test_preview_is_what_then_happens(hourly, scheduler, session):
    hourly()
    ahead = scheduler.preview("hourly", 5)
    session.rollback()
    for at in ahead:
        scheduler.run_due(at)
    assert made(session) == ahead


def test_backfill_makes_up_for_a_stretch_of_the_past_once(hourly, scheduler, session, calls):
    found = hourly()
    scheduler.run_due(NOON + HOUR)
    ids = scheduler.backfill("hourly", NOON - 3 * HOUR, NOON)
    session.commit()
    assert made(session) == [NOON + hours * HOUR for hours in (-3, -2, -1, 0, 1)]
    assert scheduler.backfill("hourly", NOON - 3 * HOUR, NOON) == []
    assert scheduler.run_due(NOON + 1.5 * HOUR).job_ids == ids
    assert counters(found) == (1, 0, 0)


def test_what_is_backfilled_expires_from_now(hourly, scheduler, session):
    hourly(expires="30m")
    scheduler.backfill("hourly", "2026-05-01T10:00", "2026-05-01T12:00")
    session.commit()
    assert scheduler.run_due(NOON).complete == 3


def test_a_tick_leaves_out_what_was_backfilled(hourly, scheduler, session, clock):
    hourly(catch_up="all", overlap="allow")
    clock.now += 3 * HOUR
    assert len(scheduler.backfill("hourly", NOON + 2 * HOUR, NOON + 9 * HOUR)) == 2
    session.commit()
    scheduler.run_due()
    assert made(session) == [NOON + hours * HOUR for hours in (1, 2, 3)]


@pytest.mark.parametrize(
    ("start", "end", "error"),
    [
        (NOON, NOON - HOUR, InvalidTime),
        (NOON + HOUR, NOON + 2 * HOUR, InvalidTime),
        ("x", NOON, InvalidTime),
        (3, NOON, InvalidArgument),
        (NOON - timedelta(days=9000), NOON, InvalidOption),
    ],
)
def test_a_stretch_that_cannot_be_is_refused(hourly, scheduler, start, end, error):
    hourly()
    with pytest.raises(error, match="start"):
        scheduler.backfill("hourly", start, end)


def test_remove_forgets_the_rule_and_keeps_the_jobs(hourly, scheduler, session):
    hourly()
    scheduler.run_due(NOON + HOUR)
    assert scheduler.remove("hourly")
    assert not scheduler.remove("hourly")
    session.commit()
    scheduler.run_due(NOON + 3 * HOUR)
    assert made(session) == [NOON + HOUR]
    assert session.scalar(select(RecurringJob)) is None


@pytest.mark.parametrize("call", ["pause", "resume", "trigger", "preview"])
def test_an_unknown_name_is_answered_with_the_nearest(hourly, scheduler, call):
    hourly()
    with pytest.raises(UnknownRecurring, match="no recurring job is called 'hourlee'; did you mean 'hourly'"):
        getattr(scheduler, call)("hourlee")


# --- rows damaged by hand -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        {"rule": "nonsense"},
        {"timezone": "Nowhere/At_all"},
        {"catch_up": "never"},
        {"overlap": "perhaps"},
        {"catch_up_window": "x"},
        {"jitter": "x"},
        {"options": ["queue"]},
        {"options": {"quue": 1}},
        {"options": {"expires": "x"}},
    ],
    ids=str,
)
def test_a_damaged_row_says_why_and_stops_no_other(hourly, scheduler, session, heard, damage, writes):
    broken = hourly()
    scheduler.recurring("whole", "0 * * * *", jobs.record)
    session.execute(update(RecurringJob).where(RecurringJob.id == broken.id).values(**damage))
    session.commit()
    assert scheduler.run_due(NOON + HOUR).complete == 1
    assert [name for name, _ in heard] == ["tick_failed"]
    assert broken.error
    assert broken.error == heard[0][1]["error"]
    assert broken.next_run_at == NOON + HOUR
    session.rollback()
    writes.clear()
    scheduler.run_due(NOON + HOUR)
    assert (len(heard), writes) == (1, [])
    hourly()
    scheduler.run_due(NOON + 2 * HOUR)
    assert (broken.error, broken.fired) == (None, 1)


def test_a_callable_that_is_gone_fails_its_job_and_not_the_rhythm(hourly, scheduler, session):
    found = hourly()
    session.execute(update(RecurringJob).values(callable_name="tests.jobs.gone"))
    session.commit()
    assert scheduler.run_due(NOON + HOUR, ignore_errors=True).failed == 1
    assert "has no 'gone'" in session.scalar(select(ScheduledJob.error))
    assert found.next_run_at == NOON + 2 * HOUR


# --- time ---------------------------------------------------------------------------------------------------------


def test_a_day_on_which_the_clocks_change(scheduler, session, clock):
    clock.now = datetime(2026, 3, 28, 12, tzinfo=UTC)
    scheduler.recurring("r", "30 2 * * *", jobs.record, timezone="Europe/Stockholm")
    session.commit()
    for _ in range(3 * 24):
        clock.now += HOUR
        scheduler.run_due()
    at = [each.astimezone(STOCKHOLM).isoformat(timespec="minutes") for each in made(session)]
    assert at == ["2026-03-29T03:00+02:00", "2026-03-30T02:30+02:00", "2026-03-31T02:30+02:00"]
    assert all(earlier < later for earlier, later in pairwise(made(session)))


def test_a_scheduler_on_a_connection_ticks_inside_its_transaction(engine, clock):
    with engine.connect() as connection, connection.begin() as outer:
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            scheduler = Scheduler(session, timezone=UTC, clock=clock)
            scheduler.recurring("r", "0 * * * *", jobs.record)
            session.commit()
            assert scheduler.run_due(NOON + HOUR).complete == 1
        outer.rollback()
    with Session(engine) as session:
        assert session.scalar(select(RecurringJob)) is None


def test_missing_tables_are_named_with_the_command_that_makes_them(empty_engine):
    with Session(empty_engine) as session:
        with pytest.raises(SchemaError, match="future-jobs db upgrade"):
            Scheduler(session).recurring("r", "@daily", jobs.record)
        session.rollback()
        with pytest.raises(SchemaError, match="future-jobs db upgrade"):
            Scheduler(session).pause("r")
