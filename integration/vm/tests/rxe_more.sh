# shellcheck shell=bash disable=SC2154 # The variables are those of lib.sh and rxe.sh.
# What a container with a card sees, a runtime that is killed, a card that is given up, and ten starts. Sourced by tests.sh.

# What one container sees, and by which process.
shown() {
    local runtime=$1 proxy seen expected
    # What a subnet manager's programs would use is there.
    modprobe ib_umad
    eventually test -e /sys/class/infiniband_mad/umad0
    card_configuration ''
    with_card c1
    up "$runtime --systemd-cgroup" c1
    no_warnings c1
    proxy=$(proxy c1)
    same "$(basename "$(readlink "/proc/$proxy/exe")")" ringfence-proxy-ibverbs "the proxy's program"
    grep -q '^Max locked memory *unlimited' "/proc/$proxy/limits"
    grep -q '^CapPrm:\s*0*$' "/proc/$proxy/status"
    if grep -q '^Uid:\s*0\s' "/proc/$proxy/status"; then echo "the proxy is root"; return 1; fi
    $runtime exec c1 ibv_devinfo -d rxe3 | grep PORT_ACTIVE
    # Each program that is run in a container takes a second here.
    # shellcheck disable=SC2016 # The container's shell expands it.
    seen=$($runtime exec c1 sh -c 'cd /sys/class/infiniband
        echo devices: $(ls)
        echo verbs: $(ls ../infiniband_verbs) $(cat ../infiniband_verbs/uverbs0/ibdev)
        echo datagrams: $(ls ../infiniband_mad 2>/dev/null)
        echo nodes: $(ls /dev/infiniband)
        cd rxe3
        cat node_guid ports/1/state ports/1/rate ports/1/link_layer
        file=$(grep -l "$0" -r ports/1/gids)
        cat $file ports/1/gid_attrs/ndevs/${file##*/}
        # It opens nothing.
        (: <>/dev/infiniband/uverbs0) 2>/dev/null && echo opened || echo refused' "$gid")
    expected=$(printf '%s\n' "devices: rxe3" "verbs: abi_version uverbs0 rxe3" datagrams: "nodes: uverbs0"
        cd /sys/class/infiniband/rxe3 && cat node_guid ports/1/state ports/1/rate ports/1/link_layer
        printf '%s\n' "0000:0000:0000:0000:0000:$gid" rdma3 refused)
    same "$seen" "$expected" "what it sees"
    # As NCCL, hwloc and libibverbs itself look for a card's place, and each file beside what verbs say.
    cp "$here/../../target/vm-sysfs" "$rootfs/tmp/sysfs"
    $runtime exec c1 /tmp/sysfs rxe3
    rm "$rootfs/tmp/sysfs"
    down "$runtime" c1
    nothing_in_kernel
    rm /etc/ringfence/conf.d/test.toml
}

# The runtime is killed after our hook and before the container starts.
runtime_killed() {
    local runtime
    card_configuration ''
    with_card c3 test.slice:rf:c3 '.hooks.createRuntime += [{path: "/bin/sleep", args: ["sleep", "30"]}]'
    (cd /srv/c3 && exec runc --systemd-cgroup run --detach c3 </dev/null >/srv/c3/output 2>&1) &
    runtime=$!
    eventually pgrep --exact --full "sleep 30" || { cat /srv/c3/output; return 1; }
    kill -KILL $runtime
    wait $runtime || true
    pkill -KILL --exact --full "sleep 30" || true
    runc delete --force c3 || true
    eventually sh -c '! pgrep ringfence-proxy'
    ringfence gc
    nothing_in_kernel
    rm /etc/ringfence/conf.d/test.toml
}

# An operator has proxies let go of the card for what wants to have it for itself, such as an update of its driver.
drained() {
    local proxies
    two_up runc
    proxies=$(pgrep ringfence-proxy)
    both_ways "runc exec c1" "runc exec c2"
    ringfence drain rxe3
    # Nobody has it open, though both proxies live.
    nothing_in_kernel
    rdma link delete rxe3
    comes_back "$proxies"
}

rxe_checks() {
    check "rxe: what a container sees" shown runc
    check "rxe: a runtime that is killed" runtime_killed
    check "rxe: proxies that let go of the card, which goes and comes back" drained
    check "rxe: ten starts" starts 10
}
# shellcheck source-path=SCRIPTDIR source=rxe.sh # tests.sh has it.
. "$here/tests/rxe.sh"
unset -f rxe_checks
