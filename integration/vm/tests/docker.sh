# shellcheck shell=bash disable=SC2154 # The variables are those of lib.sh.
# docker with systemd for its control groups, as Debian has it. Sourced by tests.sh.

rdma=(--runtime ringfence --network host)

docker_scope() {
    local id scope
    limits
    id=$(docker run --detach --name one "${rdma[@]}" --memory 64m "${half[@]}" "$image")
    scope=$cgroups/system.slice/ringfence-$id.scope
    is_limited "$id" "$scope"
    docker exec one ibv_devinfo
    # What the kernel kills leaves nothing.
    docker exec one tail /dev/zero || true
    docker kill one
    eventually test ! -e "$scope"
    docker start one
    docker exec one ibv_devinfo
    docker rm --force one
    rm /etc/ringfence/conf.d/test.toml
}

docker_slice() {
    local id
    id=$(docker run --detach --name one "${rdma[@]}" --cgroup-parent test.slice --init "$image")
    no_warnings "$id"
    same "$(cgroup "$(proxy "$id")")" "$cgroups/test.slice/ringfence-$id.scope" "the proxy's cgroup"
    docker exec one ibv_devinfo
    docker rm --force one
}

# Containers outlive dockerd, by live-restore, or come back with it.
docker_restart() {
    local before
    docker run --detach --name one "${rdma[@]}" "$image"
    docker run --detach --name two "${rdma[@]}" "$image"
    before=$(pgrep ringfence-proxy)
    restart
    same "$(pgrep ringfence-proxy)" "$before" "proxies"
    exchange "docker exec one" "docker exec two"
    docker rm --force one two
    settings false
    docker run --detach --name one --restart always "${rdma[@]}" "$image"
    before=$(pgrep ringfence-proxy)
    restart
    eventually docker exec one ibv_devinfo
    [ "$(pgrep ringfence-proxy)" != "$before" ]
    docker rm --force one
}

# dockerd's settings, with live-restore or not.
settings() {
    echo "{\"bridge\": \"none\", \"iptables\": false, \"ip6tables\": false, \"live-restore\": $1}" >/etc/docker/daemon.json
    ringfence configure --engine docker >/dev/null
    restart
}

# systemd starts nothing more often than it thinks right.
restart() {
    systemctl reset-failed docker.service 2>/dev/null || true
    systemctl restart docker.service
}

mkdir -p /etc/docker
settings true
docker load --quiet --input /var/lib/ringfence-verbs.tar >/dev/null
check "docker: scopes with limits in system.slice" docker_scope
check "docker: a slice and an init" docker_slice
check "docker: restarted by systemd" docker_restart
systemctl stop docker.service docker.socket containerd.service
