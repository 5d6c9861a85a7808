#!/bin/sh
# Builds the test programs of integration/clients in the root file system of a Debian.
#
#   applications.sh ROOT CLIENTS TARGET CACHE
#
# TARGET: an empty directory for the programs. CACHE: a directory for what is worth keeping for the next time.
set -eu
if [ "${1-}" != inside ]; then
    exec unshare --mount "$0" inside "$@"
fi
shift
root=$1
mount --make-rprivate /
mount --bind -o ro "$2" "$root/mnt"
mount --bind "$3" "$root/opt"
mount --bind "$4" "$root/srv"
mount -t proc proc "$root/proc"
mount -t tmpfs tmp "$root/tmp"
exec chroot "$root" env -i PATH=/usr/bin:/bin HOME=/tmp GOCACHE=/srv LANG=C.UTF-8 \
    sh -c 'cd /mnt && exec applications/build.sh /opt'
