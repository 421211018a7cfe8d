#!/bin/sh
# The benchmarks on a bare machine with N GPUs that has Python 3.12, torch, CUDA and pytest, but no network: installs
# what benchmarks/gpu/carry.sh packed into .whl, then runs the stages named. Each stage can run alone and leaves its
# JSON and its log in OUT. As root: RabbitMQ and Erlang go where their packages have them. With what
# benchmarks/gpu/carry_flash3.sh packed beside it (.flash3), all stages from there on run with FlashAttention 3, plain
# DiffSynth too; the benchmark then has it without as well.
#
#   OUT=DIR benchmarks/gpu/run.sh smoke profile kernels 1.3b precision 14b 14b-720p i2v-14b i2v-14b-720p video-1 video \
#       memory memory-2 precision+memory sharding waits offload daemon unit loading recovery pinning
set -u

here=$PWD
if ! [ -e /opt/reeld-site ] || [ .whl/carry.tar.xz -nt /opt/reeld-site ]; then # not there yet, from an earlier command
    # Python's, because not every machine has xz.
    python3 -c 'import tarfile; tarfile.open(".whl/carry.tar.xz").extractall("/", filter="fully_trusted")' || exit 1
    touch /opt/reeld-site
fi
if [ -e .flash3/carry.tar.xz ] && ! [ /opt/reeld-flash3 -nt .flash3/carry.tar.xz ]; then
    python3 -c 'import tarfile; tarfile.open(".flash3/carry.tar.xz").extractall("/", filter="fully_trusted")' || exit 1
    touch /opt/reeld-flash3
fi
site=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\n' /opt/reeld-site /opt/reeld-flash3 "$here" >"$site/reeld-carried.pth"
scripts=$(dirname "$(python3 -c 'import sys; print(sys.executable)')")
printf '#!/bin/sh\nexec "%s/python3" -m ops.cli "$@"\n' "$scripts" >"$scripts/reeld"
chmod +x "$scripts/reeld"
export PATH="$PATH:/usr/lib/erlang/bin" IMAGEIO_FFMPEG_EXE=/usr/bin/ffmpeg-carried PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4
python3 -m benchmarks.gpu.older_torch
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
    stage "$name" "$limit" python3 -m torch.distributed.run --standalone --nproc-per-node "$nproc" \
        -m parallel.bench --output "$OUT/$name.json" --tables "$OUT/$name.tables" "$@"
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
    tail -1 "$OUT/$video.log" | cut -c1-600
}

kernels() { # attention alone, at the 1.3B's and the 14B's heads
    for each in 1.3b 14b; do
        mkdir -p "$OUT/kernels-$each"
        stage "kernels-$each" 60 python3 -m benchmarks.gpu.profile_step --kernels-only --profile "wan2.1-t2v-$each" \
            --output "$OUT/kernels-$each"
        cat "$OUT/kernels-$each.log"
    done
}

precision() { # against float32
    bench precision 240 --profile wan2.1-t2v-1.3b --shape 480x832x9 --steps 2 --rounds 1 --compile --float32-reference \
        --only diffsynth 'ours 1' ours-compiled
}

job_memory() { # RANKS ARGUMENTS...: of a whole job of the 14B at 720p
    ranks=$1; shift
    video "memory-$ranks" wan2.1-t2v-14b --ranks "$ranks" --shape 720x1280x81 --steps 2 --jobs 1 "$@"
}

memory_of_two() {
    job_memory 2 --memory fsdp --parallel "ulysses_degree = 2"
}

memory() { # on one card, on two, and on all where there are more
    job_memory 1
    memory_of_two
    [ "$nproc" -eq 2 ] || job_memory "$nproc" --memory fsdp
}

precision_and_memory() { # at once, on four cards: neither is about time
    (export CUDA_VISIBLE_DEVICES=0,1; nproc=2; precision) &
    precision=$!
    model wan2.1-t2v-14b
    (export CUDA_VISIBLE_DEVICES=2; job_memory 1) &
    wait "$precision"
    (export CUDA_VISIBLE_DEVICES=0,1; memory_of_two)
    wait
    job_memory "$nproc" --memory fsdp
}

sharding() { # how blocks are gathered, and what the allocator holds then
    stage sharding-blocks 60 python3 -m torch.distributed.run --standalone --nproc-per-node "$nproc" \
        -m tests.distributed.sharding_ranks "$OUT/sharding-blocks.json"
    cat "$OUT/sharding-blocks.json"
    bench sharding 120 --profile wan2.1-t2v-14b --shape 720x1280x81 --steps 1 --rounds 1 --compile --fsdp \
        --only 'ours-compiled fsdp'
    grep _gib "$OUT/sharding.json"
}

waits() { # of the denoising loop for its device
    export TEST_DEVICE=cuda
    tests waits 200 tests/gpu/test_waits.py
    tail -12 "$OUT/waits.log" | cut -c1-900
}

daemon() { # the rows of the fault table that ranks meet, and what only cards can show
    faults=tests/distributed/test_rank_faults.py
    export TEST_DEVICE=cuda
    tests daemon 400 \
        tests/gpu/test_cards.py "$faults::test_row_14_rank_0_killed[2]" "$faults::test_row_15_peer_killed[2]" \
        "$faults::test_row_17_out_of_memory_on_all[step-2]" "$faults::test_row_17_out_of_memory_on_one[2-1]" \
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
    # shellcheck disable=SC2046 # a list of words
    stage loading 200 python3 -m benchmarks.loading --profile wan2.1-t2v-1.3b --model /tmp/wan2.1-t2v-1.3b --runs 2 \
        --ranks 1 2 $([ "$nproc" -eq 2 ] || echo "$nproc") --out "$OUT"
    tail -7 "$OUT/loading.log"
}

recovery() { # after a peer is killed, with a real model
    model wan2.1-t2v-1.3b
    stage recovery 200 python3 -m benchmarks.recovery --runs 3 --ranks "$nproc" --only peer \
        --model /tmp/wan2.1-t2v-1.3b --out "$OUT/recovery"
    tail -20 "$OUT/recovery.log"
}

for each in "$@"; do
    case $each in
        smoke) bench smoke 90 --profile tiny-t2v --shape 128x192x33 --compile --fsdp ;;
        profile) stage profile 120 python3 -m benchmarks.gpu.profile_step --output "$OUT" ;;
        kernels) kernels ;;
        # Eager variants on one and two cards; more have too many splits for all of them.
        # shellcheck disable=SC2046 # a list of words
        1.3b) bench 1.3b 240 --profile wan2.1-t2v-1.3b --steps 2 --rounds 3 --compile --fsdp \
            $([ "$nproc" -le 2 ] || echo --only diffsynth ours-compiled) ;;
        14b) bench 14b 330 --profile wan2.1-t2v-14b --steps 1 --rounds 2 --compile --fsdp --every-card \
            --only diffsynth ours-compiled ;;
        14b-720p) bench 14b-720p 300 --profile wan2.1-t2v-14b --shape 720x1280x81 --steps 1 --rounds 1 --compile \
            --only 'ours-compiled 1' 'ours-compiled cfg2' "ours-compiled cfg1 ulysses$nproc" ;;
        i2v-14b) bench i2v-14b 240 --profile wan2.1-i2v-14b-480p --steps 1 --rounds 2 --compile \
            --only 'ours-compiled 1' 'ours-compiled cfg2' "ours-compiled cfg1 ulysses$nproc" ;;
        i2v-14b-720p) bench i2v-14b-720p 240 --profile wan2.1-i2v-14b-720p --shape 720x1280x81 --steps 1 --rounds 1 \
            --compile --only 'ours-compiled 1' 'ours-compiled cfg2' ;;
        precision) precision ;;
        video) video "video-$nproc" wan2.1-t2v-1.3b --ranks "$nproc" ;;
        video-1) video video-1 wan2.1-t2v-1.3b --ranks 1 ;;
        memory) memory ;;
        memory-2) memory_of_two ;;
        sharding) sharding ;;
        waits) waits ;;
        offload) tests offload 60 tests/unit/test_offload.py ;;
        precision+memory) precision_and_memory ;;
        daemon) daemon ;;
        unit) unit ;;
        loading) loading ;;
        recovery) recovery ;;
        pinning) stage pinning 150 python3 -m benchmarks.gpu.pinning --output "$OUT/pinning.json"; cat "$OUT/pinning.log" ;;
        *) echo "no stage $each"; exit 2 ;;
    esac
done
