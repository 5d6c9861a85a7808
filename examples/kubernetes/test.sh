#!/usr/bin/env bash
# Runs the installer on a directory in place of a node.
#
#   examples/kubernetes/test.sh PACKAGE.deb CARDS.deb
#
# Works as root. Each check is one line, "ok" or "FAILED"; the status is not zero if any failed.
set -euo pipefail
deb=${1:?usage: $(sed -n 's/^#   //p' "$0")} cards=${2:?usage: $(sed -n 's/^#   //p' "$0")}
here=$(cd "$(dirname "$0")" && pwd)
[ "$(id -u)" -eq 0 ] || { echo "SKIPPED: ${0##*/} needs root" >&2; exit 1; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
node=$work/node
mkdir -p "$node/proc" "$node/etc/containerd" "$node/tmp"
dpkg-deb -x "$deb" "$work/image"
containerd=$node/etc/containerd/config.toml
printf '%s\n' 'version = 2' '# the administrator'\''s' '[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]' \
    '  runtime_type = "io.containerd.runc.v2"' >"$containerd"
cp "$containerd" "$work/containerd.before"
# What a pod finds at /config.
sed -n '/config.toml: |/,/^---/{s/^    //p}' "$here/install.yaml" >"$work/config.toml"

installer() {
    HOST=$node IMAGE=$work/image CONFIG=$work/config.toml RESTART="$work/restart" sh "$here/install.sh" "$@"
}
printf '#!/bin/sh\necho restarted >>%s/restarts\n' "$work" >"$work/restart"
chmod +x "$work/restart"
restarts() { wc -l <"$work/restarts"; }
names_card() { installer install 2>&1 | grep -q mlx5_0; }
touch "$work/restarts"

# shellcheck source-path=SCRIPTDIR source=../../integration/checks.sh
. "$here/../../integration/checks.sh"

cp "$work/config.toml" "$work/good.toml"
echo 'nonsense = 1' >"$work/config.toml"
check "a wrong configuration is refused" not installer install
check "and nothing is installed" not test -e "$node/opt"
cp "$work/good.toml" "$work/config.toml"

check "it installs" installer install
# The node has no runc for it to become, which it says.
check "its links lead to its runtime" sh -c "chroot '$node' /opt/ringfence/libexec/bin/runc 2>&1 | grep -q ringfence-runtime:"
check "its parts are where the configuration says" chroot "$node" /opt/ringfence/bin/ringfence config validate
while read -r path; do
    check "$path is there" test -e "$node$path"
done < <(sed -n 's/.* = "\(\/opt\/[^"]*\)"/\1/p' "$work/config.toml")
check "containerd knows it" grep -rq /opt/ringfence/bin/ringfence-runtime "$node/etc/containerd"
check "the administrator's lines are kept" grep -q "the administrator's" "$containerd"
check "containerd was restarted" test "$(restarts)" = 1
card_proxy=/opt/ringfence/libexec/ringfence-proxy-ibverbs
check "without the package for cards there is no proxy for them" not test -e "$node$card_proxy"
dpkg-deb -x "$cards" "$work/image"
check "it installs the proxy for cards" installer install
check "that lies beside the other" test -x "$node$card_proxy"
printf '\n[[device]]\nname = "mlx5_0"\nkind = "ibverbs"\n' >>"$work/config.toml"
check "a card that the node lacks does not keep it from installing" installer install
check "but is named" names_card
cp "$work/good.toml" "$work/config.toml"
rm "$work/image/usr/libexec/ringfence/ringfence-proxy-ibverbs"
check "it installs again" installer install
check "a proxy for cards of another version does not stay" not test -e "$node$card_proxy"
check "containerd was not restarted again" test "$(restarts)" = 1

# As containerd's shim has it.
bundle=$node/run/containerd/io.containerd.runtime.v2.task/k8s.io/c1
mkdir -p "$bundle"
echo /opt/ringfence/bin/ringfence-runtime >"$bundle/runtime"
check "it does not uninstall what a container needs" not installer uninstall
check "the runtime is still there" test -x "$node/opt/ringfence/bin/ringfence-runtime"
check "but no container gets it any more" not grep -rq ringfence "$node/etc/containerd"
check "containerd was restarted" test "$(restarts)" = 2
rm -r "$bundle"
check "it uninstalls" installer uninstall
check "containerd was not restarted again" test "$(restarts)" = 2
check "containerd's configuration is as it was" cmp "$containerd" "$work/containerd.before"
check "nothing is left" not sh -c "find '$node' -name '*ringfence*' | grep ."
check "it uninstalls again" installer uninstall

summary
