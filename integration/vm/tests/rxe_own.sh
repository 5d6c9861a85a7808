# shellcheck shell=bash disable=SC2154 # The variables are those of lib.sh.
# Containers with a network of their own, whose interface is the card's: each has a card, by its own address, and they reach each
# other over a pair of interfaces. Needs a kernel whose rxe works outside the first network namespace, which that of Debian 13 does not:
#
#   integration/vm/test.sh --kernel backports rxe_own
#
# Sourced by tests.sh.

# Who has c1, and who c2.
engines=([1]=runc [2]=crun)

# Each of c1 and c2 has a network namespace of its name, with one end of a pair of interfaces, a card over it, and an address.
networks() {
    local index
    ip link add own1 type veth peer name own2
    for index in 1 2; do
        ip netns add c$index
        ip -n c$index link set lo up
        ip link set own$index netns c$index
        ip -n c$index address add 10.9.4.$index/24 dev own$index
        ip -n c$index link set own$index up
        # There, as a card goes away with an interface that is moved. It is everybody's, as the kernel has them unless told otherwise.
        ip netns exec c$index rdma link add card$index type rxe netdev own$index
    done
    eventually test -e /sys/class/infiniband/card2/ports/1/gids/1
    # When nobody uses them.
    own_idle=("$(resources card1)" "$(resources card2)")
    printf '[[device]]\nname = "card%s"\nkind = "ibverbs"\n' 1 2 | configuration
    for index in 1 2; do
        bundle c$index test.slice:rf:c$index '.annotations["ringfence.dev/device"] = "card'$index'"
            | .linux.namespaces += [{"type": "network", "path": "/run/netns/c'$index'"}]'
    done
}

no_networks() {
    local index
    for index in 1 2; do
        ip netns delete c$index
        rdma link delete card$index 2>/dev/null || true
    done
    rm /etc/ringfence/conf.d/test.toml
}

# The index that the address of container $1 has in it.
own_index() {
    local file
    file=$("${engines[$1]}" exec "c$1" grep -l "ffff:0a09:040$1" -r "/sys/class/infiniband/card$1/ports/1/gids")
    echo "${file##*/}"
}

is_second() { [ "$(own_index "$1")" = 1 ]; }

# A verbs program with its server in container $1 and its client in $2.
across() {
    local server=$1 client=$2
    shift 2
    # shellcheck disable=SC2046 # An option and its value.
    "${engines[server]}" exec "c$server" "$@" -d "card$server" $(index_option "$1" "$server") >/tmp/server 2>&1 &
    eventually ip netns exec "c$server" sh -c 'ss -ltnH | grep -q ":18515 "'
    # shellcheck disable=SC2046
    timeout 300 "${engines[client]}" exec "c$client" "$@" -d "card$client" $(index_option "$1" "$client") "10.9.4.$server"
    wait $! || { cat /tmp/server; return 1; }
}

index_option() {
    case $1 in ibv_*) echo "-g $(own_index "$2")" ;; *) echo "-x $(own_index "$2")" ;; esac
}

own_cards() {
    local index engine
    networks
    for index in 1 2; do
        engine=${engines[index]}
        up "$engine --systemd-cgroup" c$index
        no_warnings c$index
        # Nothing of the other's.
        same "$($engine exec c$index ls /sys/class/infiniband)" "card$index" "cards of c$index"
        same "$($engine exec c$index ibv_devices | grep -c card)" 1 "devices of c$index"
        same "$($engine exec c$index grep -c . "/sys/class/infiniband/card$index/ports/1/gid_attrs/ndevs/$(own_index $index)")" 1 "interface of c$index"
    done
    # Whatever came first in each: the link-local address, then this one; rxe has the second version of RoCE only.
    for index in 1 2; do eventually is_second $index; done
    across 1 2 ibv_rc_pingpong -n 100
    across 2 1 ib_write_bw -F -s 65536 -n 100
    across 1 2 ib_read_lat -F -s 8 -n 100
    for index in 1 2; do down "${engines[index]}" c$index; done
    for index in 1 2; do nothing_left_of card$index "${own_idle[index - 1]}"; done
    no_networks
}

# The same network and card each, of podman.
own_podman() {
    local index engines=([1]=podman [2]=podman)
    networks
    for index in 1 2; do
        podman run --detach --name c$index --network ns:/run/netns/c$index --annotation ringfence.dev/enable=true \
            --annotation ringfence.dev/device=card$index --volume /usr/bin/ibv_rc_pingpong:/usr/bin/ibv_rc_pingpong:ro "$image"
        same "$(podman exec c$index ls /sys/class/infiniband)" "card$index" "cards of c$index"
    done
    for index in 1 2; do eventually is_second $index; done
    across 1 2 ibv_rc_pingpong -n 100
    across 2 1 ib_write_bw -F -s 65536 -n 100
    podman rm --force --time 0 c1 c2
    for index in 1 2; do nothing_left_of card$index "${own_idle[index - 1]}"; done
    no_networks
}

# Neither sends to an address that the bounds do not name.
own_peers() {
    local index engines=([1]=runc [2]=crun)
    networks
    printf '[[device]]\nname = "card%s"\nkind = "ibverbs"\n' 1 2 | cat - <(printf '[policy.bounds]\npeers = ["10.9.4.9"]\n') | configuration
    up "runc --systemd-cgroup" c1
    up "crun --systemd-cgroup" c2
    for index in 1 2; do eventually is_second $index; done
    if across 1 2 ib_write_bw -F -s 65536 -n 100 >/tmp/said 2>&1; then cat /tmp/said; return 1; fi
    cat /tmp/said
    grep -q "Failed to modify QP .* to RTR" /tmp/said
    pkill -x ib_write_bw || true
    down runc c1
    down crun c2
    no_networks
}

# Programs that connect by the kernel's rdma_cm, which looks for addresses in the network namespace of who asks; there is no node for
# verbs beside it.
own_manager() {
    local index engines=([1]=runc [2]=runc)
    networks
    printf '[[device]]\nname = "card%s"\nkind = "ibverbs"\nrdma-cm = true\n' 1 2 | configuration
    for index in 1 2; do
        up "runc --systemd-cgroup" c$index
        no_warnings c$index
        same "$(runc exec c$index ls /dev/infiniband)" rdma_cm "nodes of c$index"
    done
    managed runc rping -s -a 10.9.4.1 -C 20 -V -- rping -c -a 10.9.4.1 -C 20 -V
    managed runc ib_write_bw -R -F -n 100 -- ib_write_bw -R -F -n 100 10.9.4.1
    # Connections go from one end of the pair of interfaces to the other, and not within the host.
    [ "$(ip netns exec c1 cat /sys/class/net/own1/statistics/rx_bytes)" -gt 6500000 ]
    for index in 1 2; do down runc c$index; done
    for index in 1 2; do nothing_left_of card$index "${own_idle[index - 1]}"; done
    no_networks
}

if ! ls /repository/target/deb/ringfence-ibverbs_*.deb >/dev/null 2>&1; then
    echo "SKIPPED: rxe_own: no package ringfence-ibverbs in target/deb"
    echo "test rxe_own (all) ... ignored"
    echo "test result: ok. 0 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s"
elif [ "$(printf '%s\n' 7.0 "$(uname -r)" | sort -V | head -n 1)" != 7.0 ]; then
    echo "SKIPPED: rxe_own: rxe of Linux $(uname -r) works in the first network namespace only"
    echo "test rxe_own (all) ... ignored"
    echo "test result: ok. 0 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s"
else
    dpkg --install /repository/target/deb/ringfence-ibverbs_*.deb >/tmp/dpkg 2>&1 || cat /tmp/dpkg
    ringfence configure --engine podman >/dev/null
    podman image exists "$image" || podman load --quiet --input /var/lib/ringfence-verbs.tar >/dev/null
    cp /usr/bin/{ibv_rc_pingpong,ib_read_lat,rping} "$rootfs/usr/bin/"
    # For rping's pthread_exit.
    cp /lib/x86_64-linux-gnu/libgcc_s.so.1 "$rootfs/lib/x86_64-linux-gnu/"
    modprobe -a veth rdma_rxe rdma_ucm
    eventually test -c /dev/infiniband/rdma_cm
    # Of what an emulated machine may need that shares its processors with fuzzers.
    # shellcheck disable=SC2034 # For check.
    limit=900
    check "rxe_own: two containers with a network and a card each, of runc and crun" own_cards
    check "rxe_own: two of podman" own_podman
    check "rxe_own: rping and ib_write_bw -R by their own addresses" own_manager
    check "rxe_own: a peer that policy does not name" own_peers
    unset limit
    check "rxe_own: the package is purged" dpkg --purge ringfence-ibverbs
fi
