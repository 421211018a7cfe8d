#!/bin/sh
# The benchmarks on a bare machine with N GPUs that has Python 3.12, torch, CUDA and pytest, but no network: installs
# what benchmarks/gpu/carry.sh packed into .whl, then runs the stages named. Each stage can run alone and leaves its
# JSON and its log in OUT. As root: RabbitMQ and Erlang go where their packages have them.
#
#   OUT=DIR benchmarks/gpu/run.sh smoke profile 1.3b precision 14b 14b-720p video-1 video memory daemon unit \
#       loading
set -u

here=$PWD
# Python's, because not every machine has xz.
python3 -c 'import tarfile; tarfile.open(".whl/carry.tar.xz").extractall("/", filter="fully_trusted")' || exit 1
site=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\n' /opt/reeld-site "$here" >"$site/reeld-carried.pth"
scripts=$(dirname "$(python3 -c 'import sys; print(sys.executable)')")
printf '#!/bin/sh\nexec "%s/python3" -m ops.cli "$@"\n' "$scripts" >"$scripts/reeld"
chmod +x "$scripts/reeld"
export PATH="$PATH:/usr/lib/erlang/bin" IMAGEIO_FFMPEG_EXE=/usr/bin/ffmpeg-carried PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4
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

tests() { # NAME SECONDS TESTS...
    name=$1; limit=$2; shift 2
    stage "$name" "$limit" python3 -m pytest -q -o filterwarnings=default -o minversion=6 -p no:cacheprovider -s "$@"
}

model() { # PROFILE: a folder of random numbers with its encoder and VAE, 14.5 GB (1.3B) or 40 GB (14B)
    [ -e "/tmp/$1/google" ] || stage "model-$1" 180 python3 -m benchmarks.gpu.random_model "$1" "/tmp/$1"
}

video() { # NAME PROFILE ARGUMENTS...
    video=$1; profile=$2; shift 2
    model "$profile"
    stage "$video" 280 python3 -m benchmarks.gpu.video --profile "$profile" --model "/tmp/$profile" \
        --output "$OUT/$video.json" "$@"
    grep '^{' "$OUT/$video.log" | cut -c1-1500
    tail -3 "$OUT/$video.log" | cut -c1-600
}

memory() { # of a whole job of the 14B at 720p, on one card and on all
    tests offload 60 tests/unit/test_offload.py
    few="--shape 720x1280x81 --steps 2 --jobs 1"
    # shellcheck disable=SC2086 # a list of words
    video memory-1 wan2.1-t2v-14b --ranks 1 $few
    # shellcheck disable=SC2086
    video "memory-$nproc" wan2.1-t2v-14b --ranks "$nproc" --memory fsdp --parallel "ulysses_degree = $nproc" $few
}

daemon() { # the rows of the fault table that ranks meet, and what only cards can show
    faults=tests/distributed/test_rank_faults.py
    export TEST_DEVICE=cuda
    tests daemon 400 \
        tests/gpu/test_cards.py "$faults::test_row_14_rank_0_killed[2]" "$faults::test_row_15_peer_killed[2]" \
        "$faults::test_row_17_out_of_memory_on_all[2]" "$faults::test_row_17_out_of_memory_on_one[2-1]" \
        "$faults::test_row_18_hung_rank[2-1-hang]" \
        tests/distributed/test_path.py::test_row_27_cancel_of_a_running_and_of_a_queued_job
    tail -40 "$OUT/daemon.log" | cut -c1-400
}

unit() { # the shipped unit with its hardening, on a systemd of its own
    chmod -R go+rX . # the unit's user reads this checkout
    export TEST_DEVICE=cuda
    tests unit 280 tests/gpu/test_unit.py
    tail -60 "$OUT/unit.log" | cut -c1-600
}

loading() { # from a cold disk
    model wan2.1-t2v-1.3b
    stage loading 200 python3 -m benchmarks.loading --profile wan2.1-t2v-1.3b --model /tmp/wan2.1-t2v-1.3b --runs 2 \
        --out "$OUT"
    tail -5 "$OUT/loading.log"
}

for each in "$@"; do
    case $each in
        smoke) bench smoke 90 --profile tiny-t2v --shape 128x192x33 --compile --fsdp ;;
        profile) stage profile 120 python3 -m benchmarks.gpu.profile_step --output "$OUT" ;;
        1.3b) bench 1.3b 240 --profile wan2.1-t2v-1.3b --steps 2 --rounds 3 --compile --fsdp ;;
        14b) bench 14b 330 --profile wan2.1-t2v-14b --steps 1 --rounds 2 --compile --fsdp --only diffsynth \
            'ours-compiled 1' 'ours-compiled cfg' 'ours-compiled fsdp cfg2' 'ours-compiled fsdp cfg1 ulysses2' ;;
        14b-720p) bench 14b-720p 300 --profile wan2.1-t2v-14b --shape 720x1280x81 --steps 1 --rounds 1 --compile \
            --only 'diffsynth' 'ours-compiled 1' 'ours-compiled cfg2' 'ours-compiled cfg1 ulysses2' ;;
        precision) bench precision 240 --profile wan2.1-t2v-1.3b --shape 480x832x9 --steps 2 --rounds 1 --compile \
            --float32-reference ;;
        video) video "video-$nproc" wan2.1-t2v-1.3b --ranks "$nproc" ;;
        video-1) video video-1 wan2.1-t2v-1.3b --ranks 1 ;;
        memory) memory ;;
        daemon) daemon ;;
        unit) unit ;;
        loading) loading ;;
        *) echo "no stage $each"; exit 2 ;;
    esac
done
