#!/bin/sh
# The first process of a test's node: makes its file systems, then reaps orphans until it is killed.
#
#   init.sh ROOT CGROUP v1|v2
#
# ROOT: the node's root file system, a mount of its own. CGROUP: the node's control group, a path below the root of each
# hierarchy. Runs in new mount, PID, network, UTS and IPC namespaces. Ready when ROOT/run/node-is-ready exists.
set -eu
root=$1
group=$2
version=$3

# Hands the processors and memory of the cpuset group $1 on to the group $1/$2: a new one of version 1 has none.
hand_on() {
    [ ! -e "$1/cgroup.controllers" ] || return 0
    for file in cpuset.cpus cpuset.mems; do
        [ ! -e "$1/$file" ] || cat "$1/$file" >"$1/$2/$file"
    done
}

# Gives the groups below the group $1 all controllers that it has itself, on a machine of version 2.
grant() {
    [ -e /sys/fs/cgroup/cgroup.controllers ] || return 0
    # shellcheck disable=SC2013 # It is one line of words.
    for controller in $(cat "$1/cgroup.controllers"); do
        # Some cannot be had, such as cpu where processes have a real-time schedule.
        echo "+$controller" 2>/dev/null >"$1/cgroup.subtree_control" || true
    done
}

# The machine's mounted hierarchies, one mount point a line. Those that are not mounted stay out of reach.
hierarchies() {
    while read -r _ point type _; do
        case $type in cgroup | cgroup2) echo "$point" ;; esac
    done </proc/mounts
}

if [ "${4-}" != inside ]; then
    for point in $(hierarchies); do
        above=$point
        for part in $(echo "$group" | tr / ' '); do
            mkdir -p "$above/$part"
            hand_on "$above" "$part"
            grant "$above"
            above=$above/$part
        done
        echo 0 >"$above/cgroup.procs"
    done
    exec unshare --cgroup "$0" "$root" "$group" "$version" inside
fi

mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
# Each node has one version, as crun refuses the second beside the first when it has controllers.
[ "$version" = v2 ] || mount -t tmpfs -o mode=755 cgroup "$root/sys/fs/cgroup"
for point in $(hierarchies); do
    name=${point##*/}
    # Processes are kept out of the root group: the second version's may not have both processes and groups.
    mkdir "$point$group/init"
    hand_on "$point$group" init
    echo 0 >"$point$group/init/cgroup.procs"
    if [ "$version" = v2 ]; then
        [ ! -e "$point/cgroup.controllers" ] || mount --bind "$point$group" "$root/sys/fs/cgroup"
    elif [ ! -e "$point/cgroup.controllers" ]; then
        mkdir "$root/sys/fs/cgroup/$name"
        mount --bind "$point$group" "$root/sys/fs/cgroup/$name"
    fi
done

mount -t tmpfs -o mode=755,nosuid dev "$root/dev"
for node in 'null 1 3' 'zero 1 5' 'full 1 7' 'random 1 8' 'urandom 1 9' 'tty 5 0' 'fuse 10 229'; do
    # shellcheck disable=SC2086 # Three words.
    set -- $node
    mknod -m 666 "$root/dev/$1" c "$2" "$3"
done
# For root alone, as the machine has it; its number is not the same everywhere.
if [ -c /dev/userfaultfd ]; then
    mknod -m 600 "$root/dev/userfaultfd" c "0x$(stat -c %t /dev/userfaultfd)" "0x$(stat -c %T /dev/userfaultfd)"
fi
for pair in fd:/proc/self/fd stdin:/proc/self/fd/0 stdout:/proc/self/fd/1 stderr:/proc/self/fd/2 ptmx:pts/ptmx; do
    ln -s "${pair#*:}" "$root/dev/${pair%%:*}"
done
mkdir "$root/dev/pts" "$root/dev/shm" "$root/dev/mqueue"
mount -t devpts -o newinstance,ptmxmode=0666,mode=0620 devpts "$root/dev/pts"
mount -t mqueue mqueue "$root/dev/mqueue"
mount -t tmpfs -o mode=1777 shm "$root/dev/shm"
mount -t tmpfs -o mode=755 run "$root/run"
mount -t tmpfs -o mode=1777 tmp "$root/tmp"
# Engines lay overlays over these, and an overlay cannot be laid over another.
for name in containers containerd docker; do
    mkdir -p "$root/var/lib/$name"
    mount -t tmpfs "$name" "$root/var/lib/$name"
done

cd "$root"
mkdir -p mnt/old
pivot_root . mnt/old
cd /
umount -l /mnt/old
# As systemd does: what is mounted in a container's namespace without care is seen on the node.
mount --make-rshared /
ip link set lo up
hostname node
touch /run/node-is-ready
# `wait` reaps whatever becomes this process's child.
sleep infinity &
while :; do wait; done
