"""How long ago something was, and how large it is, in few characters."""


def age_text(seconds: float) -> str:
    """`8 s`, `4 min`, `2.5 h`, `3 d`."""
    if seconds < 90:
        return f"{max(0.0, seconds):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    if seconds < 172_800:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86_400:.0f} d"


def size_text(count: float) -> str:
    """`1.5 GiB`, `240 MiB`."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
