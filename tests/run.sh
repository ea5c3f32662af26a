#!/usr/bin/env bash
# Builds and runs the whole suite; the last line is "N passed, N failed, N skipped". MIGRATE_BIN names another binary to test.
set -uo pipefail
cd "$(dirname "$0")/.."
log=$(mktemp)
MIGRATE_SKIPS=$(mktemp)
export MIGRATE_SKIPS
trap 'rm -f "$log" "$MIGRATE_SKIPS"' EXIT
# Two cores, and every test has two hosts with an agent each: more tests at once starve them and make their timings worthless.
export RUST_TEST_THREADS=${RUST_TEST_THREADS:-1}

failed_builds=0
run() { # what, limit in seconds, arguments of cargo test
  local what=$1 limit=$2
  shift 2
  echo "== $what"
  local own
  own=$(mktemp)
  timeout --kill-after=30 "$limit" cargo test --no-fail-fast "$@" 2>&1 |
    tee "$own" |
    grep -vE '^(running [0-9]+ tests?|test .* \.\.\. ok|)$'
  local status=${PIPESTATUS[0]}
  # 101 is cargo's word for a failed test or a failed build; a failed test shows in the log as well.
  if [ "$status" -ne 0 ]; then
    if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
      echo "$what: not done after $limit s"
      failed_builds=$((failed_builds + 1))
    elif ! grep -q '^test result: FAILED' "$own"; then
      echo "$what: cargo test ended with $status"
      failed_builds=$((failed_builds + 1))
    fi
  fi
  cat "$own" >>"$log"
  rm -f "$own"
}

cargo build --quiet --package migrate-guests --bin migrate-guest || failed_builds=1
run "unit tests" 1200 --workspace --lib --bins
run "documentation tests" 600 --workspace --doc
rest=()
for test in tests/*.rs tests/*/main.rs; do
  case $test in
    */main.rs) name=$(basename "$(dirname "$test")") ;;
    *) name=$(basename "$test" .rs) ;;
  esac
  case $name in
    selftest | scale | vm | guests | harness) ;;
    *) rest+=(--test "$name") ;;
  esac
done
for dir in migrate/tests transport/tests; do
  [ -d "$dir" ] && run "tests of ${dir%/tests}" 900 --package "migrate-$(basename "${dir%/tests}" | sed 's/^migrate$/engine/')" --tests
done
run "hosts and guests" 600 --test selftest
run "two hosts" 3000 "${rest[@]}"
# One at a time: each has two machines, and there are two cores.
RUST_TEST_THREADS=1 run "virtual machines" 900 --test vm
# One at a time: these print figures.
RUST_TEST_THREADS=1 run "large trees" 900 --test scale

passed=$(sed -nE 's/^test result: .* ([0-9]+) passed.*/\1/p' "$log" | awk '{n += $1} END {print n + 0}')
failed=$(sed -nE 's/^test result: .* ([0-9]+) failed.*/\1/p' "$log" | awk '{n += $1} END {print n + 0}')
skipped=$(sort -u "$MIGRATE_SKIPS" | wc -l)
ignored=$(sed -nE 's/^test result: .* ([0-9]+) ignored.*/\1/p' "$log" | awk '{n += $1} END {print n + 0}')
failed=$((failed + failed_builds))
# A skipped test returns early, and cargo counts it as passed.
passed=$((passed - skipped))
if [ "$skipped" -gt 0 ]; then
  echo "skipped:"
  sort -u "$MIGRATE_SKIPS" | sed 's/^/  /'
fi
if [ "$failed" -gt 0 ]; then
  echo "failed:"
  sed -nE 's/^test (.*) \.\.\. FAILED$/  \1/p' "$log" | sort -u
fi
echo "$passed passed, $failed failed, $((skipped + ignored)) skipped"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
