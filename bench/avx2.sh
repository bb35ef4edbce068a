#!/bin/sh
# The CPU figures of docs/cpu.md for a machine without AVX-512: run from the repository root, appends to bench/results/cpu.csv. About
# five minutes. Arguments choose among its parts: short, long, rest.
set -eu
bench() { "${PYTHON:-python3}" -m kvfold.bench "$@" --csv bench/results/cpu.csv >/dev/null; }

widths() { # widths OPTIONS: scalar codes, then trellis codes, those of `balanced` last
  bench decode "$@" --key-bits 4 --value-bits 4
  bench decode "$@" --key-bits 3 --value-bits 3
  bench decode "$@" --key-bits 2 --value-bits 2 --codec uniform
  bench decode "$@" --key-bits 3 --value-bits 3 --codec trellis
  bench decode "$@" --key-bits 2 --value-bits 2 --codec trellis
  bench decode "$@" --key-bits 3.5 --value-bits 2.5 --codec trellis
}

for part in ${*:-short long rest}; do
  case $part in
    short) widths --context 32768 ;;
    long) widths --context 131072 --against read-floor,torch-sdpa-folded ;;
    rest)
      bench decode --context 131072 --head-dim 64 --key-bits 3 --value-bits 3 --against read-floor,torch-sdpa-folded
      bench decode --context 131072 --head-dim 64 --key-bits 3 --value-bits 3 --codec trellis --against read-floor,torch-sdpa-folded
      bench decode --context 65536 --query-heads 8 --key-bits 4 --value-bits 4
      bench decode --threads 2 --clock wall --key-bits 4 --value-bits 4
      bench fold --context 4096 --key-bits 4 --value-bits 4 --against torch-eager
      bench fold --context 4096 --key-bits 3 --value-bits 3 --codec trellis --against torch-eager
      bench prefill --key-bits 4 --value-bits 4 --against torch-sdpa,torch-sdpa-folded --rounds 3
      ;;
  esac
done
