"""`reeld dlq`: a pool's dead letters, listed, shown, requeued or dropped.

Owns which letters are meant, asking first, and how letters look. Leaves out reading and moving them
(`daemon.dead_letters`).
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from daemon.dead_letters import DeadLetter, DeadLetterQueue, rfc3339
from daemon.errors import ErrorCode, ReeldError
from daemon.sections import BrokerConfig
from ops.ages import age_text
from ops.failure import CommandFailedError, UsageError

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_SHOWN_WHEN_ASKING = 10
_CODES = (*ErrorCode, "unknown")
_PIPED_COLUMNS = 250


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """Which letters are meant: those that match every filter given. Raises UsageError for a code that there is not."""

    codes: tuple[str, ...] = ()
    job_ids: tuple[str, ...] = ()
    older_than_seconds: float | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        for code in self.codes:
            if code not in _CODES:
                raise UsageError(f"--code {code}: there is {', '.join(_CODES)}")

    @property
    def given(self) -> bool:
        return bool(self.codes or self.job_ids or self.older_than_seconds is not None or self.limit is not None)

    def match(self, letter: DeadLetter) -> bool:
        """A letter of unknown age is not older than anything."""
        if self.codes and letter.code not in self.codes:
            return False
        if self.job_ids and letter.job_id not in self.job_ids:
            return False
        if self.older_than_seconds is None:
            return True
        return letter.died_at is not None and time.time() - letter.died_at > self.older_than_seconds


def seconds_of(text: str | None) -> float | None:
    """`90s`, `15m`, `2h` or `7d` in seconds. Raises UsageError."""
    if text is None:
        return None
    if (found := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)) is None:
        raise UsageError(f"--older-than {text}: give a number and s, m, h or d, like 90s, 2h or 7d")
    return float(found[1]) * _UNITS[found[2]]


def list_letters(broker: BrokerConfig, pool: str, filters: Filters, *, as_json: bool) -> None:
    """Prints the letters that match; all of them stay where they are."""
    found = _look(broker, pool, filters)
    if as_json:
        print(json.dumps([_summary(letter) for letter in found], indent=2, ensure_ascii=False))
        return
    if not found:
        print("no dead letter matches" if filters.codes or filters.job_ids else f"pool {pool} has no dead letters")
        return
    Console(width=None if sys.stdout.isatty() else _PIPED_COLUMNS).print(_table(found))


def show_letters(broker: BrokerConfig, pool: str, filters: Filters, *, as_json: bool) -> None:
    """Prints the letters that match in full. Raises CommandFailedError when none does."""
    found = _look(broker, pool, filters)
    if not found:
        raise CommandFailedError(f"pool {pool}: no dead letter matches")
    if as_json:
        print(json.dumps([_whole(letter) for letter in found], indent=2, ensure_ascii=False))
        return
    for letter in found:
        for name, value in _whole(letter).items():
            if value not in (None, "", [], {}):
                text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
                print(f"{name:<15} " + text.replace("\n", "\n" + " " * 16))
        print()


def requeue(broker: BrokerConfig, pool: str, filters: Filters, *, yes: bool) -> None:
    """Sends the jobs that match back to their pool. Raises CommandFailedError when none matches, or nobody agrees."""
    _act(broker, pool, filters, yes=yes, words=("requeue", "requeued"), act=DeadLetterQueue.requeue)


def drop(broker: BrokerConfig, pool: str, filters: Filters, *, yes: bool) -> None:
    """Drops the letters that match, for good. Raises CommandFailedError when none matches, or nobody agrees."""
    _act(broker, pool, filters, yes=yes, words=("drop", "dropped"), act=DeadLetterQueue.drop)


def _act(
    broker: BrokerConfig,
    pool: str,
    filters: Filters,
    *,
    yes: bool,
    words: tuple[str, str],
    act: Callable[[DeadLetterQueue, DeadLetter], None],
) -> None:
    verb, past = words
    agreed: set[str] | None = None
    if not yes:
        # They are put back before the question: a connection that waits for a person is closed by its broker.
        agreed = _ask(_look(broker, pool, filters), verb, pool)
    done = 0
    try:
        with DeadLetterQueue(broker, pool) as queue:
            for letter in _matching(queue, filters):
                if agreed is None or letter.key in agreed:
                    act(queue, letter)
                    done += 1
                    print(f"{past} {letter.job_id or '(no job id)'}: {letter.code}", flush=True)
    except ReeldError:
        print(f"reeld: {done} {past}; the others are still among the dead letters", file=sys.stderr)
        raise
    if not done:
        raise CommandFailedError(f"pool {pool}: no dead letter matches")
    print(f"{done} {past}")


def _ask(found: list[DeadLetter], verb: str, pool: str) -> set[str]:
    """What may be done, by the letters' keys. Raises UsageError without a terminal, CommandFailedError on a no."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError(f"there is no terminal to ask on: add --yes to {verb} without being asked")
    if not found:
        raise CommandFailedError(f"pool {pool}: no dead letter matches")
    console = Console()
    console.print(_table(found[:_SHOWN_WHEN_ASKING]))
    if (more := len(found) - _SHOWN_WHEN_ASKING) > 0:
        console.print(f"and {more} more")
    if input(f"{verb} {len(found)} of pool {pool}? [y/N] ").strip().lower() not in ("y", "yes"):
        raise CommandFailedError("nothing was done")
    return {letter.key for letter in found}


def _look(broker: BrokerConfig, pool: str, filters: Filters) -> list[DeadLetter]:
    with DeadLetterQueue(broker, pool) as queue:
        return list(_matching(queue, filters))


def _matching(queue: DeadLetterQueue, filters: Filters) -> Iterator[DeadLetter]:
    left = filters.limit
    for letter in queue:
        if filters.match(letter):
            yield letter
            if left is not None and (left := left - 1) <= 0:
                return


def _table(letters: list[DeadLetter]) -> Table:
    # Nothing is cut short: an id is there to be given to --job-id.
    table = Table(*(Column(name, overflow="fold") for name in ("job", "code", "age", "worker", "reason")))
    for letter in letters:
        age = "?" if letter.died_at is None else age_text(time.time() - letter.died_at)
        where = f"{letter.path}: " if letter.path and not letter.message.startswith(letter.path) else ""
        again = f" (requeued {len(letter.requeued_from)}x before)" if letter.requeued_from else ""
        cells = (letter.job_id or "-", letter.code, age, letter.worker_id or "-", f"{where}{letter.message}{again}")
        table.add_row(*(escape(cell) for cell in cells))
    return table


def _summary(letter: DeadLetter) -> dict[str, Any]:
    return {
        "job_id": letter.job_id,
        "code": letter.code,
        "message": letter.message,
        "path": letter.path,
        "worker_id": letter.worker_id,
        "died_at": None if letter.died_at is None else rfc3339(letter.died_at),
        "requeued_from": letter.requeued_from,
    }


def _whole(letter: DeadLetter) -> dict[str, Any]:
    try:
        body = json.loads(letter.body)
    except ValueError:
        body = letter.body.decode("utf-8", "backslashreplace")
    return {
        **_summary(letter),
        "message_id": letter.message_id,
        "correlation_id": letter.correlation_id,
        "reply_to": letter.reply_to,
        "priority": letter.priority,
        "content_type": letter.content_type,
        "headers": json.loads(json.dumps(letter.headers, default=str)),
        "body": body,
    }
