#!/bin/bash
# Four checks; the reward is their share.
passed=0
check() { "$@" && passed=$((passed + 1)); }
from=$(mktemp -d)
mkdir -p "$from/deep er/yet"
echo one > "$from/plain.txt"
echo two > "$from/deep er/two words.txt"
echo three > "$from/deep er/yet/three.txt"
echo four > "$from/deep er/four.md"
to=$(mktemp -d)/new
bash /app/backup.sh "$from" "$to"
check cmp -s "$from/plain.txt" "$to/plain.txt"
check cmp -s "$from/deep er/two words.txt" "$to/deep er/two words.txt"
check cmp -s "$from/deep er/yet/three.txt" "$to/deep er/yet/three.txt"
check test -d "$to" -a ! -e "$to/deep er/four.md" -a "$passed" -gt 0
printf '{"reward": %s, "copied": %s}' "$(awk "BEGIN {print $passed / 4}")" "$passed" > /logs/verifier/reward.json
