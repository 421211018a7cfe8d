"""The checker can fail: correct histories pass, and whatever is wrong with one is found and named."""

from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.checker import check, check_folder, main
from tests.history import HISTORY, End, HistoryError, Recorder, Run, decode_record, encode_record, read_history
from tests.unit.histories import (
    GOOD_LINE,
    KINDS,
    LOGS,
    SPOILS,
    Spoil,
    cancelled,
    ended,
    failed,
    history,
    parts_of,
    succeeded,
)
from tests.verdict import RULES

ALL_KINDS = history(parts_of(range(len(KINDS))))
HISTORIES = st.builds(
    lambda kinds, order: history(parts_of(kinds), order),
    st.lists(st.integers(0, len(KINDS) - 1), min_size=1, max_size=8),
    st.lists(st.integers(0, 7), max_size=60),
)


def rules(records: list, logs: list = LOGS) -> set[str]:  # type: ignore[type-arg]
    return {violation.rule for violation in check(records, logs).violations}


def test_a_history_with_every_way_to_end_is_correct() -> None:
    """Done, repeated, redelivered, handed back, retried, dead-lettered, refused, cancelled, sent twice: all is well."""
    verdict = check(ALL_KINDS, LOGS)
    assert verdict.violations == []
    assert verdict.counts["lost"] == 0
    assert verdict.counts["ended: succeeded"] == 7
    assert verdict.counts["ended: failed: job_id_conflict"] == 1


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: spoil.name)
def test_each_doctored_history_is_found(spoil: Spoil) -> None:
    """Every way to spoil a history is found wherever it is done, under the rule that it breaks."""
    places = [at for at, record in enumerate(ALL_KINDS) if spoil.fits(record, ALL_KINDS)]
    assert places
    for at in places:
        spoilt = ended(spoil.apply(ALL_KINDS[at], ALL_KINDS, at))
        assert spoil.rule in rules(spoilt), (spoil.name, ALL_KINDS[at])


def test_a_violation_names_the_job() -> None:
    """The verdict says which job broke which rule, and leaves the others alone."""
    parts = [succeeded("fine"), cancelled("forgotten"), failed("bad")]
    records = [record for record in history(parts) if getattr(record, "name", "") != "cancelled"]
    assert [(each.rule, each.job) for each in check(ended(records), LOGS).violations if each.rule == "lost"] == [
        ("lost", "forgotten")
    ]


@pytest.mark.parametrize(
    "line", ["Traceback (most recent call last):", "[]", '{"event": "no fields"}', GOOD_LINE[:-1], "\x1e" + GOOD_LINE]
)
def test_a_log_line_that_does_not_parse_is_found(line: str) -> None:
    """Raw text, other JSON, a missing field, half a line and a stray separator each break `bad_log_line`."""
    assert rules(ALL_KINDS, [*LOGS, ("worker.log:2", line)]) == {"bad_log_line"}


def test_missing_evidence_is_not_taken_for_innocence() -> None:
    """Without an end, a beginning, anything published, or logs, there is no verdict `correct`."""
    assert rules(ALL_KINDS[:-1]) == {"incomplete"}
    assert "incomplete" in rules(ALL_KINDS[1:])
    assert "incomplete" in rules(ended([Run()]))
    assert "incomplete" in rules(ALL_KINDS, [])
    assert "incomplete" in rules([])
    assert "incomplete" in rules([*ALL_KINDS[:-3], ALL_KINDS[-1]])


def test_every_rule_is_broken_by_some_test() -> None:
    """No rule is there for show."""
    assert set(RULES) == {spoil.rule for spoil in SPOILS} | {"bad_log_line", "incomplete"}


@given(HISTORIES)
@settings(max_examples=200, deadline=None)
def test_every_correct_history_passes(records: list) -> None:  # type: ignore[type-arg]
    """Any mixture of jobs, interleaved in any way, passes; and its records survive being written and read."""
    assert check(records, LOGS).violations == []
    assert [decode_record(encode_record(record, at=1.5)) for record in records] == [(1.5, each) for each in records]


@given(HISTORIES, st.sampled_from(SPOILS), st.data())
@settings(max_examples=400, deadline=None)
def test_any_single_fault_in_any_history_is_found(records: list, spoil: Spoil, data: st.DataObject) -> None:  # type: ignore[type-arg]
    """One fault at one place of one history is enough, whatever else went well around it."""
    places = [at for at, record in enumerate(records) if spoil.fits(record, records)]
    assume(places)
    at = data.draw(st.sampled_from(places))
    assert spoil.rule in rules(ended(spoil.apply(records[at], records, at)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A recorded correct run."""
    recorder = Recorder(tmp_path, Run())
    for record in ALL_KINDS[1:-1]:
        recorder.add(record)
    recorder.close()
    (tmp_path / "logs" / "worker.log").write_text(GOOD_LINE + "\n")
    return tmp_path


def test_the_command_says_correct_and_0(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m tests.checker DIR` exits 0 for a correct run and counts what it consisted of."""
    assert main([str(folder)]) == 0
    said = capsys.readouterr().out
    assert said.endswith("correct\n")
    assert "lost" in said


def test_the_command_names_job_and_rule_and_exits_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line taken out of the file is found, with the job's id and the rule, and the status is 1."""
    lines = (folder / HISTORY).read_text().splitlines()
    lines = [line for line in lines if '"ManifestFound","job_id":"job-0"' not in line]
    lines[-1] = encode_record(End(records=len(lines) - 1), at=0)
    (folder / HISTORY).write_text("\n".join(lines) + "\n")
    assert main([str(folder)]) == 1
    assert "job-0: event_without_manifest" in capsys.readouterr().out


def test_a_log_on_disk_is_read_to_its_last_byte(folder: Path) -> None:
    """A half line without its newline at the end of a log is a line too, and so is one that is not UTF-8."""
    with (folder / "logs" / "worker.log").open("ab") as log:
        log.write(b'{"timestamp": "\xff')
    assert [each.rule for each in check_folder(folder).violations] == ["bad_log_line"]


@pytest.mark.parametrize("text", ["{", "[]", '{"at": 1, "kind": "Nothing"}', '{"at": 1, "kind": "Acked", "more": 1}'])
def test_what_is_no_history_is_no_verdict(folder: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that does not parse, and a folder without one, end with status 2 and never with `correct`."""
    (folder / HISTORY).write_text(text + "\n")
    with pytest.raises(HistoryError):
        read_history(folder)
    assert main([str(folder)]) == 2
    assert main([str(folder / "nowhere")]) == 2
    assert main([]) == 2
    assert "correct" not in capsys.readouterr().out
