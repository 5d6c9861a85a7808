# shellcheck shell=bash disable=SC2154 # The variables are those of lib.sh.
# podman with systemd for its control groups, as Debian has it. Sourced by tests.sh.

ringfence configure --engine podman >/dev/null
podman load --quiet --input /var/lib/ringfence-verbs.tar >/dev/null
rdma=(--annotation ringfence.dev/enable=true --network host)

start() { podman run --detach --name "$1" "${rdma[@]}" "${@:2}"; }

podman_scope() {
    local id scope
    limits
    id=$(start one --runtime "$1" "${half[@]}" "$image")
    scope=$cgroups/machine.slice/ringfence-$id.scope
    is_limited "$id" "$scope"
    podman exec one ibv_devinfo
    podman rm --force --time 0 one
    eventually test ! -e "$scope"
    rm /etc/ringfence/conf.d/test.toml
}

podman_exchange() {
    start one --runtime "$1" "$image"
    start two --runtime "$1" "$image"
    exchange "podman exec one" "podman exec two"
    podman stop --time 1 one
    podman exec two ibv_devinfo
    podman rm --force --time 0 one two
}

# A pod has a slice of its own in machine.slice, and its limits hold for the proxies too.
podman_pod() {
    local id slice
    podman pod create --name pod --network host --infra-command /bin/idle --infra-image "$image" --memory 256m
    id=$(podman run --detach --pod pod --name one --annotation ringfence.dev/enable=true "$image")
    podman run --detach --pod pod --name two --annotation ringfence.dev/enable=true "$image"
    no_warnings "$id"
    slice=$(podman pod inspect pod --format '{{.CgroupPath}}')
    same "$(cgroup "$(proxy "$id")")" "$cgroups/$slice/ringfence-$id.scope" "the proxy's cgroup"
    exchange "podman exec one" "podman exec two"
    podman pod rm --force --time 0 pod
    eventually test ! -e "$cgroups/$slice"
}

# A service that is one container, as quadlets are. systemd ends conmon, and podman its container.
podman_service() {
    local id
    cat >/run/systemd/system/rdma.service <<'UNIT'
[Service]
Type=notify
NotifyAccess=all
KillMode=mixed
Delegate=yes
SyslogIdentifier=rdma
ExecStart=podman run --name rdma --replace --rm --cgroups=split --sdnotify=conmon --detach --annotation ringfence.dev/enable=true \
    --network host localhost/ringfence-verbs:1
ExecStop=podman rm --force --ignore --time 1 rdma
UNIT
    systemctl daemon-reload
    systemctl start rdma.service
    id=$(podman inspect rdma --format '{{.Id}}')
    cat "/run/ringfence/state/$id.json"
    no_warnings "$id"
    cgroup "$(proxy "$id")"
    podman exec rdma ibv_devinfo
    systemctl daemon-reload
    podman exec rdma ibv_devinfo
    systemctl restart rdma.service
    podman exec rdma ibv_devinfo
    same "$(pgrep -c ringfence-proxy)" 1 "proxies after a restart"
    systemctl stop rdma.service
    eventually sh -c '! systemctl is-active rdma.service'
    # All of it is killed at once. podman says once that it misses conmon.
    systemctl start rdma.service
    systemctl kill --signal KILL rdma.service
    eventually sh -c '! pgrep ringfence-proxy'
    eventually podman rm --force --ignore --time 0 rdma
    systemctl reset-failed rdma.service
    rm /run/systemd/system/rdma.service
    ringfence gc
}

podman_cdi() {
    ringfence cdi generate
    podman run --rm --network none --device ringfence.dev/rdma=default "$image" ibv_devinfo | grep PORT_ACTIVE
    podman run --rm --network none --runtime ringfence --device ringfence.dev/rdma=default "$image" ibv_devinfo | grep PORT_ACTIVE
    # hooks.d's hook is called, too, for the annotation.
    podman run --rm --network none --device ringfence.dev/rdma=default --annotation ringfence.dev/max-qp=7 "$image" ibv_devinfo -v |
        grep -w 'max_qp:.*7'
    rm /etc/cdi/ringfence.json
}

# A user's own podman, in the user's own systemd.
podman_rootless() {
    id tester >/dev/null 2>&1 || useradd --create-home --shell /bin/bash tester
    loginctl enable-linger tester
    local uid as
    uid=$(id -u tester)
    eventually systemctl is-active "user@$uid.service"
    as="setpriv --reuid tester --regid tester --init-groups env -i -C /home/tester HOME=/home/tester PATH=$PATH XDG_RUNTIME_DIR=/run/user/$uid DBUS_SESSION_BUS_ADDRESS=unix:path=/run/user/$uid/bus"
    $as ringfence configure --engine podman
    $as podman load --quiet --input /var/lib/ringfence-verbs.tar
    $as podman run --rm --network none --annotation ringfence.dev/enable=true "$image" ibv_devinfo | grep PORT_ACTIVE
    $as podman run --detach --name one "${rdma[@]}" "$image"
    $as podman run --detach --name two "${rdma[@]}" "$image"
    exchange "$as podman exec one" "$as podman exec two"
    $as podman rm --force --time 0 one two
    eventually sh -c '! pgrep ringfence-proxy'
    same "$(ls "/run/user/$uid/ringfence/state")" "" "what is left of the user's containers"
    loginctl disable-linger tester
    loginctl terminate-user tester
}

for runtime in runc crun; do
    check "podman, $runtime: a scope with limits in machine.slice" podman_scope $runtime
    check "podman, $runtime: data between two containers" podman_exchange $runtime
done
check "podman: a pod" podman_pod
check "podman: a container that is a service" podman_service
check "podman: a CDI device" podman_cdi
check "podman: without root" podman_rootless
