#!/usr/bin/env bash
# Runs each target of tests/fuzz, or those named as arguments, under libFuzzer, FUZZ executions each (1,000,000), and keeps the inputs that reach something in
# tests/fuzz/corpus. What makes a target fail stays in target/fuzz/found.
set -euo pipefail
cd "$(dirname "$0")"
runs=${FUZZ:-1000000}
host=x86_64-unknown-linux-gnu
out=$PWD/../../target/fuzz
mkdir -p "$out/found"
# What cargo-fuzz asks of the compiler, with a stable one: coverage in the way libFuzzer counts it.
flags="--cfg fuzzing -Cpasses=sancov-module -Ccodegen-units=4"
for f in level=4 inline-8bit-counters pc-table trace-compares; do flags+=" -Cllvm-args=-sanitizer-coverage-$f"; done
(cd run && CARGO_TARGET_DIR=$out/build RUSTFLAGS=$flags cargo build --release --quiet --target $host --bin migrate-fuzz-run)
(cd run && CARGO_TARGET_DIR=$out/build cargo build --release --quiet --bin corpus)
fuzz=$out/build/$host/release/migrate-fuzz-run
corpus=$out/build/release/corpus
targets=("$@")
[ ${#targets[@]} -gt 0 ] || mapfile -t targets < <(ls corpus)
failed=0
for target in "${targets[@]}"; do
  export FUZZ_TARGET=$target
  rm -rf "$out/$target" "$out/$target.kept"
  mkdir -p "$out/$target" "$out/$target.kept"
  [ ! -e "corpus/$target" ] || "$corpus" unpack "corpus/$target" "$out/$target"
  if "$fuzz" "$out/$target" -runs="$runs" -artifact_prefix="$out/found/$target-" -rss_limit_mb=1024 -timeout=10 -max_len=24576 \
    -print_final_stats=1 -verbosity=0 >"$out/$target.log" 2>&1; then
    echo "$target: $(sed -n 's/stat::number_of_executed_units: *//p' "$out/$target.log") executions, nothing found"
  else
    failed=1
    echo "$target: failed, see $out/$target.log and $out/found"
    tail -n 5 "$out/$target.log"
  fi
  "$fuzz" -merge=1 "$out/$target.kept" "$out/$target" >>"$out/$target.log" 2>&1
  "$corpus" pack "$out/$target.kept" "corpus/$target"
done
exit $failed
