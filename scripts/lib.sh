# shellcheck shell=bash
# Helpers shared by the scripts: messages, the cache, content addresses, and Debian packages.
# Sourced by bash scripts with `set -euo pipefail`; it runs nothing by itself and changes no state
# outside the cache, except that `need_packages` installs Debian packages after saying which.

# The checkout these scripts belong to.
repo_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

log() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { log "error: $*"; exit 1; }

# The cache outside the tree. Everything in it can be made again; deleting it is always safe.
cache_dir() {
    local dir=${PULAU_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/pulau}
    # It becomes part of command lines of QEMU and of kernels, which give other characters a meaning.
    [[ $dir =~ ^/[A-Za-z0-9_./@+-]+$ ]] ||
        die "the cache must be an absolute path of letters, digits and _./@+-, not '$dir' (set PULAU_CACHE)"
    [[ -d $dir ]] || (umask 077 && mkdir -p "$dir") || die "cannot create the cache directory $dir"
    printf '%s\n' "$dir"
}

# The directory that is writable, under the same path, both here and in the test host: whatever a run
# writes there (reports, benchmark results) is on this machine at once.
out_dir() {
    local dir
    dir=$(cache_dir)/out
    mkdir -p "$dir"
    printf '%s\n' "$dir"
}

# hash_inputs ARG...: a short content address. Files and directories count by their content and
# permissions, anything else as a plain string.
hash_inputs() {
    local arg
    for arg in "$@"; do
        if [[ -d $arg ]]; then
            (cd "$arg" && find . -type f -printf '%P %m\n' | LC_ALL=C sort | while read -r file mode; do
                printf '%s %s ' "$file" "$mode"
                sha256sum <"$file"
            done)
        elif [[ -f $arg ]]; then
            sha256sum <"$arg"
        else
            printf 'string %s\n' "$arg"
        fi
    done | sha256sum | cut -c1-16
}

# Archives that Debian's own packages come from; a local mirror may take their place.
debian_mirror() { printf '%s\n' "${PULAU_DEBIAN_MIRROR:-http://deb.debian.org/debian}"; }
debian_security_mirror() {
    printf '%s\n' "${PULAU_DEBIAN_SECURITY_MIRROR:-http://deb.debian.org/debian-security}"
}

package_installed() {
    [[ $(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null) == installed ]]
}

# need_packages NAME...: makes sure that Debian packages are installed. NAME/bookworm-backports takes
# a package (at any installed version) from backports, adding that source where it is missing. Without
# root it prints the command to run and ends the script.
need_packages() {
    command -v dpkg-query >/dev/null ||
        die "this needs a Debian system (or these programs installed by hand): $*"
    local name missing=() backports=()
    for name in "$@"; do
        package_installed "${name%/*}" && continue
        case $name in
            */bookworm-backports) backports+=("${name%/*}") ;;
            *) missing+=("$name") ;;
        esac
    done
    ((${#missing[@]} + ${#backports[@]})) || return 0

    local source
    source="deb $(debian_mirror) bookworm-backports main"
    local list=/etc/apt/sources.list.d/bookworm-backports.list
    local codename
    codename=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
    # Releases after bookworm have new enough versions of their own.
    if [[ $codename != bookworm ]]; then
        missing+=("${backports[@]}")
        backports=()
    fi
    if ((EUID != 0)); then
        log "these Debian packages are needed: ${missing[*]} ${backports[*]}"
        log "install them as root:"
        if ((${#backports[@]})) && ! has_backports; then
            printf '    echo %q >%s\n' "$source" "$list" >&2
        fi
        printf '    apt-get update\n' >&2
        ((${#missing[@]} == 0)) ||
            printf '    apt-get install --no-install-recommends %s\n' "${missing[*]}" >&2
        ((${#backports[@]} == 0)) ||
            printf '    apt-get install --no-install-recommends -t bookworm-backports %s\n' "${backports[*]}" >&2
        exit 1
    fi

    log "installing Debian packages: ${missing[*]} ${backports[*]}"
    if ((${#backports[@]})) && ! has_backports; then
        log "adding the package source: $source"
        printf '%s\n' "$source" >"$list"
    fi
    # One apt at a time: several scripts may get here together.
    (
        flock 9
        export DEBIAN_FRONTEND=noninteractive
        apt=(apt-get -qq -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3)
        "${apt[@]}" update
        ((${#missing[@]} == 0)) || "${apt[@]}" install -y --no-install-recommends "${missing[@]}"
        ((${#backports[@]} == 0)) ||
            "${apt[@]}" install -y --no-install-recommends -t bookworm-backports "${backports[@]}"
    ) 9>/run/lock/pulau-apt.lock </dev/null >&2 || die "could not install: ${missing[*]} ${backports[*]}"
}

# unpacked_package NAME: a directory with the files of a Debian package that is not installed, since installing it
# would start its service.
unpacked_package() {
    local dir work
    dir=$(cache_dir)/packages/$1
    if [[ ! -d $dir ]]; then
        mkdir -p "${dir%/*}"
        work=$(mktemp -d "${dir%/*}/.$1.XXXXXX")
        log "downloading the Debian package $1"
        (
            cd "$work"
            download=(apt-get -qq -o APT::Sandbox::User=root -o Acquire::Retries=3 download "$1")
            "${download[@]}" 2>/dev/null || { apt-get -qq update && "${download[@]}"; }
            dpkg-deb -x "$1"_*.deb root
        ) >&2 || { rm -rf "$work"; die "the Debian package $1 could not be downloaded"; }
        # Somebody else may have been quicker.
        mv -T "$work/root" "$dir" 2>/dev/null || [[ -d $dir ]]
        rm -rf "$work"
    fi
    printf '%s\n' "$dir"
}

has_backports() { apt-cache policy 2>/dev/null | grep -q 'a=bookworm-backports\|n=bookworm-backports'; }

# with_progress LABEL COMMAND...: runs a long command, its output in a log file that is shown only when
# it fails; meanwhile says every 15 seconds how long it has been at it.
with_progress() {
    local label=$1 out status=0 start=$SECONDS pid
    shift
    out=$(mktemp)
    log "$label ..."
    "$@" >"$out" 2>&1 </dev/null &
    pid=$!
    local tick=0
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.2
        if ((++tick % 75 == 0)); then
            log "$label: $((SECONDS - start)) s so far; $(tail -n 1 "$out" | tr -d '\r' | cut -c1-100)"
        fi
    done
    wait "$pid" || status=$?
    if ((status)); then
        tail -n 60 "$out" >&2
        log "$label: failed (exit status $status)"
    else
        log "$label: done in $((SECONDS - start)) s"
    fi
    rm -f "$out"
    return "$status"
}

# need_rust: cargo, and the C parts it links with. rustup is not a Debian package, and Debian's own
# cargo is too old, so this can only say what to do.
need_rust() {
    local wanted
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$repo_dir/Cargo.toml")
    if ! command -v cargo >/dev/null && [[ -x $HOME/.cargo/bin/cargo ]]; then
        PATH=$HOME/.cargo/bin:$PATH
    fi
    command -v cargo >/dev/null || die "cargo is missing: install Rust $wanted or newer with rustup
    (https://rustup.rs), for example:  curl https://sh.rustup.rs -sSf | sh -s -- -y --profile minimal"
    need_packages gcc libc6-dev
}

# Where cargo puts programs: programs_dir release|debug. They are built for a named target; see
# .cargo/config.toml.
programs_dir() {
    local host target=${CARGO_TARGET_DIR:-$repo_dir/target}
    host=$(rustc -vV | sed -n 's/^host: //p')
    [[ $target == /* ]] || target=$PWD/$target
    printf '%s/%s/%s\n' "$target" "$host" "$1"
}

# image TARGET: the path of a guest image, built if it is not in the cache; see images/build --help.
image() { "$repo_dir/images/build" "$1" | tail -n 1; }

# place_to_run PROGRAMS: prints `here` or `test-host`: where microVMs run. `pulau doctor` tells, by running
# a guest. PULAU_PLACE=here or PULAU_PLACE=test-host decides without asking.
place_to_run() {
    local pulau=$1/pulau
    case ${PULAU_PLACE:-} in
        here | test-host) printf '%s\n' "$PULAU_PLACE"; return ;;
        '') ;;
        *) die "PULAU_PLACE is '$PULAU_PLACE'; it can be here or test-host" ;;
    esac
    if ! timeout 60 "$pulau" doctor --check kvm --quiet; then
        log "this machine has no KVM that runs ordinary guests (\`pulau doctor\` says why): using the test host"
        printf 'test-host\n'
    elif ! timeout 60 "$pulau" doctor --quiet; then
        timeout 60 "$pulau" doctor >&2 || true
        log "KVM is real here, but something else is missing (above): using the test host"
        printf 'test-host\n'
    else
        log "KVM is real here: using this machine"
        printf 'here\n'
    fi
}
