# shellcheck shell=bash disable=SC2154 # The variables are those of lib.sh and rxe.sh.
# Containers with a card in which somebody is killed, or root wants more than its proxy gives. Sourced by tests.sh.

# The card is taken away in the midst of traffic, for which the kernel waits until nobody has it open.
removed() {
    local proxies
    two_up runc
    proxies=$(pgrep ringfence-proxy)
    traffic runc
    timeout 60 rdma link delete rxe3
    has_failed
    finished
    if runc exec c1 ibv_devinfo -d rxe3 >/tmp/said 2>&1; then cat /tmp/said; return 1; fi
    comes_back "$proxies"
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
    check "rxe: programs, proxies and containers that are killed" killed runc
    check "rxe: the card goes in the midst of traffic, and comes back" removed
    check "rxe: no way round the proxy for root" no_way_round ''
    check "rxe: no way round the proxy for root that has rdma_cm" no_way_round "rdma-cm = true"
}
# shellcheck source-path=SCRIPTDIR source=rxe.sh # tests.sh has it.
. "$here/tests/rxe.sh"
unset -f rxe_checks
