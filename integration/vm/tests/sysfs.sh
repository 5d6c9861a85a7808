# shellcheck shell=bash disable=SC2154 # The variables are those of lib.sh.
# What proxied containers see of a machine's own devices beside verbs: nothing. Sourced by tests.sh.

# With the options $@ for podman.
cards_are_hidden() {
    local holder
    # Where the kernel has the device itself.
    holder=$(dirname "$(readlink -f /sys/class/infiniband/rxe0)")
    test -e "$holder/rxe0"
    podman run --detach --name one --annotation ringfence.dev/enable=true "$@" "$image"
    same "$(podman exec one ls /sys/class/infiniband)" soft0 "devices"
    same "$(podman exec one ls /sys/class/infiniband_verbs)" $'abi_version\nuverbs0' "verbs"
    same "$(podman exec one cat /sys/class/infiniband_verbs/uverbs0/ibdev)" soft0 "uverbs0"
    same "$(podman exec one ls "$holder")" "" "$holder"
    same "$(podman exec one ls /sys/class/infiniband_mad)" "" "infiniband_mad"
    same "$(podman exec one ls /dev/infiniband)" "" "/dev/infiniband"
    podman exec one ibv_devinfo | grep PORT_ACTIVE
    # The rest is there.
    podman exec one ls /sys/class/net/lo/mtu
    podman rm --force --time 0 one
    # On the machine nothing has changed.
    test -e "$holder/rxe0" && test -e /sys/class/infiniband/rxe0
}

# Addresses that come later, as docker makes a container's network after the hooks.
addresses_come_later() {
    bundle c1 test.slice:rf:c1 '.linux.namespaces += [{"type": "network"}]'
    up "runc --systemd-cgroup" c1
    no_warnings c1
    nsenter --target "$(runc state c1 | jq .pid)" --net sh -c \
        'ip link add later type dummy && ip address add 192.0.2.9/24 dev later'
    eventually sh -c "runc exec c1 cat /sys/class/infiniband/soft0/ports/1/gid_attrs/ndevs/1 | grep -x later"
    runc exec c1 cat /sys/class/infiniband/soft0/ports/1/gids/1 | grep -x 0000:0000:0000:0000:0000:ffff:c000:0209
    down runc c1
}

ringfence configure --engine podman >/dev/null
modprobe -a dummy rdma_rxe ib_umad
ip link add rdma1 address 02:00:00:00:0d:01 type dummy
ip address add 10.9.1.1/24 dev rdma1
ip link set rdma1 up
rdma link add rxe0 type rxe netdev rdma1
eventually test -c /dev/infiniband/uverbs0
check "sysfs: cards are hidden" cards_are_hidden --network none
check "sysfs: cards are hidden in the host's network" cards_are_hidden --network host
check "sysfs: cards are hidden from who is privileged" cards_are_hidden --network none --privileged
check "sysfs: addresses that come later" addresses_come_later
rdma link delete rxe0
ip link delete rdma1
