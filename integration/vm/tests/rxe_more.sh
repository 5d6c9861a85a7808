# shellcheck shell=bash
# What rxe.sh leaves out, by hand. Sourced by tests.sh.

# shellcheck disable=SC2034 # For rxe.sh.
rxe_more=1
# shellcheck disable=SC2154 source-path=SCRIPTDIR source=rxe.sh # tests.sh has it.
. "$here/tests/rxe.sh"
unset rxe_more
