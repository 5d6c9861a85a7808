#!/usr/bin/env bash
# Installs, uses, upgrades, removes and purges the package, in a Debian of its own with runc and podman.
#
#   hook/package/test-deb.sh PACKAGE.deb [SUITE]
#
# The package for hosts with a card, ringfence-ibverbs, is the one that lies beside it. Works as root; SUITE is bookworm if not given. Each check is one line, "ok" or "FAILED"; the status is not zero if any failed.
# Needs mmdebstrap; the Debian is kept in target/test-deb/ for the next time.
set -euo pipefail
deb=$(realpath "${1:?usage: $(sed -n 's/^#   //p' "$0")}")
suite=${2:-bookworm}
cd "$(dirname "$0")/../.."
[ "$(id -u)" -eq 0 ] || { echo "SKIPPED: ${0##*/} needs root" >&2; exit 1; }

cache=target/test-deb
work=$(mktemp -d /var/tmp/ringfence-deb.XXXXXX)
root=$work/root
holder=
# Those of containers, which may be the host's own.
cgroups() { find /sys/fs/cgroup -depth -type d \( -path '*/libpod_parent*' -o -name ringfence-two \); }
cgroups_before=$(cgroups)
cleanup() {
    set +e
    if [ -n "$holder" ]; then
        inside sh -c 'runc delete -f one; runc delete -f two; podman rm -af -t 0' >/dev/null 2>&1
        kill "$holder"; wait "$holder" 2>/dev/null
    fi
    # Empty once the containers are gone, and one of them ends after the package, whose hook would have removed them.
    cgroups | grep -vxF -f <(echo "$cgroups_before") | xargs -r rmdir 2>/dev/null
    rm -rf "$work"
}
trap cleanup EXIT

mkdir -p "$cache" "$root"
if [ ! -f "$cache/$suite.tar" ]; then
    echo "==> mmdebstrap $suite"
    mmdebstrap --quiet --variant=minbase --include=runc,podman,busybox-static,init-system-helpers "$suite" "$work/new.tar"
    mv "$work/new.tar" "$cache/$suite.tar"
fi
tar -C "$root" -xf "$cache/$suite.tar" --exclude='./dev/*'
cp "$deb" "$root/old.deb"
cards=${deb/ringfence_/ringfence-ibverbs_}
cp "$cards" "$root/cards.deb"
# The same, as a later version.
dpkg-deb -R "$deb" "$work/new"
sed -i 's/^Version: .*/&+upgraded/' "$work/new/DEBIAN/control"
dpkg-deb --root-owner-group -Z none -b "$work/new" "$root/new.deb" >/dev/null

# Mounts and root of its own, so that nothing of the host's is seen or changed but processes and cgroups.
mkfifo "$work/ready"
# shellcheck disable=SC2016 # The inner shell is to expand these.
unshare --mount --uts --propagation private sh -ec '
    root=$1
    mount --bind "$root" "$root"
    mount --rbind /dev "$root/dev"
    mount --rbind /sys "$root/sys"
    mount -t proc proc "$root/proc"
    mount -t tmpfs tmpfs "$root/run"
    cd "$root"
    pivot_root . mnt
    cd /
    umount -l /mnt
    echo >/proc/self/fd/3
    exec sleep infinity' sh "$root" 3<>"$work/ready" &
holder=$!
read -r -t 20 <>"$work/ready" || { echo "${0##*/}: cannot set up a root of its own in $root" >&2; exit 1; }

inside() { nsenter --target "$holder" --mount --uts --root --wd env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 "$@"; }

# shellcheck source-path=SCRIPTDIR source=../../integration/checks.sh
. integration/checks.sh
# What a command prints contains a text.
says() {
    local text=$1
    shift
    "$@" >"$work/said" 2>&1 || true
    grep -F -- "$text" "$work/said" || { cat "$work/said"; return 1; }
}
# A command succeeds and prints nothing.
is_silent() {
    if "$@" >"$work/said" 2>&1 && [ ! -s "$work/said" ]; then return; fi
    cat "$work/said"
    return 1
}

# shellcheck disable=SC2016
inside sh -ec '
    mkdir -p /bundles/one/rootfs/bin /bundles/one/rootfs/etc /etc/containers
    cp /bin/busybox /bundles/one/rootfs/bin/
    for applet in sh echo sleep ls; do ln -s busybox /bundles/one/rootfs/bin/$applet; done
    printf "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\npids_limit = 0\n[engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\nruntime = \"runc\"\n" >/etc/containers/containers.conf
    cd /bundles/one && runc spec && tar -C rootfs -cf /image.tar .'
spec='import json, sys
config = json.load(open(sys.argv[1]))
config["process"].update(terminal=False, args=["/bin/sleep", "1000"])
config["annotations"] = {"ringfence.dev/enable": "true"}
config["hooks"] = {stage: [{"path": "/usr/bin/ringfence-hook", "args": ["ringfence-hook", stage],
    "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "timeout": 30}] for stage in ("createRuntime", "poststop")}
json.dump(config, open(sys.argv[1], "w"))'
python3 -c "$spec" "$root/bundles/one/config.json" || { echo "${0##*/}: needs python3" >&2; exit 1; }
cp -a "$root/bundles/one" "$root/bundles/two"

# The pid of a container's proxy, as it is on record.
proxy() { sed -n 's/.*"proxy":{"pid":\([0-9]*\).*/\1/p' "/proc/$holder/root/run/ringfence/state/$1.json"; }
start() { inside runc run -d --bundle "/bundles/$1" "$1" </dev/null >/dev/null 2>&1; }
is_running() { inside runc state "$1" | grep -q '"status": "running"'; }
has_proxy() { readlink "/proc/$(proxy "$1")/exe" | grep ringfence-proxy; }
podman_runs() { says hello inside podman run --rm --network=none "$@" localhost/tiny echo hello; }

echo "==> install"
check "the package installs" inside dpkg -i /old.deb
check "the command runs" says "ringfence" inside ringfence version
check "the configuration is valid" inside ringfence config validate
check "the timer is enabled" inside test -L /etc/systemd/system/timers.target.wants/ringfence-gc.timer
check "no engine is configured without being asked" inside sh -c '! ls /etc/cdi /usr/share/containers/oci/hooks.d/*ringfence* 2>/dev/null'
check "a container is joined" start one
check "it has a proxy" has_proxy one
check "it is listed" says soft0 inside ringfence list
check "it has the socket" says verbs.sock inside runc exec one /bin/ls /dev/ringfence
check "it has the library" says libibverbs.so.1 inside runc exec one /bin/ls /etc/ld.so.ringfence

echo "==> upgrade with a container running"
before=$(proxy one)
echo '# changed by the administrator' >>"$root/etc/ringfence/config.toml"
check "the package upgrades" inside dpkg -i --force-confold /new.deb
check "the configuration is kept" grep -q 'changed by the administrator' "$root/etc/ringfence/config.toml"
check "the container still runs" is_running one
check "its proxy is the same" test "$before" = "$(proxy one)"
check "and runs" has_proxy one
check "a second container is joined" start two
check "the second has a proxy" has_proxy two
check "the first ends" inside runc delete -f one
sleep 0.2
check "nothing of the first is left" not inside sh -c 'find /run/ringfence -name "*one*" | grep . || ls /bundles/one/rootfs/etc | grep ld.so'

echo "==> a host with a card"
check "the package brings no libibverbs" sh -c "! dpkg-deb --field '$deb' Depends Recommends Suggests | grep -i verbs"
check "nor the proxy that needs it" inside test ! -e /usr/libexec/ringfence/ringfence-proxy-ibverbs
check "that of cards does" says libibverbs1 dpkg-deb --field "$cards" Depends
check "and is of the same version only" says "ringfence (= " dpkg-deb --field "$cards" Depends
printf '[[device]]\nname = "mlx5_9"\nkind = "ibverbs"\n' >"$work/card.toml"
mkdir -p "$root/etc/ringfence/conf.d"
cp "$work/card.toml" "$root/etc/ringfence/conf.d/card.toml"
check "without it the package is named" says "apt-get install ringfence-ibverbs" inside ringfence doctor
check "it cannot be installed without libibverbs" not inside dpkg -i /cards.deb
# The Debian has no libibverbs, and the package is of another version than the one that runs.
inside dpkg -i --force-depends /cards.deb >/dev/null 2>&1 || true
check "its program starts" says ringfence-proxy-ibverbs inside /usr/libexec/ringfence/ringfence-proxy-ibverbs --version
check "and says which library it lacks" says "libibverbs1 and ibverbs-providers" \
    inside /usr/libexec/ringfence/ringfence-proxy-ibverbs --describe mlx5_9 1
check "ringfence doctor says so, too" says "libibverbs1 and ibverbs-providers" inside ringfence doctor
check "it goes" inside dpkg -P ringfence-ibverbs
check "and leaves nothing" inside test ! -e /usr/libexec/ringfence/ringfence-proxy-ibverbs
rm "$root/etc/ringfence/conf.d/card.toml"

echo "==> engines"
inside podman import /image.tar localhost/tiny >/dev/null 2>&1
check "podman runs without us" podman_runs
if inside ringfence configure --engine podman >"$work/output" 2>&1; then
    check "podman gives RDMA" says verbs.sock inside podman run --rm --network=none --annotation ringfence.dev/enable=true \
        localhost/tiny ls /dev/ringfence
else
    skipped=$((skipped + 1))
    echo "SKIPPED: podman gives RDMA: $(cat "$work/output")"
fi
check "CDI devices are made" inside ringfence cdi generate
check "the devices are listed" says current inside ringfence cdi list
check "podman gives RDMA by a device" says verbs.sock \
    inside podman run --rm --network=none --device ringfence.dev/rdma=default localhost/tiny ls /dev/ringfence

check "what is refused is listed" says E12 inside sh -c 'podman run --rm --network=none --device ringfence.dev/rdma=default \
    --annotation ringfence.dev/bandwidth=x localhost/tiny echo; ringfence list --failures'
check "there is nothing to collect" is_silent inside ringfence gc

echo "==> remove"
check "podman runs a container by our runtime" inside podman run -d --name three --network=none --runtime /usr/bin/ringfence-runtime \
    localhost/tiny sleep 1000
check "the package is not removed from under it" says "ringfence-runtime" not inside dpkg -r ringfence
check "the engine can still end it" inside podman rm -f -t 0 three
check "the package is removed" inside dpkg -r ringfence
check "the container still runs" is_running two
check "its proxy, too" has_proxy two
check "no hook is registered any more" inside sh -c '! ls /etc/cdi/ringfence.json /usr/share/containers/oci/hooks.d/*ringfence* 2>/dev/null'
check "podman still runs containers" podman_runs
check "the configuration is kept" inside test -f /etc/ringfence/config.toml
# Its hook is gone, so poststop is said to have failed.
inside runc delete -f two >/dev/null 2>&1 || true
# What a purge removes is what no proxy uses any more.
check "proxy and warden end with the container" timeout 30 sh -c 'while pgrep -f "^ringfence-proxy --launch /run/ringfence/containers/[t]wo/"; do sleep 0.1; done'

echo "==> purge"
check "the package is purged" inside dpkg -P ringfence
check "nothing is left" inside sh -c '! find /etc/ringfence /run/ringfence /usr/lib/ringfence /usr/libexec/ringfence /usr/share/doc/ringfence \
    /etc/systemd/system/timers.target.wants/ringfence* /var/lib/systemd/deb-systemd-helper*/*ringfence* 2>/dev/null | grep .'
check "it installs again" inside dpkg -i /old.deb
check "and goes again" inside dpkg -P ringfence

summary
