// The library's own threads: started on first use, parked between calls, recreated after a fork.
#ifndef KVFOLD_POOL_H
#define KVFOLD_POOL_H

#include <cstdint>
#include <functional>

namespace kvfold {

// Calls body(i) for i in [0, count) on up to `threads` threads, the caller's included, and returns when all are done. Indices are
// handed out in order. If another caller is using the pool, everything runs on this thread: results never depend on threads.
void parallel_for(int threads, std::int64_t count, const std::function<void(std::int64_t)>& body);

}  // namespace kvfold
#endif
