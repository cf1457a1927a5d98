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
    [[ $dir == /* ]] || die "PULAU_CACHE must be an absolute path, not '$dir'"
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

    local source="deb $(debian_mirror) bookworm-backports main"
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
