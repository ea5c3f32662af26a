#!/usr/bin/env bash
# CRIU is older than many a kernel, and does not work with it. Where the installed one does not, gets one of a newer Debian release into
# target/criu: only downloaded and unpacked, with the libraries and the loader of its own release. Says what it cannot get, and ends well.
set -euo pipefail
cd "$(dirname "$0")/.."
target=${CARGO_TARGET_DIR:-target}
PATH=$PATH:/usr/sbin:/sbin

without() {
  echo "$*: migrate is not compared with CRIU" >&2
  exit 0
}
[ "$(id -u)" -eq 0 ] || without "whether CRIU works with this kernel only root can tell"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

works() { # program
  "$1" check >/dev/null 2>&1 || return 1
  # It looks at little: 4.1 on Linux 6.18 is content, and fails with the first socket.
  setsid bash -c 'exec 3<>/dev/udp/127.0.0.1/9 && exec sleep 60' </dev/null >/dev/null 2>&1 &
  local pid=$! code=0
  disown
  for _ in {1..100}; do
    [ "$(cat "/proc/$pid/comm" 2>/dev/null)" != sleep ] || break
    sleep 0.01
  done
  rm -rf "$work/images"
  mkdir "$work/images"
  "$1" dump --tree "$pid" --images-dir "$work/images" >/dev/null 2>&1 || code=1
  kill -KILL "$pid" 2>/dev/null || true
  return "$code"
}
works criu && exit 0
[ -x "$target/criu/criu" ] && works "$target/criu/criu" && exit 0
for tool in apt-get apt-cache dpkg; do
  command -v "$tool" >/dev/null || without "no CRIU that works with this kernel, and none to be had without $tool"
done
mkdir -p "$target"
dir=$(cd "$target" && pwd)/criu
trap 'rm -rf "$work" "$dir.new"' EXIT

# The machine's own package sources with another release, in lists of this script's own.
codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
release() { # suite
  rm -rf "$work"/{parts,lists,deb,tree}
  mkdir -p "$work"/{parts,lists/partial,deb,tree}
  for list in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
    [ -e "$list" ] || continue
    sed -nE "s/^(deb .*[[:space:]])$codename([[:space:]].*)\$/\1$1\2/p" "$list" >>"$work/parts/release.list"
  done
  for list in /etc/apt/sources.list.d/*.sources; do
    [ -e "$list" ] || continue
    awk -v RS= -v ORS='\n\n' -v from="$codename" -v to="$1" '
      $0 ~ "(^|\n)Suites:([^\n]*[ \t])?" from "([ \t][^\n]*)?(\n|$)" { sub(/Suites:[^\n]*/, "Suites: " to); print }
    ' "$list" >>"$work/parts/release.sources"
  done
  # Nothing counts as installed: of the libraries that this machine has as well the release's own are wanted.
  options=(-qq -o Dir::Etc::SourceList=/dev/null -o "Dir::Etc::SourceParts=$work/parts" -o "Dir::State::Lists=$work/lists"
    -o Dir::State::status=/dev/null -o "Dir::Cache::pkgcache=$work/pkgcache.bin" -o "Dir::Cache::srcpkgcache=$work/srcpkgcache.bin"
    -o APT::Sandbox::User=root)
  apt-get "${options[@]}" update || return 1
  local packages
  mapfile -t packages < <(apt-cache "${options[@]}" depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks \
    --no-replaces --no-enhances criu | grep -E '^(criu$|lib)' | sort -u)
  [ ${#packages[@]} -gt 1 ] || return 1
  (cd "$work/deb" && apt-get "${options[@]}" download "${packages[@]}") || return 1
  for deb in "$work"/deb/*.deb; do
    dpkg -x "$deb" "$work/tree" || return 1
  done
}

# Keeps the program, the loader and the libraries that it asks for.
keep() {
  local program loader libraries
  program=$(find "$work/tree" -path '*/sbin/criu' -type f)
  loader=$(find "$work/tree" -name 'ld-linux*.so.*' -type f | head -n 1)
  libraries=$(find "$work/tree" -name '*.so.*' -printf '%h\n' | sort -u | paste -sd:)
  [ -n "$program" ] && [ -n "$loader" ] || return 1
  rm -rf "$dir.new"
  mkdir -p "$dir.new"/{bin,lib}
  cp "$program" "$dir.new/bin/criu"
  cp "$loader" "$dir.new/lib/ld.so"
  "$loader" --inhibit-cache --library-path "$libraries" --list "$program" |
    awk -v own="$work/tree/" 'index($3, own) == 1 { print $3 }' | xargs -r cp -Lt "$dir.new/lib"
  cat >"$dir.new/criu" <<'WRAPPER'
#!/bin/sh
# CRIU with the libraries and the loader beside it, wherever this directory is.
here=${0%/*}
[ -e "$here/lib/ld.so" ] || here=$(dirname "$(readlink -f "$0")")
exec "$here/lib/ld.so" --inhibit-cache --library-path "$here/lib" --argv0 criu "$here/bin/criu" "$@"
WRAPPER
  chmod 755 "$dir.new/criu" "$dir.new/bin/criu" "$dir.new/lib/ld.so"
}

for suite in trixie sid; do
  [ "$suite" != "$codename" ] || continue
  echo "getting CRIU of Debian $suite"
  release "$suite" 2>"$work/log" && keep 2>>"$work/log" && works "$dir.new/criu" || {
    tail -n 5 "$work/log" >&2
    continue
  }
  # In one step, whole or not at all.
  rm -rf "$dir"
  mv "$dir.new" "$dir"
  exit 0
done
without "no CRIU that works with this kernel could be had"
