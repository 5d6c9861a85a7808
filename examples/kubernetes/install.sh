#!/bin/sh
# Puts Ringfence on the node whose root is mounted at HOST, and registers it with the node's containerd; or takes it away.
#
#   ringfence-install install|uninstall
#
# HOST     the node's root, /host
# IMAGE    where the package is installed, the root of this container
# PREFIX   where the programs go on the node, /opt/ringfence: writable on nodes whose /usr is not
# CONFIG   the administrator's configuration, /config/config.toml; without it the node keeps its own, or all defaults hold
# ENGINE   the node's engine, containerd
# RESTART  what restarts it, run in this container; on k3s
#          "nsenter --target 1 --mount --uts --ipc --net --pid -- systemctl restart k3s" (or k3s-agent)
#
# The proxy for cards is put there if the image has it. It runs with the node's own libibverbs and its providers (rdma-core), which
# nodes with a card have, and with the node's libc, which is to be no older than the one that the package was built with.
#
# Uninstalling takes the node's /etc/ringfence away, too.
#
# The engine is restarted only if its configuration changed. Containers that run are not disturbed by that.
set -eu

host=${HOST:-/host}
image=${IMAGE:-}
prefix=${PREFIX:-/opt/ringfence}
config=${CONFIG:-/config/config.toml}
engine=${ENGINE:-containerd}
cards=ringfence-proxy-ibverbs
restart=${RESTART:-nsenter --target 1 --mount --uts --ipc --net --pid -- systemctl restart $engine}

say() { echo "ringfence-install: $*"; }
fail() { say "$*" >&2; exit 1; }

# By rename: what runs keeps the file that it has, and nobody sees half a file.
put() {
    mkdir -p "$host$(dirname "$3")"
    cp "$2" "$host$3.new"
    chmod "$1" "$host$3.new"
    mv "$host$3.new" "$host$3"
}

# As the node sees itself; our programs are static and need nothing of it.
on_host() { chroot "$host" "$prefix/bin/ringfence" "$@"; }

engine_configuration() {
    for directory in /etc/containerd /etc/crio /etc/docker /var/lib/rancher /usr/share/containers/oci/hooks.d /etc/containers/oci/hooks.d; do
        if [ -d "$host$directory" ]; then
            find "$host$directory" -xdev \( -name '*.toml' -o -name '*.tmpl' -o -name '*.conf' -o -name '*.json' \) -size -1024k \
                -exec cksum {} +
        fi
    done | sort
}

# Runs a command and restarts the engine if that changed its configuration.
reconfigure() {
    before=$(engine_configuration)
    "$@"
    if [ "$before" = "$(engine_configuration)" ]; then
        say "$engine is already as it should be"
    else
        say "$restart"
        $restart || fail "$engine was configured but not restarted; on the node run: systemctl restart $engine"
    fi
}

install() {
    if [ -f "$config" ]; then
        "$image/usr/bin/ringfence" config validate "$config" >/dev/null || fail "the configuration is not valid; nothing is installed"
    fi
    for name in ringfence ringfence-hook ringfence-runtime containerd-shim-ringfence-v2; do
        put 755 "$image/usr/bin/$name" "$prefix/bin/$name"
    done
    put 755 "$image/usr/libexec/ringfence/ringfence-proxy" "$prefix/libexec/ringfence-proxy"
    if [ -f "$image/usr/libexec/ringfence/$cards" ]; then
        put 755 "$image/usr/libexec/ringfence/$cards" "$prefix/libexec/$cards"
    else
        # One of another version than the hook's is of no use.
        rm -f "$host$prefix/libexec/$cards"
    fi
    put 644 "$image/usr/lib/ringfence/libibverbs.so.1" "$prefix/lib/libibverbs.so.1"
    mkdir -p "$host$prefix/libexec/bin"
    for name in runc crun; do
        ln -sfn "$prefix/bin/ringfence-runtime" "$host$prefix/libexec/bin/$name"
    done
    if [ -f "$config" ]; then
        put 644 "$config" /etc/ringfence/config.toml
    fi
    reconfigure on_host configure --engine "$engine" --root /
    say "installed $(on_host version)"
    # What it is that a card lacks, if anything, is for whoever looks at the pod's log.
    if grep -q '^kind *= *"ibverbs"' "$host/etc/ringfence/config.toml" "$host"/etc/ringfence/conf.d/*.toml 2>/dev/null; then
        on_host info || true
    fi
}

# The containers, by their bundles, whose shim calls our runtime to stop and delete them: without it they stay for ever.
users() {
    for state in /run/containerd /run/k3s/containerd; do
        grep -lsF "$prefix/" "$host$state"/io.containerd.runtime.v2.task/*/*/runtime || true
    done
}

uninstall() {
    if [ ! -x "$host$prefix/bin/ringfence" ]; then
        say "there is nothing to take away"
        return
    fi
    # First the engine: what it names must be there.
    reconfigure on_host unconfigure --engine "$engine" --root /
    users=$(users | wc -l)
    [ "$users" -eq 0 ] || fail "$users containers of runtime class ringfence still need their runtime to end; delete their pods"
    rm -rf "${host:?}$prefix" "$host/etc/ringfence" "$host/etc/cdi/ringfence.json"
    say "uninstalled"
}

[ -d "$host/proc" ] || fail "$host is not the root of a node; mount it there"
case ${1-} in
install | uninstall) "$1" ;;
*) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
