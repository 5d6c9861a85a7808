#!/bin/sh
# Runs a program on a test's node.
#
#   enter.sh PID CGROUP PROGRAM [ARGUMENT…]
#
# PID: the node's first process. CGROUP: its control group, or nothing if the caller is in it. The program is killed when
# this process is.
set -eu
pid=$1
group=$2
shift 2
while read -r _ point type _; do
    [ -n "$group" ] || break
    case $type in cgroup | cgroup2) ;; *) continue ;; esac
    # A node of the second version has no groups in the first version's hierarchies but this one.
    for leaf in "$point$group/init" "$point$group"; do
        if [ -d "$leaf" ]; then
            echo 0 >"$leaf/cgroup.procs"
            break
        fi
    done
done </proc/mounts
exec nsenter --target "$pid" --mount --pid --net --uts --ipc --cgroup \
    setpriv --pdeathsig KILL env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 "$@"
