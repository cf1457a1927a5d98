# shellcheck shell=bash
# Shared by `images/build` and the recipes (`images/*/recipe`): Debian packages by exact version.
# Sourced after scripts/lib.sh. What it writes is under the cache's `apt/`.
#
# Images are made from packages of Debian 12 whatever the machine runs and whatever its
# /etc/apt says. The package lists are fetched once and kept, so that the versions, and with
# them the images, stay the same until `images/build --update` (or until a package has left the
# mirror: see `stale_lists`). apt checks the lists against Debian's archive keys, and every
# package against the lists.

shopt -s inherit_errexit
images_dir=$repo_dir/images
apt_dir=$(cache_dir)/apt
# A recipe ends with this status when the mirror no longer has a package of the kept lists.
stale_lists=75

# apt_setup: writes apt's configuration, and fetches the package lists if there are none yet.
apt_setup() {
    local keyring=/usr/share/keyrings/debian-archive-keyring.gpg main security
    main=$(debian_mirror)
    security=$(debian_security_mirror)
    [[ -r $keyring ]] || need_packages debian-archive-keyring
    mkdir -p "$apt_dir/none" "$apt_dir/state/lists/partial" "$apt_dir/cache/archives/partial"
    exec 8>"$apt_dir/lock"
    flock 8
    : >"$apt_dir/status"
    cat >"$apt_dir/apt.conf" <<CONF
Dir::State "$apt_dir/state";
Dir::State::status "$apt_dir/status";
Dir::Cache "$apt_dir/cache";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "srcpkgcache.bin";
Dir::Etc::sourcelist "$apt_dir/sources.list";
Dir::Etc::sourceparts "$apt_dir/none";
Dir::Etc::preferences "$apt_dir/none/none";
Dir::Etc::preferencesparts "$apt_dir/none";
APT::Architecture "amd64";
APT::Architectures "amd64";
APT::Default-Release "";
APT::Install-Recommends "false";
APT::Install-Suggests "false";
APT::Sandbox::User "root";
APT::Keep-Downloaded-Packages "true";
Binary::apt::APT::Keep-Downloaded-Packages "true";
DPkg::Post-Invoke "";
APT::Update::Post-Invoke "";
APT::Update::Post-Invoke-Success "";
Acquire::Languages "none";
Acquire::Retries "3";
CONF
    cat >"$apt_dir/sources.list.new" <<LIST
deb [signed-by=$keyring] $main bookworm main
deb [signed-by=$keyring] $main bookworm-updates main
deb [signed-by=$keyring] $security bookworm-security main
LIST
    cmp -s "$apt_dir/sources.list.new" "$apt_dir/sources.list" || rm -f "$apt_dir/fetched"
    mv "$apt_dir/sources.list.new" "$apt_dir/sources.list"
    if [[ ! -e $apt_dir/fetched ]]; then
        apt_fetch_lists
    fi
    exec 8>&-
}

# apt_update: fetches the package lists anew; packages may have newer versions afterwards.
apt_update() {
    exec 8>"$apt_dir/lock"
    flock 8
    apt_fetch_lists
    exec 8>&-
}

# What comes by -c overrides the machine's own /etc/apt/apt.conf.d, from which a proxy stays.
apt_get() { apt-get -qq -c "$apt_dir/apt.conf" "$@"; }
apt_cache() { apt-cache -c "$apt_dir/apt.conf" "$@"; }

apt_fetch_lists() {
    log "fetching Debian 12's package lists"
    rm -f "$apt_dir/fetched"
    apt_get update >&2 || die "could not fetch the package lists from $(debian_mirror)"
    : >"$apt_dir/fetched"
}

# deb_version PACKAGE: the version the kept lists offer.
deb_version() {
    local version
    version=$(apt_cache policy "$1" | sed -n 's/^  Candidate: //p')
    [[ $version && $version != '(none)' ]] || die "Debian 12 has no package named $1"
    printf '%s\n' "$version"
}

# deb_fetch PACKAGE: downloads one package, without what it depends on; prints the file's path.
deb_fetch() {
    local version file dir
    version=$(deb_version "$1")
    for file in "$apt_dir/cache/archives/$1_${version//:/%3a}"_{amd64,all}.deb; do
        [[ ! -f $file ]] || { printf '%s\n' "$file"; return; }
    done
    log "downloading $1 $version"
    dir=$(mktemp -d "$apt_dir/cache/archives/partial/$1.XXXXXX")
    (cd "$dir" && apt_get download "$1=$version" >&2) || { rm -rf "$dir"; exit "$stale_lists"; }
    file=$(echo "$dir"/*.deb)
    mv "$file" "$apt_dir/cache/archives/"
    rmdir "$dir"
    printf '%s\n' "$apt_dir/cache/archives/${file##*/}"
}

# deb_set PACKAGE...: the packages (file names) of a Debian system with these in it: the essential ones, apt, these
# packages, and everything any of them needs.
deb_set() {
    apt_get -o Dir::Cache::Archives="$apt_dir/none" install --yes --print-uris '?essential' apt "$@" |
        cut -d' ' -f2 | LC_ALL=C sort
}

# deb_repository DIR PACKAGE...: downloads what `deb_set` lists, and makes a package archive of it.
deb_repository() {
    local dir=$1 names name
    shift
    names=$(deb_set "$@")
    log "downloading $(wc -l <<<"$names") packages, as far as they are not here yet"
    apt_get install --yes --download-only '?essential' apt "$@" >&2 || exit "$stale_lists"
    mkdir "$dir"
    for name in $names; do
        ln "$apt_dir/cache/archives/$name" "$dir/" 2>/dev/null || cp "$apt_dir/cache/archives/$name" "$dir/"
        dpkg-deb --field "$dir/$name"
        printf 'Filename: ./%s\nSize: %s\nSHA256: %s\n\n' "$name" "$(stat -c %s "$dir/$name")" \
            "$(sha256sum <"$dir/$name" | cut -d' ' -f1)"
    done >"$dir/Packages"
}

# The time of everything an image build writes.
image_time=1735689600 # 2025-01-01

# bootstrap_debian TAR REPOSITORY PACKAGES OPTION...: installs Debian packages (comma-separated) from an archive that
# `deb_repository` made. Options are mmdebstrap's.
bootstrap_debian() {
    local tar=$1 repository=$2 packages=$3 mode=root
    shift 3
    ((EUID == 0)) || mode=unshare
    SOURCE_DATE_EPOCH=$image_time TMPDIR=${tar%/*} with_progress "installing Debian packages" \
        mmdebstrap --mode="$mode" --variant=apt --format=tar \
        --dpkgopt=force-unsafe-io --include="$packages" "$@" \
        '' "$tar" "deb [trusted=yes] copy:$repository ./"
}

# agent_binary: the agent's path. It is the release program of this checkout, built with the others (by itself
# it would get other features, and other bytes), unless PULAU_AGENT names another.
agent_binary() {
    local agent=${PULAU_AGENT:-}
    [[ $agent ]] || agent=$("$repo_dir/scripts/build" | tail -n 1) || die "the agent could not be built"
    [[ -f $agent ]] || die "the agent is missing: $agent"
    realpath "$agent"
}

# install_agent ROOT: puts the agent into a root file system, as /usr/lib/pulau/pulau-agent.
install_agent() {
    install -D -m 0755 "$(agent_binary)" "$1/usr/lib/pulau/pulau-agent"
    strip --strip-all "$1/usr/lib/pulau/pulau-agent"
}

# make_erofs FILE ROOT UUID OPTION...: a read-only file system image with the content of a directory. The
# same content gives the same bytes: all times are the same and the UUID is given. Padded with zeros to 2 MiB, so that
# it can also be a persistent-memory device.
make_erofs() {
    local file=$1 root=$2 uuid=$3
    shift 3
    mkfs.erofs --quiet -T$image_time -U "$uuid" "$@" "$file" "$root" >&2
    truncate -s %2M "$file"
}
