# shellcheck shell=bash
# containerd as a service, with containers whose shims outlive it. Sourced by tests.sh.

ctr_run() { ctr run --detach --net-host --annotation ringfence.dev/enable=true "$@"; }

in_task() { local id=$1; shift; ctr task exec --exec-id "exec-$RANDOM" "$id" "$@"; }

gone() {
    ctr task kill --signal KILL "$1" || true
    eventually ctr task delete "$1"
    ctr container delete "$1"
}

ctr_shim() {
    ctr_run --runtime io.containerd.ringfence.v2 $image c1
    no_warnings c1
    same "$(cgroup "$(proxy c1)")" "$cgroups/default/ringfence-c1" "the proxy's cgroup"
    in_task c1 ibv_devinfo
    gone c1
    test ! -e "$cgroups/default/ringfence-c1"
}

# The shim takes no --systemd-cgroup; its runtime sees the cgroup's form.
ctr_slice() {
    ctr_run --runtime io.containerd.ringfence.v2 --cgroup test.slice:ctr:c1 $image c1
    no_warnings c1
    same "$(cgroup "$(proxy c1)")" "$cgroups/test.slice/ringfence-c1.scope" "the proxy's cgroup"
    in_task c1 ibv_devinfo
    gone c1
}

ctr_restart() {
    local id
    for id in c1 c2; do ctr_run --runtime io.containerd.ringfence.v2 $image $id; done
    systemctl restart containerd.service
    for id in c1 c2; do in_task $id ibv_devinfo; done
    exchange "in_task c1" "in_task c2"
    gone c1
    in_task c2 ibv_devinfo
    gone c2
}

# What systemd does to a service that hangs: shims and proxies are not in its control group.
ctr_killed() {
    ctr_run --runtime io.containerd.ringfence.v2 $image c1
    systemctl kill --signal KILL containerd.service
    eventually ctr version
    in_task c1 ibv_devinfo
    gone c1
}

# Kubernetes' way: a handler with SystemdCgroup, a pod in a slice.
cri_pod() {
    local pod container
    cat >/tmp/pod.json <<'POD'
{"metadata": {"name": "pod", "namespace": "team-a", "uid": "1", "attempt": 0},
 "annotations": {"ringfence.dev/enable": "true"}, "log_directory": "/tmp",
 "linux": {"cgroup_parent": "kubepods-pod1.slice", "security_context": {"namespace_options": {"network": 2}}}}
POD
    cat >/tmp/container.json <<'CONTAINER'
{"metadata": {"name": "app"}, "image": {"image": "localhost/ringfence-verbs:1"}, "log_path": "app.log", "linux": {
 "resources": {"memory_limit_in_bytes": 134217728}, "security_context": {"namespace_options": {"network": 2}}}}
CONTAINER
    pod=$(crictl runp --runtime ringfence /tmp/pod.json)
    container=$(crictl create --no-pull "$pod" /tmp/container.json /tmp/pod.json)
    crictl start "$container"
    no_warnings "$container"
    same "$(cgroup "$(proxy "$container")")" "$cgroups/kubepods.slice/kubepods-pod1.slice/ringfence-$container.scope" "the proxy's cgroup"
    crictl exec "$container" ibv_devinfo
    systemctl restart containerd.service
    eventually crictl exec "$container" ibv_devinfo
    crictl stopp "$pod"
    crictl rmp "$pod"
}

mkdir -p /etc/containerd
cat >/etc/containerd/config.toml <<'TOML'
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/ringfence-verbs:1"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = true
TOML
ringfence configure --engine containerd >/dev/null
systemctl restart containerd.service
ctr images import /var/lib/ringfence-verbs.tar >/dev/null
check "containerd: ctr with the shim" ctr_shim
check "containerd: ctr with the shim, in a slice" ctr_slice
check "containerd: restarted by systemd" ctr_restart
check "containerd: killed by systemd" ctr_killed
ctr -n k8s.io images import /var/lib/ringfence-verbs.tar >/dev/null
check "containerd: a pod in a slice" cri_pod
systemctl stop containerd.service
