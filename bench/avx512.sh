#!/bin/sh
# The CPU figures of docs/cpu.md for a machine with AVX-512 and no AMX: run from the repository root, appends to bench/results/cpu.csv.
# About seven minutes. Arguments choose among its parts: short, long, rest, prefill.
set -eu
bench() { "${PYTHON:-python3}" -m kvfold.bench "$@" --csv bench/results/cpu.csv >/dev/null; }

widths() { # widths OPTIONS: scalar codes, then trellis codes
  bench decode "$@" --key-bits 4 --value-bits 4
  bench decode "$@" --key-bits 3 --value-bits 3
  bench decode "$@" --key-bits 2 --value-bits 2 --codec uniform
  bench decode "$@" --key-bits 3 --value-bits 3 --codec trellis --against read-floor
  bench decode "$@" --key-bits 2 --value-bits 2 --codec trellis --against read-floor
  bench decode "$@" --key-bits 3.5 --value-bits 2.5 --codec trellis --against read-floor
}

for part in ${*:-short long rest prefill}; do
  case $part in
    short) widths --context 32768 ;;
    long) widths --context 131072 --rounds 5 ;;
    rest)
      for context in 8192 65536; do bench decode --context "$context" --key-bits 4 --value-bits 4 --against read-floor; done
      bench decode --level avx2 --key-bits 4 --value-bits 4
      bench decode --level avx2 --key-bits 2 --value-bits 2 --codec uniform
      bench decode --query-heads 8 --context 65536 --key-bits 4 --value-bits 4
      bench decode --query-heads 8 --context 65536 --key-bits 2 --value-bits 2 --codec uniform
      bench fold --context 4096 --key-bits 4 --value-bits 4 --against torch-eager
      ;;
    prefill) bench prefill --key-bits 4 --value-bits 4 --against torch-sdpa,torch-sdpa-folded --rounds 1 ;;
  esac
done
