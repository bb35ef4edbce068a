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

}  // namespace kvfold
