#!/bin/sh
# Folding trellis codes beside the scalar encoder of the same level (docs/cpu.md): run from the repository root, appends to
# bench/results/cpu.csv. About a minute.
set -eu
bench() { "${PYTHON:-python3}" -m kvfold.bench fold --codec trellis --against scalar "$@" --csv bench/results/cpu.csv >/dev/null; }

for level in avx512-vnni avx2; do
  bench --level "$level" --context 4096 --key-bits 2 --value-bits 2
  bench --level "$level" --context 4096 --key-bits 3 --value-bits 2
  bench --level "$level" --context 4096 --key-bits 3.5 --value-bits 2.5
done
bench --level scalar --context 1024 --key-bits 2 --value-bits 2
# One layer of recall-llama-12m.
bench --context 102400 --query-heads 4 --kv-heads 2 --key-bits 3.5 --value-bits 2.5 --rounds 5
