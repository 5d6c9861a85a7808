# shellcheck shell=bash disable=SC2154 # The variables are those of lib.sh.
# Containers that have a card for themselves, by mode exclusive: rxe, moved to their network namespace. Needs a kernel that can, which
# that of Debian 13 cannot, and then shows what is said:
#
#   integration/vm/test.sh [--kernel backports] exclusive
#
# Sourced by tests.sh; alone, as the kernel's mode can only be chosen before there is any network namespace.

# With further lines of its [[device]] and behind it.
one_card() {
    configuration <<TOML
[[device]]
name = "card0"
kind = "ibverbs"
${1-}
[policy.bounds]
modes = ["proxied", "exclusive"]
TOML
}

# A root that is the machine's own the hook refuses.
native_root() {
    mkdir -p /srv/native /run/empty
    mountpoint -q /srv/native || mount -t overlay -o lowerdir=/run/empty:/ overlay /srv/native
}

# Makes bundle /srv/$1 of a container that is to have card $2 for itself, in the network namespace $3, by default a new one; with further
# edits.
own() {
    local network='{"type": "network"}'
    native_root
    [ -z "${3-}" ] || network='{"type": "network", "path": "/run/netns/'$3'"}'
    rootfs=/srv/native bundle "$1" "test.slice:rf:$1" '.process.args = ["sleep", "infinity"] | .root.readonly = true |
        .annotations["ringfence.dev/mode"] = "exclusive" | .annotations["ringfence.dev/device"] = "'"$2"'" |
        .linux.namespaces += ['"$network"'] | '"${4-.}"
}

# What the host has of cards, and what is used of them.
hosts() { rdma dev; rdma resource; ls /sys/class/infiniband; }

# The host has what it had.
is_back() {
    eventually has_all || same "$(hosts)" "$had" "the host's cards"
}

has_all() { [ "$(hosts)" = "$had" ]; }

on_host() { rdma dev show "$1" >/dev/null 2>&1; }

# The container of runtime $1 and bundle $2 does not start, and $3 is what is said.
refused() {
    if up "$1 --systemd-cgroup" "$2" >/dev/null 2>&1; then echo "it started"; return 1; fi
    tail -n 1 /run/ringfence/failures.jsonl | jq -r .message | grep -F -e "$3" || { tail -n 1 /run/ringfence/failures.jsonl; return 1; }
    ${1%% *} delete --force "$2" >/dev/null 2>&1 || true
}

in_shared_mode() {
    one_card
    own c1 card0
    refused runc c1 'options ib_core netns_mode=0'
    refused crun c1 'mode=exclusive needs the kernel to show each RDMA device in one network namespace only'
    ringfence doctor >/tmp/said || true
    grep 'mode=exclusive needs the kernel' /tmp/said
    is_back
}

# A driver that does not take back what its users have cannot be moved.
not_movable() {
    one_card
    own c1 card0
    refused runc c1 'RDMA device card0 cannot be moved to a container: Operation not supported'
    refused crun c1 'use mode=proxied or mode=passthrough'
    is_back
}

siw() {
    modprobe siw
    rdma link add siw0 type siw netdev rdma0
    printf '[[device]]\nname = "siw0"\nkind = "ibverbs"\n[policy.bounds]\nmodes = ["exclusive"]\n' | configuration
    own c1 siw0
    refused runc c1 'RDMA device siw0 cannot be moved to a container: Operation not supported'
    rdma link delete siw0
    is_back
}

bad_input() {
    local holder
    one_card
    own c1 card0 "" '.linux.namespaces -= [{"type": "network"}]'
    refused runc c1 "the container has the host's; give it one of its own"
    own c1 card0 "" '.annotations["ringfence.dev/max-qp"] = "3"'
    refused runc c1 'ringfence.dev/max-qp cannot be enforced with ringfence.dev/mode=exclusive'
    printf '[[device]]\nname = "card9"\nkind = "ibverbs"\n[policy.bounds]\nmodes = ["exclusive"]\n' | configuration
    own c1 card9
    refused runc c1 'no RDMA device has the name card9: there is card0'
    one_card
    own c1 card0
    python3 -c 'import pyverbs.device, time; context = pyverbs.device.Context(name="card0"); print(flush=True); time.sleep(600)' >/tmp/opened &
    holder=$!
    eventually test -s /tmp/opened
    refused runc c1 "RDMA device card0 is in use by process $holder (python3)"
    kill $holder
    wait $holder || true
    ip netns add other
    rdma dev set card0 netns other
    refused runc c1 'RDMA device card0 is in another network namespace'
    ip netns delete other
    is_back
}

# By runtime $1: a whole life, and what others have of it.
one_life() {
    local runtime=$1
    one_card
    own c1 card0
    own c2 card0
    up "$runtime --systemd-cgroup" c1
    no_warnings c1
    $runtime exec c1 ibv_devinfo -d card0 | grep PORT_ACTIVE
    same "$($runtime exec c1 ls /sys/class/infiniband)" card0 "cards of c1"
    same "$($runtime exec c1 ls /dev/infiniband)" "$($runtime exec c1 ls /sys/class/infiniband_verbs | grep uverbs)" "nodes of c1"
    systemctl daemon-reload
    $runtime exec c1 ibv_devinfo -d card0 | grep PORT_ACTIVE
    # Nobody else has it.
    if on_host card0; then rdma dev; return 1; fi
    same "$(ls /sys/class/infiniband)" "" "the host's cards"
    same "$(pgrep ringfence-proxy || true)" "" proxies
    refused "$runtime" c2 "RDMA device card0 is container c1's for itself"
    own c2 card0 "" '.annotations["ringfence.dev/mode"] = "proxied"'
    refused "$runtime" c2 'RDMA device card0 is in another network namespace'
    # Nor has it been touched by that.
    $runtime exec c1 ibv_devinfo -d card0 | grep PORT_ACTIVE
    ringfence gc
    $runtime exec c1 ibv_devinfo -d card0 | grep PORT_ACTIVE
    same "$(ringfence info --json | jq -r '.cards[0] | "\(.["netns-mode"]) \(.place) \(.container)"')" "exclusive container c1" info
    ringfence info | grep 'in the network namespace of container c1, which has it for itself'
    ringfence doctor >/tmp/said || true
    grep 'card0: in the network namespace of container c1' /tmp/said
    down "$runtime" c1
    eventually on_host card0
    is_back
    same "$(ringfence info --json | jq -r '.cards[0].place')" host "where it is"
}

# Two that want it at once.
at_once() {
    local runtime id started=0
    one_card
    for runtime in runc crun; do
        own c1 card0
        own c2 card0
        for id in c1 c2; do
            (cd /srv/$id && $runtime --systemd-cgroup run --detach $id </dev/null >/srv/$id/output 2>&1 && echo 0 >status || echo 1 >status) &
        done
        wait
        same "$(sort /srv/c1/status /srv/c2/status | head -n 1)" 0 "the status of the first"
        if [ "$(cat /srv/c1/status)" = "$(cat /srv/c2/status)" ]; then cat /srv/c?/output; return 1; fi
        tail -n 1 /run/ringfence/failures.jsonl | jq -r .message | grep "for itself (mode=exclusive)"
        for id in c1 c2; do
            if [ "$(cat /srv/$id/status)" = 0 ]; then
                $runtime exec $id ibv_devinfo -d card0 | grep PORT_ACTIVE
                down $runtime $id
                started=$((started + 1))
            else
                $runtime delete --force $id || true
            fi
        done
        is_back
    done
    same "$started" 2 containers
}

# The init is killed, and nobody deletes the container: the kernel brings the card back. The next one gets it.
init_killed() {
    local runtime
    one_card
    for runtime in runc crun; do
        own c1 card0
        own c2 card0
        up "$runtime --systemd-cgroup" c1
        kill -KILL "$($runtime state c1 | jq .pid)"
        is_back
        up "$runtime --systemd-cgroup" c2
        $runtime exec c2 ibv_devinfo -d card0 | grep PORT_ACTIVE
        # Its poststop comes late, and takes nothing from the other.
        $runtime delete c1
        $runtime exec c2 ibv_devinfo -d card0 | grep PORT_ACTIVE
        down $runtime c2
        is_back
    done
}

# Kills the process that $1 prints, as soon as $2 succeeds, while runc makes the container c1; and says whether it was in time.
killed_while() {
    local victim=$1 pid
    shift
    rm -f /srv/c1/status
    (cd /srv/c1 && runc --systemd-cgroup run --detach c1 </dev/null >/srv/c1/output 2>&1 && echo 0 >status || echo 1 >status) &
    until "$@"; do
        if [ -e /srv/c1/status ]; then break; fi
    done
    pid=$($victim || true)
    [ -z "$pid" ] || kill -KILL "$pid" || true
    wait
    [ "$(cat /srv/c1/status)" != 0 ]
}

the_hook() { pgrep -f '^ringfence-hook createRuntime'; }
the_runtime() { pgrep -f '^runc --systemd-cgroup run'; }
# Points of the hook's way: it has begun, the card is on record, the card has been moved, its node is there.
begun() { the_hook >/dev/null; }
on_record() { grep -q lent /run/ringfence/state/c1.json 2>/dev/null; }
moved() { ! [ -e /sys/class/infiniband/card0 ]; }
has_node() { [ -e /run/ringfence/containers/c1 ]; }

# Of what is killed half-way nothing is left, with a network namespace of the container's own ($1 is empty) and with one that stays.
killed_half_way() {
    local victim point tries
    one_card
    [ -z "$1" ] || ip netns add "$1"
    for victim in the_hook the_runtime; do
        for point in begun on_record moved has_node; do
            for tries in 1 2 3 4 5 6; do
                own c1 card0 "$1"
                if killed_while $victim $point; then break; fi
                down runc c1
            done
            # What was reached when it was killed.
            echo "$victim at $point, try $tries: $(jq -c .lent /run/ringfence/state/c1.json 2>/dev/null), on the host: $(ls /sys/class/infiniband)"
            [ "$tries" -lt 6 ] || { echo "it was never in time"; return 1; }
            # With a namespace of its own the card comes back by the kernel alone.
            [ -n "$1" ] || { runc delete --force c1 2>/dev/null || true; is_back; }
            runc delete --force c1 2>/dev/null || true
            # The hook may outlive its runtime.
            eventually sh -c '! pgrep -f "^ringfence-hook createRuntime"'
            ringfence gc
            is_back
            nothing_left || { leftovers; return 1; }
        done
    done
    [ -z "$1" ] || ip netns delete "$1"
}

# The namespace outlives the container: by a mount, by a process, by a descriptor.
kept() {
    local runtime keeper
    one_card
    for runtime in runc crun; do
        ip netns add kept
        own c1 card0 kept
        up "$runtime --systemd-cgroup" c1
        down $runtime c1
        on_host card0
        is_back
        # The same again, for another container.
        own c2 card0 kept
        up "$runtime --systemd-cgroup" c2
        $runtime exec c2 ibv_devinfo -d card0 | grep PORT_ACTIVE
        down $runtime c2
        on_host card0
        ip netns delete kept

        own c1 card0
        up "$runtime --systemd-cgroup" c1
        nsenter --net="/proc/$($runtime state c1 | jq .pid)/ns/net" sleep 600 &
        keeper=$!
        eventually grep -q sleep /proc/$keeper/comm
        down $runtime c1
        on_host card0
        kill $keeper
        wait $keeper || true

        own c1 card0
        up "$runtime --systemd-cgroup" c1
        exec 9<"/proc/$($runtime state c1 | jq .pid)/ns/net"
        down $runtime c1
        on_host card0
        exec 9<&-
        is_back
    done
}

limited() {
    local directory
    one_card $'rdma-cgroup = true\n[policy.defaults]\nmax-qp = 1\nmax-cq = 1\nmax-mr = 1'
    own c1 card0
    up "runc --systemd-cgroup" c1
    directory=$(cgroup "$(runc state c1 | jq .pid)")
    grep 'card0 hca_handle=1 hca_object=4' "$directory/rdma.max"
    echo 'card0 hca_handle=max hca_object=max' >"$directory/rdma.max"
    down runc c1
    is_back
}

# Two containers, each with a card and the interface under it, reach each other. The interface is there first: rxe goes away with one that is
# moved.
pair() {
    local index
    ip link add own1 type veth peer name own2
    for index in 1 2; do
        ip netns add c$index
        ip -n c$index link set lo up
        ip link set own$index netns c$index
        ip -n c$index address add 10.9.4.$index/24 dev own$index
        ip -n c$index link set own$index up
        ip netns exec c$index rdma link add card$index type rxe netdev own$index || true
        on_host card$index || { rdma dev; ip netns exec c$index rdma dev; return 1; }
    done
    printf '[[device]]\nname = "card%s"\nkind = "ibverbs"\n' 1 2 | cat - <(printf '[policy.bounds]\nmodes = ["exclusive"]\n') | configuration
    for index in 1 2; do own c$index card$index c$index; done
    up "runc --systemd-cgroup" c1
    up "crun --systemd-cgroup" c2
    no_warnings c1
    no_warnings c2
    same "$(runc exec c1 ibv_devices | grep -o 'card[0-9]')" card1 "devices of c1"
    same "$(crun exec c2 ibv_devices | grep -o 'card[0-9]')" card2 "devices of c2"
    runc exec c1 ibv_rc_pingpong -d card1 -g "$(index_of runc 1)" -n 100 >/tmp/server 2>&1 &
    eventually ip netns exec c1 sh -c 'ss -ltnH | grep -q ":18515 "'
    timeout 120 crun exec c2 ibv_rc_pingpong -d card2 -g "$(index_of crun 2)" -n 100 10.9.4.1
    wait $! || { cat /tmp/server; return 1; }
    down runc c1
    down crun c2
    on_host card1
    on_host card2
    rdma link delete card1
    rdma link delete card2
    ip netns delete c1
    ip netns delete c2
    is_back
}

# The index that the address of container $2 has in it.
index_of() {
    local file
    file=$($1 exec "c$2" grep -l "ffff:0a09:040$2" -r "/sys/class/infiniband/card$2/ports/1/gids")
    echo "${file##*/}"
}

# The card goes away with the interface under it, and that with the namespace: nothing is to be brought back, and nothing is left.
gone_with_its_interface() {
    ip link add gone0 type dummy
    ip netns add gone
    ip link set gone0 netns gone
    ip -n gone link set gone0 up
    ip netns exec gone rdma link add card1 type rxe netdev gone0 || true
    on_host card1
    printf '[[device]]\nname = "card1"\nkind = "ibverbs"\n[policy.bounds]\nmodes = ["exclusive"]\n' | configuration
    own c1 card1 gone
    up "runc --systemd-cgroup" c1
    ip netns delete gone
    down runc c1
    eventually sh -c '! rdma dev show card1'
    is_back
}

modprobe -a dummy veth rdma_rxe ib_uverbs
ip link add rdma0 address 02:00:00:00:0d:00 type dummy
ip address add 10.9.0.1/24 dev rdma0
ip link set rdma0 up
rdma link add card0 type rxe netdev rdma0
eventually test -c /dev/infiniband/uverbs0
had=$(hosts)
movable=
check "exclusive: refused in mode shared" in_shared_mode
if ! eventually rdma system set netns exclusive; then
    echo "SKIPPED: exclusive: there are network namespaces already; run it alone"
    echo "test exclusive (all) ... ignored"
    echo "test result: ok. 0 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s"
elif [ "$(printf '%s\n' 7.3 "$(uname -r)" | sort -V | head -n 1)" != 7.3 ]; then
    echo "SKIPPED: exclusive: rxe of Linux $(uname -r) cannot be moved; what is said of it is tested"
    check "exclusive: refused where rxe cannot be moved" not_movable
    if modinfo siw >/dev/null 2>&1; then
        check "exclusive: siw cannot be moved" siw
    else
        echo "SKIPPED: exclusive: siw: Linux $(uname -r) has no such module"
    fi
else
    movable=1
    # rxe keeps the number of its first pair for management for good, so that after its first move, there or back, the kernel makes none any more
    # ("Couldn't create ib_mad QP1"): from then on the host has the same.
    ip netns add first
    rdma dev set card0 netns first
    ip netns delete first
    eventually on_host card0
    sleep 1
    had=$(hosts)
    check "exclusive: a life with runc" one_life runc
fi
if [ -n "$movable" ] && [ -z "${exclusive_life-}" ]; then
    check "exclusive: a life with crun" one_life crun
    check "exclusive: two containers at once" at_once
    check "exclusive: its init is killed" init_killed
    check "exclusive: what is refused" bad_input
    check "exclusive: somebody keeps the network namespace" kept
    limit=1200 check "exclusive: hook and runtime are killed half-way" killed_half_way ""
    limit=1200 check "exclusive: hook and runtime are killed half-way, in a network namespace that stays" killed_half_way stays
    check "exclusive: limits of objects by policy" limited
    check "exclusive: two containers with a card each" pair
    check "exclusive: a card goes with its interface" gone_with_its_interface
fi
rm -f /etc/ringfence/conf.d/test.toml
umount /srv/native 2>/dev/null
rdma link delete card0
ip link delete rdma0
