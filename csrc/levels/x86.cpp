#include "x86.h"

#include <cpuid.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kvfold {
namespace {

struct Leaf { unsigned eax = 0, ebx = 0, ecx = 0, edx = 0; };

Leaf cpuid(unsigned leaf, unsigned sub) {
  Leaf out;
  if (__get_cpuid_count(leaf, sub, &out.eax, &out.ebx, &out.ecx, &out.edx) == 0) return Leaf{};
  return out;
}

bool bit(unsigned value, int index) { return ((value >> index) & 1u) != 0; }

// Register state the operating system saves: bits 1-2 SSE and AVX, 5-7 AVX-512, 17-18 AMX tiles.
std::uint64_t saved_state() {
  if (!bit(cpuid(1, 0).ecx, 27)) return 0;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

bool os_saves(std::uint64_t mask) { return (saved_state() & mask) == mask; }

bool request_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

const char* find_avx2_reason() {
  const Leaf basic = cpuid(1, 0), extended = cpuid(7, 0);
  if (!bit(extended.ebx, 5)) return "the processor has no AVX2";
  if (!bit(basic.ecx, 12) || !bit(basic.ecx, 29)) return "the processor has no FMA or F16C";
  return os_saves(0x6) ? "" : "the operating system does not save AVX registers";
}

const char* find_avx_vnni_reason() {
  if (find_avx2_reason()[0] != '\0') return find_avx2_reason();
  return bit(cpuid(7, 1).eax, 4) ? "" : "the processor has no AVX-VNNI";
}

const char* find_avx512_vnni_reason() {
  const Leaf leaf = cpuid(7, 0);
  if (!bit(leaf.ebx, 16) || !bit(leaf.ebx, 17) || !bit(leaf.ebx, 30) || !bit(leaf.ebx, 31))
    return "the processor has no AVX-512 F, DQ, BW and VL";
  if (!bit(leaf.ecx, 1) || !bit(leaf.ecx, 6) || !bit(leaf.ecx, 8) || !bit(leaf.ecx, 11))
    return "the processor has no AVX-512 VBMI, VBMI2, GFNI and VNNI";
  return os_saves(0xE6) ? find_avx2_reason() : "the operating system does not save AVX-512 registers";
}

const char* find_amx_reason() {
  if (find_avx512_vnni_reason()[0] != '\0') return find_avx512_vnni_reason();
  const Leaf leaf = cpuid(7, 0);
  if (!bit(leaf.edx, 24) || !bit(leaf.edx, 25)) return "the processor has no AMX int8 tiles";
  if (!os_saves(0x60000)) return "the operating system does not save AMX tiles";
  return request_tiles() ? "" : "the operating system refused permission to use AMX tiles";
}

}  // namespace

// cpuid leaves a virtual machine and takes microseconds there: asked once.
const char* avx2_reason() {
  static const char* const reason = find_avx2_reason();
  return reason;
}

const char* avx_vnni_reason() {
  static const char* const reason = find_avx_vnni_reason();
  return reason;
}

const char* avx512_vnni_reason() {
  static const char* const reason = find_avx512_vnni_reason();
  return reason;
}

const char* amx_reason() {
  static const char* const reason = find_amx_reason();
  return reason;
}

}  // namespace kvfold
