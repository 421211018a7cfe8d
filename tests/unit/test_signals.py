"""The signals of `daemon.signals`, beside what a GPU's compiler does to them. Needs no GPU: Triton compiles anyway."""

import subprocess
import sys
from pathlib import Path

_SCRIPT = """
import faulthandler, os, signal, sys
from daemon.signals import DRAIN_SIGNAL, STACKS_SIGNAL

heard = []
for number in (DRAIN_SIGNAL, signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: heard.append(number))
stacks = open(sys.argv[1], "w")
faulthandler.register(STACKS_SIGNAL, stacks)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def double(x, n, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(x + place, tl.load(x + place, mask=place < n) * 2, mask=place < n)

source = ASTSource(fn=double, signature={"x": "*fp32", "n": "i32", "BLOCK": "constexpr"}, constexprs={"BLOCK": 64})
assert "ptx" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
for number in (signal.SIGUSR1, DRAIN_SIGNAL, STACKS_SIGNAL, signal.SIGTERM):
    os.kill(os.getpid(), number)
print([int(number) for number in heard])
print(int(DRAIN_SIGNAL), int(signal.SIGTERM))
"""


def test_signals_are_heard_after_a_kernel_was_compiled(tmp_path: Path) -> None:
    """LLVM, which compiles Triton's kernels, takes SIGUSR1 for itself; drain and stacks still arrive, and SIGTERM is
    handed on. (If SIGUSR1 arrives one day, the real-time signals are no longer needed.)"""
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path / "stacks.txt")],
        env={"PATH": "/usr/bin:/bin", "TRITON_CACHE_DIR": str(tmp_path / "triton"), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    heard, expected = done.stdout.splitlines()
    assert heard == f"[{expected.replace(' ', ', ')}]"
    assert "script.py" in (tmp_path / "stacks.txt").read_text()
