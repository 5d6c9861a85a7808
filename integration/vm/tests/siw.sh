# shellcheck shell=bash disable=SC2154 # The variables are those of lib.sh.
# An iWARP card of the kernel's, siw over a dummy interface: no proxy takes it, and containers that are trusted can have its nodes. Debian's kernels
# have no siw: siw.sh compiles it for the image. Sourced by tests.sh.

siw_address=10.9.5.1
# Its modes: $1; with further lines of its [[device]].
siw_configuration() {
    configuration <<TOML
[[device]]
name = "siw5"
kind = "ibverbs"
nodes = ["$siw_node", "/dev/infiniband/rdma_cm"]
${2-}
[[device]]
name = "rxe5"
kind = "ibverbs"
rdma-cm = true
[policy.bounds]
modes = [$1]
TOML
}

# The container of runtime $1 and bundle c1 does not start, by the hook's exit code $2, and $3 is what is said.
siw_refused() {
    local failure
    if up "$1 --systemd-cgroup" c1 >/tmp/said; then echo "it started"; return 1; fi
    cat /tmp/said
    failure=$(tail -n 1 /run/ringfence/failures.jsonl)
    same "$(jq -r '"\(.container) \(.code)"' <<<"$failure")" "c1 $2" "$failure"
    jq -r .message <<<"$failure" | grep -F -e "$3"
    # runc hands on what the hook says, and crun the exit code.
    case $1 in runc) grep -qF -e "$3" /tmp/said ;; crun) grep -qw "$2" /tmp/said ;; esac
    $1 delete --force c1 >/dev/null 2>&1 || true
}

no_proxy() {
    local runtime
    siw_configuration '"proxied", "passthrough"'
    for runtime in runc crun; do
        bundle c1 test.slice:rf:c1 '.annotations["ringfence.dev/device"] = "siw5"'
        siw_refused $runtime 17 "RDMA device siw5 is iWARP, which cannot be shared by a proxy yet: its queue pairs are connected by rdma_cm only"
        grep -qF "give it to a trusted container with mode=passthrough" /tmp/said || [ $runtime = crun ]
    done
    # Nor does a container behind another card's proxy get the connection manager, by which it could take the queue pairs of this.
    bundle c1 test.slice:rf:c1 '.annotations["ringfence.dev/device"] = "rxe5"'
    siw_refused runc 14 "device rxe5 has rdma-cm = true, and this host has the iWARP card siw5"
    rm /etc/ringfence/conf.d/test.toml
}

# A container with a proxy finds its own card, and neither the other nor what a subnet manager's programs would use.
no_other_card() {
    modprobe ib_umad
    eventually test -e /sys/class/infiniband_mad/umad0
    printf '[[device]]\nname = "rxe5"\nkind = "ibverbs"\n' | configuration
    bundle c1 test.slice:rf:c1 '.annotations["ringfence.dev/device"] = "rxe5"'
    up "runc --systemd-cgroup" c1
    no_warnings c1
    # shellcheck disable=SC2016 # The container's shell expands it.
    same "$(runc exec c1 sh -c 'cd /sys/class/infiniband && echo $(ls) and $(cat ../infiniband_verbs/*/ibdev) and $(ls ../infiniband_mad 2>/dev/null)
        ls /dev/infiniband 2>/dev/null; ibv_devices | grep -c "siw\|rxe"')" "rxe5 and rxe5 and"$'\n'1 "what it sees"
    down runc c1
    rm /etc/ringfence/conf.d/test.toml
    modprobe --remove ib_umad
}

siw_told() {
    siw_configuration '"proxied", "passthrough"'
    ringfence doctor --engine podman >/tmp/said || true
    grep "siw5: an iWARP card, whose queue pairs no proxy can connect" /tmp/said
    grep "ask for it with mode=passthrough only" /tmp/said
    ringfence info --json >/tmp/said
    jq .cards /tmp/said
    jq -e '.cards[0] | .name == "siw5" and .modes == ["passthrough"] and .grants == null and .card.ports[0].state == "ACTIVE" and
        .card.ports[0].interfaces == ["rdma5"] and .problems == ["an iWARP card, whose queue pairs no proxy can connect"]' /tmp/said
    # Where it may be had in no other way it is an error.
    siw_configuration '"proxied"'
    if ringfence doctor --engine podman >/tmp/said; then cat /tmp/said; return 1; fi
    grep "siw5: an iWARP card, whose queue pairs no proxy can connect" /tmp/said
    grep "name another card in /etc/ringfence, or allow mode passthrough" /tmp/said
    rm /etc/ringfence/conf.d/test.toml
}

# Programs of the image's own librdmacm between two containers that have the card's nodes.
by_its_nodes() {
    local id idle
    idle=$(resources siw5)
    siw_configuration '"proxied", "passthrough"'
    # A root that is the machine's own the hook refuses.
    mkdir -p /srv/native /run/empty
    mount -t overlay -o lowerdir=/run/empty:/ overlay /srv/native
    for id in c1 c2; do
        rootfs=/srv/native bundle $id test.slice:rf:$id '.process.args = ["sleep", "infinity"] | .root.readonly = true |
            .annotations["ringfence.dev/mode"] = "passthrough" | .annotations["ringfence.dev/device"] = "siw5"'
    done
    up "crun --systemd-cgroup" c1
    up "runc --systemd-cgroup" c2
    no_warnings c2
    ringfence list >/tmp/said
    cat /tmp/said
    # It has no proxy.
    grep -E '^c1 +[0-9]+ +- +siw5 ' /tmp/said
    same "$(pgrep ringfence-proxy || true)" "" proxies
    same "$(runc exec c2 ls /sys/class/infiniband)" siw5 "cards of c2"
    runc exec c2 ibv_devinfo -d siw5 >/tmp/said
    cat /tmp/said
    grep -E 'transport:.*iWARP' /tmp/said
    grep PORT_ACTIVE /tmp/said
    managed crun rping -s -a $siw_address -C 20 -V -- rping -c -a $siw_address -C 20 -V
    managed crun ib_write_bw -R -d siw5 -F -n 100 -- ib_write_bw -R -d siw5 -F -n 100 $siw_address
    down crun c1
    down runc c2
    nothing_left_of siw5 "$idle"
    umount /srv/native
    rm /etc/ringfence/conf.d/test.toml
}

why=
modinfo siw >/dev/null 2>&1 || why="the image has no siw for Linux $(uname -r)"
ls /repository/target/deb/ringfence-ibverbs_*.deb >/dev/null 2>&1 || why="no package ringfence-ibverbs in target/deb"
if [ -n "$why" ]; then
    echo "SKIPPED: siw: $why"
    echo "test siw (all) ... ignored"
    echo "test result: ok. 0 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s"
else
    dpkg --install /repository/target/deb/ringfence-ibverbs_*.deb >/tmp/dpkg 2>&1 || cat /tmp/dpkg
    modprobe -a dummy siw rdma_rxe rdma_ucm
    ip link add rdma5 address 02:00:00:00:0d:05 type dummy
    ip address add $siw_address/24 dev rdma5
    ip link set rdma5 up
    rdma link add siw5 type siw netdev rdma5
    rdma link add rxe5 type rxe netdev rdma5
    eventually sh -c 'grep -qx siw5 /sys/class/infiniband_verbs/*/ibdev'
    siw_node=$(grep -lx siw5 /sys/class/infiniband_verbs/*/ibdev)
    siw_node=${siw_node%/ibdev}
    siw_node=/dev/infiniband/${siw_node##*/}
    eventually test -c "$siw_node"
    eventually test -c /dev/infiniband/rdma_cm
    check "siw: info and doctor" siw_told
    check "siw: no proxy takes it" no_proxy
    check "siw: nobody who has another card sees it" no_other_card
    check "siw: two containers that have its nodes" by_its_nodes
    rdma link delete rxe5
    rdma link delete siw5
    ip link delete rdma5
    # That another card's containers may have the connection manager.
    modprobe --remove siw
    check "siw: the package is purged" dpkg --purge ringfence-ibverbs
fi
