# Sourced by the other scripts: the cache, and Debian packages that are used without being installed.

cache=${SARANG_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/sarang}
mkdir -p "$cache"

say() { printf '%s\n' "== $*" >&2; }
fail() { printf '%s\n' "${0##*/}: $*" >&2; exit 1; }

# need PROGRAM PACKAGE: makes sure that a program is there.
need() {
    command -v "$1" >/dev/null && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing $2"
        apt-get -qq update
        DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends "$2" >/dev/null
    fi
    command -v "$1" >/dev/null || fail "needs $1; install it first (on Debian: apt-get install $2)"
}

# need_header HEADER PACKAGE: makes sure that a C header is there.
need_header() {
    header_works() { echo "#include <$1>" | gcc -E - >/dev/null 2>&1; }
    header_works "$1" && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing $2"
        apt-get -qq update
        DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends "$2" >/dev/null
    fi
    header_works "$1" || fail "needs the header $1; install it first (on Debian: apt-get install $2)"
}

need_rust() {
    need cc gcc
    command -v cargo >/dev/null ||
        fail "needs Rust 1.90 or newer with cargo; install it first (https://rustup.rs)"
}

# unpack PACKAGE DIRECTORY: downloads a Debian package and unpacks it there, without installing it.
# Further arguments are options for apt-get.
unpack() {
    local package=$1 directory=$2 work
    shift 2
    command -v apt-get >/dev/null || fail "needs Debian's apt-get to download $package"
    need dpkg-deb dpkg
    work=$(mktemp -d "$cache/download.XXXXXX")
    chmod 755 "$work"
    say "downloading $package"
    (
        cd "$work"
        apt-get -qq "$@" download "$package" 2>/dev/null ||
            { apt-get -qq "$@" update && apt-get -qq "$@" download "$package"; }
        mkdir tree
        dpkg-deb -x ./*.deb tree
    ) >&2 || { rm -rf "$work"; fail "cannot download $package; is the network there?"; }
    mkdir -p "$(dirname "$directory")"
    rm -rf "$directory"
    mv "$work/tree" "$directory"
    rm -rf "$work"
}

# versioned META: the package that a metapackage stands for, such as linux-image-6.1.0-50-amd64.
versioned() {
    local name
    for try in 1 2; do
        name=$(apt-cache depends "$1" 2>/dev/null | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
        [ -n "$name" ] && { echo "$name"; return; }
        [ "$try" = 2 ] || apt-get -qq update >&2
    done
    fail "apt-get knows no package $1"
}

# qemu_works QEMU: whether QEMU is 8.1 or newer. Before that, emulated processors go on running code that another one
# has just patched, as Linux does to itself all the time: kernels hang in an old breakpoint, or worse.
qemu_works() {
    local version
    version=$("$1" --version 2>/dev/null | sed -n 's/^QEMU emulator version \([0-9]*\)\.\([0-9]*\).*/\1 \2/p')
    [ -n "$version" ] || return 1
    # shellcheck disable=SC2086
    set -- $version
    [ "$1" -gt 8 ] || { [ "$1" = 8 ] && [ "$2" -ge 1 ]; }
}

# Sets qemu to the command, with its options, of a QEMU that emulates several processors rightly: the installed one, or
# one from Debian's backports that is unpacked into the cache and not installed. Call it with the cache locked.
find_qemu() {
    need qemu-system-x86_64 qemu-system-x86
    qemu=(qemu-system-x86_64)
    qemu_works "${qemu[0]}" && return
    local tree=$cache/qemu
    if ! qemu_works "$tree/usr/bin/qemu-system-x86_64"; then
        say "this QEMU is older than 8.1 and does not emulate several processors well; getting a newer one"
        local codename mirror apt=$cache/apt package
        codename=$(. /etc/os-release && echo "${VERSION_CODENAME-}")
        mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m1 '/debian/$') ||
            fail "needs QEMU 8.1 or newer; install it first"
        mkdir -p "$apt/lists/partial"
        echo "deb $mirror $codename-backports main" >"$apt/sources.list"
        rm -rf "$tree" "$tree.part"
        for package in qemu-system-x86 qemu-system-common qemu-system-data; do
            unpack "$package/$codename-backports" "$tree.part" -o "Dir::Etc::sourcelist=$apt/sources.list" \
                -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$apt/lists"
            mkdir -p "$tree"
            cp -a "$tree.part/." "$tree/"
        done
        rm -rf "$tree.part" "$apt"
        qemu_works "$tree/usr/bin/qemu-system-x86_64" || fail "needs QEMU 8.1 or newer; install it first"
    fi
    # The firmware of the installed one does for both.
    qemu=("$tree/usr/bin/qemu-system-x86_64" -L "$tree/usr/share/qemu" -L /usr/share/qemu -L /usr/share/seabios)
}

# The path of a static busybox.
busybox_path() {
    [ -x "$cache/busybox/bin/busybox" ] || unpack busybox-static "$cache/busybox"
    echo "$cache/busybox/bin/busybox"
}

# kernel META DIRECTORY: unpacks the kernel package behind a metapackage, with its module dependencies worked out.
kernel() {
    local meta=$1 directory=$2 version
    [ -e "$directory/complete" ] && return
    unpack "$(versioned "$meta")" "$directory"
    need depmod kmod
    version=$(basename "$directory"/boot/vmlinuz-*)
    version=${version#vmlinuz-}
    PATH=$PATH:/sbin:/usr/sbin depmod -b "$directory" "$version"
    echo "$version" >"$directory/complete"
}

# pack DIRECTORY FILE: makes an initial RAM disk of a directory.
pack() {
    local busybox
    busybox=$(busybox_path)
    (cd "$1" && find . | sort | "$busybox" cpio -o -H newc 2>/dev/null) >"$2.$$"
    mv "$2.$$" "$2"
}

# Only one script fills the cache at a time.
lock_cache() {
    need flock util-linux
    exec 9>"$cache/lock"
    flock 9
}
unlock_cache() { exec 9>&-; }
