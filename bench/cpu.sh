#!/bin/sh
# Every CPU figure of docs/cpu.md: run from the repository root, appends to bench/results/cpu.csv. About five minutes.
set -eu
bench() { "${PYTHON:-python3}" -m kvfold.bench "$@" --csv bench/results/cpu.csv >/dev/null; }

for context in 32768 131072; do
  bench decode --context "$context" --key-bits 4 --value-bits 4
  bench decode --context "$context" --key-bits 3 --value-bits 3
  bench decode --context "$context" --key-bits 2 --value-bits 2 --codec uniform
done
for context in 8192 65536; do
  bench decode --context "$context" --key-bits 3 --value-bits 3 --against read-floor
done
for level in avx512-vnni avx-vnni avx2; do
  bench decode --level "$level" --key-bits 4 --value-bits 4
  bench decode --level "$level" --key-bits 2 --value-bits 2 --codec uniform
done
bench decode --query-heads 8 --context 65536 --key-bits 4 --value-bits 4
bench decode --query-heads 8 --context 65536 --key-bits 2 --value-bits 2 --codec uniform
bench decode --threads 2 --clock wall --key-bits 4 --value-bits 4
bench fold --context 4096 --key-bits 4 --value-bits 4 --against torch-eager
bench fold --context 4096 --key-bits 3 --value-bits 3 --against torch-eager
bench prefill --key-bits 4 --value-bits 4 --against torch-sdpa,torch-sdpa-folded --rounds 3
