# shellcheck shell=bash disable=SC2154 # The variables are those of lib.sh.
# Programs that connect by the kernel's rdma_cm, in containers with a card behind their proxies: the image's own librdmacm, on rxe.
# Sourced by tests.sh.

manager=/dev/infiniband/rdma_cm
cm_address=10.9.4.1

cm_configuration() { printf '[[device]]\nname = "rxe4"\nkind = "ibverbs"\n%s\n[inject]\nuverbs = "always"\n' "$1" | configuration; }
cm_bundle() { bundle "$1" "test.slice:rf:$1" '.annotations["ringfence.dev/device"] = "rxe4" | '"${2-.}"; }

# crun says no more of a hook than its exit code.
start() { up "$@" || { tail -n 1 /run/ringfence/failures.jsonl; return 1; }; }

# Of the card's GIDs the containers have one, so that it has another index for them than for the kernel.
connections() {
    cm_configuration "rdma-cm = true"$'\n'"gids = [\"$cm_address\"]"
    cm_bundle c1
    start "crun --systemd-cgroup" c1
    cm_bundle c2
    start "runc --systemd-cgroup" c2
    no_warnings c2
    # shellcheck disable=SC2016 # The container's shell expands it.
    same "$(runc exec c2 sh -c 'echo $(ls /dev/infiniband); (: <>/dev/infiniband/uverbs0) 2>/dev/null && echo opened
        (: <>/dev/infiniband/rdma_cm) && echo connects')" "rdma_cm uverbs0"$'\n'connects "its nodes"
    systemctl daemon-reload
    managed crun rping -s -C 20 -V -- rping -c -a $cm_address -C 20 -V
    managed crun rdma_server -- rdma_client -s $cm_address
    managed crun ucmatose -c 3 -- ucmatose -c 3 -s $cm_address
    managed crun rstream -T resolve -S 4096 -C 20 -- rstream -T resolve -s $cm_address -S 4096 -C 20
    managed crun ib_write_bw -R -F -n 100 -- ib_write_bw -R -F -n 100 $cm_address
    down crun c1
    down runc c2
    nothing_left_of rxe4 "$cm_idle"
    rm /etc/ringfence/conf.d/test.toml
}

# Where it could find no address it does not go in; nor where nobody said so.
without() {
    local inside="ip netns exec rf"
    ip netns add rf
    $inside ip link set lo up
    cm_configuration $'rdma-cm = true\ngids = "host"'
    cm_bundle c1 '.linux.namespaces += [{"type": "network", "path": "/run/netns/rf"}]'
    start "crun --systemd-cgroup" c1
    jq -e ".warnings == [.warnings[] | select(startswith(\"no $manager: it knows the addresses of the container's own network\"))] and (.warnings | length) == 1" \
        /run/ringfence/state/c1.json
    same "$(crun exec c1 ls /dev/infiniband)" uverbs0 "its nodes"
    down crun c1
    ip netns delete rf
    cm_configuration ''
    cm_bundle c1
    start "crun --systemd-cgroup" c1
    no_warnings c1
    same "$(crun exec c1 ls /dev/infiniband)" uverbs0 "its nodes"
    down crun c1
    # And not without the kernel's module.
    modprobe --remove rdma_ucm
    cm_configuration 'rdma-cm = true'
    cm_bundle c1
    if up "runc --systemd-cgroup" c1 >/tmp/said; then echo "it started"; return 1; fi
    cat /tmp/said
    grep -F "this kernel has no $manager: modprobe rdma_ucm" /tmp/said
    modprobe rdma_ucm
    rm /etc/ringfence/conf.d/test.toml
}

if ! ls /repository/target/deb/ringfence-ibverbs_*.deb >/dev/null 2>&1; then
    echo "SKIPPED: rxe_cm: no package ringfence-ibverbs in target/deb"
    echo "test rxe_cm (all) ... ignored"
    echo "test result: ok. 0 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s"
else
    dpkg --install /repository/target/deb/ringfence-ibverbs_*.deb >/tmp/dpkg 2>&1 || cat /tmp/dpkg
    cp /usr/bin/{rping,rdma_server,rdma_client,ucmatose,rstream} "$rootfs/usr/bin/"
    # For rping's pthread_exit.
    cp /lib/x86_64-linux-gnu/libgcc_s.so.1 "$rootfs/lib/x86_64-linux-gnu/"
    modprobe -a dummy rdma_rxe rdma_ucm
    ip link add rdma4 address 02:00:00:00:0d:04 type dummy
    ip address add $cm_address/24 dev rdma4
    ip link set rdma4 up
    rdma link add rxe4 type rxe netdev rdma4
    eventually grep -q ffff:0a09:0401 -r /sys/class/infiniband/rxe4/ports/1/gids
    eventually test -c $manager
    cm_idle=$(resources rxe4)
    check "rdma_cm: rping, rdma_client, ucmatose, rstream, ib_write_bw -R between two containers" connections
    check "rdma_cm: where it is not" without
    rdma link delete rxe4
    ip link delete rdma4
    check "rdma_cm: the package is purged" dpkg --purge ringfence-ibverbs
fi
