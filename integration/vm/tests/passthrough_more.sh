# shellcheck shell=bash
# What passthrough.sh leaves out, by hand. Sourced by tests.sh.

# shellcheck disable=SC2034 # For passthrough.sh.
passthrough_more=1
# shellcheck disable=SC2154 source-path=SCRIPTDIR source=passthrough.sh # tests.sh has it.
. "$here/tests/passthrough.sh"
unset passthrough_more
