#include "levels.h"

namespace kvfold {

const std::vector<const Level*>& levels() {
  static const std::vector<const Level*> all = {
#if defined(__x86_64__) || defined(_M_X64)
#if defined(__linux__)
      &kAmx,
#endif
      &kAvx512Vnni, &kAvxVnni, &kAvx2,
#elif defined(__aarch64__)
      &kNeon,
#endif
      &kScalar};
  return all;
}

const Level* choose_level(int index) {
  const auto& all = levels();
  if (index >= static_cast<int>(all.size())) return nullptr;
  if (index >= 0) return all[index]->reason()[0] == '\0' ? all[index] : nullptr;
  for (const Level* level : all)
    if (level->reason()[0] == '\0') return level;
  return nullptr;
}

const TrellisEncoder& trellis_encoder(const Level& level) {
#if defined(__x86_64__) || defined(_M_X64)
  if (&level == &kAvx2 || &level == &kAvxVnni) return kEncodeAvx2;
  if (&level != &kScalar) return kEncodeAvx512;
#elif defined(__aarch64__)
  if (&level == &kNeon) return kEncodeNeon;
#endif
  (void)level;
  return kEncodeScalar;
}

bool usable(const kvf_trellis& code) {
  if (code.period < 1 || code.period > KVF_TRELLIS_PERIOD || code.levels < 1 || code.levels > KVF_TRELLIS_LEVELS) return false;
  if (code.starts == 0 || code.shift < 0 || code.shift > 15 || code.grid < 1 || code.clip < 0 || code.clip > 1 << 14) return false;
  for (int i = 0; i < code.period; ++i)
    if (code.width[i] < 1 || code.width[i] > KVF_TRELLIS_WIDTH || code.index[i] == nullptr) return false;
  return true;
}

}  // namespace kvfold
