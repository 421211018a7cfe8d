#!/bin/sh
# Unpacks the distribution's packages that only tests need into .tools: Prometheus (with promtool), rsyslog and
# syslog-ng, with the libraries that this machine lacks. Unpacked and not installed: the two loggers exclude each other
# and would replace the machine's own, nothing of them may start here, and no root is needed. Run it again at any time:
# it does nothing when all is there.
set -eu

cd "$(dirname "$0")/.."

WANTED="prometheus rsyslog syslog-ng-core"
STAMP=.tools/.unpacked

[ "$(cat "$STAMP" 2>/dev/null)" != "$WANTED" ] || exit 0
fail() { echo "test tools: $*" >&2; exit 1; }
command -v apt-get >/dev/null || fail "no apt-get here; the tests need these unpacked in .tools: $WANTED"

echo "test tools: unpacking $WANTED into .tools (100 MB)" >&2
packages=$WANTED
for package in $WANTED; do
    # What apt would install with it, but not the web pages of Prometheus.
    plan=$(apt-get -s install --no-install-recommends "$package") \
        || fail "apt-get knows no way to install $package; \`apt-get update\` may help (its own words are above)"
    packages="$packages $(echo "$plan" | awk '$1 == "Inst" && $2 !~ /^(libjs-|fonts-)/ { print $2 }')"
done
downloads=$(mktemp -d)
trap 'rm -rf "$downloads"' EXIT
# shellcheck disable=SC2046,SC2086 # a list of words
(cd "$downloads" && apt-get -qq -o APT::Sandbox::User=root download $(printf '%s\n' $packages | sort -u) >/dev/null) \
    || fail "apt-get could not download; \`apt-get update\` may help (its own words are above)"
rm -rf .tools
mkdir .tools
for package in "$downloads"/*.deb; do
    dpkg-deb --extract "$package" .tools
done
echo "$WANTED" >"$STAMP"
