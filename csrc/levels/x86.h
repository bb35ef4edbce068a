// What this x86 processor and operating system allow. Compiled without any SIMD flag.
#ifndef KVFOLD_X86_H
#define KVFOLD_X86_H

namespace kvfold {

const char* avx2_reason();
const char* avx_vnni_reason();
const char* avx512_vnni_reason();
const char* amx_reason();

}  // namespace kvfold
#endif
