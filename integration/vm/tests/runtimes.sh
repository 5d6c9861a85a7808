# shellcheck shell=bash disable=SC2154 # The variables are those of lib.sh.
# runc and crun with the hook in config.json: where proxies are accounted. Sourced by tests.sh.

# Half of CPU 1, and half the usual share.
processors='.linux.resources.cpu = {quota: 50000, period: 100000, shares: 512, cpus: "1", mems: "0"}'

scope() {
    local runtime=$1 scope=$cgroups/test.slice/ringfence-c1.scope property
    limits
    bundle c1 test.slice:rf:c1 "$processors"
    up "$runtime --systemd-cgroup" c1
    is_limited c1 "$scope"
    same "$(cat "$scope/cpu.weight")" "$(cat "$cgroups/test.slice/rf-c1.scope/cpu.weight")" "its share, as the container's"
    same "$(systemctl show -P Before ringfence-c1.scope | grep -ow 'rf-c1.scope')" rf-c1.scope "what the scope outlives"
    for property in CPUQuotaPerSecUSec=500ms AllowedCPUs=1 AllowedMemoryNodes=0; do
        same "$(systemctl show -P "${property%=*}" ringfence-c1.scope)" "${property#*=}" "the scope's ${property%=*}"
    done
    $runtime exec c1 ibv_devinfo
    down "$runtime" c1
    eventually test ! -e "$scope"
    rm /etc/ringfence/conf.d/test.toml
}

sibling() {
    local runtime=$1 sibling=$cgroups/test/ringfence-c1
    limits
    bundle c1 /test/c1 "$processors"
    up "$runtime" c1
    is_limited c1 "$sibling"
    same "$(cat "$sibling/cpu.weight")" "$(cat "$cgroups/test/c1/cpu.weight")" "its share, as the container's"
    down "$runtime" c1
    test ! -e "$sibling"
    # Runtimes leave what they made above their own.
    rmdir "$cgroups/test"
    rm /etc/ringfence/conf.d/test.toml
}

# A scope whose name is taken: the container starts, and says what is not as it should be.
taken() {
    systemd-run --quiet --scope --unit ringfence-c1 sleep 60 &
    eventually systemctl is-active ringfence-c1.scope
    bundle c1 test.slice:rf:c1
    up "runc --systemd-cgroup" c1
    ringfence list --json
    jq -e '.warnings[0] | contains("systemd did not make ringfence-c1.scope")' /run/ringfence/state/c1.json
    runc exec c1 ibv_devinfo
    down runc c1
    systemctl stop ringfence-c1.scope
}

# A proxy that ends before systemd has moved it, of which systemd never hears: its scope would stay, and keep the container's.
proxy_ends_at_once() {
    local proxy=/usr/libexec/ringfence/ringfence-proxy moment
    mv $proxy $proxy.away
    trap 'mv -f $proxy.away $proxy' EXIT
    for moment in 0 0.02 0.05 0.1 0.2; do
        printf '#!/bin/sh\nsleep %s\nexit 1\n' $moment >$proxy
        chmod 755 $proxy
        bundle c1 test.slice:rf:c1
        if up "$1 --systemd-cgroup" c1; then echo "it started"; return 1; fi
        # crun tells nothing of what a hook says but its exit code.
        grep -qE "ended before it was ready|exit code: 17" /srv/c1/output
    done
    mv $proxy.away $proxy
    trap - EXIT
    bundle c1 test.slice:rf:c1
    up "$1 --systemd-cgroup" c1
    no_warnings c1
    # At once again, under the same name.
    down "$1" c1
    up "$1 --systemd-cgroup" c1
    no_warnings c1
    down "$1" c1
}

exchanged() {
    local id
    for id in c1 c2; do
        bundle $id "test.slice:rf:$id"
        up "$1 --systemd-cgroup" $id
    done
    exchange "$1 exec c1" "$1 exec c2"
    down "$1" c1
    $1 exec c2 ibv_devinfo
    down "$1" c2
}

# The kernel kills the container's init, and the proxy ends with it.
container_takes_too_much() {
    bundle c1 test.slice:rf:c1 '.process.args = ["sh", "-c", "until [ -e /tmp/go ]; do sleep 0.1; done; exec tail /dev/zero"] |
        .linux.resources.memory = {limit: 33554432, swap: 33554432}'
    up "$1 --systemd-cgroup" c1
    local proxy
    proxy=$(proxy c1)
    $1 exec c1 touch /tmp/go
    eventually test ! -e "/proc/$proxy"
    $1 state c1 | jq -e '.status == "stopped"'
    rm -f "$rootfs/tmp/go"
    $1 delete c1
}

# The kernel kills the proxy alone: its container's verbs fail, and nobody else's.
proxy_takes_too_much() {
    local proxy
    bundle c2 test.slice:rf:c2
    up "runc --systemd-cgroup" c2
    limits
    bundle c1 test.slice:rf:c1
    up "runc --systemd-cgroup" c1
    proxy=$(proxy c1)
    # The least that can be configured would take too many queues to exceed, and of the queues' memory the application pays for
    # what it touches first. So its proxy is in the midst of traffic when the limit comes to be less than it has.
    timeout 60 runc exec c2 ib_write_bw -F -n 5000000 >/dev/null 2>&1 &
    eventually sh -c 'ss -ltnH | grep -q :18515'
    timeout 60 runc exec c1 ib_write_bw -F -n 5000000 127.0.0.1 >/dev/null 2>&1 &
    sleep 1
    systemctl set-property --runtime ringfence-c1.scope MemoryMax=4K
    if wait $!; then echo "verbs did not fail"; return 1; fi
    wait || true
    eventually test ! -e "/proc/$proxy"
    runc state c1 | jq -e '.status == "running"'
    runc exec c2 ibv_devinfo
    down runc c1
    down runc c2
    rm /etc/ringfence/conf.d/test.toml
}

for runtime in runc crun; do
    check "$runtime: a scope with limits beside the container's scope" scope $runtime
    check "$runtime: a directory with limits beside the container's directory" sibling $runtime
    check "$runtime: data between two containers" exchanged $runtime
    check "$runtime: a container that takes too much memory" container_takes_too_much $runtime
    check "$runtime: a proxy that ends at once leaves no scope" proxy_ends_at_once $runtime
done
check "runc: a scope that cannot be made fails nothing" taken
check "runc: a proxy that takes too much memory" proxy_takes_too_much
