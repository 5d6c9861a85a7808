# shellcheck shell=bash
# Of exclusive.sh a container's life, and what is refused in mode shared. Sourced by tests.sh; last, as the kernel's mode stays.

# shellcheck disable=SC2034 # For exclusive.sh.
exclusive_life=1
# shellcheck disable=SC2154 source-path=SCRIPTDIR source=exclusive.sh # tests.sh has it.
. "$here/tests/exclusive.sh"
unset exclusive_life
