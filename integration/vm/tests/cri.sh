# shellcheck shell=bash disable=SC2154 # The variables are those of lib.sh.
# Pods as the kubelet has them where systemd makes the control groups. Sourced by tests.sh.

cri=$here/../../target/x86_64-unknown-linux-gnu/release/ringfence-cri
pod_slice=kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podx.slice

in_container() { local id=$1; shift; ctr --namespace k8s.io task exec --exec-id "exec-$RANDOM" "$id" "$@"; }

# Runs a pod of containers of these names, all with RDMA but `plain`: its id and theirs in ${ids[@]}.
pod() {
    local said
    said=$("$cri" run --annotation ringfence.dev/enable=true --annotation enable.ringfence.dev/container.plain=false ringfence "/$pod_slice" "$@")
    mapfile -t ids <<<"$said"
}

cri_scopes() {
    local id
    limits $'cpus = 0.5\ncpuset = "1"'
    pod one other plain
    for id in "${ids[@]:1:2}"; do
        is_limited "$id" "$cgroups/$pod_slice/ringfence-$id.scope"
    done
    same "$(pgrep -c ringfence-proxy)" 2 "proxies of two containers"
    exchange "in_container ${ids[1]}" "in_container ${ids[2]}"
    in_container "${ids[3]}" sh -c '! [ -e /dev/ringfence ]'
    "$cri" remove "${ids[0]}"
    # As the kubelet does.
    systemctl stop kubepods.slice
    test ! -e "$cgroups/$pod_slice"
    rm /etc/ringfence/conf.d/test.toml
}

cri_restart() {
    pod one other
    systemctl restart containerd.service
    exchange "in_container ${ids[1]}" "in_container ${ids[2]}"
    eventually "$cri" remove "${ids[0]}"
}

start_containerd
ctr --namespace k8s.io images import /var/lib/ringfence-verbs.tar >/dev/null
check "CRI: scopes with limits in a pod's slice" cri_scopes
check "CRI: containerd restarted under a pod" cri_restart
systemctl stop containerd.service
