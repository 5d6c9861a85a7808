# shellcheck shell=bash disable=SC2154 # The variables are those of lib.sh.
# Containers with a card behind their proxies: the kernel's own software device, rxe, over a dummy interface. Sourced by tests.sh,
# and by files that run other tests with the same card, which they define as `rxe_checks`.

address=10.9.3.1
gid=ffff:0a09:0301

# With further lines of its [[device]].
card_configuration() {
    printf '[[device]]\nname = "rxe3"\nkind = "ibverbs"\n%s\n[inject]\nuverbs = "always"\n' "$1" | configuration
}

# Makes the bundle of a container that has the card.
with_card() { bundle "$1" "${2-test.slice:rf:$1}" '.annotations["ringfence.dev/device"] = "rxe3" | '"${3-.}"; }

nothing_in_kernel() { nothing_left_of rxe3 "$idle"; }

# The index that the card's address has in a container, given as a command that runs a program in it.
index() {
    local file
    file=$("$@" grep -l "$gid" -r /sys/class/infiniband/rxe3/ports/1/gids)
    echo "${file##*/}"
}

# A TCP port that no program here has had: in TIME_WAIT it could not be listened to.
a_port() (
    flock 9
    echo >>/tmp/ports
    echo $((18600 + $(wc -l </tmp/ports)))
) 9>/tmp/ports.lock

# The line of figures in the output of a program of perftest's.
figures_of() { grep -E '^ *[0-9]+ +[0-9]+ +[0-9.]+ +[0-9.]+' "$1" || { cat "$1" >&2; return 1; }; }

# Of lines of one number each.
median() { sort -g | awk '{ value[NR] = $1 } END { print value[int((NR + 1) / 2)] }'; }

# Puts perftest into the containers' root, with the libraries that it needs there.
bring_perftest() {
    local library
    cp /usr/bin/ib_* "$rootfs/usr/bin/"
    for library in $(ldd /usr/bin/ib_send_lat | grep -o '/[^ ]*'); do
        [ -e "$rootfs$library" ] || cp "$library" "$rootfs$library"
    done
}

# A verbs program with its server in one container and its client in another, given as commands that run a program in each.
between() {
    local server=$1 client=$2
    shift 2
    $server "$@" >/tmp/server 2>&1 &
    # One that has ended the client will find out.
    # shellcheck disable=SC2086 # A command's words.
    eventually ${inside-} sh -c "ss -ltnH | grep -q ':18515 ' || ! kill -0 $!" || { cat /tmp/server; return 1; }
    # shellcheck disable=SC2086 # A command's words.
    timeout 120 $client "$@" 127.0.0.1 || { cat /tmp/server; return 1; }
    wait $! || { cat /tmp/server; return 1; }
}

both_ways() {
    local server=$1 client=$2 index
    # shellcheck disable=SC2086 # A command's words.
    index=$(index $client)
    between "$server" "$client" ibv_rc_pingpong -d rxe3 -g "$index" -n 100
    between "$client" "$server" ib_write_bw -d rxe3 -x "$index" -F -s 65536 -n 100
}

# Containers c1 and c2 that have the card, by the runtime $1.
two_up() {
    local runtime=$1 id
    card_configuration ''
    for id in c1 c2; do
        with_card $id
        up "$runtime --systemd-cgroup" $id
    done
}

pair() {
    local runtime=$1 id
    two_up "$runtime"
    both_ways "$runtime exec c1" "$runtime exec c2"
    for id in c1 c2; do down "$runtime" $id; done
    nothing_in_kernel
    rm /etc/ringfence/conf.d/test.toml
}

# Two containers with a network of their own, which the card knows nothing of: by the host's GIDs.
own_network() {
    local id began inside="ip netns exec rf"
    ip netns add rf
    $inside ip link set lo up
    card_configuration 'gids = "host"'
    for id in c1 c2; do
        with_card $id "test.slice:rf:$id" '.linux.namespaces += [{"type": "network", "path": "/run/netns/rf"}]'
        up "runc --systemd-cgroup" $id
    done
    both_ways "runc exec c1" "runc exec c2"
    for id in c1 c2; do down runc $id; done
    nothing_in_kernel
    # By their own addresses there is none, which the proxy says.
    card_configuration 'gids = "namespace"'
    began=$(date +%s)
    with_card c1 test.slice:rf:c1 '.linux.namespaces += [{"type": "network", "path": "/run/netns/rf"}]'
    up "runc --systemd-cgroup" c1
    runc exec c1 ls /sys/class/infiniband/rxe3/ports/1/gids
    if runc exec c1 grep "$gid" -r /sys/class/infiniband/rxe3/ports/1/gids; then return 1; fi
    eventually sh -c "journalctl -t ringfence-proxy --since @$began | grep -F \"has no GID yet that is an address of the container's network namespace\""
    down runc c1
    only_its_own "$inside"
    ip netns delete rf
    rm /etc/ringfence/conf.d/test.toml
}

# Root in the container gives interfaces any address, and any number: the host's GID is not its own for that. That of an interface of the
# card's is. $1: the words by which a command is run in the container's network namespace.
only_its_own() {
    local inside=$1 gids=/sys/class/infiniband/rxe3/ports/1/gids own=ffff:0a09:0307
    modprobe rdma_ucm
    eventually test -c /dev/infiniband/rdma_cm
    $inside ip link add fake index "$(cat /sys/class/net/rdma3/ifindex)" type dummy
    $inside ip address add $address/24 dev fake
    $inside ip link set fake up
    ip link add link rdma3 name own netns rf type macvlan mode bridge
    $inside ip address add 10.9.3.7/24 dev own
    $inside ip link set own up
    eventually grep -q $own -r $gids
    with_card c1 test.slice:rf:c1 '.linux.namespaces += [{"type": "network", "path": "/run/netns/rf"}]'
    up "runc --systemd-cgroup" c1
    eventually runc exec c1 grep -q $own -r $gids
    if runc exec c1 grep "$gid" -r $gids; then return 1; fi
    # By verbs as well.
    runc exec c1 ibv_devinfo -v -d rxe3 >/tmp/said
    grep "GID\[.*10.9.3.7" /tmp/said
    if grep -F "$address" /tmp/said; then return 1; fi
    # What is its own is seen to be it when it comes later.
    $inside ip link delete own
    eventually sh -c "! runc exec c1 grep -q $own -r $gids"
    down runc c1
    nothing_in_kernel
}

# The client's proxy has a queue pair of the card.
is_busy() { [ "$(rdma resource show qp link rxe3/1 | grep -c 'type RC')" -ge "$1" ]; }

# Long traffic between c1, which serves, and c2, by the runtime $1.
traffic() {
    local runtime=$1 index
    index=$(index "$runtime" exec c1)
    timeout 150 "$runtime" exec c1 ib_write_bw -d rxe3 -x "$index" -F -s 4096 -n 5000000 >/tmp/server 2>&1 &
    server=$!
    eventually sh -c 'ss -ltnH | grep -q ":18515 "'
    timeout 150 "$runtime" exec c2 ib_write_bw -d rxe3 -x "$index" -F -s 4096 -n 5000000 127.0.0.1 >/tmp/client 2>&1 &
    client=$!
    eventually is_busy 2
}

# The client has ended with an error, and not because it took too long.
has_failed() {
    local status=0
    wait "$client" || status=$?
    case $status in
        0 | 124) echo "the client's status is $status"; cat /tmp/client; return 1 ;;
    esac
}

finished() {
    kill "$server" "$client" 2>/dev/null || true
    wait "$server" || true
    wait "$client" || true
}

# Programs, a proxy and a container's first process are killed, by the runtime $1.
killed() {
    local runtime=$1
    two_up "$runtime"
    # Programs: the containers go on.
    traffic "$runtime"
    pkill -KILL -x ib_write_bw
    finished
    eventually sh -c '! rdma resource show qp link rxe3/1 | grep "type RC"'
    both_ways "$runtime exec c1" "$runtime exec c2"
    # A proxy: its container's verbs fail, and the other's go on.
    traffic "$runtime"
    kill -KILL "$(proxy c2)"
    has_failed
    finished
    eventually sh -c '! rdma resource show qp link rxe3/1 | grep "type RC"'
    "$runtime" exec c1 ibv_devinfo -d rxe3 | grep PORT_ACTIVE
    "$runtime" state c2 | jq -e '.status == "running"'
    down "$runtime" c2
    # A container's first process.
    kill -KILL "$("$runtime" state c1 | jq .pid)"
    eventually "$runtime" delete c1
    nothing_in_kernel
    rm /etc/ringfence/conf.d/test.toml
}

# What there is to know where a container's proxy does not find its card again, which came at $2.
lost() (
    set +e
    runc exec "$1" sh -c 'ls -l /dev/infiniband; grep . -r /sys/class/infiniband/*/ports/1/gids; ibv_devinfo -v -d rxe3'
    echo "the host's:"
    ls -l /dev/infiniband /sys/class/infiniband_verbs
    grep -v :0000:0000:0000:0000:0000:0000:0000 -r /sys/class/infiniband/rxe3/ports/1/gids
    ip address show rdma3
    rdma resource show context
    journalctl -t ringfence-proxy --since "@$2" --no-pager
    dmesg | tail -n 20
    exit 1
)

# The card of c1 and c2 is there again, after it went with the proxies $1, which have not ended.
comes_back() {
    local id began
    began=$(date +%s)
    same "$(pgrep ringfence-proxy)" "$1" proxies
    rdma link add rxe3 type rxe netdev rdma3
    for id in c1 c2; do
        eventually runc exec $id grep -q "$gid" -r /sys/class/infiniband/rxe3/ports/1/gids || lost $id "$began"
        eventually runc exec $id sh -c "ibv_devinfo -d rxe3 | grep PORT_ACTIVE" || lost $id "$began"
    done
    both_ways "runc exec c1" "runc exec c2"
    for id in c1 c2; do down runc $id; done
    nothing_in_kernel
    rm /etc/ringfence/conf.d/test.toml
}

# Of $1 containers that use the card and end, one after the other, without having destroyed anything, nothing stays in the kernel.
starts() {
    local before run
    card_configuration ''
    with_card c1 /test/c1 '.process.args = ["/tmp/reach"]'
    cp "$here/../../target/vm-reach" "$rootfs/tmp/reach"
    before=$(rdma resource show)
    for ((run = 0; run < $1; run++)); do
        (cd /srv/c1 && crun run c1 </dev/null >/srv/c1/output 2>&1) || { cat /srv/c1/output; return 1; }
        grep -q "^rxe3: used" /srv/c1/output
    done
    eventually same "$(rdma resource show)" "$before" "the kernel's resources" || { rdma resource show; return 1; }
    rm "$rootfs/tmp/reach"
    eventually rmdir "$cgroups/test"
    rm /etc/ringfence/conf.d/test.toml
}

pair_of_podman() {
    local name
    card_configuration ''
    for name in one two; do
        podman run --detach --name $name --network host --annotation ringfence.dev/enable=true --annotation ringfence.dev/device=rxe3 \
            --volume /usr/bin/ibv_rc_pingpong:/usr/bin/ibv_rc_pingpong:ro "$image"
    done
    both_ways "podman exec one" "podman exec two"
    podman rm --force --time 0 one two
    nothing_in_kernel
    rm /etc/ringfence/conf.d/test.toml
}

# The start of a container with the card fails, and says $1.
says_instead() {
    with_card c1
    if up "runc --systemd-cgroup" c1 >/tmp/said; then echo "it started"; return 1; fi
    cat /tmp/said
    grep -qF -- "$1" /tmp/said
}

refused() {
    local library=/usr/lib/x86_64-linux-gnu/libibverbs.so.1 proxy=/usr/libexec/ringfence/ringfence-proxy-ibverbs
    configuration <<<$'[[device]]\nname = "rxe9"\nkind = "ibverbs"'
    bundle c1 test.slice:rf:c1 '.annotations["ringfence.dev/device"] = "rxe9"'
    if up "runc --systemd-cgroup" c1 >/tmp/said; then return 1; fi
    grep "no RDMA device has the name rxe9: there is rxe3" /tmp/said
    card_configuration ''
    mv $proxy $proxy.away
    says_instead "install the package ringfence-ibverbs"
    mv $proxy.away $proxy
    mv $library $library.away
    says_instead "a device of kind ibverbs needs rdma-core (Debian: libibverbs1 and ibverbs-providers)"
    mv $library.away $library
    # With its port down a container starts, and is told of.
    ip link set rdma3 down
    eventually grep -q DOWN /sys/class/infiniband/rxe3/ports/1/state
    with_card c1
    up "runc --systemd-cgroup" c1
    jq -e '.warnings[0] | contains("port 1 of RDMA device rxe3 is DOWN")' /run/ringfence/state/c1.json
    runc exec c1 ibv_devinfo -d rxe3 | grep PORT_DOWN
    down runc c1
    ip link set rdma3 up
    eventually grep -q "$gid" -r /sys/class/infiniband/rxe3/ports/1/gids
    rm /etc/ringfence/conf.d/test.toml
}

told() {
    card_configuration ''
    ringfence doctor --engine podman >/tmp/said || true
    grep "rxe3: an RDMA card with node GUID" /tmp/said
    grep "rxe3: opened by libibverbs; policies can grant" /tmp/said
    # It asks each engine's version, which takes its time here.
    ringfence info --json >/tmp/said
    jq -e '.cards[0] | .name == "rxe3" and .modes == ["proxied"] and .problems == [] and .grants["max-qp"] > 0 and
        .card.ports[0].state == "ACTIVE" and .card.ports[0].interfaces == ["rdma3"]' /tmp/said
    rm /etc/ringfence/conf.d/test.toml
}

if ! ls /repository/target/deb/ringfence-ibverbs_*.deb >/dev/null 2>&1; then
    echo "SKIPPED: rxe: no package ringfence-ibverbs in target/deb"
    echo "test rxe (all) ... ignored"
    echo "test result: ok. 0 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s"
else
    dpkg --install /repository/target/deb/ringfence-ibverbs_*.deb >/tmp/dpkg 2>&1 || cat /tmp/dpkg
    cp /usr/bin/ibv_rc_pingpong "$rootfs/usr/bin/"
    ringfence configure --engine podman >/dev/null
    podman image exists "$image" || podman load --quiet --input /var/lib/ringfence-verbs.tar >/dev/null
    modprobe -a dummy rdma_rxe
    # With an address of our choice, of which the card's GUID is made: udev gives another one to an interface that has none, soon after.
    ip link add rdma3 address 02:00:00:00:0d:03 type dummy
    ip address add $address/24 dev rdma3
    ip link set rdma3 up
    rdma link add rxe3 type rxe netdev rdma3
    eventually grep -q "$gid" -r /sys/class/infiniband/rxe3/ports/1/gids
    eventually test -c /dev/infiniband/uverbs0
    # When nobody uses it.
    idle=$(resources rxe3)
    if declare -F rxe_checks >/dev/null; then
        rxe_checks
    else
        check "rxe: info and doctor" told
        check "rxe: two containers of crun" pair crun
        check "rxe: two containers of podman" pair_of_podman
        check "rxe: two containers with a network of their own" own_network
        check "rxe: what is not as it should be is told" refused
    fi
    rdma link delete rxe3
    ip link delete rdma3
    # It needs the other package, which could not be removed.
    check "rxe: the package is purged" dpkg --purge ringfence-ibverbs
fi
