#!/bin/sh
# The benchmark on a bare machine with N GPUs that has Python 3.12, torch and CUDA, but no network: installs from
# wheels carried in .whl (see docs/performance.md), then runs the stages named, each leaving a JSON file in OUT.
#
#   OUT=DIR ops/gpu_bench.sh smoke 1.3b 14b 14b-720p
set -u

python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/reeld-site .whl/*.whl || exit 1
export PYTHONPATH=/tmp/reeld-site:. PYTHONUNBUFFERED=1
nproc=$(python3 -c 'import torch; print(torch.cuda.device_count())')
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader >"$OUT/gpus.txt"

bench() { # NAME SECONDS ARGUMENTS...
    name=$1; limit=$2; shift 2
    timeout "$limit" python3 -m torch.distributed.run --nproc-per-node "$nproc" -m parallel.bench \
        --output "$OUT/$name.json" "$@" >"$OUT/$name.log" 2>&1
    echo "$name: exit status $?"
    grep '^{' "$OUT/$name.log" | cut -c1-330
    grep -E 'Error|error' "$OUT/$name.log" | grep -v '^{' | tail -5 | cut -c1-300
}

for stage in "$@"; do
    case $stage in
        smoke) bench smoke 80 --profile tiny-t2v --shape 128x192x33 --compile ;;
        1.3b) bench 1.3b 150 --profile wan2.1-t2v-1.3b --steps 4 --compile ;;
        14b) bench 14b 230 --profile wan2.1-t2v-14b --steps 2 --compile ;;
        14b-720p) bench 14b-720p 200 --profile wan2.1-t2v-14b --shape 720x1280x81 --steps 1 --compile \
            --only diffsynth ours-compiled ;;
    esac
done
