"""The benchmarks measure what they say, and say what they measured. No server and no peer is needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import measure, workers
from benchmarks.peers import running, systems
from benchmarks.peers.protocol import WORKS, Report, parse
from benchmarks.peers.systems import NORMAL, REQUIREMENTS, SYSTEMS, System
from benchmarks.peers.tables import HEAD, Measured, broken, table
from benchmarks.sizes import Sizes

OURS = next(each for each in SYSTEMS if each.name == NORMAL)
THEIRS = System(
    "Theirs", "huey", "sqlite", "as it comes", {"one": 10, "drain": 10}, rival=NORMAL, floors={"drain": 2.0}
)


def test_the_first_round_of_each_is_not_counted():
    first, second = iter([99.0, 1.0, 2.0]), iter([98.0, 3.0, 4.0])
    assert measure.interleaved(2, lambda: next(first), lambda: next(second)) == ([1.0, 2.0], [3.0, 4.0])


def test_a_result_is_the_median_of_the_ratios_of_the_rounds():
    result = measure.compared("name", "sqlite", ([10.0, 10.0, 10.0], [1.0, 5.0, 6.0]), floor=0.6)
    assert (result.ratio, result.lowest, result.highest, result.verdict) == (0.5, 0.1, 0.6, "FAIL")
    assert measure.table([result]).splitlines()[-1].split() == (
        ["name", "sqlite", "ours", "/", "raw", "0.50", "0.10..0.60", ">=", "0.60", "FAIL", "5/s", "10/s"]
    )


def test_worker_processes_drain_what_the_driver_does():
    results = list(workers.drain("sqlite", Sizes(worker=30, worker_rounds=1)))
    assert [each.what for each in results[:3]] == ["ours / raw, two transactions", "ours / raw, merged", "two / one"]
    assert all(each.ratio > 0 for each in results)


@pytest.mark.parametrize("work", WORKS)
def test_an_adapter_reports_how_long_its_work_took(work):
    report = running.measure(OURS, work, 30)
    assert report.count == 30
    assert report.rate == 30 / report.seconds


def test_an_adapter_that_fails_has_the_last_word():
    with pytest.raises(running.Failed, match="KeyError: 'dance'"):
        running.measure(OURS, "dance", 30)


def test_a_peer_that_is_not_installed_is_said_to_be_so(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "VENVS", tmp_path)
    with pytest.raises(running.Failed, match="not installed"):
        running.measure(THEIRS, "one", 30)


def test_a_report_is_the_last_line_whatever_was_said_before():
    assert parse('a warning\n{"seconds": 2.0, "count": 10, "version": "1.0"}\n') == Report(2.0, 10, "1.0")


@pytest.mark.parametrize(
    "output", ["", "killed", "[]", '{"seconds": 2.0}', '{"seconds": 0.0, "count": 10, "version": "1.0"}']
)
def test_what_is_no_report_is_refused(output):
    with pytest.raises(ValueError, match="report"):
        parse(output)


def test_the_table_tells_how_many_times_as_fast_ours_is_and_what_failed():
    ours = Measured(OURS, {"one": [10.0, 20.0, 30.0], "bulk": [5.0], "drain": [9.0]}, version="1")
    theirs = Measured(THEIRS, {"one": [20.0, 20.0, 20.0]}, {"drain": "not done after 60 s"}, version="2")
    assert table([ours, theirs]).removeprefix(HEAD).splitlines()[1:] == [
        f"| {NORMAL} 1 | {OURS.configuration} | 20/s | 5/s | 9/s |",
        "| Theirs 2 | as it comes | 20/s (1) | none | failed: not done after 60 s |",
    ]


def test_a_floor_is_broken_when_it_is_not_reached_and_when_nothing_was_measured():
    ours, theirs = Measured(OURS, {"drain": [30.0]}), Measured(THEIRS, {"drain": [10.0]})
    assert list(broken([ours, theirs])) == []
    theirs.rates["drain"] = [20.0]
    assert list(broken([ours, theirs])) == ["Theirs, drain: ours is 1.50 times as fast, and should be 2.0"]
    theirs.failures["drain"] = "out of memory"
    assert list(broken([ours, theirs])) == ["Theirs, drain: not measured, and ours should be 2.0 times as fast"]


def test_every_system_has_an_adapter_that_fits_on_two_screens_and_a_rival_on_our_side():
    folder = Path(systems.__file__).parent / "adapters"
    ours = {each.name for each in SYSTEMS if not each.rival}
    for each in SYSTEMS:
        source = (folder / f"{each.adapter}.py").read_text().splitlines()
        assert len(source) <= 100, each.name
        assert set(each.counts) <= set(WORKS)
        assert (each.adapter in REQUIREMENTS) == (each.rival != ""), each.name
        assert not each.rival or each.rival in ours, each.name
    assert set(REQUIREMENTS) == {each.adapter for each in SYSTEMS if each.rival}
