#!/usr/bin/env bash
# Everything that is shown of containers with real RDMA devices: rxe and siw in the virtual machine, on Debian's kernel and on that of its backports.
#
#   integration/rxe.sh [--kernel debian | --kernel backports] [FILE…]
#
# FILE of integration/vm/tests/, without .sh; by default all that are about cards, each in a machine of its own, which takes some two hours.
# What is also run by test.sh comes first. The last lines say how many tests each file has passed, failed and skipped; the status is not zero
# if any failed.
set -euo pipefail
cd "$(dirname "$0")/.."

kernels=(debian backports)
declare -A files=(
    # exclusive shows there what the kernel's refusal is made to say.
    [debian]="rxe rxe_fence rxe_more rxe_cm rxe_programs siw passthrough sysfs rxe_kills rxe_starts rxe_tenants rxe_engines rxe_programs_all passthrough_more
        exclusive rxe_pyverbs ibverbs rxe_cost"
    [backports]="rxe_own exclusive rxe_fence rxe_more rxe_kills ibverbs"
)
while [ $# -gt 0 ]; do
    case $1 in
        --kernel)
            case ${2-} in
                debian | backports) kernels=("$2") ;;
                *) echo "${0##*/}: no kernel \"${2-}\"; there are debian and backports" >&2; exit 2 ;;
            esac
            shift 2
            ;;
        -*) sed -n '2,/^set/s/^# \{0,1\}//p' integration/rxe.sh; exit 2 ;;
        *) break ;;
    esac
done
for kernel in "${kernels[@]}"; do [ $# -eq 0 ] || files[$kernel]=$*; done

# shellcheck source=integration/packages.sh
. integration/packages.sh
install_packages "${test_packages[@]}" >&2
build_release >&2
build_ibverbs >&2
build_package >&2

output=$(mktemp)
trap 'rm -f "$output"' EXIT
results=() status=0
for kernel in "${kernels[@]}"; do
    option=()
    [ "$kernel" = debian ] || option=(--kernel "$kernel")
    for file in ${files[$kernel]}; do
        failed=
        integration/vm/test.sh "${option[@]}" "$file" 2>&1 | tee "$output" || failed=", FAILED" status=1
        results+=("$kernel $file: $(sed -n 's/^test result: [A-Za-z]*\. \(.*\); 0 measured.*/\1/p' "$output" | paste -sd '+')$failed")
    done
done
echo
echo "revision $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
printf '%s\n' "${results[@]}"
exit "$status"
