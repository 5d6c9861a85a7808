#!/bin/bash
# Runs cases in a container, one after the other, and says how each ended.
#
#   run-cases.sh LIST
#
# LIST: one case a line: name, seconds that it may take, command for the shell, with tabs between. What is said: a line
# ">>> NAME", the case's output with "| " before each line, "<<< NAME STATUS SECONDS".
output=$(mktemp -p /dev/shm) || exit 1
while IFS=$'\t' read -r name seconds command; do
    echo ">>> $name"
    began=$SECONDS
    timeout --kill-after=2 "$seconds" bash -c "$command" >"$output" 2>&1 </dev/null
    status=$?
    sed 's/^/| /' "$output"
    # What does not end in a line's end must not take the next line with it.
    echo
    echo "<<< $name $status $((SECONDS - began))"
done <"$1"
rm -f "$output"
