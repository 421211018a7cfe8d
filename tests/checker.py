"""The checker: was a run correct? `python -m tests.checker DIR` says yes, or which job broke which rule.

Owns the rules of docs/reliability.md. It reads a recorded history (`tests.history`) and the logs beside it, and
imports nothing of the product: what the daemons say of themselves counts only where it is compared with what was seen
from outside. Exit status 0: correct; 1: rules were broken; 2: there is no whole history to judge.

A *request* is one body under one `message_id`; it may be published in several *copies*. Every request must end, and no
more often than it was published: after a failure or a cancel a further copy is a new chance, after a success it is
answered with the same result.
"""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tests.history import (
    Acked,
    CancelAsked,
    DeadLetter,
    Delivered,
    End,
    Fault,
    HandedBack,
    Heard,
    HistoryError,
    Left,
    ManifestFound,
    Published,
    Record,
    Run,
    VideoSeen,
    read_history,
    read_logs,
)
from tests.verdict import RULES, Verdict, Violation, judge_log_lines
from tests.wire_order import Wire

_T = TypeVar("_T", bound=Record)

TERMINAL = ("succeeded", "failed", "cancelled")


@dataclass(slots=True)
class _Request:
    job_id: str | None
    body: str
    message_id: str | None
    digest: str | None = None
    copies: int = 0
    confirmed: bool = False
    codes: set[str] = field(default_factory=set)
    acked: bool = False

    @property
    def shown(self) -> str:
        return self.job_id or f"(no id, body {self.body[:12]})"


def check(records: Iterable[Record], logs: Iterable[tuple[str, str]] = ()) -> Verdict:
    """Judges a run by its records, in the order in which they were seen, and its log lines (place, text)."""
    return _Case(list(records), list(logs)).verdict()


class _Case:
    """One run under judgement."""

    def __init__(self, records: list[Record], logs: list[tuple[str, str]]) -> None:
        self._records, self._logs = records, logs
        self._found: list[Violation] = []
        run = records[0] if records else None
        self._run = run if isinstance(run, Run) else Run()
        self._requests: dict[tuple[str, str | None], _Request] = {}
        self._by_job: dict[str, list[_Request]] = defaultdict(list)
        for each in self._all(Published):
            key = (each.body, each.message_id)
            if key not in self._requests:
                self._requests[key] = _Request(each.job_id, each.body, each.message_id, each.digest)
                if each.job_id is not None:
                    self._by_job[each.job_id].append(self._requests[key])
            request = self._requests[key]
            request.copies += 1
            request.confirmed |= each.confirmed
        self._manifests = {each.job_id: each for each in self._all(ManifestFound)}
        self._cancels = {each.job_id for each in self._all(CancelAsked)}
        self._terminal: dict[str, list[Heard]] = defaultdict(list)
        for heard in self._all(Heard):
            if heard.name in TERMINAL:
                self._terminal[heard.job_id].append(heard)
        for letter in self._all(DeadLetter):
            lettered = self._requests.get((letter.body, letter.message_id))
            if lettered is not None and letter.code:
                lettered.codes.add(letter.code)

    def verdict(self) -> Verdict:
        self._check_evidence()
        self._check_wire()
        self._check_letters()
        for request in self._requests.values():
            self._check_request(request)
        for job_id in sorted({*self._terminal, *self._manifests}):
            self._check_job(job_id)
        self._check_videos()
        self._found += judge_log_lines(self._logs)
        for left in self._all(Left):
            waiting = self._requests.get((left.body, left.message_id))
            self._broken("left_in_queue", waiting.shown if waiting else f"(body {left.body[:12]})", left.queue)
        return Verdict(sorted(set(self._found), key=str), self._counts())

    def _all(self, kind: type[_T]) -> Iterator[_T]:
        return (each for each in self._records if isinstance(each, kind))

    def _broken(self, rule: str, job: str, text: str) -> None:
        assert rule in RULES
        self._found.append(Violation(rule, job, text))

    # The rules

    def _check_evidence(self) -> None:
        end = self._records[-1] if self._records else None
        if not self._records or not isinstance(self._records[0], Run):
            self._broken("incomplete", "(run)", "the history does not begin with a Run")
        if not isinstance(end, End) or end.records != len(self._records) - 1:
            self._broken("incomplete", "(run)", "the history does not end with a fitting End")
        if not self._requests:
            self._broken("incomplete", "(run)", "nothing was published")
        if self._run.logs and not self._logs:
            self._broken("incomplete", "(run)", "there are no log lines")

    def _check_wire(self) -> None:
        """Walks through the frames in their order: at each ack, what was durable by then?"""
        wire = Wire(self._run)
        for number, record in enumerate(self._records):
            if isinstance(record, Delivered) and record.queue == self._run.jobs_queue:
                if (record.body, record.message_id) not in self._requests:
                    self._broken("unknown_job", f"(body {record.body[:12]})", "delivered, but never published")
            elif isinstance(record, Acked):
                since, delivery = wire.delivery_of(record)
                request = self._requests.get((delivery.body, delivery.message_id)) if delivery else None
                if request is not None:
                    request.acked = True
                    self._check_ack(record, request, wire, since)
            wire.see(number, record)

    def _check_ack(self, ack: Acked, request: "_Request", wire: Wire, since: int) -> None:
        job_id, found = request.job_id, self._manifests.get(request.job_id or "")
        letter = wire.dead_lettered(request.body, request.message_id, since=since)
        own_manifest = ack.manifest is not None and (found is None or found.digest == request.digest)
        if not (
            (own_manifest and wire.told(job_id, "succeeded"))
            or (letter and (job_id is None or wire.told(job_id, "failed")))
            or wire.retried(request.body, request.message_id, since=since)
            or wire.told(job_id, "cancelled")
        ):
            told = [name for name in TERMINAL if wire.told(job_id, name)]
            durable = [*(["manifest"] if own_manifest else []), *(["dead letter"] if letter else []), *told]
            self._broken("ack_before_outcome", request.shown, f"durable by then: {durable}")
        if ack.manifest is not None and (found is None or found.sha256 != ack.manifest):
            self._broken("manifest_rewritten", request.shown, "not the manifest that is there now")

    def _check_request(self, request: _Request) -> None:
        endings = self._endings(request)
        if request.confirmed and not endings:
            self._broken("lost", request.shown, f"published {request.copies} times, body {request.body[:12]}")
        if len(endings) > request.copies:
            self._broken("two_endings", request.shown, f"{sorted(endings)} from {request.copies} published")
        if self._run.wire and endings and not request.acked:
            self._broken("never_acked", request.shown, f"ended as {sorted(endings)}")

    def _endings(self, request: _Request) -> set[str]:
        endings = {f"failed: {code}" for code in request.codes}
        if request.job_id is None:
            return endings
        manifest = self._manifests.get(request.job_id)
        if manifest is not None and manifest.digest == request.digest:
            endings.add("succeeded")
        cancelled = any(heard.name == "cancelled" for heard in self._terminal[request.job_id])
        # A cancelled event names the job, not the request: where a job id had several, it is one without other end.
        if cancelled and (not endings or len(self._by_job[request.job_id]) == 1):
            endings.add("cancelled")
        return endings

    def _check_job(self, job_id: str) -> None:
        requests = self._by_job.get(job_id, [])
        terminal = self._terminal.get(job_id, [])
        manifest = self._manifests.get(job_id)
        if not requests:
            if job_id not in self._cancels or manifest is not None:
                self._broken("unknown_job", job_id, f"{[heard.name for heard in terminal]}, but never published")
            return
        if manifest is not None and manifest.digest not in {request.digest for request in requests}:
            self._broken("wrong_request", job_id, f"digest {manifest.digest[:12]}")
        by_event_id: dict[Any, list[Heard]] = defaultdict(list)
        for heard in terminal:
            by_event_id[heard.event.get("id")].append(heard)
        for event_id, repeats in by_event_id.items():
            if len({_essence(heard) for heard in repeats}) > 1:
                self._broken("repeat_differs", job_id, f"event {event_id}")
        endings = sum(len(self._endings(request)) for request in requests)
        if len(by_event_id) > endings:
            self._broken("two_terminal_events", job_id, f"{sorted(map(str, by_event_id))} for {endings} endings")
        names = {heard.name for heard in terminal}
        if "succeeded" in names and manifest is None:
            self._broken("event_without_manifest", job_id, "succeeded")
        if manifest is not None and "succeeded" not in names:
            self._broken("manifest_without_event", job_id, f"heard only {sorted(names)}")
        for heard in terminal:
            if heard.name == "succeeded" and manifest is not None and heard.data.get("result") != manifest.result:
                self._broken("event_differs_from_manifest", job_id, f"event {heard.event.get('id')}")
        letters = {code for request in requests for code in request.codes}
        for heard in terminal:
            if heard.name == "failed" and heard.data.get("code") not in letters:
                self._broken("event_without_dead_letter", job_id, f"code {heard.data.get('code')}")
        if "cancelled" in names and job_id not in self._cancels:
            self._broken("cancelled_unasked", job_id, "cancelled")

    def _check_letters(self) -> None:
        for letter in self._all(DeadLetter):
            request = self._requests.get((letter.body, letter.message_id))
            if request is None:
                self._broken("unknown_job", f"(body {letter.body[:12]})", "dead-lettered, but never published")
                continue
            if not letter.code:
                self._broken("dead_letter_without_code", request.shown, f"body {letter.body[:12]}")
            told = [heard for heard in self._terminal.get(request.job_id or "", []) if heard.name == "failed"]
            if request.job_id is not None and letter.code not in [heard.data.get("code") for heard in told]:
                self._broken("dead_letter_without_event", request.shown, f"code {letter.code}")

    def _check_videos(self) -> None:
        contents: dict[str, set[str]] = defaultdict(set)
        last: dict[str, str | None] = {}
        for seen in self._all(VideoSeen):
            last[seen.path] = seen.sha256
            if seen.sha256 is not None:
                contents[seen.path].add(seen.sha256)
        owners = {each.result["video"]["path"]: each for each in self._manifests.values()}
        for path, found in contents.items():
            if len(found) > 1:
                owner = owners.get(path)
                self._broken("video_rewritten", owner.job_id if owner else path, f"{len(found)} contents of {path}")
        for path, manifest in owners.items():
            claimed = manifest.result["video"]["sha256"]
            if last.get(path) != claimed:
                self._broken("video_missing", manifest.job_id, f"{path}: {last.get(path)} in place of {claimed}")

    def _counts(self) -> dict[str, int]:
        outcomes = Counter(ending for request in self._requests.values() for ending in self._endings(request))
        job_deliveries = [each for each in self._all(Delivered) if each.queue == self._run.jobs_queue]
        repeats = sum(len(each) - len({heard.event.get("id") for heard in each}) for each in self._terminal.values())
        return {
            "jobs": len({request.job_id or request.body for request in self._requests.values()}),
            "requests": len(self._requests),
            "published": sum(request.copies for request in self._requests.values()),
            "deliveries": len(job_deliveries),
            "redeliveries": sum(each.redelivered for each in job_deliveries),
            "acks": sum(1 for _ in self._all(Acked)),
            "handed back": sum(1 for _ in self._all(HandedBack)),
            "terminal events repeated": repeats,
            "faults": sum(1 for _ in self._all(Fault)),
            "log lines": len(self._logs),
            **{f"ended: {ending}": count for ending, count in sorted(outcomes.items())},
            "lost": sum(violation.rule == "lost" for violation in self._found),
        }


def _essence(heard: Heard) -> str:
    """What must be equal when a terminal event is said again: all but who says it, when, and at which attempt."""
    data = {key: value for key, value in heard.data.items() if key not in ("attempt", "worker_id")}
    return json.dumps([heard.name, data], sort_keys=True)


def check_folder(folder: Path) -> Verdict:
    """Judges the run that left this folder. Raises HistoryError."""
    return check([record for _, record in read_history(folder)], read_logs(folder))


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m tests.checker DIR", file=sys.stderr)
        return 2
    try:
        verdict = check_folder(Path(arguments[0]))
    except HistoryError as error:
        print(error, file=sys.stderr)
        return 2
    for name, count in verdict.counts.items():
        print(f"{count:8}  {name}")
    for violation in verdict.violations:
        print(violation)
    print("correct" if verdict.correct else f"NOT correct: {len(verdict.violations)} broken rules")
    return 0 if verdict.correct else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
