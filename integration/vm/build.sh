#!/usr/bin/env bash
# Makes the virtual machine's image of Debian's packages, in integration/.cache/vm: 2 minutes and the network.
#
#   integration/vm/build.sh [backports]     with the kernel of Debian's backports, in integration/.cache/vm-backports
#
# The kernel that is not of the backports has siw as well, where siw.sh can compile it; tests that need it are skipped if not.
#
# Does nothing if it is there already, with the same packages; remove the directory to renew it. Works as root; needs mmdebstrap and
# mke2fs.
set -euo pipefail
vm=$(cd "$(dirname "$0")" && pwd)
cache=${vm%/*}/.cache
suite=trixie
case ${1-} in
    '') target=$cache/vm kernel=linux-image-amd64 mirrors=() siw=siw ;;
    backports)
        target=$cache/vm-backports kernel=linux-image-amd64/$suite-backports siw=
        mirrors=("deb http://deb.debian.org/debian $suite main" "deb http://deb.debian.org/debian $suite-backports main")
        ;;
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
packages=(
    # The machine: a kernel with rdma_rxe, systemd with users' sessions.
    "$kernel" initramfs-tools kmod udev systemd-sysv dbus dbus-user-session libpam-systemd procps iproute2 init-system-helpers
    # The engines.
    runc crun podman conmon netavark containerd uidmap docker.io docker-cli
    # What is run, and what the tests use.
    busybox-static hwloc-nox ibverbs-providers ibverbs-utils jq perftest python3-pyverbs rdmacm-utils
)
# Unpacked, without what they depend on: a gigabyte of GPUs' and MPI's, which ucx_info does not load.
unpacked=(libucx0 ucx-utils)
# What the image is made of.
made_of="${packages[*]} ${unpacked[*]}${siw:+ $siw}"

[ "$(cat "$target/packages" 2>/dev/null)" != "$made_of" ] || exit 0
[ "$(id -u)" -eq 0 ] || { echo "${0##*/}: must be root to make $target" >&2; exit 1; }
for tool in mmdebstrap mke2fs; do
    command -v "$tool" >/dev/null || { echo "${0##*/}: $tool is missing; install it" >&2; exit 1; }
done

mkdir -p "$cache"
work=$(mktemp -d "$cache/vm.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
root=$work/root
# shellcheck disable=SC2016 # mmdebstrap's shell is to expand $1, the new root.
# The initial RAM disk is made while the kernel is installed, so its few modules are to be known before.
mmdebstrap --quiet --mode=root --variant=minbase --include="$(IFS=,; echo "${packages[*]}")" \
    --aptopt='APT::Install-Recommends false' --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/rdma-core*' \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --essential-hook="tar -C '$vm/guest' -c . | tar -C \"\$1\" --no-same-owner -x" \
    --customize-hook='chroot "$1" systemctl --quiet enable vm-command.service' \
    --customize-hook='chroot "$1" systemctl --quiet disable containerd docker docker.socket podman podman.socket podman-auto-update.timer podman-restart \
        podman-clean-transient apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap \
        fstrim.timer getty@ netavark-dhcp-proxy.socket netavark-dhcp-proxy' \
    --customize-hook='cd "$1/tmp" && APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-get -qq download '"${unpacked[*]}"' &&
        for package in *.deb; do dpkg-deb --extract "$package" .. && rm "$package"; done' \
    --customize-hook='touch "$1/etc/.updated" "$1/var/.updated"' \
    "$suite" "$root" ${mirrors+"${mirrors[@]}"}
if [ -n "$siw" ] && ! "$vm/siw.sh" "$root" >"$work/siw" 2>&1; then
    cat "$work/siw"
    echo "SKIPPED: ${0##*/}: siw could not be compiled; the image has none"
    # It is tried again with the next run.
    made_of+=" without siw"
fi
"$vm/../src/node/image.sh" "$root" "$root/var/lib/ringfence-verbs.tar" localhost/ringfence-verbs:1

mkdir "$work/vm"
mv "$root"/boot/vmlinuz-* "$work/vm/vmlinuz"
mv "$root"/boot/initrd.img-* "$work/vm/initrd"
# No journal: what a machine writes is thrown away.
mke2fs -q -t ext4 -O '^has_journal' -m 0 -d "$root" "$work/vm/root.ext4" 2G
echo "$made_of" >"$work/vm/packages"
rm -rf --one-file-system "$target"
mv "$work/vm" "$target"
