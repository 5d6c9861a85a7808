#!/usr/bin/env bash
# Boots the virtual machine, runs a command in it as root, and powers it off. The command's output is that of this program,
# and so is its exit status; 124 after --timeout seconds (300), 125 if the machine ended without a status.
#
#   integration/vm/run.sh [--kernel backports] [--timeout SECONDS] [--console FILE] COMMAND
#
# COMMAND is a line of bash, run in /repository, which is the repository, read-only. Each machine starts from the same image
# (build.sh makes it), and what is written in it is lost with it.
set -euo pipefail
vm=$(cd "$(dirname "$0")" && pwd)
repository=${vm%/*/*}
image=${vm%/*}/.cache/vm
timeout=300
console=
while [ $# -gt 1 ]; do
    case $1 in
        --kernel) image=${vm%/*}/.cache/vm-$2; shift 2 ;;
        --timeout) timeout=$2; shift 2 ;;
        --console) console=$2; shift 2 ;;
        *) break ;;
    esac
done
[ $# -eq 1 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/run"
printf '%s\n' "$1" >"$work/run/command"

# Some machines have a /dev/kvm that starts guests and cannot run their kernel: here that panics at once, for want of a root.
acceleration=(-accel 'tcg,thread=multi' -cpu max)
# Emulated, the guest's time stamp counter is this machine's, and on a busy one the guest misjudges its rate by factors: its clock
# and all time limits in it are then wrong. Under a hypervisor the rate is known; real processors change theirs.
rate=
if grep -qw hypervisor /proc/cpuinfo; then
    rate=$(awk '/^cpu MHz/ { printf "tsc_early_khz=%d", $4 * 1000; exit }' /proc/cpuinfo)
fi
if [ -w /dev/kvm ] && timeout 4 qemu-system-x86_64 -accel kvm -cpu host -m 512 -nodefaults -display none -nic none -no-reboot \
    -kernel "$image/vmlinuz" -append 'panic=-1' </dev/null >/dev/null 2>&1; then
    acceleration=(-accel kvm -cpu host)
    rate=
fi

status=0
# By a pipe: a file that is opened again would have another place to write to.
timeout --foreground --kill-after=5 "$timeout" qemu-system-x86_64 "${acceleration[@]}" -M q35,usb=off,smbus=off,hpet=off -smp 2 -m 2048 \
    -nodefaults -display none -no-reboot -nic none -kernel "$image/vmlinuz" -initrd "$image/initrd" \
    -append "root=/dev/vda rw console=ttyS0 quiet panic=-1 mitigations=off nokaslr random.trust_cpu=on tsc=reliable $rate no_timer_check audit=0 apparmor=0 selinux=0 nosoftlockup systemd.getty_auto=0 systemd.show_status=false" \
    -serial "file:$work/console" \
    -drive "file=$image/root.ext4,if=none,id=root,format=raw,snapshot=on,cache=unsafe" -device virtio-blk-pci,drive=root \
    -fsdev "local,id=run,path=$work/run,security_model=none" -device virtio-9p-pci,fsdev=run,mount_tag=run \
    -fsdev "local,id=repository,path=$repository,security_model=none,readonly=on,multidevs=remap" \
    -device virtio-9p-pci,fsdev=repository,mount_tag=repository \
    -device virtio-serial-pci -chardev file,id=output,path=/dev/stdout,append=on -device virtserialport,chardev=output,name=output \
    -device virtio-rng-pci </dev/null | cat || status=$?

[ -z "$console" ] || cp "$work/console" "$console"
if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
    echo "${0##*/}: no end within $timeout s; the console's last lines:" >&2
    tail -n 5 "$work/console" >&2
    exit 124
fi
if ! [ -s "$work/run/status" ]; then
    echo "${0##*/}: the machine ended without a status (qemu: $status); the console's last lines:" >&2
    tail -n 20 "$work/console" >&2
    exit 125
fi
exit "$(cat "$work/run/status")"
