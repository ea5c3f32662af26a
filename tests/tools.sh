#!/usr/bin/env bash
# Installs what building and testing need and this machine lacks; says so. Without root it only says what is missing:
# the tests concerned are then skipped by name.
set -euo pipefail
"$(dirname "$0")/vm/tools.sh" || echo "tests/vm/tools.sh failed: tests between virtual machines may be skipped" >&2

# program:package
wanted=(
  busybox:busybox-static
  redis-server:redis-server
  python3:python3
  node:nodejs
  ip:iproute2
  make:make
  cc:gcc
  chromium:chromium
  criu:criu
)
missing=()
PATH=$PATH:/usr/sbin:/sbin
install_missing() {
  for pair in "${wanted[@]}"; do
    command -v "${pair%%:*}" >/dev/null 2>&1 || missing+=("${pair##*:}")
  done
  if [ ${#missing[@]} -eq 0 ]; then
    return
  fi
  if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "missing, and not installed (that takes root and apt-get): ${missing[*]}" >&2
    return
  fi
  echo "installing: ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  # No package may start a service of its own: the tests start what they need.
  policy=/usr/sbin/policy-rc.d
  if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
  fi
  apt-get update -qq
  # Not every release has all of them, CRIU for one.
  for package in "${missing[@]}"; do
    apt-get install -qq -y --no-install-recommends "$package" >/dev/null || echo "$package could not be installed" >&2
  done
}
install_missing
"$(dirname "$0")/criu.sh" || echo "tests/criu.sh failed: migrate is not compared with CRIU" >&2
