#!/usr/bin/env bash
# Compiles siw, the kernel's iWARP over TCP, for the kernel in a Debian at ROOT, and installs it there: Debian's kernels are built without it,
# and Debian's package of their source has it. A minute or two. build.sh calls it.
#
#   integration/vm/siw.sh ROOT
#
# What compiles it is installed in a layer over ROOT, which is thrown away.
set -euo pipefail
[ $# -eq 1 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
root=$1
cd "$root/lib/modules"
release=$(echo *)
# 6.12.118+deb13-amd64 is of linux-source-6.12.
version=$(cut -d. -f1,2 <<<"$release")
directory=drivers/infiniband/sw/siw

work=$(mktemp -d -p "${root%/*}")
clean() {
    cd /
    umount --recursive "$work/layered" || true
    rm -rf --one-file-system "$work"
}
trap clean EXIT
mkdir "$work"/{upper,work,layered}
mount -t overlay -o "lowerdir=$root,upperdir=$work/upper,workdir=$work/work" overlay "$work/layered"
mount --bind /dev "$work/layered/dev"
mount -t proc proc "$work/layered/proc"
inside() { env -u APT_CONFIG DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 chroot "$work/layered" "$@"; }

packages=("linux-headers-$release" "linux-source-$version" make)
inside apt-get -q update
inside apt-get -q -o DPkg::Options::=--force-unsafe-io install --yes --no-install-recommends "${packages[@]}"
# Of 80,000 files two dozen.
tar -C "$work/layered/tmp" --strip-components 1 --wildcards -xJf "$work/layered/usr/src/linux-source-$version.tar.xz" "*/$directory/*"
inside make --jobs "$(nproc)" -C "/lib/modules/$release/build" M="/tmp/$directory" CONFIG_RDMA_SIW=m modules
install -D -m 644 "$work/layered/tmp/$directory/siw.ko" "$root/lib/modules/$release/updates/siw.ko"
chroot "$root" depmod "$release"
