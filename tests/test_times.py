"""What a ``when``, a duration and an expiry mean, and what is refused."""

import calendar
import os
import time
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from functools import cache
from zoneinfo import ZoneInfo

import pytest
from dateutil import tz as dateutil_tz
from dateutil.relativedelta import MO, relativedelta
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from future_jobs import times
from future_jobs.errors import FutureJobsError, InvalidArgument, InvalidTime
from future_jobs.times import as_utc, parse_duration, resolve, resolve_expiry, utc_now, zone

NOW = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
STOCKHOLM = ZoneInfo("Europe/Stockholm")  # forward 2026-03-29 02:00 to 03:00, back 2026-10-25 03:00 to 02:00
NEW_YORK = ZoneInfo("America/New_York")

SECOND = 10**6
EXACT = {"w": 604_800 * SECOND, "d": 86_400 * SECOND, "h": 3_600 * SECOND, "m": 60 * SECOND, "s": SECOND}


def utc(*fields):
    return datetime(*fields, tzinfo=UTC)


def at(text, zone=UTC, now=NOW):
    return resolve(text, now=now, timezone=zone)


@pytest.fixture
def system_zone(monkeypatch):
    def use(name):
        monkeypatch.setenv("TZ", name)
        time.tzset()

    before = os.environ.get("TZ")
    yield use
    monkeypatch.delenv("TZ") if before is None else monkeypatch.setenv("TZ", before)
    time.tzset()


# Durations


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("90s", timedelta(seconds=90)),
        ("30m", timedelta(minutes=30)),
        ("5h", timedelta(hours=5)),
        ("3d", timedelta(days=3)),
        ("2w", timedelta(weeks=2)),
        ("1mo", relativedelta(months=1)),
        ("1y", relativedelta(years=1)),
        ("250ms", timedelta(milliseconds=250)),
        ("7us", timedelta(microseconds=7)),
        ("0s", timedelta(0)),
        ("0h", timedelta(0)),
        ("0mo", relativedelta()),
        ("007d", timedelta(days=7)),
        ("100h", timedelta(hours=100)),
    ],
)
def test_a_number_and_a_unit_is_a_duration(text, duration):
    assert parse_duration(text) == duration


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("1h30m", timedelta(hours=1, minutes=30)),
        ("1d 12h", timedelta(days=1, hours=12)),
        ("1w2d3h4m5s6ms7us", timedelta(7 + 2, 5, 7, 6, 4, 3)),
        ("1y6mo", relativedelta(years=1, months=6)),
        ("1mo 12h", relativedelta(months=1, hours=12)),
        ("1y 36h", relativedelta(years=1, days=1, hours=12)),
    ],
)
def test_units_are_compounded_from_the_largest_down(text, duration):
    assert parse_duration(text) == duration


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("3 days", timedelta(days=3)),
        ("1 day", timedelta(days=1)),
        ("1 hour and 30 minutes", timedelta(hours=1, minutes=30)),
        ("1 day, 2 hours", timedelta(days=1, hours=2)),
        ("2 weeks, 1 day and 5 secs", timedelta(weeks=2, days=1, seconds=5)),
        ("15 min", timedelta(minutes=15)),
        ("1 month", relativedelta(months=1)),
        ("2years", relativedelta(years=2)),
        ("  3\td\n", timedelta(days=3)),
        ("3\N{NO-BREAK SPACE}d", timedelta(days=3)),
    ],
)
def test_units_may_be_words(text, duration):
    assert parse_duration(text) == duration


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("P1DT2H", timedelta(days=1, hours=2)),
        ("P2W", timedelta(weeks=2)),
        ("PT0.5S", timedelta(seconds=0.5)),
        ("PT0,5S", timedelta(seconds=0.5)),
        ("PT1M", timedelta(minutes=1)),
        ("P1M", relativedelta(months=1)),
        ("P1Y2M3DT4H5M6S", relativedelta(years=1, months=2, days=3, hours=4, minutes=5, seconds=6)),
        ("P0D", timedelta(0)),
    ],
)
def test_iso_8601_durations_are_understood(text, duration):
    assert parse_duration(text) == duration


def test_m_is_minutes_and_mo_is_months():
    assert (parse_duration("1m"), parse_duration("1mo")) == (timedelta(minutes=1), relativedelta(months=1))


@pytest.mark.parametrize(
    ("text", "microseconds"),
    [
        ("1.5h", 5_400 * SECOND),
        ("0.1s", 100_000),
        ("1.000001s", 1_000_001),
        ("0.0001ms", None),
        ("1.1w", 665_280 * SECOND),
    ],
)
def test_a_decimal_fraction_is_exact_to_the_microsecond_or_refused(text, microseconds):
    if microseconds is None:
        with pytest.raises(InvalidTime, match="microsecond"):
            parse_duration(text)
    else:
        assert parse_duration(text) == timedelta(microseconds=microseconds)


@settings(deadline=None)
@given(st.integers(0, 10**14))
def test_a_fraction_of_seconds_survives_to_the_last_digit(microseconds):
    assert parse_duration(f"{microseconds // SECOND}.{microseconds % SECOND:06}s") == timedelta(
        microseconds=microseconds
    )


@settings(deadline=None)
@given(
    st.fixed_dictionaries({}, optional={unit: st.integers(0, 9999) for unit in EXACT}), st.sampled_from(["", " ", ", "])
)
def test_exact_units_add_up(amounts, separator):
    assume(amounts)
    text = separator.join(f"{amounts[unit]}{unit}" for unit in EXACT if unit in amounts)
    assert parse_duration(text) == timedelta(microseconds=sum(amounts[unit] * EXACT[unit] for unit in amounts))


@settings(deadline=None)
@given(st.timedeltas(timedelta(0), timedelta(days=99_999)))
def test_text_and_iso_forms_of_a_duration_mean_the_same(duration):
    days, seconds, micros = duration.days, duration.seconds, duration.microseconds
    assert (
        parse_duration(f"{days}d {seconds}s {micros}us")
        == parse_duration(f"P{days}DT{seconds}.{micros:06}S")
        == duration
    )


@settings(deadline=None)
@given(st.integers(0, 900), st.integers(0, 11), st.integers(0, 10**6))
def test_months_and_years_come_back_as_a_relativedelta(years, months, seconds):
    expected = relativedelta(years=years, months=months, seconds=seconds)
    assert (
        parse_duration(f"{years}y{months}mo{seconds}s") == parse_duration(f"P{years}Y{months}MT{seconds}S") == expected
    )


def test_changing_a_relativedelta_does_not_change_what_its_text_means():
    parse_duration("5mo").months = 7
    assert parse_duration("5mo") == relativedelta(months=5)


NO_DURATION = [
    "", " ", "d", "3", "3x", "d3", "3d3d", "1.5.2h", "1.5mo", "0.5y", "sat", "5 parsecs", "1h1d", "30m 1h", "3 d d",
    "1d and", "and 1d", ", 1d", "1dand 2h", "1d;2h", "3D", "1M", "3 Days", "1e3s", "1_000s", "1,000s", "0x10s", "½d",
    ".5h", "5.h", "+3d", "--3d", "P", "PT", "P1", "PT1", "P1DT", "P1H", "PT1D", "p1d", "P-1D", "P1D2H", "P1W1Y",
    "P1.5M", "٣d", "３d", "3\x00d", "3d\x00", "\ud800", "3d" * 60, "9" * 400, "9" * 400 + "d", "9" * 5000 + "d",
    "99999999999d", "inf d", "nan", "None", "tomorrow", "24:00", "* * * * *",
]  # fmt: skip


@pytest.mark.parametrize("text", NO_DURATION)
def test_what_is_not_a_duration_is_refused(text):
    with pytest.raises(InvalidTime, match=r"^lease=") as caught:
        parse_duration(text, argument="lease")
    assert (caught.value.argument, caught.value.value) == ("lease", text)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("text", [text for text in NO_DURATION if len(text) < 40])
def test_what_is_not_a_duration_is_no_when_either(text):
    with pytest.raises(InvalidTime, match=r"^when="):
        at(text)


@pytest.mark.parametrize("text", ["3x", "5 parsecs", "", "sat", "10/11/12", "9" * 400])
def test_the_refusal_lists_the_forms_that_work(text):
    with pytest.raises(InvalidTime, match=r"90s 30m 5h 3d 2w 1mo 1y.*1h30m.*3 days.*P1DT2H.*2026-12-01T09:00"):
        at(text)


def test_the_refusal_shows_at_most_eighty_characters_of_the_value():
    with pytest.raises(InvalidTime) as caught:
        at("9" * 400)
    assert "9" * 75 in str(caught.value)
    assert "9" * 81 not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("3", "3d"),
        ("d3", "3d"),
        ("3D", "3d"),
        ("1M", "1mo"),
        ("p1dt2h", "P1DT2H"),
        ("3 dayz", "3 days"),
        ("4 mnths", "4 months"),
        ("1 Hour", "1 hour"),
        ("٣d", "3d"),
        ("٣", "3d"),
    ],
)
def test_a_near_miss_is_answered_with_what_was_meant(text, meant):
    with pytest.raises(InvalidTime, match=f"did you mean '{meant}'\\?"):
        at(text)


@pytest.mark.parametrize("text", ["5 parsecs", "3x", "sat", "3600", "20261201", "3d3d"])
def test_nothing_is_suggested_that_was_not_nearly_written(text):
    with pytest.raises(InvalidTime) as caught:
        at(text)
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("read", [parse_duration, at])
@pytest.mark.parametrize("text", ["-1d", "-3 days", " -P1D", "- 1h30m", "\N{MINUS SIGN}1d", "-1mo"])
def test_a_negative_duration_says_how_to_run_at_once(read, text):
    with pytest.raises(InvalidTime, match="pass a past datetime to run at once"):
        read(text)


@pytest.mark.parametrize("value", [3, 1.5, True, None, b"3d", timedelta(1), date(2026, 1, 1), ["3d"]])
def test_only_text_is_parsed(value):
    with pytest.raises(InvalidArgument, match="duration must be text such as '3d'") as caught:
        parse_duration(value)
    assert isinstance(caught.value, TypeError)


# A when that counts from now


@pytest.mark.parametrize("when", ["3d", timedelta(days=3), relativedelta(days=3), "P3D", "72 hours"])
def test_a_duration_counts_from_now(when):
    assert at(when) == utc(2026, 2, 3, 12)


@pytest.mark.parametrize("when", ["0s", "0mo", timedelta(0), relativedelta()])
def test_no_time_at_all_is_now(when):
    assert at(when) == NOW


def test_a_naive_now_is_local_time_as_elsewhere():
    assert at("1h", STOCKHOLM, datetime(2026, 1, 31, 13, 0)) == utc(2026, 1, 31, 13)


def test_a_month_stops_at_the_end_of_the_month():
    assert at("1mo") == utc(2026, 2, 28, 12)
    assert at("1y", now=utc(2028, 2, 29)) == utc(2029, 2, 28)


def test_a_year_and_a_month_are_added_before_the_day_is_clamped():
    assert at("1y1mo", now=utc(2027, 1, 31)) == utc(2028, 2, 29)


def test_a_month_keeps_the_time_of_day_in_the_zone():
    assert at("1mo", STOCKHOLM, utc(2026, 3, 1, 8)) == utc(2026, 4, 1, 7)


def test_the_calendar_is_that_of_the_zone():
    now = utc(2026, 1, 31, 23, 30)  # already February in Stockholm
    assert at("1mo", STOCKHOLM, now) == utc(2026, 2, 28, 23, 30)
    assert at("1mo", UTC, now) == utc(2026, 2, 28, 23, 30)
    assert at("1mo", NEW_YORK, utc(2026, 3, 1, 3)) == utc(2026, 3, 29, 2)  # 28 February there


@pytest.mark.parametrize("when", ["1d", timedelta(days=1), relativedelta(days=1), "24h", relativedelta(hours=24)])
def test_a_day_is_24_hours_whatever_the_clocks_do(when):
    assert at(when, STOCKHOLM, utc(2026, 3, 28, 12)) == utc(2026, 3, 29, 12)


def test_a_mixed_duration_is_calendar_first_and_then_exact():
    now = utc(2026, 2, 28, 12)  # a month later, 13:00 on the wall, is the day before the clocks go forward
    assert at("1mo 12h", STOCKHOLM, now) == utc(2026, 3, 29)
    assert at("1mo 1d", STOCKHOLM, now) == utc(2026, 3, 29, 12)
    assert at(relativedelta(months=1, days=1), STOCKHOLM, now) == utc(2026, 3, 29, 12)


def test_months_into_a_gap_move_forward_by_the_gap():
    assert at("2mo", STOCKHOLM, utc(2026, 1, 29, 1, 30)) == utc(2026, 3, 29, 1, 30)


def test_a_month_into_a_fold_takes_the_first():
    assert at("1mo", STOCKHOLM, utc(2026, 9, 25, 0, 30)) == utc(2026, 10, 25, 0, 30)


def test_zero_months_in_the_second_half_of_a_fold_is_still_now():
    now = utc(2026, 10, 25, 1, 30)
    assert at("0mo", STOCKHOLM, now) == now


def test_a_relativedelta_that_sets_fields_speaks_of_the_wall_clock():
    tomorrow_at_nine = relativedelta(days=1, hour=9, minute=0)
    assert at(tomorrow_at_nine, STOCKHOLM, utc(2026, 3, 28, 12)) == utc(2026, 3, 29, 7)
    next_monday = relativedelta(days=1, weekday=MO, hour=0, minute=0, second=0, microsecond=0)
    assert at(next_monday, STOCKHOLM, utc(2026, 3, 28, 12)) == utc(2026, 3, 29, 22)
    assert at(relativedelta(leapdays=1), now=utc(2028, 3, 1)) == utc(2028, 3, 2)


def test_fields_set_within_the_second_half_of_a_fold_stay_in_it():
    assert at(relativedelta(minute=50), STOCKHOLM, utc(2026, 10, 25, 1, 30)) == utc(2026, 10, 25, 1, 50)


def test_a_relativedelta_may_step_back_as_long_as_it_ends_ahead():
    assert at(relativedelta(months=1, days=-1)) == utc(2026, 2, 27, 12)


@pytest.mark.parametrize(
    "when",
    [timedelta(microseconds=-1), relativedelta(months=-1), relativedelta(days=1, hours=-25), relativedelta(hour=9)],
)
def test_a_duration_that_ends_before_now_says_how_to_run_at_once(when):
    with pytest.raises(InvalidTime, match="pass a past datetime to run at once") as caught:
        at(when)
    assert (caught.value.argument, caught.value.value) == ("when", when)


# A when that is a point in time


def test_an_aware_datetime_is_that_instant():
    assert at(datetime(2026, 7, 1, 9, tzinfo=STOCKHOLM)) == utc(2026, 7, 1, 7)
    assert at(datetime(2026, 7, 1, 9, tzinfo=timezone(timedelta(hours=5, minutes=30)))) == utc(2026, 7, 1, 3, 30)


def test_a_past_datetime_is_taken_as_it_is():
    assert at(utc(1999, 1, 1)) == utc(1999, 1, 1)


@settings(deadline=None)
@given(st.datetimes(timezones=st.timezones()))
def test_what_comes_back_is_utc_and_the_same_instant(when):
    try:
        expected = when.astimezone(UTC)
    except OverflowError:
        with pytest.raises(InvalidTime):
            at(when)
        return
    assert at(when) == expected
    assert at(when).tzinfo is UTC


def test_an_offset_may_have_seconds():
    assert at("1900-01-01T00:00:00+01:12:12") == utc(1899, 12, 31, 22, 47, 48)


def test_a_naive_datetime_is_local_time_of_the_zone():
    assert at(datetime(2026, 7, 1, 9), STOCKHOLM) == utc(2026, 7, 1, 7)
    assert at(datetime(2026, 7, 1, 9), NEW_YORK) == utc(2026, 7, 1, 13)


def test_a_naive_datetime_without_a_zone_is_local_time_of_the_system(system_zone):
    system_zone("America/New_York")
    assert at(datetime(2026, 7, 1, 9), None) == utc(2026, 7, 1, 13)
    system_zone("Asia/Tokyo")
    assert at("2026-07-01T09:00", None) == utc(2026, 7, 1)


def test_the_system_zone_has_gaps_and_folds_too(system_zone):
    system_zone("Europe/Stockholm")
    assert at(datetime(2026, 3, 29, 2, 30), None) == utc(2026, 3, 29, 1, 30)
    assert at(datetime(2026, 3, 29, 2, 30, fold=1), None) == utc(2026, 3, 29, 1, 30)
    assert at(datetime(2026, 10, 25, 2, 30), None) == utc(2026, 10, 25, 0, 30)
    assert at(datetime(2026, 10, 25, 2, 30, fold=1), None) == utc(2026, 10, 25, 1, 30)
    assert at("2mo", None, utc(2026, 1, 29, 1, 30)) == utc(2026, 3, 29, 1, 30)


def test_the_present_moment_in_local_time_is_now(system_zone):
    system_zone("America/St_Johns")
    before, when, after = utc_now(), at(datetime.now(), None), utc_now()
    assert before <= when <= after


ZONES_OF_THE_SAME_RULES = [
    STOCKHOLM,
    dateutil_tz.gettz("Europe/Stockholm"),
    dateutil_tz.tzstr("CET-1CEST,M3.5.0/2,M10.5.0/3", posix_offset=True),
]


@pytest.mark.parametrize("stockholm", ZONES_OF_THE_SAME_RULES, ids=["zoneinfo", "dateutil-file", "dateutil-rule"])
@pytest.mark.parametrize("fold", [0, 1])
def test_a_time_in_a_gap_moves_forward_by_the_gap(stockholm, fold):
    assert at(datetime(2026, 3, 29, 2, 30, fold=fold), stockholm) == utc(2026, 3, 29, 1, 30)


@pytest.mark.parametrize("stockholm", ZONES_OF_THE_SAME_RULES, ids=["zoneinfo", "dateutil-file", "dateutil-rule"])
def test_a_time_in_a_fold_is_the_first_unless_the_second_is_asked_for(stockholm):
    assert at(datetime(2026, 10, 25, 2, 30), stockholm) == utc(2026, 10, 25, 0, 30)
    assert at(datetime(2026, 10, 25, 2, 30, fold=1), stockholm) == utc(2026, 10, 25, 1, 30)


def test_a_whole_day_may_be_missing():
    assert at(datetime(2011, 12, 30, 12), ZoneInfo("Pacific/Apia")) == at(
        datetime(2011, 12, 31, 12), ZoneInfo("Pacific/Apia")
    )


TRICKY = [
    "Africa/Casablanca", "Africa/Monrovia", "America/Caracas", "America/New_York", "America/Nuuk", "America/Sao_Paulo",
    "America/St_Johns", "Antarctica/Troll", "Asia/Gaza", "Asia/Kathmandu", "Asia/Pyongyang", "Asia/Tehran",
    "Australia/Lord_Howe", "Europe/Dublin", "Europe/Lisbon", "Europe/Stockholm", "Pacific/Apia", "Pacific/Kwajalein",
]  # fmt: skip


def wall(instant, zone):
    return instant.astimezone(zone).replace(tzinfo=None)


@cache
def changes_of_the_clock(name):
    zone, day = ZoneInfo(name), timedelta(days=1)
    days = [utc(1970, 1, 1) + n * day for n in range(365 * 68)]
    offsets = [instant.astimezone(zone).utcoffset() for instant in days]
    return [days[n] for n in range(len(days) - 1) if offsets[n] != offsets[n + 1]]


@st.composite
def times_near_a_change_of_the_clock(draw):
    name = draw(st.sampled_from(TRICKY))
    around = draw(st.sampled_from(changes_of_the_clock(name)))
    return wall(around, ZoneInfo(name)) + timedelta(minutes=draw(st.integers(-120, 36 * 60))), ZoneInfo(name)


def first_instant_at(local, zone):
    """Find by search, and by nothing but UTC to local, when clocks in ``zone`` first show ``local``, or would."""
    low = local.replace(tzinfo=UTC) - timedelta(hours=30)
    while wall(low, zone) < local:
        low += timedelta(minutes=30)
    high, low = low, low - timedelta(minutes=30)
    while high - low > timedelta.resolution:
        middle = low + (high - low) / 2
        low, high = (middle, high) if wall(middle, zone) < local else (low, middle)
    missing = wall(high, zone) - local and local - wall(low, zone) - timedelta.resolution
    return high + missing if missing else high


@settings(deadline=None)
@given(times_near_a_change_of_the_clock())
@example((datetime(2011, 12, 30, 12), ZoneInfo("Pacific/Apia")))
@example((datetime(2026, 4, 5, 1, 45), ZoneInfo("Australia/Lord_Howe")))
def test_local_times_agree_with_a_search_through_the_zone(local_and_zone):
    local, zone = local_and_zone
    assert at(local, zone) == first_instant_at(local, zone)


@settings(deadline=None)
@given(times_near_a_change_of_the_clock(), st.integers(1, 600), st.timedeltas(timedelta(0), timedelta(days=9)))
def test_months_agree_with_the_calendar(local_and_zone, months, exact):
    local, zone = local_and_zone
    now = first_instant_at(local, zone)
    here = wall(now, zone)
    year, month = divmod(here.year * 12 + here.month - 1 + months, 12)
    day = min(here.day, calendar.monthrange(year, month + 1)[1])
    expected = first_instant_at(here.replace(year=year, month=month + 1, day=day), zone) + exact
    text = f"{months // 12}y{months % 12}mo{exact // timedelta.resolution}us"
    assert at(text, zone, now) == expected
    assert at(parse_duration(text), zone, now) == expected


DURATIONS = st.one_of(
    st.builds("{}{}".format, st.integers(0, 500), st.sampled_from(["us", "s", "m", "h", "d", "w", "mo", "y"])),
    st.timedeltas(timedelta(0), timedelta(days=9999)),
)


@settings(deadline=None)
@given(
    DURATIONS, st.datetimes(datetime(1900, 1, 1), datetime(2900, 1, 1)), st.timedeltas(timedelta(0), timedelta(days=99))
)
def test_who_asks_later_never_runs_earlier(when, now, later):
    now = now.replace(tzinfo=UTC)
    assert now <= at(when, UTC, now) <= at(when, UTC, now + later)


@settings(deadline=None)
@given(DURATIONS, times_near_a_change_of_the_clock())
def test_no_duration_ends_before_it_begins_in_any_zone(when, local_and_zone):
    local, zone = local_and_zone
    now = at(local, zone)
    assert at(when, zone, now) >= now


class Stamp(datetime):
    """Stands for pandas.Timestamp, whose arithmetic and attributes are its own."""


def test_a_subclass_of_datetime_comes_back_plain():
    for when in (Stamp(2026, 7, 1, 9, 0, 0, 5), Stamp(2026, 7, 1, 7, 0, 0, 5, tzinfo=UTC)):
        assert at(when, STOCKHOLM) == utc(2026, 7, 1, 7, 0, 0, 5)
        assert type(at(when, STOCKHOLM)) is datetime
    assert type(at("3d", now=Stamp(2026, 1, 1, tzinfo=UTC))) is datetime
    assert at(Stamp(2026, 10, 25, 2, 30, fold=1), STOCKHOLM) == utc(2026, 10, 25, 1, 30)


def test_a_datetime_that_is_no_time_is_refused():
    class NotATime(datetime):
        def date(self):
            raise ValueError("NaTType does not support date")

    with pytest.raises(InvalidTime, match="NaTType"):
        at(NotATime(2026, 1, 1))


# ISO 8601 text


@pytest.mark.parametrize(
    "text",
    [
        "2026-12-01T09:00",
        "2026-12-01 09:00",
        "2026-12-01T09:00:00",
        "2026-12-01T09:00:00.000",
        "2026-12-01T09:00:00,000000",
        "2026-12-01T08:00Z",
        "2026-12-01T08:00:00+00:00",
        "2026-12-01T03:00:00-05:00",
        "2026-12-01T13:30+0530",
        "2026-12-01T10:00+02",
        "20261201T0900",
        "20261201T080000Z",
        "2026-W49-2T09:00",
        "2026-12-01t08:00z",
        " 2026-12-01T09:00\n",
        "2026-12-01T08:00:00.000000000Z",
    ],
)
def test_iso_8601_text_is_a_time(text):
    assert at(text, STOCKHOLM) == utc(2026, 12, 1, 8)


@settings(deadline=None)
@given(st.datetimes(datetime(1, 1, 3), datetime(9999, 12, 29), timezones=st.none() | st.timezones()))
def test_what_isoformat_writes_is_read_back(when):
    assert at(when.isoformat()) == at(when.isoformat(" ")) == at(when)


@pytest.mark.parametrize("text", ["2026-12-01", "2026-W49-2"])
def test_a_date_without_a_time_is_ambiguous(text):
    with pytest.raises(InvalidTime, match=f"ambiguous; write '{text}T00:00'"):
        at(text)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("2026-02-30", "day"),
        ("2026-02-30T09:00", "day"),
        ("2026-13-01T09:00", "month"),
        ("0000-01-01T00:00", "year"),
        ("24:00", "hour"),
        ("9:30", "time of day needs a date"),
        ("2026-12-01T24:00", "hour"),
        ("2026-12-01T25:00", "hour"),
        ("2026-12-01T09:60", "minute"),
        ("2026-12-01T09:00:60", "second"),
        ("2026-12-01T09:00+25:00", "offset"),
        ("2026-12-01T09:00:00.0000001", "microsecond"),
    ],
)
def test_an_impossible_time_names_its_part(text, part):
    with pytest.raises(InvalidTime, match=f"^when='.*': .*{part}"):
        at(text)


@pytest.mark.parametrize(
    "text",
    [
        "10/11/12", "sat", "2026", "2026-12", "202612", "20261201", "2026-1-1T9:00", "2026-12-01T", "2026-12-01T09",
        "2026-12-01T9:00", "2026-12-01x09:00", "2026-12-01  09:00", "2026-12-01T09:00 +02:00", "2026-12-01T09:00,5",
        "2026-12-01T09:00CET", "2026-335T09:00", "2026-12-01T09:00\x00", "+2026-12-01T09:00", "2026-12-01T09:00:0000",
        "1764579600", "now", "Tue, 01 Dec 2026 09:00:00 GMT", "２026-12-01T09:00", "2026-W49T09:00",
        "2026-12-01T09:00Z+01:00", "2026-12-01T09:00/PT1H", "2026-1201T09:00",
    ],
)  # fmt: skip
def test_what_is_not_quite_iso_8601_is_not_guessed_at(text):
    with pytest.raises(InvalidTime, match="not understood"):
        at(text)


@settings(deadline=None)
@given(
    st.text()
    | st.text("0123456789.,:-+TWZPYMDHSdhmsoywan ", max_size=30)
    | st.from_regex(r"\d{4}-?\d\d-?\d\d[T ][\d:.,Z+-]*"),
    st.sampled_from([None, UTC, STOCKHOLM]),
)
@example("0001-01-01T00:00+14:00", UTC)
@example("0001-01-01T00:00", STOCKHOLM)
@example("9999-12-31T23:59", NEW_YORK)
@example("9999-12-31T23:59", None)
def test_no_text_whatever_raises_anything_but_a_refusal(text, zone):
    for read in (
        lambda: resolve(text, now=NOW, timezone=zone),
        lambda: resolve_expiry(text, run_at=NOW, timezone=zone),
        lambda: parse_duration(text),
        lambda: times.zone(text),
    ):
        try:
            read()
        except InvalidTime as error:
            assert error.value == text
            assert len(str(error)) < 500


# What a when cannot be


@pytest.mark.parametrize("value", [3, 0, 1.5, True, None, b"3d", object(), [], MO])
def test_what_is_neither_time_nor_duration_is_a_type_error(value):
    with pytest.raises(InvalidArgument, match="when must be a datetime, timedelta, relativedelta or text") as caught:
        at(value)
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, FutureJobsError)
    assert caught.value.argument == "when"


def test_a_date_is_ambiguous():
    with pytest.raises(InvalidArgument, match="ambiguous, pass a datetime"):
        at(date(2026, 12, 1))


@pytest.mark.parametrize(
    ("when", "zone"),
    [
        ("9999y", UTC),
        ("99999999999d", UTC),
        (timedelta.max, UTC),
        (relativedelta(years=8000), UTC),
        (relativedelta(days=10**12), UTC),
        (relativedelta(years=10**30), UTC),
        (datetime.min.replace(tzinfo=timezone(timedelta(hours=1))), UTC),
        (datetime.max.replace(tzinfo=timezone(timedelta(hours=-1))), UTC),
        (datetime.min, STOCKHOLM),
        (datetime.max, NEW_YORK),
        ("9999-12-31T23:59:59-00:01", UTC),
        ("1000000000000000000y", UTC),
    ],
)
def test_what_lies_outside_the_calendar_is_refused(when, zone):
    with pytest.raises(InvalidTime, match=r"^when=.*: .*(year|range)") as caught:
        at(when, zone)
    assert caught.value.argument == "when"


def test_the_ends_of_the_calendar_are_within_it():
    assert at(datetime.min) == datetime.min.replace(tzinfo=UTC)
    assert at(datetime.max) == datetime.max.replace(tzinfo=UTC)
    assert at("9999-12-31T23:59:59.999999") == datetime.max.replace(tzinfo=UTC)


def test_the_message_uses_the_name_of_the_argument():
    with pytest.raises(InvalidTime, match=r"^until='3x'") as caught:
        resolve("3x", now=NOW, timezone=UTC, argument="until")
    assert caught.value.argument == "until"


# Expiry


def test_no_expiry_is_never():
    assert resolve_expiry(None, run_at=NOW, timezone=UTC) is None


@pytest.mark.parametrize(
    "expires", ["5d", timedelta(days=5), relativedelta(days=5), "2026-02-05T12:00", utc(2026, 2, 5, 12)]
)
def test_an_expiry_counts_from_the_scheduled_time_or_is_a_time(expires):
    assert resolve_expiry(expires, run_at=NOW, timezone=UTC) == utc(2026, 2, 5, 12)


def test_a_naive_expiry_is_local_time_of_the_zone():
    assert resolve_expiry(datetime(2026, 7, 1, 9), run_at=NOW, timezone=STOCKHOLM) == utc(2026, 7, 1, 7)


def test_an_expiry_in_months_is_on_the_calendar_of_the_zone():
    assert resolve_expiry("1mo", run_at=utc(2026, 3, 1, 8), timezone=STOCKHOLM) == utc(2026, 4, 1, 7)


@pytest.mark.parametrize("expires", ["0s", NOW, "2026-01-31T12:00Z"])
def test_a_job_may_expire_at_the_time_it_is_due(expires):
    assert resolve_expiry(expires, run_at=NOW, timezone=UTC) == NOW


def test_an_expiry_before_the_job_is_due_shows_both():
    with pytest.raises(InvalidTime, match=r"2026-01-31T11:59:59\+00:00.*2026-01-31T12:00:00\+00:00") as caught:
        resolve_expiry("2026-01-31T11:59:59Z", run_at=NOW, timezone=UTC)
    assert (caught.value.argument, caught.value.value) == ("expires", "2026-01-31T11:59:59Z")


@pytest.mark.parametrize("expires", ["-1d", timedelta(-1), "sat", "3", "2026-02-30T00:00", "9999y"])
def test_an_expiry_that_means_nothing_names_the_argument(expires):
    with pytest.raises(InvalidTime, match=r"^expires="):
        resolve_expiry(expires, run_at=NOW, timezone=UTC)


@pytest.mark.parametrize("expires", [5, False, date(2026, 12, 1)])
def test_an_expiry_of_the_wrong_type_is_a_type_error(expires):
    with pytest.raises(InvalidArgument, match=r"^expires must be"):
        resolve_expiry(expires, run_at=NOW, timezone=UTC)


# Zones and now


def test_a_zone_may_be_named_given_or_left_to_the_system():
    assert zone("Europe/Stockholm") == STOCKHOLM
    assert zone(STOCKHOLM) is STOCKHOLM
    assert zone(UTC) is UTC
    assert zone(None) is None


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("Europe/Stokholm", "Europe/Stockholm"),
        ("europe/stockholm", "Europe/Stockholm"),
        ("Stockholm", "Europe/Stockholm"),
        ("New York", "America/New_York"),
        ("utc", "UTC"),
    ],
)
def test_an_unknown_zone_is_answered_with_the_nearest(name, meant):
    with pytest.raises(InvalidTime, match=f"timezone='{name}': no such time zone here; did you mean '{meant}'"):
        zone(name)


@pytest.mark.parametrize(
    "name", ["", ".", "Europe", "../x", "/etc/passwd", "a\x00b", "\ud800", "x" * 5000, "zone.tab", "+02:00"]
)
def test_what_is_not_the_name_of_a_zone_is_refused(name):
    with pytest.raises(InvalidTime, match=r"^tz=.* no such time zone here") as caught:
        zone(name, argument="tz")
    assert (caught.value.argument, caught.value.value) == ("tz", name)


@pytest.mark.parametrize("value", [2, timedelta(hours=2), b"UTC", UTC.utcoffset])
def test_a_zone_of_the_wrong_type_is_a_type_error(value):
    with pytest.raises(InvalidArgument, match="timezone must be a tzinfo, a name"):
        zone(value)


def test_a_zone_made_by_pytz_becomes_the_zone_of_its_name():
    class Pytz(tzinfo):
        zone = "Europe/Stockholm"

        def localize(self):
            raise AssertionError

    assert zone(Pytz()) == STOCKHOLM


def test_now_is_aware_and_utc():
    assert utc_now().tzinfo is UTC


def test_a_now_that_is_given_is_read_as_a_when_is():
    assert as_utc(datetime(2026, 7, 1, 9), timezone=STOCKHOLM) == utc(2026, 7, 1, 7)
    assert as_utc(datetime(2026, 7, 1, 9, tzinfo=NEW_YORK), timezone=STOCKHOLM) == utc(2026, 7, 1, 13)


@pytest.mark.parametrize("value", ["3d", None, 3, date(2026, 1, 1)])
def test_a_now_that_is_no_datetime_is_a_type_error(value):
    with pytest.raises(InvalidArgument, match=r"^now must be a datetime"):
        as_utc(value, timezone=UTC)
    with pytest.raises(InvalidArgument, match=r"^now must be a datetime"):
        at("3d", now=value)


def test_a_now_outside_the_calendar_is_refused():
    with pytest.raises(InvalidTime, match=r"^now="):
        as_utc(datetime.max, timezone=NEW_YORK)
