#!/usr/bin/env bash
# Gets what the tests between virtual machines need into target/vm: QEMU is installed, two of Debian's kernels and virtiofsd are only
# downloaded and unpacked. Says what it cannot get, and ends well: the tests concerned are then skipped by name.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=${CARGO_TARGET_DIR:-target}
mkdir -p "$target/vm"
dir=$(cd "$target/vm" && pwd)
PATH=$PATH:/usr/sbin:/sbin

# In the order they are loaded; what a kernel has built in is no file there.
modules=(virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci failover net_failover virtio_net virtio_console fuse virtiofs
  unix_diag inet_diag tcp_diag udp_diag
  # Hosts within a machine, and CRIU.
  af_packet_diag netlink_diag veth crc32c_generic libcrc32c nfnetlink nf_tables)
kernels=(6.1 6.12)

complete() { # kernel
  [ "$(cat "$dir/$1/modules" 2>/dev/null)" = "${modules[*]}" ]
}
missing=()
command -v qemu-system-x86_64 >/dev/null || missing+=(qemu)
for v in "${kernels[@]}"; do
  complete "$v" || missing+=("kernel $v")
done
[ -x "$dir/virtiofsd" ] || missing+=(virtiofsd)
[ ${#missing[@]} -eq 0 ] && exit 0

without() {
  echo "$*: the tests between virtual machines that need it will be skipped" >&2
}
if [ "$(uname -m)" != x86_64 ] || [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  without "missing, and not installed (that takes x86-64, root and apt-get): ${missing[*]}"
  exit 0
fi
echo "getting for the virtual machines: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
work=$(mktemp -d)
policy=/usr/sbin/policy-rc.d
made_policy=
trap 'rm -rf "$work"; [ -z "$made_policy" ] || rm -f "$policy"' EXIT

# The machine's own package sources, with the backports of its release from the same place, in lists of this script's own.
codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
mkdir -p "$work/parts" "$work/lists/partial"
for list in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
  [ -e "$list" ] || continue
  cp "$list" "$work/parts/$(basename "${list%.list}").list"
  sed -nE "s/^(deb .*[[:space:]])$codename([[:space:]].*)\$/\1$codename-backports\2/p" "$list" >>"$work/parts/backports.list"
done
for list in /etc/apt/sources.list.d/*.sources; do
  [ -e "$list" ] || continue
  cp "$list" "$work/parts/"
  awk -v RS= -v ORS='\n\n' -v suite="$codename" '
    $0 ~ "(^|\n)Suites:([^\n]*[ \t])?" suite "([ \t][^\n]*)?(\n|$)" { sub(/Suites:[^\n]*/, "Suites: " suite "-backports"); print }
  ' "$list" >>"$work/parts/backports.sources"
done
options=(-qq -o Dir::Etc::SourceList=/dev/null -o "Dir::Etc::SourceParts=$work/parts" -o "Dir::State::Lists=$work/lists"
  -o "Dir::Cache::pkgcache=$work/pkgcache.bin" -o "Dir::Cache::srcpkgcache=$work/srcpkgcache.bin" -o APT::Sandbox::User=root)
if ! apt-get "${options[@]}" update; then
  # A mirror without backports is no reason to go without the rest.
  rm -f "$work"/parts/backports.*
  apt-get "${options[@]}" update || without "no package lists"
fi

if ! command -v qemu-system-x86_64 >/dev/null; then
  if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    made_policy=1
  fi
  # Of qemu-utils, where it is installed, the version of the backports is common: nothing may be removed for the other one.
  install=(apt-get "${options[@]}" install -y --no-remove --no-install-recommends)
  "${install[@]}" -t "$codename-backports" qemu-system-x86 >"$work/log" 2>&1 || "${install[@]}" qemu-system-x86 >"$work/log" 2>&1 || {
    tail -n 5 "$work/log" >&2
    without "QEMU could not be installed"
  }
fi

unpack() { # package, or package/suite: unpacked in $work/tree
  rm -rf "$work/deb" "$work/tree"
  mkdir "$work/deb"
  (cd "$work/deb" && apt-get "${options[@]}" download "$1" 2>"$work/log") || return 1
  dpkg -x "$work"/deb/*.deb "$work/tree"
}

for v in "${kernels[@]}"; do
  complete "$v" && continue
  mapfile -t names < <(apt-cache "${options[@]}" pkgnames "linux-image-$v." |
    grep -E '^linux-image-[0-9.-]+(\+deb[0-9]+)?-cloud-amd64-unsigned$' | sort -rV | head -n 3)
  for name in "${names[@]}"; do
    unpack "$name" || continue
    kernel=$dir/$v.new
    rm -rf "$dir/$v" "$kernel"
    mkdir "$kernel"
    mv "$work"/tree/boot/vmlinuz-* "$kernel/vmlinuz"
    n=10
    for module in "${modules[@]}"; do
      file=$(find "$work/tree" -name "$module.ko" -o -name "$module.ko.xz" | head -n 1)
      n=$((n + 1))
      case $file in
        *.xz) xz -dc "$file" >"$kernel/$n-$module.ko" ;;
        ?*) cp "$file" "$kernel/$n-$module.ko" ;;
      esac
    done
    echo "${modules[*]}" >"$kernel/modules"
    # In one step, whole or not at all.
    mv "$kernel" "$dir/$v"
    break
  done
  complete "$v" || without "kernel $v could not be had"
done

if [ ! -x "$dir/virtiofsd" ]; then
  # A package of its own since Debian 13, part of QEMU before.
  for package in virtiofsd "qemu-system-common/$codename"; do
    unpack "$package" || continue
    file=$(find "$work/tree/usr" -name virtiofsd -type f | head -n 1)
    [ -n "$file" ] && ldd "$file" | grep -q 'not found' && continue
    [ -n "$file" ] && install -m 755 "$file" "$dir/virtiofsd" && break
  done
  [ -x "$dir/virtiofsd" ] || without "virtiofsd could not be had"
fi
exit 0
