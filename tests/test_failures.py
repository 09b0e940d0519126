"""Recording a failure cannot fail, on any database."""

import pytest
from sqlalchemy import select

from future_jobs import JobFailure
from tests.jobs import record
from tests.test_bad_input import HARD


@pytest.mark.parametrize("name", HARD)
def test_whatever_is_raised_is_recorded_in_bounds(scheduler, session, now, calls, name):
    bad = scheduler.schedule(now, f"tests.test_bad_input.{name}", priority=1)
    scheduler.schedule(now, record)
    report = scheduler.run_due(now, ignore_errors=True)
    assert (report.failed, report.complete) == (1, 1)
    assert bad.status == "failed"
    assert 0 < len(bad.error.encode()) <= 64 * 1024
    assert "\x00" not in bad.error
    [failure] = session.scalars(select(JobFailure))
    assert failure.traceback == bad.error
    expected = {
        "raise_nul": "\\x00b",
        "raise_group": "two",
        "raise_megabytes": "bytes cut",
        "recurse": "RecursionError",
    }
    assert expected.get(name, "") in bad.error
