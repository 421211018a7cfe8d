"""Has the kernel signal a process when the one that started it is gone, however it went (PR_SET_PDEATHSIG)."""

import ctypes
import os
import signal
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_prctl = ctypes.CDLL(None, use_errno=True).prctl  # bound here: nothing may be looked up after a fork


def signal_after_parent(number: signal.Signals) -> None:
    """Asks for `number` when this process's parent ends. The parent may have died before: compare `os.getppid()`."""
    _prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def child_gets(number: signal.Signals) -> Callable[[], None]:
    """For `preexec_fn`: the child gets `number` when this process ends, and does not start if it has ended already."""
    parent = os.getpid()

    def ask() -> None:
        signal_after_parent(number)
        if os.getppid() != parent:
            os._exit(1)

    return ask
