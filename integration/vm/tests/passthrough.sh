# shellcheck shell=bash disable=SC2154 # The variables are those of lib.sh.
# Verbs devices of the kernel's in containers, by mode passthrough: rxe over a dummy interface. Sourced by tests.sh.

# With further lines of its [[device]] and behind it.
passthrough() {
    configuration <<TOML
[[device]]
name = "rxe0"
kind = "ibverbs"
nodes = ["/dev/infiniband/uverbs0"]
${1-}
[policy.bounds]
modes = ["proxied", "passthrough"]
TOML
}

# A root that is the machine's own the hook refuses.
native_root() {
    mkdir -p /srv/native /run/empty
    mount -t overlay -o lowerdir=/run/empty:/ overlay /srv/native
}

native() {
    rootfs=/srv/native bundle c1 "$1" '.process.args = ["sleep", "infinity"] | .annotations["ringfence.dev/mode"] = "passthrough" |
        .root.readonly = true'" | ${2-.}"
}

opens_rxe0() { "$@" ibv_devinfo -d rxe0 | grep PORT_ACTIVE; }

# The runtime names the node in linux.devices and in the control group's program, where systemd knows of it, too.
through_runtime() {
    passthrough
    # The image has no drivers: the machine's own root has, with a layer over it.
    podman run --detach --name one --runtime ringfence --network host "$@" --annotation ringfence.dev/mode=passthrough \
        --rootfs /:O sleep infinity
    opens_rxe0 podman exec one
    # Nobody else may open it, though he sees it.
    if podman run --rm --network none --volume /dev/infiniband:/dev/infiniband --rootfs /:O ibv_devinfo -d rxe0; then return 1; fi
    systemctl daemon-reload
    opens_rxe0 podman exec one
    same "$(pgrep ringfence-proxy || true)" "" proxies
    podman rm --force --time 0 one
    rm /etc/ringfence/conf.d/test.toml
}

# runc itself, in a directory and in a scope. Of another card it sees nothing.
through_wrapper() {
    local cgroup options
    ip link add rdma9 address 02:00:00:00:0d:09 type dummy
    rdma link add rxe9 type rxe netdev rdma9
    passthrough
    native_root
    for cgroup in /test/c1 test.slice:rf:c1; do
        options=
        [ "$cgroup" = /test/c1 ] || options=--systemd-cgroup
        native "$cgroup" '.hooks = {}'
        up "ringfence-runtime $options" c1
        opens_rxe0 runc exec c1
        same "$(runc exec c1 ls /sys/class/infiniband)" rxe0 "cards of c1"
        same "$(runc exec c1 ibv_devices | grep -o 'rxe[0-9]')" rxe0 "devices of c1"
        systemctl daemon-reload
        opens_rxe0 runc exec c1
        down runc c1
    done
    umount /srv/native
    rmdir "$cgroups/test"
    rdma link delete rxe9
    ip link delete rdma9
    rm /etc/ringfence/conf.d/test.toml
}

# The hook alone, which has systemd know of the node.
through_hook() {
    local runtime
    passthrough
    native_root
    for runtime in runc crun; do
        native test.slice:rf:c1
        up "$runtime --systemd-cgroup" c1
        opens_rxe0 $runtime exec c1
        systemctl daemon-reload
        opens_rxe0 $runtime exec c1
        down $runtime c1
    done
    umount /srv/native
    rm /etc/ringfence/conf.d/test.toml
}

# Of the policy's limits the kernel keeps those of objects.
limited_by_policy() {
    local runtime directory script='
import pyverbs.device, pyverbs.pd
context = pyverbs.device.Context(name="rxe0")
domains = []
for _ in range(6):
    try:
        domains.append(pyverbs.pd.PD(context))
    except Exception as error:
        print(error)
        break
print(len(domains))'
    passthrough $'rdma-cgroup = true\n[policy.defaults]\nmax-qp = 1\nmax-cq = 1\nmax-mr = 1'
    native_root
    for runtime in runc crun; do
        native test.slice:rf:c1
        up "$runtime --systemd-cgroup" c1
        directory=$(cgroup "$($runtime state c1 | jq .pid)")
        # crun has the container below its scope.
        [ -e "$directory/rdma.max" ] || directory=${directory%/*}
        grep 'rxe0 hca_handle=1 hca_object=4' "$directory/rdma.max"
        $runtime exec c1 python3 -c "$script" >/tmp/said
        cat /tmp/said
        # The kernel answers EAGAIN.
        grep "temporarily unavailable" /tmp/said
        same "$(tail -n 1 /tmp/said)" 4 "protection domains"
        echo 'rxe0 hca_handle=max hca_object=max' >"$directory/rdma.max"
        down $runtime c1
    done
    umount /srv/native
    rm /etc/ringfence/conf.d/test.toml
}

# Of a container's limits for RDMA objects, which the kernel charges to the proxy.
rdma_limits() {
    local limits='.linux.resources.rdma = {"rxe0": {"hcaHandles": 3, "hcaObjects": 1000}}'
    bundle c1 test.slice:rf:c1 "$limits"
    up "runc --systemd-cgroup" c1
    no_warnings c1
    grep 'rxe0 hca_handle=3 hca_object=1000' "$cgroups/test.slice/ringfence-c1.scope/rdma.max"
    systemctl daemon-reload
    grep 'rxe0 hca_handle=3 hca_object=1000' "$cgroups/test.slice/ringfence-c1.scope/rdma.max"
    lift "$cgroups/test.slice/rf-c1.scope"
    down runc c1
    bundle c1 /test/c1 "$limits"
    up runc c1
    no_warnings c1
    grep 'rxe0 hca_handle=3 hca_object=1000' "$cgroups/test/ringfence-c1/rdma.max"
    lift "$cgroups/test/c1"
    down runc c1
    rmdir "$cgroups/test"
    # For each limit that is left when its cgroup goes, kernel 6.12 looks into freed memory here.
    rdma link delete rxe0
}

# runc leaves its own container's limits when that goes.
lift() {
    grep 'rxe0 hca_handle=3 hca_object=1000' "$1/rdma.max"
    echo 'rxe0 hca_handle=max hca_object=max' >"$1/rdma.max"
}

ringfence configure --engine podman >/dev/null
modprobe -a dummy rdma_rxe
ip link add rdma0 address 02:00:00:00:0d:00 type dummy
ip address add 10.9.0.1/24 dev rdma0
ip link set rdma0 up
rdma link add rxe0 type rxe netdev rdma0
eventually test -c /dev/infiniband/uverbs0
if [ -n "${passthrough_more-}" ]; then
    check "passthrough: by the hook alone" through_hook
    check "passthrough: limits of objects by policy" limited_by_policy
    rdma link delete rxe0
else
    ringfence cdi generate >/dev/null
    check "passthrough: podman with ringfence-runtime" through_runtime --annotation ringfence.dev/enable=true
    check "passthrough: podman with ringfence-runtime and a CDI device" through_runtime --device ringfence.dev/rdma=default
    rm /etc/cdi/ringfence.json
    check "passthrough: runc by ringfence-runtime" through_wrapper
    check "runc: limits of RDMA objects are the proxy's" rdma_limits
fi

ip link delete rdma0
