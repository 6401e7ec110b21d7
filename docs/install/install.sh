#!/bin/sh
# install.sh DESTINATION VERSION LIBRARIES: `make install`, where DESTINATION is $DESTDIR$PREFIX.
# install.sh -u DESTINATION: `make uninstall`.
# Programs need only the header. The other files tell build systems where it is, and people what it does.
set -eu
cd "$(dirname "$0")/../.."
here=docs/install

pages() { # DIRECTORY VERSION
    mkdir -p "$1/man3" "$1/man7"
    awk -v out="$1/man3" -v version="$2" -v date="$(date -r ctxcancel.h +%Y-%m-%d)" -f $here/man.awk ctxcancel.h
}

new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT

if [ "$1" = -u ]; then
    to=$2
    pages "$new" 0
    for page in "$new"/man?/*; do rm -f "$to/share/man/${page#"$new/"}"; done
    rm -f "$to/include/ctxcancel.h" "$to/share/pkgconfig/ctxcancel.pc"
    rm -rf "$to/share/cmake/ctxcancel"
    exit 0
fi

to=$1 version=$2 libraries=$3
pages "$new" "$version"
mkdir -p "$to/include" "$to/share/pkgconfig" "$to/share/cmake/ctxcancel" "$to/share/man/man3" "$to/share/man/man7"
cat >"$new/ctxcancel.pc" <<END
prefix=$PREFIX
includedir=\${prefix}/include

Name: ctxcancel
Description: Cancellation, deadlines, structured concurrency and graceful shutdown for C
Version: $version
Cflags: -I\${includedir} -pthread
Libs: $libraries
END
# The threads are a target of CMake's own.
others=$(echo " $libraries " | sed 's/ -pthread / /g; s/^ *//; s/ *$//; s/  */;/g')
for file in ctxcancelConfig.cmake ctxcancelConfigVersion.cmake; do
    sed "s/@VERSION@/$version/; s/@LIBRARIES@/$others/" $here/$file.in >"$new/$file"
    install -m 644 "$new/$file" "$to/share/cmake/ctxcancel/$file"
done
install -m 644 ctxcancel.h "$to/include/ctxcancel.h"
install -m 644 "$new/ctxcancel.pc" "$to/share/pkgconfig/ctxcancel.pc"
for page in "$new"/man?/*; do install -m 644 "$page" "$to/share/man/${page#"$new/"}"; done
