# shellcheck shell=bash disable=SC2154 # The variables are those of lib.sh and rxe.sh.
# Containers with a card in which somebody is killed, or root wants more than its proxy gives. Sourced by tests.sh.

# The client's proxy has a queue pair of the card.
is_busy() { [ "$(rdma resource show qp link rxe3/1 | grep -c 'type RC')" -ge "$1" ]; }

# Long traffic between c1, which serves, and c2.
traffic() {
    local index
    index=$(index runc exec c1)
    timeout 40 runc exec c1 ib_write_bw -d rxe3 -x "$index" -F -s 4096 -n 5000000 >/tmp/server 2>&1 &
    server=$!
    eventually sh -c 'ss -ltnH | grep -q ":18515 "'
    timeout 40 runc exec c2 ib_write_bw -d rxe3 -x "$index" -F -s 4096 -n 5000000 127.0.0.1 >/tmp/client 2>&1 &
    client=$!
    eventually is_busy 2
}

finished() {
    kill "$server" "$client" 2>/dev/null || true
    wait "$server" || true
    wait "$client" || true
}

killed() {
    local id
    card_configuration ''
    for id in c1 c2; do
        with_card $id
        up "runc --systemd-cgroup" $id
    done
    # Programs: the containers go on.
    traffic
    pkill -KILL -x ib_write_bw
    finished
    eventually sh -c '! rdma resource show qp link rxe3/1 | grep "type RC"'
    both_ways "runc exec c1" "runc exec c2"
    # A proxy: its container's verbs fail, and the other's go on.
    traffic
    kill -KILL "$(proxy c2)"
    if wait "$client"; then echo "verbs did not fail"; return 1; fi
    finished
    eventually sh -c '! rdma resource show qp link rxe3/1 | grep "type RC"'
    runc exec c1 ibv_devinfo -d rxe3 | grep PORT_ACTIVE
    runc state c2 | jq -e '.status == "running"'
    down runc c2
    # A container's first process.
    kill -KILL "$(runc state c1 | jq .pid)"
    eventually runc delete c1
    nothing_in_kernel
    rm /etc/ringfence/conf.d/test.toml
}

# A program in c1 finds the card and cannot open it: what libibverbs says depends on where it looked last.
reaches_nothing() {
    if runc exec c1 "$@" >/tmp/said 2>&1; then cat /tmp/said; return 1; fi
    cat /tmp/said
    grep "^rxe3: " /tmp/said
}

# Root in the container, with all that capabilities give, makes the card's nodes itself, where libibverbs looks for them, and shows
# it the host's /sys; with a libibverbs of its own. $1: further lines of the [[device]], by which it may have another node.
no_way_round() {
    local node name numbers make='' reach=$here/../../target/vm-reach-static
    card_configuration "$1"
    if [ -n "$1" ]; then
        modprobe rdma_ucm
        eventually test -c /dev/infiniband/rdma_cm
    fi
    with_card c1 test.slice:rf:c1 '.process.capabilities |= map_values(. + ["CAP_MKNOD", "CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE", "CAP_NET_ADMIN"])'
    up "runc --systemd-cgroup" c1
    for node in /dev/infiniband/*; do
        # There are directories of udev's.
        [ -c "$node" ] || continue
        name=${node##*/}
        # The host's can be opened: what fails below fails for another reason.
        (: <>"$node")
        numbers=$(stat -c '%Hr %Lr' "$node")
        # shellcheck disable=SC2086 # Two numbers.
        runc exec c1 busybox mknod "/tmp/$name" c $numbers
        if [ -n "$1" ] && [ "$name" = rdma_cm ]; then
            runc exec c1 sh -c ": <>/tmp/$name"
        else
            if runc exec c1 sh -c ": <>/tmp/$name" 2>/tmp/said; then echo "$name was opened"; return 1; fi
            grep "Operation not permitted" /tmp/said
        fi
        rm "$rootfs/tmp/$name"
        make+="busybox mknod /dev/infiniband/$name c $numbers && "
    done
    "$reach" | grep "^rxe3: used"
    cp "$reach" "$rootfs/tmp/reach"
    reaches_nothing /tmp/reach
    reaches_nothing sh -c "mount -t tmpfs none /dev/infiniband && ${make}exec /tmp/reach"
    # The same with the host's /sys, which cannot be mounted upon itself.
    reaches_nothing sh -c "mount -t tmpfs none /dev/infiniband && ${make}mkdir /tmp/sys && mount -t sysfs none /tmp/sys &&
        SYSFS_PATH=/tmp/sys exec /tmp/reach"
    rm -r "$rootfs/tmp/reach" "$rootfs/tmp/sys"
    down runc c1
    nothing_in_kernel
    rm /etc/ringfence/conf.d/test.toml
}

rxe_checks() {
    check "rxe: programs, proxies and containers that are killed" killed
    check "rxe: no way round the proxy for root" no_way_round ''
    check "rxe: no way round the proxy for root that has rdma_cm" no_way_round "rdma-cm = true"
}
# shellcheck source-path=SCRIPTDIR source=rxe.sh # tests.sh has it.
. "$here/tests/rxe.sh"
unset -f rxe_checks
