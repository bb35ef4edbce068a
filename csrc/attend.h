#ifndef KVFOLD_ATTEND_H
#define KVFOLD_ATTEND_H

#include "levels/level.h"

namespace kvfold {

void attend(const kvf_attend_request& request, const Level& level);

}  // namespace kvfold
#endif
