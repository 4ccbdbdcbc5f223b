// A team of threads that goes through phases together. In a phase each thread fetches items until none is left; no
// thread begins a phase before all have ended the one before.
//
// Which thread computes an item is chance, so an item must be the same arithmetic wherever it runs, and no two items
// may write the same number. Results then do not depend on the number of threads.

#pragma once

#include <atomic>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel
using Threads = int (*)();                                             // omp_get_num_threads

class Team {
 public:
  __attribute__((always_inline)) explicit Team(Threads threads) : threads_(threads) {}

  // Calls body(item) for items 0 to count - 1, and waits until all of them are done. All threads must call it.
  template <class Body>
  void each(int64_t count, Body body) {
    const int64_t size = threads_ == nullptr ? 1 : threads_();
    if (size == 1) {
      for (int64_t i = 0; i < count; ++i) body(i);
      return;
    }
    const int64_t phase = phase_.load(std::memory_order_acquire);
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) body(i);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int64_t spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) pause(spins);
  }

 private:
  static void pause(int64_t spins);

  const Threads threads_;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<int64_t> phase_{0};
};

// Runs body on up to `threads` threads at once, as one team.
template <class Body>
void as_team(Parallel parallel, Threads count, int64_t threads, Body body) {
  if (parallel == nullptr || count == nullptr || threads == 1) {
    Team alone(nullptr);
    body(alone);
    return;
  }
  struct Both {
    Team team;
    Body& body;
  } both{Team(count), body};
  parallel(
      [](void* p) {
        Both& given = *static_cast<Both*>(p);
        given.body(given.team);
      },
      &both, static_cast<unsigned>(threads), 0);
}
