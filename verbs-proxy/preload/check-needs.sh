#!/bin/sh
# Fails if a shared library that is preloaded into other people's images needs what those may not have:
# a glibc newer than 2.17, another library than libc.so.6, thread-local storage, or code that runs when it is loaded; or if
# it has variables for others that cannot be written.
#
#   check-needs.sh library
set -eu

library=$1
failed=0
complain() {
	echo "check-needs: $library: $1" >&2
	failed=1
}

# What it needs of other libraries; its own version definitions are no needs.
needs=$(readelf --wide --version-info "$library" | sed -n '/^Version needs section/,$p' | sed -n 's/.*Name: \([^ ]*\).*/\1/p' | sort -u)
for version in $needs; do
	case $version in
	GLIBC_*)
		newest=$(printf '%s\n' 2.17 "${version#GLIBC_}" | sort -V | tail -n 1)
		[ "$newest" = 2.17 ] || complain "needs $version, but images may have glibc 2.17: $(
			readelf --wide --dyn-syms "$library" | sed -n "s/.* UND \([^ ]*@$version\) .*/\1/p" | tr '\n' ' ')"
		;;
	*) complain "needs version $version, which is not glibc's" ;;
	esac
done

for needed in $(readelf --wide --dynamic "$library" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p'); do
	[ "$needed" = libc.so.6 ] || complain "needs $needed, which images may lack"
done

if readelf --wide --dynamic "$library" | grep -E '\((INIT|INIT_ARRAY|PREINIT_ARRAY|FINI|FINI_ARRAY)\)' >&2; then
	complain 'runs code when it is loaded or unloaded'
fi
if readelf --wide --program-headers "$library" | grep -w TLS >&2; then
	complain 'has thread-local storage'
fi

# A second library of the kind in the same process writes its variables, which are ours there.
writable=$(readelf --wide --sections "$library" | grep -v '\.data\.rel\.ro' | sed -n 's/^ *\[ *\([0-9]*\)\] .* WA  *[0-9]* .*/\1/p')
for section in $(readelf --wide --dyn-syms "$library" | awk '$4 == "OBJECT" && $7 ~ /^[0-9]+$/ { print $7 }' | sort -u); do
	printf '%s\n' "$writable" | grep -qx "$section" || complain "has variables in section $section, which cannot be written"
done
exit "$failed"
