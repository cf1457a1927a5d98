# Updates a guest's packages: VERB ID [SECONDS]. Run by its agent as root, by whatever sh there is.
#
# What `start` starts has a session of its own: it goes on when the daemon that asked for it is gone, and the next one
# finds it by `look`. All it leaves is in a directory below /run, which the next boot forgets.
set -u
verb=$1 dir=/run/pulau-patch/$2
export LC_ALL=C DEBIAN_FRONTEND=noninteractive
# Packages and versions before and after, by name.
versions='dpkg-query -W -f "\${db:Status-Abbrev} \${binary:Package} \${Version}\\n" | sed -n "s/^i[A-Za-z]* *//p"'
update='set -e
    keep="-o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold"
    # What an update before this one was cut short at.
    dpkg --force-confdef --force-confold --configure -a
    apt-get -q -y -o APT::Update::Error-Mode=any -o DPkg::Lock::Timeout=120 update
    apt-get -q -y -o DPkg::Lock::Timeout=120 $keep upgrade --with-new-pkgs'
work='cd "$1" || exit
    eval "$3" >before
    timeout -k 30 "$2" sh -c "$4" &
    echo $! >worker
    wait $!
    code=$?
    eval "$3" >after
    awk "NR == FNR { old[\$1] = \$2; next } old[\$1] != \$2 { print \$1, \$1 in old ? old[\$1] : \"-\", \$2 }
        { seen[\$1] } END { for (name in old) if (!(name in seen)) print name, old[name], \"-\" }" before after |
        sort >changes
    echo "$code" >status.new
    mv status.new status'
case $verb in
start)
    if ! command -v apt-get >/dev/null || ! command -v setsid >/dev/null; then
        echo unsupported
        exit
    fi
    umask 077
    mkdir -p "$dir" || exit
    # Asked again, it is under way.
    mkdir "$dir/started" 2>/dev/null || exit 0
    setsid sh -c "$work" pulau-patch "$dir" "$3" "$versions" "$update" >"$dir/log" 2>&1 </dev/null &
    ;;
look)
    if [ ! -d "$dir/started" ]; then
        echo state unknown
        exit
    elif [ -e "$dir/status" ]; then
        echo state done
        echo "exit $(cat "$dir/status")"
        [ ! -e /run/reboot-required ] || echo reboot required
        sed 's/^/package /' "$dir/changes"
    else
        echo state running
    fi
    echo output
    tail -c 4096 "$dir/log"
    ;;
cancel)
    # It passes the signal on.
    kill "$(cat "$dir/worker")"
    ;;
esac
