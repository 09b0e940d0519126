"""What a look decides: pure, whenever anybody looks."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from future_jobs.plans import Plan
from future_jobs.recurrence import parse_rule
from future_jobs.tick_statements import Span
from future_jobs.ticks import decide, walk

NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
LOOKS = st.lists(st.integers(1, 600), min_size=1, max_size=12, unique=True).map(sorted)
RULES = st.sampled_from(["*/5 * * * *", "17 * * * *", "7m", "FREQ=HOURLY;BYMINUTE=3,4,50"])


def lived(plan, looks, lasting):
    """Look at each of the minutes, each run lasting so many; return what was fired, and the counts."""
    fired, missed, skipped, spans = [], 0, 0, []
    following = first = plan.after(NOON)
    for minutes in looks:
        now = NOON + minutes * MINUTE
        seen = [Span(span.since, span.until if span.until <= now else None) for span in spans]
        if following is None or following > now:
            continue
        tick = decide(plan, following, now=now, fired=len(fired), spans=seen if plan.overlap != "allow" else [])
        if tick is None:
            continue
        assert tick.next_at is None or tick.next_at > following
        fired += tick.fire
        spans += [Span(now, now + lasting * MINUTE) for _ in tick.fire]
        following, missed, skipped = tick.next_at, missed + tick.missed, skipped + tick.skipped
    until = following - timedelta.resolution if following else NOON + looks[-1] * MINUTE
    return fired, missed, skipped, list(walk(plan, first, until))


@settings(deadline=None, max_examples=200)
@given(
    RULES,
    LOOKS,
    st.integers(0, 90),
    st.sampled_from(["latest", "all", "skip"]),
    st.sampled_from(["skip", "queue", "allow"]),
)
def test_every_time_is_fired_missed_or_skipped_and_none_twice(rule, looks, lasting, catch_up, overlap):
    plan = Plan(parse_rule(rule, timezone=UTC, anchor=NOON), catch_up=catch_up, overlap=overlap)
    fired, missed, skipped, times = lived(plan, looks, lasting)
    assert len(fired) + missed + skipped == len(times)
    assert fired == sorted(set(fired))
    assert set(fired) <= set(times)


@settings(deadline=None, max_examples=100)
@given(RULES, LOOKS)
def test_all_fires_every_time_whenever_anybody_looks(rule, looks):
    plan = Plan(parse_rule(rule, timezone=UTC, anchor=NOON), catch_up="all", overlap="allow")
    fired, missed, skipped, times = lived(plan, looks, 0)
    assert (fired, missed, skipped) == (times, 0, 0)


@settings(deadline=None, max_examples=100)
@given(RULES, LOOKS, st.integers(1, 90))
def test_runs_neither_overlap_nor_are_lost_in_a_queue(rule, looks, lasting):
    plan = Plan(parse_rule(rule, timezone=UTC, anchor=NOON), catch_up="all", overlap="queue")
    fired, missed, _, times = lived(plan, looks, lasting)
    assert (fired, missed) == (times, 0)


@pytest.mark.parametrize("limit", [1, 3, 50])
@pytest.mark.parametrize("catch_up", ["latest", "all"])
def test_a_limit_is_kept_however_late_one_looks(limit, catch_up):
    plan = Plan(parse_rule("* * * * *", timezone=UTC), catch_up=catch_up, overlap="allow", limit=limit)
    fired, *_ = lived(plan, [5, 10, 300, 301, 302, 303], 0)
    assert len(fired) <= limit


@pytest.mark.parametrize("catch_up", ["latest", "skip", "all"])
@pytest.mark.parametrize("rule", ["1s", "* * * * *", "*/2 9-17 * * mon-fri"])
def test_a_decade_of_absence_is_decided_in_a_moment(rule, catch_up):
    window = timedelta(hours=1) if catch_up == "all" else None
    plan = Plan(parse_rule(rule, timezone="Europe/Stockholm"), catch_up=catch_up, window=window)
    now = NOON + timedelta(days=3653)
    tick = decide(plan, plan.after(NOON), now=now, fired=0, spans=[])
    assert tick.missed >= 10_000 - 1
    assert tick.next_at > now or catch_up == "all"
    assert all(now - timedelta(days=3) < at <= now for at in tick.fire)
