# shellcheck shell=bash disable=SC2154 # The variables are those of lib.sh.
# containerd as a service, with containers whose shims outlive it. Sourced by tests.sh.

ctr_run() { ctr run --detach --net-host --annotation ringfence.dev/enable=true "$@"; }

in_task() { local id=$1; shift; ctr task exec --exec-id "exec-$RANDOM" "$id" "$@"; }

gone() {
    ctr task kill --signal KILL "$1" || true
    eventually ctr task delete "$1"
    ctr container delete "$1"
}

ctr_shim() {
    ctr_run --runtime io.containerd.ringfence.v2 "$image" c1
    no_warnings c1
    same "$(cgroup "$(proxy c1)")" "$cgroups/default/ringfence-c1" "the proxy's cgroup"
    in_task c1 ibv_devinfo
    gone c1
    test ! -e "$cgroups/default/ringfence-c1"
}

# The shim takes no --systemd-cgroup; its runtime sees the cgroup's form.
ctr_slice() {
    ctr_run --runtime io.containerd.ringfence.v2 --cgroup test.slice:ctr:c1 "$image" c1
    no_warnings c1
    same "$(cgroup "$(proxy c1)")" "$cgroups/test.slice/ringfence-c1.scope" "the proxy's cgroup"
    in_task c1 ibv_devinfo
    gone c1
}

# BinaryName's runtime is told by the shim.
ctr_binary() {
    ctr_run --runc-binary /usr/bin/ringfence-runtime --runc-systemd-cgroup --cgroup test.slice:ctr:c1 "$image" c1
    no_warnings c1
    same "$(cgroup "$(proxy c1)")" "$cgroups/test.slice/ringfence-c1.scope" "the proxy's cgroup"
    in_task c1 ibv_devinfo
    gone c1
}

ctr_restart() {
    local id
    for id in c1 c2; do ctr_run --runtime io.containerd.ringfence.v2 "$image" $id; done
    systemctl restart containerd.service
    for id in c1 c2; do in_task $id ibv_devinfo; done
    exchange "in_task c1" "in_task c2"
    gone c1
    in_task c2 ibv_devinfo
    gone c2
}

# containerd alone is killed, and later its shims with it: then it ends their containers when it is back.
ctr_killed() {
    ctr_run --runtime io.containerd.ringfence.v2 "$image" c1
    systemctl kill --kill-whom main --signal KILL containerd.service
    eventually in_task c1 ibv_devinfo
    systemctl kill --signal KILL containerd.service
    eventually ctr version
    eventually sh -c '! pgrep ringfence-proxy'
    eventually ctr container delete c1
    ringfence gc
}

start_containerd
ctr images import /var/lib/ringfence-verbs.tar >/dev/null
check "containerd: ctr with the shim" ctr_shim
check "containerd: ctr with the shim, in a slice" ctr_slice
check "containerd: ctr with ringfence-runtime, in a slice" ctr_binary
check "containerd: restarted by systemd" ctr_restart
check "containerd: killed by systemd" ctr_killed
systemctl stop containerd.service
