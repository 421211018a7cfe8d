"""A rank as a program: `torchrun --nproc-per-node N -m daemon`. The configuration file is named by REELD_CONFIG."""

import os
import sys

from daemon.entry import main

if __name__ == "__main__":
    status = main()
    # Not sys.exit: interpreter shutdown would wait for threads that a broken process group holds.
    sys.stdout.flush()
    os._exit(status)
