#!/bin/sh
# Install what is missing.  deps.sh base: for `make demo` and `make test`.  deps.sh dev: for `make check` and `make bench`.
# Does nothing, and needs no network, where all is there.  Status 2: something of base is missing that this cannot
# install. What is missing of the rest is named, and what needs it is skipped.
set -u
CC=${CC:-gcc}

has_header() { echo "#include <$1>" | $CC -E -x c - >/dev/null 2>&1; }
has() { command -v "$1" >/dev/null 2>&1; }
has_package() { dpkg -s "$1" 2>/dev/null | grep -q '^Status: install ok installed'; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

base_missing() {
    has_header stdio.h || echo libc6-dev
    has_header stb/stb_ds.h || has_header stb_ds.h || echo libstb-dev
    has_header openssl/evp.h || echo libssl-dev
    has_header sqlite3.h || echo libsqlite3-dev
}

# For the examples of event loops, which are left out without these.
loops_missing() {
    has pkg-config || echo pkg-config
    pkg-config --exists libuv 2>/dev/null || echo libuv1-dev
    pkg-config --exists glib-2.0 2>/dev/null || echo libglib2.0-dev
}

# gcc-12-multilib and not gcc-multilib: that one would remove the cross compilers.
# The last three are the bench's peers.
dev_packages="g++ clang libclang-rt-14-dev lld clang-tidy clang-format cppcheck valgrind musl-tools gcc-12-multilib
gcc-arm-linux-gnueabihf libc6-dev-armhf-cross gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user cmake mandoc
pkg-config libglib2.0-dev libnsync-dev"

dev_missing() {
    if ! has dpkg; then
        for tool in g++ clang clang-tidy clang-format cppcheck valgrind musl-gcc qemu-arm pkg-config cmake mandoc go; do
            has "$tool" || echo "$tool"
        done
        return
    fi
    for package in $dev_packages; do
        case $package in
            # A newer one may stand in for Debian 12's own.
            libclang-rt-14-dev) has_sanitizers || echo "$package" ;;
            *) has_package "$package" || echo "$package" ;;
        esac
    done
    has go || [ -x /usr/local/go/bin/go ] || echo golang
}

has_sanitizers() {
    has clang || return 1
    [ -e "$(clang -print-resource-dir)/lib/linux/libclang_rt.tsan-$(uname -m).a" ]
}

manual() {
    echo "missing: $(echo $1)" >&2
    echo "$2, so install these yourself (the names are Debian's packages)." >&2
    case $1 in *libstb-dev*) echo "libstb-dev is one file: put stb_ds.h on the include path." >&2 ;; esac
    case $1 in *libssl-dev*) echo "libssl-dev is OpenSSL's libcrypto with its headers." >&2 ;; esac
    case $1 in *libsqlite3-dev*) echo "libsqlite3-dev is SQLite 3 with its header." >&2 ;; esac
    [ "$mode" = base ] && exit 2
    echo "What needs them is skipped." >&2
    exit 0
}

apt() { as_root env DEBIAN_FRONTEND=noninteractive apt-get -y -q -o DPkg::Lock::Timeout=120 "$@" >"$log" 2>&1 </dev/null; }

install() {
    [ -z "$(echo $1)" ] && return 0
    has apt-get || manual "$1" "There is no apt-get here"
    [ "$(id -u)" = 0 ] || has sudo || manual "$1" "This is not root and there is no sudo"
    echo "installing: $(echo $1)"
    log=$(mktemp)
    apt install --no-install-recommends $1 || { apt update; apt install --no-install-recommends $1; } || install_singly "$1"
    rm -f "$log"
}

# One package that does not exist here must not keep the others out.
install_singly() {
    failed=
    for package in $1; do
        apt install --no-install-recommends "$package" || { failed="$failed $package"; tail -n 3 "$log" >&2; }
    done
    [ -z "$failed" ] || manual "$failed" "apt-get could not install them"
}

mode=base
case ${1:-base} in
    base)
        install "$(base_missing)"
        mode=loops
        install "$(loops_missing)"
        ;;
    dev)
        install "$(base_missing)"
        mode=dev
        install "$(loops_missing) $(dev_missing)"
        ;;
    *) echo "usage: deps.sh base|dev" >&2; exit 2 ;;
esac
