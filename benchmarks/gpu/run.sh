#!/bin/sh
# The benchmarks on a bare machine with N GPUs that has Python 3.12, torch and CUDA, but no network: installs from
# wheels carried in .whl (docs/performance.md says which), then runs the stages named. Each stage can run alone and
# leaves its JSON and its log in OUT.
#
#   OUT=DIR benchmarks/gpu/run.sh smoke profile 1.3b 14b 14b-720p
set -u

here=$PWD
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target /tmp/reeld-site .whl/*.whl || exit 1
export PYTHONPATH=/tmp/reeld-site:$here PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4
nproc=$(python3 -c 'import torch; print(torch.cuda.device_count())')
nvidia-smi --query-gpu=name,driver_version,power.limit --format=csv,noheader >"$OUT/gpus.txt"

stage() { # NAME SECONDS COMMAND...
    name=$1; limit=$2; shift 2
    begun=$(date +%s)
    timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
    echo "$name: exit status $?, $(($(date +%s) - begun)) s"
    grep -E 'Error|error' "$OUT/$name.log" | grep -v '^{' | tail -5 | cut -c1-300
}

bench() { # NAME SECONDS ARGUMENTS...
    name=$1; limit=$2; shift 2
    stage "$name" "$limit" python3 -m torch.distributed.run --nproc-per-node "$nproc" -m parallel.bench \
        --output "$OUT/$name.json" --tables "$OUT/$name.tables" "$@"
    python3 -m benchmarks.gpu.summary "$OUT/$name.json"
}

for each in "$@"; do
    case $each in
        smoke) bench smoke 90 --profile tiny-t2v --shape 128x192x33 --compile --fsdp ;;
        profile) stage profile 120 python3 -m benchmarks.gpu.profile_step --output "$OUT" ;;
        1.3b) bench 1.3b 180 --profile wan2.1-t2v-1.3b --steps 2 --rounds 3 --compile --fsdp ;;
        14b) bench 14b 330 --profile wan2.1-t2v-14b --steps 1 --rounds 2 --compile --fsdp --only diffsynth \
            'ours-compiled 1' 'ours-compiled cfg' 'ours-compiled fsdp cfg2' 'ours-compiled fsdp cfg1 ulysses2' ;;
        14b-720p) bench 14b-720p 240 --profile wan2.1-t2v-14b --shape 720x1280x81 --steps 1 --rounds 1 --compile \
            --only 'diffsynth' 'ours-compiled 1' 'ours-compiled cfg2' 'ours-compiled cfg1 ulysses2' ;;
        *) echo "no stage $each"; exit 2 ;;
    esac
done
