"""One line a variant from a benchmark's JSON, for a terminal: python -m benchmarks.gpu.summary FILE."""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    report = json.loads(Path(sys.argv[1]).read_text())
    print(report["device"], report["torch"], report["matmul_tflops"])
    for row in report["results"]:
        if "failed" in row:
            print(f"{row['variant']:36} {row['failed'][:200]}")
            continue
        card = (row.get("card") or [{}])[-1]
        print(
            f"{row['variant']:36} {row.get('seconds_per_step', 0):8.3f} {row.get('repeats')} warm "
            f"{row.get('warm_up_seconds')} TF {row.get('tflops_per_card')} GiB {row.get('peak_memory_gib')} "
            f"err {row.get('relative_error', 0):.4f} {card.get('sm_mhz')} MHz {card.get('watts')} W"
        )
