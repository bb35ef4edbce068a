// The ordered list of levels in this build, best first.
#ifndef KVFOLD_LEVELS_H
#define KVFOLD_LEVELS_H

#include <vector>

#include "levels/level.h"

namespace kvfold {

const std::vector<const Level*>& levels();

// The level of that index, the best available one for -1, null if it cannot run here.
const Level* choose_level(int index);

// What writes trellis codes at a level.
const TrellisEncoder& trellis_encoder(const Level& level);
bool usable(const kvf_trellis& code);

}  // namespace kvfold
#endif
