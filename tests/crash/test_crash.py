"""Nothing is lost, and nothing is done twice in the database, whatever dies, sleeps or lies.

Each test is short by default; ``pytest tests/crash --crash-long`` makes the long run of it, and says what it found.
"""

from __future__ import annotations

from time import monotonic

import pytest

from tests.crash.lab import STUCK, kill_sessions


@pytest.fixture
def lease(is_long):
    """Seconds; in the long run what leaves a busy machine room for what is promised."""
    return 2.0 if is_long else 1.0


def test_workers_are_killed_at_random_moments(shared_url, open_lab, conclude, is_long, lease):
    lab = open_lab(shared_url, lease=lease)
    lab.start_command()
    for _ in range(3):
        lab.start()
    strikes, jobs = (200, 20_000) if is_long else (4, 120)
    lab.storm(strikes, jobs, lambda _: lab.replace(lab.victim()))
    verdict = conclude(lab)
    assert len(lab.dead) == strikes
    assert verdict.losses or not is_long


def test_workers_sleep_past_their_leases(shared_url, open_lab, conclude, is_long, lease):
    """Their jobs are given to others, and what they finish when they wake up is refused."""
    lab = open_lab(shared_url, lease=lease)
    for _ in range(5 if is_long else 2):
        lab.start()
    strikes, jobs, most = (200, 4_000, 3) if is_long else (1, 60, 1)

    def pause(_):
        lab.until(lambda: len(lab.asleep) < most)
        awake = [worker for worker in lab.workers if worker not in lab.asleep]
        lab.pause(*awake, leases=STUCK)

    lab.storm(strikes, jobs, pause, longest=0.1)  # so that it is often in the middle of a job
    lab.until(lambda: not lab.asleep)
    verdict = conclude(lab)
    assert verdict.refused >= 10 or not is_long


# --- one attempt that is paused, and one that follows it -----------------------------------------------------------


@pytest.fixture
def overtaken(shared_url, open_lab):
    """Let a worker sleep in the middle of a job until another has begun it anew; return the lab, and both."""

    def overtaken(guard=None, *, lease=0.4):
        lab = open_lab(shared_url, lease=lease)
        [job_id] = lab.schedule("write_when_let_go")
        sleeper = lab.start(guard=guard)
        lab.until(lambda: lab.noted("began", job_id, 1))
        lab.pause(sleeper)
        lab.start()
        lab.until(lambda: lab.noted("began", job_id, 2))
        return lab, job_id, sleeper

    return overtaken


def test_a_worker_that_slept_finishes_nothing_while_another_runs_its_job(overtaken, conclude):
    lab, job_id, sleeper = overtaken()
    lab.open_gate(job_id, 1)
    lab.wake(sleeper)
    lab.until(lambda: lab.noted("lost", job_id, 1))
    lab.open_gate(job_id, 2)
    lab.until(lambda: lab.left() == 0)
    assert conclude(lab).refused == 1
    assert lab.status(job_id) == ("complete", 2)


def test_a_worker_that_slept_finishes_nothing_after_another_has(overtaken, conclude):
    lab, job_id, sleeper = overtaken()
    lab.open_gate(job_id, 2)
    lab.until(lambda: lab.left() == 0)
    lab.open_gate(job_id, 1)
    lab.wake(sleeper)
    lab.until(lambda: lab.noted("lost", job_id, 1))
    assert conclude(lab).refused == 1


def test_the_lab_sees_a_finish_that_is_guarded_by_the_id_alone(overtaken):
    lab, job_id, sleeper = overtaken("id")
    lab.open_gate(job_id, 2)
    lab.until(lambda: lab.left() == 0)
    lab.open_gate(job_id, 1)
    lab.wake(sleeper)
    lab.until(lambda: lab.verdict().stale > 0)
    verdict = lab.verdict()
    assert (verdict.doubled, verdict.stale) == ([job_id], 2)  # the effect, and the completion
    with pytest.raises(AssertionError):
        verdict.check(lease=lab.lease, is_long=False)


def test_the_lab_sees_a_finish_that_is_guarded_by_the_status_alone(overtaken):
    lab, job_id, sleeper = overtaken("status")
    lab.open_gate(job_id, 1)
    lab.wake(sleeper)
    lab.until(lambda: lab.left() == 0)
    lab.open_gate(job_id, 2)
    lab.until(lambda: lab.noted("lost", job_id, 2))
    verdict = lab.verdict()
    assert (verdict.doubled, verdict.stale) == ([], 2)
    with pytest.raises(AssertionError):
        verdict.check(lease=lab.lease, is_long=False)


# --- the database ---------------------------------------------------------------------------------------------------


def test_the_database_ends_all_sessions(shared_kind, shared_url, open_lab, conclude, is_long, lease):
    if shared_kind == "file":
        pytest.skip("a file has no sessions")
    lab = open_lab(shared_url, lease=lease)
    for _ in range(3):
        lab.start()
    strikes, jobs = (100, 5_000) if is_long else (3, 120)
    lab.storm(strikes, jobs, lambda _: kill_sessions(lab.url))
    conclude(lab)
    lab.check_all_lived()


def test_the_server_crashes_and_comes_back(server, open_lab, conclude, is_long, lease):
    lab = open_lab(server.url, lease=lease)
    for _ in range(3):
        lab.start()
    strikes, jobs = (20, 2_000) if is_long else (1, 60)
    lab.storm(strikes, jobs, lambda _: server.restart())
    conclude(lab)
    lab.check_all_lived()


def test_the_reply_to_a_commit_is_lost(proxy, shared_url, open_lab, conclude, is_long, lease):
    """It had happened, or it had not, or it happens once its worker has already given up."""
    cuts = 500 if is_long else 12
    lab = open_lab(shared_url, lease=lease, worker_url=proxy.url.render_as_string(hide_password=False))
    for _ in range(3):
        lab.start()
    proxy.cut(0.2, cuts)
    while proxy.cuts.total() < cuts:
        lab.schedule_mixed(60)
        lab.until(lambda: lab.left() == 0 or proxy.cuts.total() >= cuts)
        lab.told(f"{proxy.cuts.total()} of {cuts} cuts")
    lab.until(lambda: lab.left() == 0)
    lab.strikes = proxy.cuts.total()
    conclude(lab)
    lab.check_all_lived()
    assert proxy.cuts.total() >= cuts
    assert min(proxy.cuts.values()) >= (cuts // 6 if is_long else 1)


# --- jobs and clocks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", ["die", "leave"])
def test_a_job_that_kills_its_worker_ends_as_failed(shared_url, open_lab, conclude, is_long, lease, poison):
    if poison == "leave" and not is_long:
        pytest.skip("another way to die: only in the long run")
    lab = open_lab(shared_url, lease=lease if is_long else 0.4)
    lab.start()
    [poisoned] = lab.schedule(poison)
    lab.schedule_mixed(300 if is_long else 30)
    lab.until(lambda: lab.left() == 0)
    conclude(lab, excepted=[poisoned])
    # Each death is charged; beside a job that died with it before, it may have been handed back, which is not.
    assert lab.status(poisoned)[0] == "failed"
    assert lab.losses(poisoned) == len(lab.dead) == 5


def test_the_clocks_of_workers_are_hours_wrong(shared_url, open_lab, conclude, lease):
    """They take nothing from the living and start nothing early, they are not late, and they see who has died."""
    lab = open_lab(shared_url, lease=lease)
    [long] = lab.schedule("write_when_let_go")
    lab.start(slots=1)
    lab.until(lambda: lab.noted("began", long, 1))
    for hours in (-3, 3):
        lab.start(clock=hours * 3600.0, slots=1)
    [early] = lab.schedule("write", when="1h")
    lab.schedule_mixed(9)
    since = monotonic()
    lab.until(lambda: lab.left() == 2 and monotonic() - since > STUCK * lease)
    assert lab.status(early) == ("scheduled", 0)
    assert lab.status(long) == ("running", 1)

    lab.open_gate(long, 1)
    [held] = lab.schedule("write_when_let_go")
    for attempt in (1, 2):
        lab.until(lambda attempt=attempt: lab.noted("began", held, attempt))
        lab.kill(lab.runner(held, attempt))
    lab.open_gate(held, 3)
    lab.until(lambda: lab.left() == 1)
    verdict = conclude(lab, excepted=[early])
    assert len(verdict.waits) == 2
    assert (lab.status(long), lab.status(held)) == (("complete", 1), ("complete", 3))
