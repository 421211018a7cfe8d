#!/bin/sh
# Makes this checkout runnable on Debian 12 or Ubuntu: the few distribution packages that reeld needs, a
# virtual environment in .venv with exactly the packages of requirements.lock (by hash), and reeld itself,
# editable. Run it again at any time: it does nothing when all is there, and says so by silence.
#
#   ops/install.sh [--no-broker] [--tests]
#       --no-broker: leave out RabbitMQ (the demo on a broker you already have)
#       --tests: also what the tests boot a systemd with
#
# PYTHON names the interpreter to build .venv with; by default the newest of python3, python3.14 … python3.11
# that is 3.11 or newer. Needs root or sudo only while a distribution package is missing.
set -eu

cd "$(dirname "$0")/.."
here=$(pwd -P)

RABBITMQ=/usr/lib/rabbitmq/bin/rabbitmq-server
STAMP=.venv/.reeld-installed
NEEDED_GIB=8

with_broker=yes
with_tests=no
for option in "$@"; do
    case "$option" in
        --no-broker) with_broker=no ;;
        --tests) with_tests=yes ;;
        *) echo "usage: ops/install.sh [--no-broker] [--tests]" >&2; exit 64 ;;
    esac
done

say() { echo "install: $*" >&2; }
fail() { say "$*"; exit 1; }

# --- the distribution's packages ---------------------------------------------------------------------------

find_python() {
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
}

python=$(find_python)
missing=
if [ -z "$python" ]; then
    [ -z "${PYTHON:-}" ] || fail "PYTHON=$PYTHON is not a Python 3.11 or newer"
    ! command -v python3 >/dev/null \
        || fail "needs Python 3.11 or newer, found only $(python3 -V 2>&1): install one, or set PYTHON to it"
    missing="python3 python3-venv"
elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    missing=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
fi
if [ "$with_broker" = yes ]; then
    [ -x "$RABBITMQ" ] || missing="$missing rabbitmq-server"
    command -v amqp-publish >/dev/null || missing="$missing amqp-tools"
fi
if [ "$with_tests" = yes ]; then
    command -v systemd-nspawn >/dev/null || missing="$missing systemd-container"
    command -v mmdebstrap >/dev/null || missing="$missing mmdebstrap"
fi
missing=${missing# }

if [ -n "$missing" ]; then
    command -v apt-get >/dev/null || fail "no apt-get here: install these by your own means: $missing"
    sudo=
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || fail "neither root nor sudo; as root, run: apt-get install $missing"
        sudo=sudo
    fi
    say "installing with apt-get: $missing"
    # Installing rabbitmq-server would start a broker on this machine's own ports, now and at every boot. Nobody
    # asked for that: reeld starts a private one when it needs it. invoke-rc.d obeys policy-rc.d, so one that
    # forbids everything stands in for the machine's (if it has one) as long as apt-get runs.
    # shellcheck disable=SC2086 # both are lists of words
    $sudo env DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=l sh -eu -s -- $missing <<'AS_ROOT' \
        || fail "apt-get could not install: $missing (its own words are above)"
policy=/usr/sbin/policy-rc.d
saved=
restore() {
    rm -f "$policy"
    [ -z "$saved" ] || mv "$saved" "$policy"
}
case " $* " in *" rabbitmq-server "*)
    if [ -e "$policy" ] || [ -L "$policy" ]; then
        saved=$policy.before-reeld
        mv "$policy" "$saved"
    fi
    trap restore EXIT
    trap 'exit 1' HUP INT TERM
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
esac
apt-get -qq update || echo "install: apt-get update failed; trying with the package lists at hand" >&2
apt-get -qq -o=Dpkg::Use-Pty=0 install --no-install-recommends -y "$@" </dev/null >/dev/null
case " $* " in *" rabbitmq-server "*)
    ! command -v systemctl >/dev/null || systemctl --quiet disable rabbitmq-server.service >/dev/null 2>&1 || true
esac
AS_ROOT
    python=$(find_python)
    [ -n "$python" ] || fail "needs Python 3.11 or newer, and this system's packages have only $(python3 -V 2>&1)"
fi

# --- the virtual environment -------------------------------------------------------------------------------

wanted=$(cat requirements.lock pyproject.toml | sha256sum)
wanted="${wanted%% *} $here" # an editable install and the scripts of .venv hold this path
if [ "$(cat "$STAMP" 2>/dev/null)" = "$wanted" ] && .venv/bin/python -c '' 2>/dev/null; then
    exit 0
fi

if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
    || [ "$(.venv/bin/python -c 'import sys; print(sys.prefix)')" != "$here/.venv" ] \
    || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    free_gib=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1048576))
    [ "$free_gib" -ge "$NEEDED_GIB" ] || fail "needs $NEEDED_GIB GiB of free disk here, there are $free_gib"
    say "making .venv with $python"
    rm -rf .venv
    "$python" -m venv .venv || fail "$python could not make .venv (its own words are above)"
fi
rm -f "$STAMP"

# uv installs a lock of this size several times faster than pip. Its own version and hashes are in the lock too.
uv_lock=$(mktemp)
trap 'rm -f "$uv_lock"' EXIT
awk '/^uv==/ { mine = 1 } mine { print } mine && !/\\$/ { exit }' requirements.lock >"$uv_lock"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r "$uv_lock" \
    || fail "pip could not install uv (its own words are above)"

export UV_PYTHON_DOWNLOADS=never
say "installing the packages of requirements.lock (about 6 GB on disk; a minute or a few)"
.venv/bin/uv pip sync --quiet --python .venv/bin/python --require-hashes requirements.lock \
    || fail "uv could not install requirements.lock (its own words are above)"
.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable . \
    || fail "uv could not install reeld itself (its own words are above)"

echo "$wanted" >"$STAMP"
say "done"
