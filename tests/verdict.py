"""The words of a verdict: the rules, one by one, and what breaks the rule about log lines.

Owns the vocabulary. Leaves out how a history is judged (`tests.checker`).
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

LOG_FIELDS = {
    "timestamp", "level", "event", "logger", "service", "version", "host", "pid", "rank", "local_rank", "world_size",
}  # fmt: skip
RULES = {
    "lost": "a confirmed job has no manifest, no dead letter and no cancelled event",
    "two_endings": "a request ended in more ways than copies of it were published",
    "two_terminal_events": "a job has more different terminal events than endings",
    "repeat_differs": "a terminal event came again under the same id with another content",
    "event_without_manifest": "a succeeded event, and no manifest",
    "manifest_without_event": "a manifest, and nobody was told",
    "event_differs_from_manifest": "a succeeded event that does not say what the manifest says",
    "wrong_request": "a manifest under a job id for a request that was never made under it",
    "event_without_dead_letter": "a failed event, and no dead letter with its code",
    "dead_letter_without_event": "a dead letter, and nobody was told",
    "dead_letter_without_code": "a dead letter that does not say why",
    "cancelled_unasked": "a cancelled event for a job that nobody cancelled",
    "ack_before_outcome": "a delivery was acked before its outcome was durable",
    "never_acked": "a job ended and none of its deliveries was seen acked",
    "video_missing": "the video that a manifest names is not there, or is another one",
    "video_rewritten": "a video file held different contents at different times",
    "manifest_rewritten": "a manifest was another one when its job was acked",
    "left_in_queue": "a message is left in a queue",
    "unknown_job": "something was said or done about a job that nobody published",
    "bad_log_line": "a log line is no JSON object with the fields that every line has",
    "incomplete": "the history breaks off, or a kind of evidence is missing altogether",
}


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule. `job` is the job's id, or what stands for it where it has none."""

    rule: str
    job: str
    text: str

    def __str__(self) -> str:
        return f"{self.job}: {self.rule}: {self.text}"


@dataclass(frozen=True, slots=True)
class Verdict:
    violations: list[Violation]
    counts: dict[str, int]  # what the run consisted of, for reports

    @property
    def correct(self) -> bool:
        return not self.violations


def judge_log_lines(lines: Iterable[tuple[str, str]]) -> Iterator[Violation]:
    """What is wrong with log lines, given as (place, text)."""
    for place, line in lines:
        try:
            parsed = json.loads(line)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict) or not parsed.keys() >= LOG_FIELDS:
            yield Violation("bad_log_line", "(logs)", f"{place}: {line[:160]}")
