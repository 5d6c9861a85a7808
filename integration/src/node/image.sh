#!/bin/sh
# Makes a container image out of a node's root file system: busybox and a few stock verbs programs.
#
#   image.sh ROOT ARCHIVE NAME
#
# ARCHIVE is in `docker save`'s format, which every engine can load without a registry. The image idles until SIGTERM.
set -eu
root=$1
archive=$2
name=$3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/layer" "$work/image"
cd "$work/layer"
mkdir -p bin dev etc proc sys usr/bin
mkdir -m 1777 tmp
echo root:x:0:0:root:/root:/bin/sh >etc/passwd
echo root:x:0: >etc/group

for program in ibv_devices ibv_devinfo ib_write_bw; do
    cp "$root/usr/bin/$program" usr/bin/
    chroot "$root" ldd "/usr/bin/$program" | grep -o '/[^ ]*' | while read -r library; do
        mkdir -p ".${library%/*}"
        [ -e ".$library" ] || cp "$(chroot "$root" realpath "$library" | sed "s|^|$root|")" ".$library"
    done
done
cp "$(chroot "$root" which busybox | sed "s|^|$root|")" bin/busybox
for applet in cat dd echo false grep head kill ls mkdir mount ps rm sh sleep tail touch true wc; do
    ln -s busybox "bin/$applet"
done
cat >bin/idle <<'END'
#!/bin/sh
trap 'exit 0' TERM
sleep infinity &
wait
END
chmod 755 bin/idle

cd "$work/image"
tar --numeric-owner --owner=0 --group=0 -C "$work/layer" -cf layer.tar .
cat >config.json <<END
{"architecture": "amd64", "os": "linux",
 "config": {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": ["/bin/idle"]},
 "rootfs": {"type": "layers", "diff_ids": ["sha256:$(sha256sum <layer.tar | cut -d ' ' -f 1)"]},
 "history": [{"created_by": "image.sh"}]}
END
echo "[{\"Config\": \"config.json\", \"RepoTags\": [\"$name\"], \"Layers\": [\"layer.tar\"]}]" >manifest.json
tar -cf "$archive.part" manifest.json config.json layer.tar
mv "$archive.part" "$archive"
