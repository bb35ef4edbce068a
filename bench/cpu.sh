#!/bin/sh
# Every CPU figure of docs/cpu.md: run from the repository root, appends to bench/results/cpu.csv. About ten minutes.
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
# Trellis codes beside the scalar codec of the same width; 2.5 and 1.5 bits have none.
for dim in 128 64; do
  bench decode --head-dim "$dim" --context 131072 --key-bits 3 --value-bits 3 --against read-floor
  bench decode --head-dim "$dim" --context 131072 --key-bits 3 --value-bits 3 --codec trellis --against read-floor
  bench decode --head-dim "$dim" --context 131072 --key-bits 2 --value-bits 2 --codec uniform --against read-floor
  bench decode --head-dim "$dim" --context 131072 --key-bits 2 --value-bits 2 --codec trellis --against read-floor
done
bench decode --context 131072 --key-bits 3.5 --value-bits 3 --codec trellis
bench decode --context 131072 --key-bits 2.5 --value-bits 1.5 --codec trellis
bench decode --level avx2 --key-bits 3 --value-bits 3 --codec trellis --against read-floor
bench decode --head-dim 96 --key-bits 4 --value-bits 4
bench decode --head-dim 96 --key-bits 3 --value-bits 3
bench decode --query-heads 8 --context 65536 --key-bits 4 --value-bits 4
bench decode --query-heads 8 --context 65536 --key-bits 2 --value-bits 2 --codec uniform
bench decode --threads 2 --clock wall --key-bits 4 --value-bits 4
bench fold --context 4096 --key-bits 4 --value-bits 4 --against torch-eager
bench fold --context 4096 --key-bits 3 --value-bits 3 --against torch-eager
bench prefill --key-bits 4 --value-bits 4 --against torch-sdpa,torch-sdpa-folded --rounds 3
