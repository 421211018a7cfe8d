#!/bin/sh
# Packs FlashAttention 3 into .flash3/carry.tar.xz, for benchmarks/gpu/run.sh on a machine that has .whl/carry.tar.xz
# unpacked already: both at once are more than such a machine takes with one command.
#
#   benchmarks/gpu/carry_flash3.sh            run it in the checkout (minutes: 355 MB are packed into 55)
set -eu

cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m pip download -q --no-deps -d "$work" xformers==0.0.34 nvidia-cuda-runtime-cu12==12.9.79
packed=opt/reeld-flash3
mkdir -p "$work/root/$packed"
cp benchmarks/gpu/flash3/flash_attn_interface.py "$work/root/$packed/"
unpack() { # WHEEL FILE NAME
    python3 -c 'import sys, zipfile; sys.stdout.buffer.write(zipfile.ZipFile(sys.argv[1]).read(sys.argv[2]))' \
        "$1" "$2" >"$work/root/$packed/$3"
}
unpack "$work"/xformers-*.whl xformers/flash_attn_3/_C.so flash3.so
unpack "$work"/nvidia_cuda_runtime_cu12-*.whl nvidia/cuda_runtime/lib/libcudart.so.12 libcudart.so.12
mkdir -p .flash3
tar -C "$work/root" -c . | xz -T0 -9 >.flash3/carry.tar.xz
ls -l .flash3/carry.tar.xz
