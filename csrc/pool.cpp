#include "pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <unistd.h>
#endif

namespace kvfold {
namespace {

constexpr int kMaxThreads = 256;

class Pool {
 public:
  void run(int threads, const std::function<void()>& body) {
    while (static_cast<int>(workers_.size()) < threads - 1) {
      const int index = static_cast<int>(workers_.size());
      workers_.emplace_back([this, index, seen = generation_] { park(index, seen); });
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      body_ = &body;
      wanted_ = running_ = threads - 1;
      ++generation_;
    }
    start_.notify_all();
    body();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void park(int index, std::uint64_t seen) {
    for (;;) {
      const std::function<void()>* body = nullptr;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        start_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        if (index >= wanted_) continue;
        body = body_;
      }
      (*body)();
      const std::lock_guard<std::mutex> lock(mutex_);
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable start_, done_;
  const std::function<void()>* body_ = nullptr;
  std::uint64_t generation_ = 0;
  int wanted_ = 0, running_ = 0;
};

std::int64_t process_id() {
#if defined(_WIN32)
  return 0;
#else
  return getpid();
#endif
}

// A forked child inherits the object but not its threads; the old one is abandoned, never destroyed, because its mutexes may be held.
struct Shared {
  Pool* pool = new Pool;
  std::atomic<bool> busy{false};
  std::int64_t process = process_id();
};

Shared& shared() {
  static std::atomic<Shared*> current{new Shared};
  Shared* mine = current.load();
  if (mine->process != process_id()) {
    auto* fresh = new Shared;
    if (current.compare_exchange_strong(mine, fresh)) return *fresh;
    delete fresh->pool;
    delete fresh;
    mine = current.load();
  }
  return *mine;
}

}  // namespace

void parallel_for(int threads, std::int64_t count, const std::function<void(std::int64_t)>& body) {
  threads = static_cast<int>(std::min<std::int64_t>(std::min(threads, kMaxThreads), count));
  std::atomic<std::int64_t> next{0};
  const std::function<void()> drain = [&] {
    for (std::int64_t i; (i = next.fetch_add(1)) < count;) body(i);
  };
  if (threads <= 1) return drain();
  Shared& mine = shared();
  if (mine.busy.exchange(true)) return drain();
  mine.pool->run(threads, drain);
  mine.busy = false;
}

}  // namespace kvfold
