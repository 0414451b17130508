#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Installs Kedge on this machine, or upgrades it. POSIX sh and what every Linux has. docs/install.md says more.
set -eu

usage() {
	cat <<'U'
usage: install.sh [OPTIONS] [server|agent [KEDGE OPTIONS]]

Installs Kedge as a service of systemd or OpenRC, starts it, and waits until it is ready. Run again, from a newer release, it
upgrades; pods keep running. It takes the release that it lies in, and downloads one if it lies in none.

  server, agent       what this machine is to be. Default: what it is; at first an agent if KEDGE_URL is given, else a server
  KEDGE OPTIONS       of `kedge server` or `kedge agent`: they go into the service. A token goes into a file that only root reads.
                      Without server or agent the options of the last time stay

  --config FILE       put FILE in place as /etc/kedge/config.yaml
  --release-pub FILE  accept only a release that is signed with this key
  --version VERSION   download this release instead of the latest
  --timeout SECONDS   how long to wait until Kedge is ready (600)
  --no-start          do not start it now
  --skip-check        start it even if `kedge check` says that it cannot work
  --dry-run           say what would be done, and change nothing

Variables: KEDGE_URL and KEDGE_TOKEN (server and token to join with), KEDGE_CONFIG, KEDGE_RELEASE_PUB and KEDGE_VERSION (as the options
above), KEDGE_DOWNLOAD_URL (a directory with SHA256SUMS and archives, to download from).
U
}

releases=https://github.com/kedge-io/kedge/releases
bin=/usr/local/bin/kedge
etc=/etc/kedge
newline='
'

say() { echo "install.sh: $*"; }
die() {
	say "$@" >&2
	exit 1
}
dry() { [ -n "$dry_run" ]; }

# parse takes everything off the command line and the environment. Options for Kedge are lines of $args.
parse() {
	dry_run='' no_start='' skip_check='' timeout=600 role='' args='' token='' agent_token='' changed='' joins=''
	config=${KEDGE_CONFIG:-} release_pub=${KEDGE_RELEASE_PUB:-} version=${KEDGE_VERSION:-} download_url=${KEDGE_DOWNLOAD_URL:-}
	url=${KEDGE_URL:-} env_token=${KEDGE_TOKEN:-}
	unset KEDGE_CONFIG KEDGE_RELEASE_PUB KEDGE_VERSION KEDGE_DOWNLOAD_URL KEDGE_URL KEDGE_TOKEN
	left=$(env | sed -n 's/^\(KEDGE_[A-Z_]*\)=..*/\1/p')
	[ -z "$left" ] || die "a service gets no variables: give ${left} as an option: install.sh server --some-option VALUE"
	while [ $# -gt 0 ]; do
		case $1 in
		--dry-run) dry_run=yes ;;
		--no-start) no_start=yes ;;
		--skip-check) skip_check=yes ;;
		--config | --release-pub | --version | --timeout)
			[ $# -gt 1 ] || die "$1 takes a value"
			case $1 in
			--config) config=$2 ;;
			--release-pub) release_pub=$2 ;;
			--version) version=$2 ;;
			--timeout) timeout=$2 ;;
			esac
			shift
			;;
		--config=*) config=${1#*=} ;;
		--release-pub=*) release_pub=${1#*=} ;;
		--version=*) version=${1#*=} ;;
		--timeout=*) timeout=${1#*=} ;;
		-h | --help)
			usage
			exit
			;;
		server | agent)
			role=$1
			shift
			break
			;;
		*) die "$1 is not known here (options of kedge come after server or agent); see install.sh --help" ;;
		esac
		shift
	done
	case $timeout in '' | *[!0-9]*) die "--timeout $timeout: a number of seconds is wanted" ;; esac
	for file in "$config" "$release_pub"; do [ -z "$file" ] || [ -r "$file" ] || die "$file cannot be read"; done
	guessed=''
	if [ -z "$role" ] && [ -n "$url$env_token" ]; then
		role=server guessed=yes
		[ -z "$url" ] || role=agent
	fi
	while [ $# -gt 0 ]; do
		case $1 in
		-t | -token | --token | -agent-token | --agent-token)
			[ $# -gt 1 ] || die "$1 takes a value"
			secret "$1" "$2"
			shift
			;;
		-t=* | -token=* | --token=* | -agent-token=* | --agent-token=*) secret "${1%%=*}" "${1#*=}" ;;
		*) option "$1" ;;
		esac
		case $1 in -s | -s=* | -server | -server=* | --server | --server=*) joins=yes ;; esac
		shift
	done
	if [ -n "$url" ]; then
		[ -z "$joins" ] || die "KEDGE_URL and --server are both given: leave one out"
		joins=yes
		option --server
		option "$url"
	fi
	if [ -n "$env_token" ]; then
		[ -z "$token" ] || die "KEDGE_TOKEN and --token are both given: leave one out"
		secret --token "$env_token"
	fi
}

option() {
	case $1 in *"$newline"*) die "an option must not have several lines: $1" ;; esac
	args="$args$1$newline"
}
secret() {
	[ -n "$2" ] || die "$1 is empty"
	case $1 in
	*agent-token)
		agent_token=$2
		option --agent-token-file
		option $etc/agent-token
		;;
	*)
		token=$2
		option --token-file
		option $etc/token
		;;
	esac
}

# look refuses what cannot work.
look() {
	[ "$(uname -s)" = Linux ] || die "Kedge runs on Linux"
	case $(uname -m) in
	x86_64 | amd64) arch=amd64 ;;
	aarch64 | arm64) arch=arm64 ;;
	*) die "Kedge is made for amd64 and arm64, and this machine is $(uname -m)" ;;
	esac
	if [ -d /run/systemd/system ]; then
		init=systemd service=/etc/systemd/system/kedge.service
	elif [ -d /run/openrc ] && command -v rc-service >/dev/null; then
		init=openrc service=/etc/init.d/kedge
	else
		die "neither systemd nor OpenRC runs this machine: copy kedge to $bin and have it started by what does"
	fi
	[ "$(id -u)" = 0 ] || die "only root can install: sudo sh install.sh …"
	for dir in ${bin%/*} /var/lib/kedge; do
		! noexec "$dir" || die "$dir is on a file system mounted with noexec: programs cannot run there; remount it (mount -o remount,exec MOUNTPOINT) and mend /etc/fstab"
	done
	if [ -n "$guessed" ] && [ -e $service ] && ! grep -q -e "^ExecStart=$bin $role" -e "^command_args='$role" $service; then
		die "this machine is installed as another role than $role: say server or agent"
	fi
	if [ -n "$joins" ] && [ -z "$token" ] && [ -z "$config" ] && [ ! -e $etc/config.yaml ] && [ ! -e $service ]; then
		case $newline$args in *"$newline"-token-file* | *"$newline"--token-file*) ;; *) die "a machine joins with a token: give KEDGE_TOKEN, as \`kedge token create\` prints it on a server" ;; esac
	fi
	if [ "$role" = agent ] && [ -z "$joins" ] && [ -z "$config" ] && [ ! -e $etc/config.yaml ]; then
		die "an agent joins a cluster: give KEDGE_URL and KEDGE_TOKEN, as \`kedge token create\` prints them on a server"
	fi
}

# noexec says whether programs cannot be run from a directory, which need not exist yet.
noexec() {
	awk -v dir="$1/" '
		{ point = $2; if (point != "/") point = point "/" }
		index(dir, point) == 1 && length(point) >= length(best) { best = point; options = $4 }
		END { exit ("," options ",") !~ /,noexec,/ }' /proc/mounts
}

fetch() { # FILE: from the download directory to $work
	say "downloading $from_url/$1"
	if command -v curl >/dev/null; then
		curl -fsSL --retry 3 -o "$work/$1" "$from_url/$(echo "$1" | sed 's/+/%2B/g')"
	elif command -v wget >/dev/null; then
		wget -q -O "$work/$1" "$from_url/$(echo "$1" | sed 's/+/%2B/g')"
	else
		die "neither curl nor wget is here: get the archive in another way, unpack it, and run the install.sh in it"
	fi || die "$from_url/$1 cannot be downloaded (KEDGE_DOWNLOAD_URL names another place; without a network see docs/airgap.md)"
}

# find_release sets $from: the directory with the release.
find_release() {
	case $0 in
	*install.sh)
		from=$(cd "$(dirname "$0")" && pwd)
		if [ -z "$version$download_url" ] && [ -f "$from/kedge" ] && [ -f "$from/SHA256SUMS" ]; then return; fi
		;;
	esac
	from_url=${download_url%/}
	if [ -z "$from_url" ]; then
		from_url=$releases/latest/download
		[ -z "$version" ] || from_url=$releases/download/$(echo "$version" | sed 's/+/%2B/g')
	fi
	packing=gz
	if command -v zstd >/dev/null; then packing=zst; fi
	fetch SHA256SUMS
	archive=$(awk -v start="kedge-$version" -v end="-linux-$arch.tar.$packing" \
		'index($2, start) == 1 && substr($2, length($2) - length(end) + 1) == end { print $2 }' "$work/SHA256SUMS" | sort -V | tail -n 1)
	[ -n "$archive" ] || die "$from_url/SHA256SUMS names no archive kedge-${version:-VERSION}-linux-$arch.tar.$packing"
	fetch "$archive"
	grep -F " $archive" "$work/SHA256SUMS" >"$work/sum"
	(cd "$work" && sha256sum -c sum >/dev/null 2>&1) || die "$archive is damaged: its checksum is not the one in SHA256SUMS; try again"
	if [ $packing = zst ]; then zstd -dcq "$work/$archive"; else gzip -dc "$work/$archive"; fi | tar -C "$work" -xf -
	from=$work/${archive%.tar.*}
}

# verify believes a release by the key that was given, else by the one that this machine knows, else by the release's own.
verify() {
	(cd "$from" && sha256sum -c SHA256SUMS) >"$work/log" 2>&1 ||
		die "the release in $from is damaged: $(grep -v ': OK$' "$work/log" | head -n 3)"
	case $arch$(od -An -tx1 -j18 -N1 "$from/kedge") in
	'amd64 3e' | 'arm64 b7') ;;
	*) die "the release in $from is for another architecture; this machine needs linux-$arch" ;;
	esac
	key=$from/release.pub whose="the key that it brings along: it is complete, and from whom it comes you have to know"
	[ ! -e $etc/release.pub ] || key=$etc/release.pub whose="$etc/release.pub"
	[ -z "$release_pub" ] || key=$release_pub whose=$release_pub
	if ! openssl pkeyutl -help 2>&1 | grep -q -e -rawin; then
		[ -z "$release_pub" ] || die "the signature cannot be checked with $release_pub: openssl 3 is missing; install the package openssl"
		say "checksums are right. The signature was NOT checked: openssl 3 is missing"
		return
	fi
	# The file may hold several keys, and openssl reads one.
	awk -v file="$work/key" '/^-----BEGIN/ { n++ } n { print >(file n) }' "$key"
	for k in "$work"/key*; do
		if openssl pkeyutl -verify -pubin -inkey "$k" -rawin -in "$from/SHA256SUMS" -sigfile "$from/SHA256SUMS.sig" >/dev/null 2>&1; then
			say "checksums are right, and signed with $whose"
			return
		fi
	done
	die "the release in $from is not signed with $key: it comes from somebody else, or was changed. If you have the new key from a source that you trust: --release-pub FILE"
}

# put makes FILE what SOURCE is; what was there before is kept as FILE.previous if KEEP is given.
put() { # FILE MODE SOURCE [KEEP]
	if cmp -s "$3" "$1"; then
		dry || chmod "$2" "$1"
		return
	fi
	changed=yes
	say "$1"
	! dry || return 0
	mkdir -p "${1%/*}"
	if [ -n "${4:-}" ] && [ -e "$1" ]; then cp -p "$1" "$1.previous"; fi
	rm -f "$1.new"
	(umask 077 && cp "$3" "$1.new")
	chmod "$2" "$1.new"
	mv -f "$1.new" "$1"
}

# get_ready puts the new program beside the old one: $new.
get_ready() {
	new=$bin
	if cmp -s "$from/kedge" $bin; then return; fi
	new=$from/kedge
	! dry || return 0
	new=${bin%/*}/.kedge.new
	mkdir -p "${bin%/*}"
	cp "$from/kedge" "$new"
	chmod 755 "$new"
	cmp -s "$from/kedge" "$new" || die "$new is not what was copied: look after the disk"
	"$new" version >/dev/null || die "$new does not run on this machine"
}

# check asks the program itself whether it can work here, before the first installation.
check() {
	[ -z "$skip_check" ] && [ ! -e "$service" ] || return 0
	if dry && noexec "$from"; then
		say "kedge check would be run; programs cannot be run from $from"
		return
	fi
	# The tokens are not in their place yet.
	printf %s "$args" | sed "s|^$etc/\(agent-\)*token\$|$work/\1token|" >"$work/args"
	set --
	while IFS= read -r line; do set -- "$@" "$line"; done <"$work/args"
	[ "$role" != agent ] || set -- --agent "$@"
	[ -z "$config" ] || set -- --config "$(cd "$(dirname "$config")" && pwd)/${config##*/}" "$@"
	if ! "$new" check "$@" >"$work/log" 2>&1; then
		if grep -q '^kedge: ' "$work/log"; then die "these options will not do: $(sed -n 's/^kedge: //p' "$work/log")"; fi
		cat "$work/log" >&2
		die "this machine cannot run Kedge yet: mend what says FAIL above (--skip-check goes on regardless)"
	fi
}

install_program() {
	if [ "$new" != $bin ]; then
		changed=yes
		say "$bin ($("$new" version 2>/dev/null | head -n 1))"
		if ! dry; then
			sync
			# A link first, so that there is a kedge at any time.
			[ ! -f $bin ] || ln -f $bin $bin.previous
			mv -f "$new" $bin
		fi
	fi
	for name in kubectl ctr; do
		if command -v $name >/dev/null || [ -e "${bin%/*}/$name" ] || [ -h "${bin%/*}/$name" ]; then continue; fi
		say "${bin%/*}/$name -> kedge"
		dry || ln -s kedge "${bin%/*}/$name"
	done
}

# command_line is what the service starts, quoted as its file wants it.
command_line() {
	if [ -z "$role" ] && [ -e "$service" ]; then
		if [ $init = systemd ]; then sed -n 's/^ExecStart=//p' $service; else sed -n 's/^command_args=//p' $service; fi
		return
	fi
	if [ $init = systemd ]; then
		# % and $ have a meaning in units.
		printf '%s\n%s\n%s' $bin "${role:-server}" "$args" | sed 's/[\\"]/\\&/g; s/[%$]/&&/g; s/^$/""/; \#[^A-Za-z0-9_.,:/=@%+"-]#s/.*/"&"/' | paste -s -d ' ' -
	else
		# Quoted for the shell, and once more for the assignment, which the init script hands to eval.
		printf '%s\n%s' "${role:-server}" "$args" | sed "\\#^[A-Za-z0-9_.,:/=@%+-]\{1,\}\$#! { s/'/'\\\\''/g; s/.*/'&'/; }" |
			paste -s -d ' ' - | sed "s/'/'\\\\''/g; s/.*/'&'/"
	fi
}

install_files() {
	[ -z "$config" ] || put $etc/config.yaml 600 "$config" keep
	if [ -n "$release_pub" ] || [ ! -e $etc/release.pub ]; then put $etc/release.pub 644 "$key"; fi
	for name in token agent-token; do
		[ ! -e "$work/$name" ] || put $etc/$name 600 "$work/$name" keep
	done
	template=$from/kedge.service mode=644 setting=ExecStart
	[ $init = systemd ] || template=$from/kedge.openrc mode=755 setting=command_args
	SETTING=$setting LINE=$(command_line) awk 'index($0, ENVIRON["SETTING"] "=") == 1 { $0 = ENVIRON["SETTING"] "=" ENVIRON["LINE"] } { print }' "$template" >"$work/service"
	put $service $mode "$work/service"
}

# is_current says that the Kedge that runs is the one that is installed.
is_current() {
	pid=$($bin status 2>/dev/null | sed -n '1s/.*(pid \([0-9]*\)).*/\1/p')
	[ -z "$changed" ] && [ -n "$pid" ] && [ "$(stat -L -c %d:%i "/proc/$pid/exe" 2>/dev/null)" = "$(stat -c %d:%i $bin)" ]
}

start() {
	if is_current; then
		say "nothing to do: Kedge is installed like that, and runs ($($bin version | head -n 1))"
		return
	fi
	if dry; then
		say "would then enable the service${no_start:+, and not start it}; nothing was changed"
		return
	fi
	before=$(state InvocationID)
	if [ $init = systemd ]; then
		systemctl daemon-reload
		systemctl -q enable kedge
	else
		rc-update -q add kedge default
	fi
	if [ -n "$no_start" ]; then
		say "installed, and not started"
		return
	fi
	say "starting the service"
	if [ $init = systemd ]; then systemctl restart --no-block kedge; else rc-service -q kedge restart; fi ||
		die "the service cannot be started; when the reason above is gone, run install.sh again"
	wait_ready
}

# state gives a property of the unit.
state() { [ $init != systemd ] || systemctl show -p "$1" kedge | cut -d= -f2-; }
# respawned says that OpenRC's supervisor had to start Kedge again.
respawned() { grep -q '[1-9]' /run/openrc/options/kedge/start_count 2>/dev/null; }

# progress sets $text to what Kedge waits for, and says in $stage: ready, starting or ended.
progress() {
	stage=starting text=''
	if [ $init = systemd ]; then
		[ "$(state InvocationID)" != "$before" ] || return 0 # the old one has not stopped yet
		text=$(state StatusText)
		case $(state ActiveState)/$(state SubState) in
		active/*) stage=ready ;;
		*/auto-restart | failed/* | inactive/*) stage=ended ;;
		esac
		return
	fi
	if $bin status >"$work/log" 2>/dev/null; then stage=ready; fi
	text=$(awk 'NR > 3 && NF > 3 && $3 ~ /^(waiting|starting|running|failed)$/ { print $2, $3; n++ } n == 3 { exit }' "$work/log" | paste -s -d ';' -)
	! respawned || stage=ended
}

wait_ready() {
	began=$(date +%s) shown=''
	while :; do
		progress
		seconds=$(($(date +%s) - began))
		case $stage in
		ready) break ;;
		ended)
			say "Kedge ended; the last that it said:" >&2
			if [ $init = systemd ]; then journalctl -u kedge -n 15 -o cat --no-pager; else tail -n 15 /var/log/kedge.log; fi >&2 || true
			die "the service goes on trying. When the reason is gone nothing more has to be done; with other options run install.sh again$(back)"
			;;
		esac
		if [ "$text" != "$shown" ] && [ -n "$text" ]; then
			shown=$text
			say "$(printf '%3d s: %s' $seconds "$text" | cut -c1-140)"
		fi
		[ $seconds -lt "$timeout" ] || die "not ready after $timeout s. The service goes on trying: see kedge status$(back)"
		sleep 1
	done
	say "ready after $seconds s"
	if [ -e $etc/kubeconfig.yaml ]; then
		say "try: kedge kubectl get nodes"
		say "more machines: kedge token create --role server (or agent) prints what to type there"
	fi
}

# back tells how to undo an upgrade.
back() { [ ! -e $bin.previous ] || echo "; back to the last version: mv $bin.previous $bin, and start the service again"; }

main() {
	parse "$@"
	look
	work=$(mktemp -d)
	trap 'rm -rf "$work" ${bin%/*}/.kedge.new' EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM HUP
	[ -z "$token" ] || printf '%s\n' "$token" >"$work/token"
	[ -z "$agent_token" ] || printf '%s\n' "$agent_token" >"$work/agent-token"
	find_release
	verify
	! dry || say "this would be written:"
	get_ready
	check
	install_files
	install_program
	start
}

# In one line at the end: a download that was cut off does nothing.
main "$@"
