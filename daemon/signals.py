"""The signals that the processes of a daemon send each other.

Real-time signals, because Triton brings LLVM along, and LLVM puts handlers of its own on SIGUSR1, SIGUSR2, SIGTERM and
others when the first kernel is compiled (llvm/lib/Support/Unix/Signals.inc): one on SIGUSR1 swallows it, the others
hand the signal back to the handler that was there before. So a wish to drain by SIGUSR1 was never heard on a GPU.
"""

import signal

# From the launcher to rank 0: finish the job in hand and end. SIGTERM is torchrun's, for ranks that are left behind.
DRAIN_SIGNAL = signal.SIGRTMIN
# To any rank, and to the launcher: write the stacks of all threads into a file.
STACKS_SIGNAL = signal.SIGRTMIN + 1
