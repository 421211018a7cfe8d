"""What a copy of a message keeps of it: its publisher's headers, and the reasons for which it was requeued.

Owns which headers are the publisher's own. Leaves out what reeld adds (`daemon.reporter`) and publishing.
"""

from typing import Any

# On a job that somebody requeued from the dead letters: a list of what it had failed of, the latest last.
REQUEUED_HEADER = "x-reeld-requeued-from"
_HEADER_BYTES = 32_768
_LATIN_CHARACTERS = 127  # of two bytes each in UTF-8; a short string holds 255


def own_headers(headers: dict[str, Any]) -> dict[str, Any]:
    """The publisher's headers for a copy of its message."""
    # A copy that carries x-death may be dropped by the broker's cycle detection; x-delivery-count is the broker's; with
    # CC or BCC the broker would send the copy to other queues as well (sender-selected distribution).
    kept = {
        key: value
        for key, value in headers.items()
        if key == REQUEUED_HEADER
        or (
            key not in ("x-death", "x-delivery-count", "x-acquired-count", "CC", "BCC")
            and not key.startswith(("x-first-death", "x-last-death", "x-reeld-"))
        )
    }
    if len(repr(kept).encode("utf-8", "replace")) > _HEADER_BYTES:
        # Properties must fit into one frame together with ours: a copy that cannot be published is requeued for ever.
        return {"x-reeld-headers-dropped": True}
    return kept


def short_text(value: str | bytes | None) -> str | None:
    """A short string. pika gives bytes for what is no UTF-8: shown as Latin-1, and short enough to be sent again."""
    return value.decode("latin-1")[:_LATIN_CHARACTERS] if isinstance(value, bytes) else value
