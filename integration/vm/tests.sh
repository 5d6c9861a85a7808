#!/usr/bin/env bash
# Tests that need a machine of their own: systemd as init, control groups of version 2 with all controllers, a verbs device.
# To be run in the virtual machine, where it installs the package first:
#
#   integration/vm/run.sh 'integration/vm/tests.sh [FILE…]'     FILE of integration/vm/tests/, without .sh; by default all that are not by hand
#
# Prints what libtest prints; the status is not zero if any test failed.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source-path=SCRIPTDIR source=tests/lib.sh
. "$here/tests/lib.sh"

[ -e /vm/command ] || { echo "${0##*/}: not in the virtual machine; use integration/vm/run.sh" >&2; exit 2; }
[ $# -gt 0 ] || set -- runtimes podman containerd cri docker passthrough sysfs rxe rxe_fence rxe_more rxe_cm rxe_programs siw legal package

mkdir -p "$rootfs"
tar -xOf /var/lib/ringfence-verbs.tar layer.tar | tar -C "$rootfs" -x
if ! dpkg --install "$here"/../../target/deb/ringfence_*.deb >/tmp/dpkg 2>&1; then cat /tmp/dpkg; exit 1; fi
# The kernel rewrites its own instructions when the first group with such limits comes and when the last one goes. An emulated
# processor that is about to run them stumbles over that now and then, and the kernel panics in __set_next_task_fair: one group
# stays, and comes while there is a single processor. So do two sockets of the kind that rxe has in each network namespace
# (UDP_ENCAP_L2TPINUDP), for which it panicked in udp_destroy_sock.
echo 0 >/sys/devices/system/cpu/cpu1/online
systemd-run --quiet --unit=limits-stay --property=CPUQuota=50% --property=AllowedCPUs=0 sleep infinity
systemd-run --quiet --unit=tunnels-stay python3 -c '
import socket, time
tunnels = [socket.socket(family, socket.SOCK_DGRAM) for family in (socket.AF_INET, socket.AF_INET6)]
for tunnel in tunnels:
    tunnel.setsockopt(socket.IPPROTO_UDP, 100, 3)
tunnels[1].bind(("::1", 1701))
time.sleep(1 << 31)'
eventually sh -c 'ss -lunH | grep -F "[::1]:1701"'
echo 1 >/sys/devices/system/cpu/cpu1/online
for file in "$@"; do
    # shellcheck source=/dev/null
    . "$here/tests/$file.sh"
done
check "the kernel found nothing wrong" same "$(dmesg | grep -E 'BUG:|kernel BUG|Oops:|WARNING:')" "" "its log"

for program in $failed_programs; do echo "FAILED: $program"; done
result=ok
[ "$failed" -eq 0 ] || result=FAILED
echo
echo "test result: $result. $passed passed; $failed failed; 0 ignored; 0 measured; 0 filtered out; finished in $SECONDS.00s"
[ "$failed" -eq 0 ] && [ -z "$failed_programs" ]
