"""A benchmark's JSON as a table: python -m benchmarks.gpu.summary FILE."""

import json
import sys
from pathlib import Path

from ops.bench import markdown

if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())))
