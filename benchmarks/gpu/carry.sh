#!/bin/sh
# Packs what a bare GPU machine lacks into .whl/carry.tar.xz, for benchmarks/gpu/run.sh: the Python packages that such
# a machine with torch, transformers and pytest does not have, RabbitMQ with Erlang and systemd (from this machine's own
# packages: 58 and 12 MB, that need glibc 2.36), and an ffmpeg that is small enough (an old one: 22 MB).
#
#   benchmarks/gpu/carry.sh            run it in the checkout, after `make install`
set -eu

cd "$(dirname "$0")/../.."
packages="diffsynth xfuser yunchang modelscope modelscope-hub cryptography cffi pycparser diffusers ftfy wcwidth
    structlog tenacity pika pydantic pydantic-core pydantic-settings python-dotenv typing-inspection
    prometheus-client annotated-types setproctitle"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

wanted=$(for name in $packages; do sed -n "s/^\($name==[^ ]*\).*/\1/p" requirements.lock; done)
platforms="--platform manylinux_2_34_x86_64 --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64
    --platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform any"
# shellcheck disable=SC2086 # lists of words
.venv/bin/python -m pip --version >/dev/null 2>&1 && pip=".venv/bin/python -m pip" || pip="python3 -m pip"
# shellcheck disable=SC2086
$pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp $platforms \
    -d "$work/wheels" $wanted imageio-ffmpeg==0.3.0
mkdir -p "$work/root/opt/reeld-site" "$work/root/usr/lib" "$work/root/usr/bin"
for wheel in "$work"/wheels/*.whl; do
    python3 -m zipfile -e "$wheel" "$work/root/opt/reeld-site"
done
# The newest wrapper finds its ffmpeg by IMAGEIO_FFMPEG_EXE.
mv "$work"/root/opt/reeld-site/imageio_ffmpeg/binaries/ffmpeg-* "$work/root/usr/bin/ffmpeg-carried"
chmod +x "$work/root/usr/bin/ffmpeg-carried"
rm -r "$work"/root/opt/reeld-site/imageio_ffmpeg*
for each in .venv/lib/python3*/site-packages/imageio_ffmpeg*; do cp -r "$each" "$work/root/opt/reeld-site/"; done
rm -f "$work"/root/opt/reeld-site/imageio_ffmpeg/binaries/ffmpeg-*
rm -r "$work/root/opt/reeld-site/modelscope/models" # 22 MB; DiffSynth wants its downloads alone
cp -a /usr/lib/erlang /usr/lib/rabbitmq "$work/root/usr/lib/"
cp -a /usr/bin/erl "$work/root/usr/bin/"
# What a machine that has parts of systemd's libraries lacks. /lib and /bin are links into /usr.
dpkg -L systemd libsystemd-shared libkmod2 libapparmor1 libip4tc2 | grep -E '^(/usr)?/(lib|bin)/' | while read -r file; do
    if [ -f "$file" ] || [ -L "$file" ]; then
        mkdir -p "$work/root/usr/$(dirname "${file#/usr}")"
        cp -a "$file" "$work/root/usr/${file#/usr}"
    fi
done
mkdir -p .whl
tar -C "$work/root" -c . | xz -T0 -9 >.whl/carry.tar.xz
ls -l .whl/carry.tar.xz
