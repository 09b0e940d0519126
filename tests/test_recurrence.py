"""Recurring rules, against clocks that are walked minute by minute, and against the published cases of others."""

import json
import pickle
import re
import struct
import time
from calendar import monthrange
from datetime import UTC, date, datetime, timedelta, timezone
from importlib import resources
from itertools import cycle, islice, pairwise
from pathlib import Path
from zoneinfo import TZPATH, ZoneInfo, available_timezones

import pytest
from cronsim import CronSim
from dateutil import tz
from dateutil.relativedelta import relativedelta
from dateutil.rrule import DAILY, HOURLY, MO, MONTHLY, WEEKLY, YEARLY, rrule, rruleset, rrulestr
from hypothesis import given, settings
from hypothesis import strategies as st

from future_jobs.errors import InvalidArgument, InvalidTime
from future_jobs.recurrence import EPOCH, explain, parse_rule

DATA = Path(__file__).parent / "data"
CRONTABS = json.loads((DATA / "crontabs.json").read_text())
RFC_EXAMPLES = json.loads((DATA / "rrules.json").read_text())
STOCKHOLM = ZoneInfo("Europe/Stockholm")
MINUTE = timedelta(minutes=1)
ZONES = sorted(available_timezones() - {"localtime"})


def utc(*fields):
    return datetime(*fields, tzinfo=UTC)


def upcoming(rule, instant, number=3):
    """The next instants, in the wall clock text of the rule's zone."""
    found = []
    while len(found) < number and (instant := rule.next_after(instant)):
        found.append(instant.isoformat(timespec="minutes"))
    return found


def fired(rule, start, end):
    found, instant = [], start
    while (instant := rule.next_after(instant)) and instant <= end:
        found.append(instant.astimezone(UTC))
    return found


# The oracle. It shares nothing with the library: it reads cron's fields itself, and walks along the clock.


def whole_minutes(zone, start, end):
    """Every (instant, wall clock) after start up to end at which the wall clock of zone shows a whole minute."""
    instant = start
    while instant < end:
        wall = instant.astimezone(zone)
        steady = (instant + MINUTE).astimezone(zone).utcoffset() == wall.utcoffset()
        instant += MINUTE if steady and wall.second == 0 else timedelta(seconds=1)
        wall = instant.astimezone(zone).replace(tzinfo=None, fold=0)
        if wall.second == 0:
            yield instant, wall


def field_values(text, low, high, names=()):
    values = set()
    for term in text.lower().split(","):
        span, _, step = term.partition("/")
        for number, name in enumerate(names, low):
            span = span.replace(name, str(number))
        first, _, last = (f"{low}-{high}" if span == "*" else span).partition("-")
        last = last or (high if step else first)
        values.update(range(int(first), int(last) + 1, int(step or 1)))
    return values


def matcher(text):
    minute, hour, day, month, weekday = text.split()
    minutes, hours = field_values(minute, 0, 59), field_values(hour, 0, 23)
    days = set() if day == "L" else field_values(day, 1, 31)
    months = field_values(month, 1, 12, "jan feb mar apr may jun jul aug sep oct nov dec".split())
    weekdays = {value % 7 for value in field_values(weekday, 0, 7, "sun mon tue wed thu fri sat".split())}
    both = day.startswith("*") or weekday.startswith("*")

    def matches(wall):
        if wall.minute not in minutes or wall.hour not in hours or wall.month not in months:
            return False
        on_day = wall.day == monthrange(wall.year, wall.month)[1] if day == "L" else wall.day in days
        on_weekday = wall.isoweekday() % 7 in weekdays
        return (on_day and on_weekday) if both else (on_day or on_weekday)

    return matches


def cron_oracle(texts, zone, start, end, before=timedelta(hours=26)):
    """Debian's cron: a wildcard job at every minute that matches, another one once per minute of a clock which
    never runs backwards, and which passes quickly through the minutes that are skipped."""
    found = {text: [] for text in texts}
    jobs = [(found[text], matcher(text), any(field[0] == "*" for field in text.split()[:2])) for text in texts]
    latest = None
    for instant, wall in whole_minutes(zone, start - before, end):
        latest = latest or wall - MINUTE
        passed = [latest + n * MINUTE for n in range(1, (wall - latest) // MINUTE + 1)]
        latest = max(latest, wall)
        for instants, matches, wildcard in jobs:
            if start < instant <= end and any(map(matches, [wall] if wildcard else passed)):
                instants.append(instant)
    return found


def transitions(name):
    """The changes of a zone: those listed in its file (RFC 8536), and those which its last rule makes for 2025."""
    parts = name.split("/")
    files = [path for path in (Path(root, *parts) for root in TZPATH) if path.is_file()]
    data = (files or [resources.files("tzdata").joinpath("zoneinfo", *parts)])[0].read_bytes()
    counts = struct.unpack(">6l", data[20:44])
    skipped = 44 + counts[3] * 5 + counts[4] * 6 + counts[5] + counts[2] * 8 + counts[1] + counts[0]
    (number,) = struct.unpack(">l", data[skipped + 32 : skipped + 36])
    listed = struct.unpack(f">{number}q", data[skipped + 44 : skipped + 44 + 8 * number])
    yield from (utc(1970, 1, 1) + timedelta(seconds=second) for second in listed if second > -5_000_000_000)
    hours = [utc(2025, 1, 1) + timedelta(hours=n) for n in range(0, 366 * 24, 24)]
    zone = ZoneInfo(name)
    for day, following in pairwise(hours):
        if day.astimezone(zone).utcoffset() != following.astimezone(zone).utcoffset():
            seconds = range(0, 86401, 60)
            offset = day.astimezone(zone).utcoffset()
            yield next(
                day + timedelta(seconds=second)
                for second in seconds
                if (day + timedelta(seconds=second)).astimezone(zone).utcoffset() != offset
            )


def clock_changes():
    """One (zone, instant) for every kind of change: offset before, offset after, time of day, this age or before."""
    kinds = {}
    for name in ZONES:
        zone = ZoneInfo(name)
        for change in transitions(name):
            before = (change - timedelta(seconds=1)).astimezone(zone).utcoffset()
            after = change.astimezone(zone).utcoffset()
            if before != after:
                kinds.setdefault((before, after, (change + before).time(), change.year >= 1970), (name, change))
    return sorted(kinds.values())


WALKED = (
    ("*/20 * * * *", "0 0 * * *", "59 23 * * mon-sat", "30 */2 * * *"),
    ("7 * * * *", "15,45 0-3,22,23 * * *", "30 2 1-7 * sun", "*/25 0-4 * * *"),
)


def test_at_every_kind_of_clock_change_cron_rules_fire_as_the_walked_clock_says():
    kinds = clock_changes()
    assert len(kinds) > 500
    for texts, (name, change) in zip(cycle(WALKED), kinds, strict=False):
        zone = ZoneInfo(name)
        shift = (change - MINUTE).astimezone(zone).utcoffset() - (change + MINUTE).astimezone(zone).utcoffset()
        start, end = change - timedelta(minutes=97), change + max(shift, timedelta(0)) + timedelta(minutes=97)
        expected = cron_oracle(texts, zone, start, end, before=timedelta(hours=2))
        assert {text: fired(parse_rule(text, timezone=zone), start, end) for text in texts} == expected, (name, change)


def test_at_every_kind_of_clock_change_rrules_skip_what_does_not_exist_and_count_elapsed_time():
    for name, change in clock_changes():
        zone = ZoneInfo(name)
        start, end = change - timedelta(hours=3), change + timedelta(hours=3)
        halves = parse_rule("FREQ=DAILY;BYHOUR=0,1,2,3,4,20,21,22,23;BYMINUTE=0,30", timezone=zone)
        seen, expected = set(), []
        shift = (change - MINUTE).astimezone(zone).utcoffset() - (change + MINUTE).astimezone(zone).utcoffset()
        for instant, wall in whole_minutes(zone, start - max(shift, timedelta(0)), end):
            if wall.minute in (0, 30) and wall.hour in (0, 1, 2, 3, 4, 20, 21, 22, 23) and wall not in seen:
                expected += [instant] * (start < instant <= end and wall >= EPOCH)
            seen.add(wall)
        assert fired(halves, start, end) == expected, (name, change)
        steps = [start + n * timedelta(minutes=20) for n in range(1, 19)]
        quick = parse_rule("FREQ=MINUTELY;INTERVAL=20;BYHOUR=0,2,23,1", timezone=zone, anchor=start)
        assert fired(quick, start, end) == [at for at in steps if at.astimezone(zone).hour in (0, 2, 23, 1)]
        hourly = parse_rule("FREQ=HOURLY;INTERVAL=2", timezone=zone, anchor=start)
        assert fired(hourly, start, end) == [start + timedelta(hours=n) for n in (2, 4, 6)]


@st.composite
def cron_texts(draw):
    def field(low, high, plain):
        number = st.integers(low, high)
        span = st.tuples(number, number).map(lambda ends: "{}-{}".format(*sorted(ends)))
        step = st.tuples(st.just("*") | span, st.integers(1, 7)).map(lambda pair: "{}/{}".format(*pair))
        terms = st.lists(number.map(str) | span | step, min_size=1, max_size=3).map(",".join)
        return draw(st.one_of([st.just("*")] * plain + [terms]))

    return " ".join([field(0, 59, 1), field(0, 23, 1), field(1, 28, 3), field(1, 12, 5), field(0, 7, 3)])


@settings(max_examples=60, deadline=None)
@given(cron_texts(), st.sampled_from(ZONES), st.datetimes(datetime(1970, 1, 2), datetime(2060, 1, 1)))
def test_any_cron_rule_in_any_zone_fires_as_the_walked_clock_says(text, zone, start):
    zone, start = ZoneInfo(zone), start.replace(tzinfo=UTC)
    end = start + timedelta(hours=8)
    walked_from = start.replace(second=0, microsecond=0)
    expected = [at for at in cron_oracle([text], zone, walked_from, end)[text] if at > start]
    assert fired(parse_rule(text, timezone=zone), start, end) == expected


@pytest.mark.parametrize(
    ("zone", "start", "end"),
    [
        ("Europe/Stockholm", utc(2026, 3, 27), utc(2026, 4, 6)),
        ("Australia/Lord_Howe", utc(2026, 9, 30), utc(2026, 10, 5)),
        ("Antarctica/Troll", utc(2026, 10, 24), utc(2026, 10, 26)),
        ("Pacific/Apia", utc(2011, 12, 29), utc(2012, 1, 1)),
        ("Africa/Cairo", utc(2026, 4, 23), utc(2026, 4, 25)),  # no midnight
        ("America/Goose_Bay", utc(1988, 10, 29), utc(1988, 10, 31)),  # two hours back at one minute past midnight
    ],
)
def test_the_crontabs_of_debian_packages_fire_as_the_walked_clock_says(zone, start, end):
    texts = sorted({crontab["schedule"] for crontab in CRONTABS})
    expected = cron_oracle(texts, ZoneInfo(zone), start, end)
    assert {text: fired(parse_rule(text, timezone=zone), start, end) for text in texts} == expected


def test_no_rule_fires_twice_or_at_an_instant_not_asked_for():
    for name in ZONES:
        rule, instant = parse_rule("30 0,2,23 * * *", timezone=name), utc(2026, 3, 1)
        for _ in range(3):
            following = rule.next_after(instant)
            assert following.astimezone(UTC) > instant.astimezone(UTC)
            assert rule.next_after(following - timedelta.resolution) == following
            assert following.astimezone(UTC).astimezone(following.tzinfo).isoformat() == following.isoformat()
            instant = following


RIGA = [  # from cronsim's own tests: the clock goes from 03:00 to 04:00 on 28 March, from 04:00 to 03:00 on 31 October
    ("0 * * * *", "2021-03-28T01:30+02:00", "28T02:00+02:00 28T04:00+03:00"),
    ("0 * * * *", "2021-10-31T01:30+03:00", "31T02:00+03:00 31T03:00+03:00 31T03:00+02:00 31T04:00+02:00"),
    ("*/30 * * * *", "2021-03-28T02:10+02:00", "28T02:30+02:00 28T04:00+03:00 28T04:30+03:00"),
    ("*/30 * * * *", "2021-10-31T03:10+03:00", "31T03:30+03:00 31T03:00+02:00 31T03:30+02:00 31T04:00+02:00"),
    ("0 */2 * * *", "2021-03-28T01:30+02:00", "28T02:00+02:00 28T04:00+03:00 28T06:00+03:00"),
    ("30 */2 * * *", "2021-10-31T01:30+03:00", "31T02:30+03:00 31T04:30+02:00"),
    ("0 */3 * * *", "2021-10-31T01:30+03:00", "31T03:00+03:00 31T03:00+02:00 31T06:00+02:00"),
    ("0 1,2,3,4,5 * * *", "2021-03-28T01:30+02:00", "28T02:00+02:00 28T04:00+03:00 28T05:00+03:00"),
    ("0 1,2,3,4,5 * * *", "2021-10-31T01:30+03:00", "31T02:00+03:00 31T03:00+03:00 31T04:00+02:00"),
    ("30 1,2,3,4,5 * * *", "2021-03-28T01:30+02:00", "28T02:30+02:00 28T04:00+03:00 28T04:30+03:00"),
    ("30 1,2,3,4,5 * * *", "2021-10-31T01:30+03:00", "31T02:30+03:00 31T03:30+03:00 31T04:30+02:00"),
    ("0 2 * * *", "2021-03-28T01:30+02:00", "28T02:00+02:00 29T02:00+03:00"),
]


@pytest.mark.parametrize(("text", "start", "expected"), RIGA)
def test_the_published_clock_change_cases_of_cronsim_hold(text, start, expected):
    expected = [start[:8] + each for each in expected.split()]
    assert upcoming(parse_rule(text, timezone="Europe/Riga"), datetime.fromisoformat(start), len(expected)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 1 L * *", "01-31T01:01 02-29T01:01"),
        ("1 1 * * 5L", "01-31T01:01 02-28T01:01 03-27T01:01"),
        ("1 1 * * 0L", "01-26T01:01"),
        ("1 1 * * 7L", "01-26T01:01"),
        ("1 1 * * 1#2", "01-13T01:01"),
        ("1 1 1-7 * */7", "01-05T01:01 02-02T01:01"),
        ("1 1 */100,1-7 * MON", "01-06T01:01 02-03T01:01"),
        ("0 0 13 * fri", "01-03T00:00 01-10T00:00 01-13T00:00"),
        ("0 0 LW * *", "01-31T00:00 02-28T00:00"),
        ("5/15 0 1 jan *", "01-01T00:05 01-01T00:20"),
        ("0 5-05/2 * * mon-1/3", "01-06T05:00 01-13T05:00"),
        ("@weekly", "01-05T00:00"),
        ("@monthly", "02-01T00:00"),
        ("@HOURLY", "01-01T01:00"),
        ("  0\t12  *  *  SUN,sat ", "01-04T12:00 01-05T12:00"),
    ],
)
def test_cron_fields_mean_what_cron_says(text, expected):
    expected = [f"2020-{each}+00:00" for each in expected.split()]
    assert upcoming(parse_rule(text, timezone=UTC), utc(2020, 1, 1), len(expected)) == expected


@pytest.mark.parametrize(
    ("text", "zone", "start", "expected"),
    [  # each is wrong in cronsim 2.8, the last one there never ends
        ("7 * * * *", "Asia/Colombo", utc(1996, 10, 25, 17, 50), "1996-10-26T00:07+06:00"),
        ("30 */2 * * *", "America/Caracas", utc(2007, 12, 9, 6, 40), "2007-12-09T02:30-04:30"),
        ("*/25 0-4 * * *", "America/Goose_Bay", utc(1988, 10, 30, 2, 0, 30), "1988-10-30T00:00-04:00"),
        ("30 */2 * * *", "America/Goose_Bay", utc(1987, 10, 25, 3, 1), "1987-10-25T00:30-04:00"),
    ],
)
def test_wildcards_are_right_where_clocks_change_by_half_hours_and_around_midnight(text, zone, start, expected):
    occurrences = upcoming(parse_rule(text, timezone=zone), start, 3)
    assert expected in occurrences


@pytest.mark.parametrize("example", RFC_EXAMPLES, ids=lambda example: example["rule"])
def test_the_examples_of_rfc_5545_hold(example):
    rule = parse_rule(f"DTSTART:{example['dtstart']}\nRRULE:{example['rule']}", timezone="America/New_York")
    instant = utc(1990, 1, 1)
    for expected in example["times"]:
        instant = rule.next_after(instant)
        assert (instant and instant.strftime("%Y-%m-%dT%H:%M")) == expected


@st.composite
def rrule_texts(draw):
    freq = draw(st.sampled_from(["YEARLY", "MONTHLY", "WEEKLY", "DAILY", "HOURLY", "MINUTELY"]))
    parts = [f"FREQ={freq}", f"INTERVAL={draw(st.integers(1, 5))}", f"WKST={draw(st.sampled_from(['MO', 'SU']))}"]

    def maybe(name, values, odds):
        if draw(st.integers(1, odds)) == 1:
            chosen = draw(st.lists(values, min_size=1, max_size=4, unique=True))
            parts.append(f"{name}={','.join(map(str, chosen))}")

    numbered = ["1MO", "-1FR", "2WE"] if freq in ("YEARLY", "MONTHLY") and draw(st.booleans()) else None
    maybe("BYDAY", st.sampled_from(numbered or ["MO", "TU", "FR", "SU"]), 2)
    maybe("BYMONTH", st.integers(1, 12), 4)
    maybe("BYMONTHDAY", st.sampled_from([1, 2, 13, 28, 31, -1, -2]), 4)
    if freq in ("YEARLY", "DAILY"):
        maybe("BYYEARDAY", st.sampled_from([1, 60, 100, 366, -1]), 6)
    maybe("BYHOUR", st.integers(0, 23), 3)
    if freq != "MINUTELY":
        maybe("BYMINUTE", st.integers(0, 59), 4)
    if len(parts) > 3:
        maybe("BYSETPOS", st.sampled_from([1, 2, -1]), 3)
    return ";".join(parts)


@settings(max_examples=60, deadline=None)
@given(rrule_texts(), st.datetimes(datetime(1999, 1, 1), datetime(2003, 1, 1)), st.integers(0, 500))
def test_where_clocks_never_change_rules_fire_when_dateutil_says(text, dtstart, days):
    dtstart = dtstart.replace(microsecond=0, tzinfo=UTC)
    try:
        rule = parse_rule(text, timezone=UTC, anchor=dtstart)
    except InvalidTime:
        return
    reference = rrulestr(text, dtstart=dtstart)
    found, instant = [], dtstart - timedelta.resolution
    while len(found) < 5 and (instant := rule.next_after(instant)):
        found.append(instant)
    assert found == list(islice(reference, 5))
    later = dtstart + timedelta(days=days if "LY;" in text and "MINUTELY" not in text else days % 10, minutes=17)
    assert rule.next_after(later) == reference.after(later)


def test_dateutils_reading_of_mixed_weekdays_is_corrected():
    rule = parse_rule("FREQ=MONTHLY;BYDAY=MO,1FR;BYHOUR=9", timezone=UTC)
    assert upcoming(rule, utc(2026, 5, 1), 4) == [
        "2026-05-01T09:00+00:00",
        "2026-05-04T09:00+00:00",
        "2026-05-11T09:00+00:00",
        "2026-05-18T09:00+00:00",
    ]


def test_dates_are_added_and_excluded():
    rule = parse_rule(
        """DTSTART;TZID=Europe/Stockholm:20260101T090000
        RRULE:FREQ=DAILY;COUNT=4
        RDATE:20260110T120000Z
        EXDATE;TZID=Europe/Stockholm:20260102T090000,20260103T090000
        EXDATE:20260104T080000Z""",
        timezone="America/New_York",
    )
    assert upcoming(rule, utc(2026, 1, 1), 9) == ["2026-01-01T09:00+01:00", "2026-01-10T13:00+01:00"]
    assert rule.timezone == STOCKHOLM


def test_a_rule_may_be_rare():
    rule = parse_rule("DTSTART:20260101T090100Z\nRRULE:FREQ=MINUTELY;INTERVAL=1441;BYHOUR=9;BYMINUTE=0", timezone=UTC)
    assert upcoming(rule, utc(2026, 1, 1), 2) == ["2029-12-11T09:00+00:00", "2033-11-21T09:00+00:00"]


def test_folded_lines_are_joined():
    folded = "DTSTART:20260101T090000\r\nRRULE:FREQ=DAILY\r\nEXDATE:20260101T090000,2026\r\n 0102T090000\r\n"
    assert upcoming(parse_rule(folded, timezone=UTC), utc(2026, 1, 1), 1) == ["2026-01-03T09:00+00:00"]


def test_a_count_does_not_count_times_that_a_clock_change_skips():
    rule = parse_rule("DTSTART:20260328T023000\nRRULE:FREQ=DAILY;COUNT=2", timezone=STOCKHOLM)
    assert upcoming(rule, utc(2026, 1, 1), 5) == ["2026-03-28T02:30+01:00", "2026-03-30T02:30+02:00"]


@pytest.mark.parametrize(
    "text",
    [
        "DTSTART:19700101T000000\nRRULE:FREQ=SECONDLY",
        "DTSTART:19700101T000007\nRRULE:FREQ=SECONDLY;INTERVAL=7;BYHOUR=9;BYMINUTE=0",
        "DTSTART:19700101T000000\nRRULE:FREQ=MINUTELY",
        "DTSTART:19700101T000000\nRRULE:FREQ=MINUTELY;INTERVAL=13;BYDAY=MO;BYHOUR=3",
        "DTSTART:19700101T000000\nRRULE:FREQ=MINUTELY;COUNT=1000000000",
        "DTSTART:19700101T000000\nRRULE:FREQ=HOURLY;INTERVAL=5;BYMONTH=1",
        "DTSTART:19700101T000000\nRRULE:FREQ=DAILY;INTERVAL=3",
        "DTSTART:19700101T000000\nRRULE:FREQ=DAILY;BYMONTH=2;BYMONTHDAY=29",
        "DTSTART:19700101T000000\nRRULE:FREQ=WEEKLY;INTERVAL=2;BYDAY=MO,FR",
        "DTSTART:19700101T000000\nRRULE:FREQ=MONTHLY;BYDAY=FR;BYMONTHDAY=13",
        "DTSTART:19700101T000000\nRRULE:FREQ=MONTHLY;BYDAY=MO,TU,WE,TH,FR;BYSETPOS=-1",
        "DTSTART:19700101T000000\nRRULE:FREQ=YEARLY;BYMONTH=12;BYMONTHDAY=31;UNTIL=20501231T000000Z",
        "0 9 * * mon-fri",
        "*/5 * * * *",
        "0 0 29 2 *",
        "15m",
        "1mo",
    ],
)
def test_an_old_rule_answers_in_under_five_milliseconds(text):
    rule = parse_rule(text, timezone=STOCKHOLM, anchor=utc(1970, 1, 1))
    took = []
    for day in range(1, 8):
        start = time.process_time()
        assert rule.next_after(utc(2026, 3, day, 11, 7, 13))
        took.append(time.process_time() - start)
    assert sorted(took)[3] < 0.005


@pytest.mark.parametrize(
    "text",
    [
        "0 0 30 2 *",
        "0 0 31 4,6,9,11 *",
        "1 1 */100 * MON#4",
        "0 0 */31 * MON#5",
        "FREQ=DAILY;COUNT=0",
        "DTSTART:20260101T000000\nRRULE:FREQ=DAILY;UNTIL=20251231T000000Z",
        "FREQ=YEARLY;BYMONTH=2;BYMONTHDAY=30",
        "FREQ=MONTHLY;BYMONTH=2;BYMONTHDAY=30",
        "FREQ=WEEKLY;BYMONTH=2;BYMONTHDAY=30",
        "FREQ=DAILY;BYMONTH=2;BYMONTHDAY=30",
        "FREQ=HOURLY;BYMONTH=2;BYMONTHDAY=30",
        "FREQ=SECONDLY;BYMONTH=2;BYMONTHDAY=30",
        "FREQ=YEARLY;BYYEARDAY=366;BYMONTH=1",
        "FREQ=YEARLY;BYWEEKNO=53;BYMONTH=6",
        "FREQ=MONTHLY;INTERVAL=12;BYMONTH=3",
        "FREQ=MONTHLY;BYDAY=MO;BYSETPOS=6",
        "FREQ=WEEKLY;BYDAY=MO;BYSETPOS=6",
        "FREQ=DAILY;BYHOUR=9;BYSETPOS=2",
        "FREQ=HOURLY;BYMINUTE=9;BYSETPOS=2",
        "FREQ=DAILY;INTERVAL=7;BYDAY=TU",
        "FREQ=HOURLY;INTERVAL=168;BYDAY=TU",
        "FREQ=HOURLY;INTERVAL=8784;BYMONTH=2;BYMONTHDAY=29;BYHOUR=5",
        "FREQ=MINUTELY;INTERVAL=60;BYMINUTE=30",
        "FREQ=SECONDLY;INTERVAL=86400;BYHOUR=5",
        "DTSTART:20260101T090000\nRRULE:FREQ=DAILY\nEXRULE:FREQ=DAILY",
        "DTSTART:20260101T090000\nRRULE:FREQ=DAILY;COUNT=1\nEXDATE:20260101T090000",
    ],
)
def test_a_rule_that_never_fires_is_refused_in_half_a_second(text):
    start = time.process_time()
    with pytest.raises(InvalidTime, match="never fires"):
        parse_rule(text, timezone=UTC)
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    ("text", "part", "value"),
    [
        ("61 * * * *", "minute", "'61'"),
        ("0 24 * * *", "hour", "'24'"),
        ("0 0 32 * *", "day-of-month", "'32'"),
        ("0 0 * foo *", "month", "'foo'"),
        ("0 0 * * fri-sun", "day-of-week", "'fri-sun'"),
        ("*/0 * * * *", "minute", "'*/0'"),
        (f"{'9' * 5000} * * * *", "minute", "'999"),
        ("٣ * * * *", "minute", "'٣'"),
        ("0 0 * * frı", "day-of-week", "'frı'"),
        ("0 9 * *", "five fields", "has 4"),
        ("0 0 9 * * *", "five fields", "has 6"),
        ("@reboot", "no such name", "@hourly"),
        ("3x", "not understood", "'3x'"),
        ("", "not understood", "''"),
        ("15M", "did you mean", "'15m'"),
        ("-1d", "backwards", "'-1d'"),
        ("0s", "at least one second", "'0s'"),
        ("every day", "not understood", "mon-fri"),
        ("x " * 40_000, "too many", "65536"),
        ("FREQ=DAYLY", "FREQ", "'DAYLY'"),
        ("INTERVAL=2;FREQ", "FREQ", "no value"),
        ("RRULE:INTERVAL=2", "FREQ", "missing"),
        ("FREQ=DAILY;BYHOUR=25", "BYHOUR", "'25'"),
        ("FREQ=DAILY;BYMONTHDAY=0", "BYMONTHDAY", "'0'"),
        ("FREQ=DAILY;INTERVAL=0", "INTERVAL", "'0'"),
        ("FREQ=DAILY;BYDAY=XX", "BYDAY", "'XX'"),
        ("FREQ=WEEKLY;BYDAY=1MO", "BYDAY", "'1MO'"),
        ("FREQ=DAILY;BYHOURS=9", "BYHOURS=9", "did you mean BYHOUR?"),
        ("FREQ=DAILY;FREQ=DAILY", "FREQ", "twice"),
        ("FREQ=DAILY;BYSETPOS=1", "BYSETPOS", "another BY part"),
        ("FREQ=DAILY;COUNT=2;UNTIL=20300101T000000Z", "COUNT", "UNTIL"),
        ("FREQ=DAILY;COUNT=90000", "COUNT", "90000"),
        ("FREQ=DAILY;UNTIL=tomorrow", "UNTIL", "'TOMORROW'"),
        ("DTSTART:20260230T000000\nRRULE:FREQ=DAILY", "DTSTART", "'20260230T000000'"),
        ("DTSTART;TZID=Nowhere:20260203T000000\nRRULE:FREQ=DAILY", "TZID", "'Nowhere'"),
        ("DTSTART;X=1:20260203T000000\nRRULE:FREQ=DAILY", "DTSTART", "X=1"),
        ("DTSTART:20260203T000000\nDTSTART:20260203T000000\nRRULE:FREQ=DAILY", "DTSTART", "once"),
        ("DTSTART:20260203T000000", "RRULE", "never fires"),
        ("RRULE:FREQ=DAILY\nDTEND:20260203T000000", "DTEND", "RDATE"),
    ],
)
def test_a_bad_rule_is_refused_with_its_part_and_value(text, part, value):
    with pytest.raises(InvalidTime) as caught:
        parse_rule(text, timezone=UTC)
    assert part in str(caught.value)
    assert value in str(caught.value)
    assert caught.value.argument in ("rule", "TZID")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", [None, 3, 1.5, True, b"@daily", date(2026, 1, 1), datetime(2026, 1, 1), ["@daily"]])
def test_what_is_no_rule_at_all_is_a_type_error(value):
    with pytest.raises(InvalidArgument, match="rule must be"):
        parse_rule(value, timezone=UTC)


@pytest.mark.parametrize(
    "value",
    [
        timedelta(0),
        timedelta(hours=-1),
        timedelta(milliseconds=1),
        relativedelta(months=-1),
        relativedelta(months=1, days=-3),
        relativedelta(hour=9),
        relativedelta(weekday=MO),
        relativedelta(),
    ],
)
def test_an_interval_that_does_not_go_forward_is_refused(value):
    with pytest.raises(InvalidTime, match="an interval is"):
        parse_rule(value, timezone=UTC)


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=40)
    | st.lists(st.sampled_from([*"0123456789*/-,#L@= ", "MON", "FREQ=DAILY", "BYDAY", ";", "1d", "\n"])).map("".join)
)
def test_any_text_is_a_rule_or_refused(text):
    try:
        rule = parse_rule(text, timezone=STOCKHOLM)
    except InvalidTime:
        return
    assert rule.next_after(utc(2026, 1, 1)) is None or rule.next_after(utc(2026, 1, 1)) > utc(2026, 1, 1)
    assert explain(rule)


def test_asking_needs_an_aware_datetime():
    rule = parse_rule("@daily", timezone=UTC)
    with pytest.raises(InvalidTime, match="has no time zone"):
        rule.next_after(datetime(2026, 1, 1))
    with pytest.raises(InvalidArgument, match="aware datetime"):
        rule.next_after(date(2026, 1, 1))


ALL_KINDS = [
    "0 9 * * mon-fri",
    "@daily",
    "* * * * *",
    "15m",
    "1y2mo3d",
    "1w",
    timedelta(seconds=90.5),
    relativedelta(months=1, days=2),
    "FREQ=MONTHLY;BYDAY=-1FR",
    "freq=daily;byhour=2;byminute=30;count=5",
    "DTSTART;TZID=Asia/Tokyo:20260101T090000\nRRULE:FREQ=DAILY\nEXDATE:20260102T000000Z",
    rrule(WEEKLY, dtstart=datetime(2026, 1, 1, 9, tzinfo=UTC), byweekday=MO(1), until=datetime(2027, 1, 1, tzinfo=UTC)),
]


@pytest.mark.parametrize("given_rule", ALL_KINDS, ids=str)
@pytest.mark.parametrize("anchor", [None, datetime(2026, 1, 31, 9, 30, 15, tzinfo=STOCKHOLM)])
def test_a_rule_is_a_value_that_its_text_zone_and_anchor_restore(given_rule, anchor):
    rule = parse_rule(given_rule, timezone="Europe/Stockholm", anchor=anchor)
    again = parse_rule(rule.text, timezone=rule.timezone, anchor=rule.anchor)
    assert again == rule
    assert again.text == rule.text
    assert hash(again) == hash(rule)
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert rule.anchor == (anchor if rule.needs_anchor else None)
    assert upcoming(again, utc(2026, 3, 1)) == upcoming(rule, utc(2026, 3, 1))


def test_rules_end_with_the_calendar():
    for text in ("@daily", "* * * * *", "1mo", "15m", "FREQ=YEARLY", "FREQ=HOURLY", "0 0 29 2 *"):
        for zone in (UTC, STOCKHOLM, ZoneInfo("Pacific/Kiritimati"), ZoneInfo("America/Los_Angeles")):
            rule = parse_rule(text, timezone=zone)
            assert rule.next_after(datetime.max.replace(tzinfo=UTC)) is None
            for edge in (utc(9999, 12, 31, 23, 50), datetime.min.replace(tzinfo=UTC), utc(1, 1, 2, 12)):
                found = rule.next_after(edge)
                assert found is None or found > edge


@pytest.mark.parametrize(
    ("rule", "anchor", "after", "expected"),
    [
        ("1mo", "2026-01-31T09:00", "2026-01-31T09:00", "2026-02-28T09:00 2026-03-31T09:00 2026-04-30T09:00"),
        ("1mo", "2026-01-31T09:00", "2028-01-31T09:00", "2028-02-29T09:00 2028-03-31T09:00"),
        (
            "1y",
            "2024-02-29T00:00",
            "2024-02-29T00:00",
            "2025-02-28T00:00 2026-02-28T00:00 2027-02-28T00:00 2028-02-29T00:00",
        ),
        ("1mo", "2026-01-29T02:30", "2026-02-28T02:30", "2026-03-29T03:30 2026-04-29T02:30"),
        ("1mo", "2026-09-25T02:30", "2026-10-01T00:00", "2026-10-25T02:30 2026-11-25T02:30"),
        ("1d", "2026-03-28T12:00", "2026-03-28T12:00", "2026-03-29T13:00 2026-03-30T13:00"),
        ("1d", "2026-03-28T12:00", "2026-01-10T00:00", "2026-01-10T12:00"),
        ("15m", None, "2026-05-01T09:07", "2026-05-01T09:15 2026-05-01T09:30"),
        ("1w", None, "2026-01-01T00:00", "2026-01-05T00:00 2026-01-12T00:00"),
        ("1mo", None, "2026-01-01T00:00", "2026-02-01T00:00 2026-03-01T00:00"),
    ],
)
def test_intervals_count_from_their_anchor(rule, anchor, after, expected):
    anchor = anchor and datetime.fromisoformat(anchor).replace(tzinfo=STOCKHOLM)
    after = datetime.fromisoformat(after).replace(tzinfo=STOCKHOLM)
    expected = expected.split()
    rule = parse_rule(rule, timezone="Europe/Stockholm", anchor=anchor)
    assert [each[:16] for each in upcoming(rule, after, len(expected))] == expected


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 40),
    st.sampled_from(ZONES),
    st.datetimes(datetime(1975, 1, 1), datetime(2040, 1, 1)),
    st.datetimes(datetime(1975, 1, 1), datetime(2060, 1, 1)),
)
def test_calendar_intervals_never_drift(months, zone, anchor, instant):
    anchor = anchor.replace(tzinfo=ZoneInfo(zone))
    wall = anchor.astimezone(UTC).astimezone(anchor.tzinfo)
    instant = instant.replace(tzinfo=UTC)
    found = parse_rule(relativedelta(months=months), timezone=zone, anchor=anchor).next_after(instant)
    span = (found.year - wall.year) * 12 + found.month - wall.month
    assert found > instant
    assert found - instant < timedelta(days=31 * months + 3)
    if found.time() == wall.time():  # else a gap moved it, perhaps into the next day
        assert span % months == 0
        assert found.day == min(wall.day, monthrange(found.year, found.month)[1])


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (rrule(DAILY, dtstart=datetime(2026, 1, 1, 9)), "DTSTART:20260101T090000\nRRULE:FREQ=DAILY"),
        (
            rrule(HOURLY, interval=4, count=7, dtstart=datetime(2026, 1, 1, 9, tzinfo=UTC)),
            "DTSTART:20260101T090000Z\nRRULE:FREQ=HOURLY;INTERVAL=4;COUNT=7",
        ),
        (
            rrule(MONTHLY, byweekday=MO(-1), dtstart=datetime(2026, 1, 1, 9, tzinfo=ZoneInfo("Asia/Tokyo"))),
            "DTSTART;TZID=Asia/Tokyo:20260101T090000\nRRULE:FREQ=MONTHLY;BYDAY=-1MO",
        ),
        (
            rrule(
                YEARLY,
                dtstart=datetime(2026, 1, 1, 9, tzinfo=tz.gettz("Europe/Paris")),
                until=datetime(2030, 1, 1, 1, tzinfo=tz.gettz("Europe/Paris")),
            ),
            "DTSTART;TZID=Europe/Paris:20260101T090000\nRRULE:FREQ=YEARLY;UNTIL=20300101T000000Z",
        ),
    ],
)
def test_a_dateutil_rule_becomes_text_with_its_zone(made, text):
    rule = parse_rule(made, timezone="Europe/Stockholm")
    assert rule.text == text
    expected = [at.replace(tzinfo=at.tzinfo or STOCKHOLM) for at in islice(made, 4)]
    assert fired(rule, utc(2025, 1, 1), expected[-1]) == expected


def test_a_dateutil_set_becomes_text():
    start = datetime(2026, 1, 1, 9)
    made = rruleset()
    made.rrule(rrule(DAILY, dtstart=start))
    made.rrule(rrule(WEEKLY, dtstart=start, byhour=15))
    made.exrule(rrule(WEEKLY, dtstart=start, byweekday=MO))
    made.rdate(datetime(2026, 1, 3, 12))
    made.exdate(datetime(2026, 1, 2, 9))
    rule = parse_rule(made, timezone=UTC)
    expected = [at.replace(tzinfo=UTC) for at in islice(made, 12)]
    assert fired(rule, utc(2025, 1, 1), expected[-1]) == expected
    other = rruleset()
    other.rrule(rrule(DAILY, dtstart=start))
    other.rrule(rrule(DAILY, dtstart=start + timedelta(days=1)))
    with pytest.raises(InvalidTime, match="one DTSTART"):
        parse_rule(other, timezone=UTC)


def test_a_zone_that_has_no_name_is_refused_and_one_of_dateutil_is_named():
    with pytest.raises(InvalidTime, match="has no name"):
        parse_rule(rrule(DAILY, dtstart=datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=2)))), timezone=UTC)
    with pytest.raises(InvalidTime, match="has no name"):
        parse_rule("@daily", timezone=tz.tzstr("EST5EDT,M3.2.0,M11.1.0"))
    assert parse_rule("@daily", timezone=tz.gettz("Europe/Stockholm")).timezone == STOCKHOLM
    assert parse_rule("@daily", timezone=tz.UTC).timezone == UTC
    assert parse_rule("@daily", timezone=tz.tzlocal()).timezone is None
    assert parse_rule("@daily", timezone=None).next_after(utc(2026, 1, 1)).tzinfo


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("0 9 * * mon-fri", "at 09:00, Monday to Friday, Europe/Stockholm"),
        ("0 0 22 * *", "at 00:00, the 22nd day of every month, Europe/Stockholm"),
        ("0 0 1,31 * *", "at 00:00, the first and the 31st day of month, Europe/Stockholm"),
        ("0 0 11,13 * *", "at 00:00, the 11th and the 13th day of month, Europe/Stockholm"),
        ("*/15 * * * *", "every 15th minute of every hour, Europe/Stockholm"),
        ("0 0 */2 * mon", "at 00:00, every second day of month if it's on Monday, Europe/Stockholm"),
        ("@hourly", "at the start of every hour, Europe/Stockholm"),
        ("90m", "every 1 hour 30 minutes, Europe/Stockholm"),
        ("1mo", "every month, Europe/Stockholm"),
        ("FREQ=WEEKLY;INTERVAL=2;BYDAY=MO,FR;BYHOUR=9", "every 2 weeks, Monday and Friday, at 09:00, Europe/Stockholm"),
        (
            "FREQ=MONTHLY;BYDAY=MO,TU,WE,TH,FR;BYSETPOS=-1;BYHOUR=17",
            "every month, Monday to Friday, at 17:00, only the last of these, Europe/Stockholm",
        ),
        ("FREQ=MONTHLY;BYMONTHDAY=1,-1", "every month, the last and 1st day, at 00:00, Europe/Stockholm"),
        ("FREQ=YEARLY;BYEASTER=0", "every year, Easter Sunday, at 00:00, Europe/Stockholm"),
        ("FREQ=MINUTELY;INTERVAL=5;BYHOUR=9,10", "every 5 minutes, hour 9 and 10, Europe/Stockholm"),
        (
            "DTSTART:20260101T093000\nRRULE:FREQ=DAILY;COUNT=3\nEXDATE:20260102T093000",
            "every day, at 09:30, until 2026-01-03 09:30, except on 1 date, Europe/Stockholm",
        ),
        ("DTSTART:20260101T093000Z\nRRULE:FREQ=YEARLY", "every year, the 1st day, in January, at 09:30, UTC"),
    ],
)
def test_rules_are_explained_in_words(rule, words):
    assert explain(parse_rule(rule, timezone="Europe/Stockholm")) == words


def test_an_explanation_names_a_given_anchor_and_the_systems_zone():
    rule = parse_rule("36h", timezone=None, anchor=utc(2026, 1, 31, 9))
    assert re.fullmatch(r"every 1 day 12 hours, counted from 2026-0.-.. ..:.., the system's time zone", explain(rule))


def test_cronsim_and_this_agree_where_clocks_never_change():
    for text in {crontab["schedule"] for crontab in CRONTABS}:
        reference = CronSim(text, utc(2026, 2, 25))
        rule, instant = parse_rule(text, timezone=UTC), utc(2026, 2, 25)
        for expected in islice(reference, 20):
            instant = rule.next_after(instant)
            assert instant == expected
