// The threads of a team: made on first use, asleep when nothing has been posted for a while, and lost in a fork.

#include "team.h"

#include <atomic>
#include <pthread.h>
#include <sched.h>
#include <time.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t MOST_THREADS = 256;
constexpr int64_t AWAKE = 300'000;  // nanoseconds that a thread looks for work before it sleeps
constexpr int LOOKS = 64;           // at the phase between two looks at the clock

// Odd while a phase is open. A thread enters by counting itself in `inside` and looking again; the caller closes the
// phase and then waits until nobody is inside, so that no thread touches a phase that has ended.
alignas(64) std::atomic<uint32_t> phase{0};
alignas(64) std::atomic<int64_t> next{0};
alignas(64) std::atomic<int64_t> inside{0};
alignas(64) std::atomic<uint32_t> asleep{0};
std::atomic<bool> busy{false};
void (*run_item)(void*, int64_t, int64_t) = nullptr;
void* given = nullptr;
int64_t items = 0;
std::atomic<int64_t> size{1};  // threads that may take items, the caller included
int64_t made = 1;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

int64_t nanoseconds() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1'000'000'000 + t.tv_nsec;
}

void sleep_at(uint32_t seen) {
#if defined(__linux__)
  asleep.fetch_add(1);
  syscall(SYS_futex, &phase, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);  // returns if the phase is another
  asleep.fetch_sub(1);
#else
  for (long nap = 50'000; phase.load() == seen; nap = nap < 4'000'000 ? 2 * nap : nap) {  // up to 6 ms
    const timespec moment{0, nap};
    nanosleep(&moment, nullptr);
  }
#endif
}

void take_items(int64_t thread) {
  for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) run_item(given, i, thread);
}

void* work(void* number) {
  const int64_t thread = reinterpret_cast<intptr_t>(number);
  uint32_t done = 0;
  for (;;) {
    const int64_t start = nanoseconds();
    uint32_t now;
    while ((now = phase.load(std::memory_order_acquire)) == done || now % 2 == 0 || thread >= size.load()) {
      for (int i = 0; i < LOOKS && phase.load(std::memory_order_relaxed) == now; ++i) relax();
      if (nanoseconds() - start > AWAKE) {
        sleep_at(now);
        break;
      }
    }
    if (now == done || now % 2 == 0 || thread >= size.load()) continue;
    inside.fetch_add(1);
    if (phase.load() == now) take_items(thread);
    inside.fetch_sub(1);
    done = now;
  }
  return nullptr;
}

// Torch's GOMP_parallel, or null.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<Parallel> torch_parallel{nullptr};

struct Borrowed {
  void (*run)(void*, int64_t, int64_t);
  void* body;
  int64_t count;
  std::atomic<int64_t> next{0}, thread{0};
};

void take_borrowed(void* p) {
  Borrowed& work = *static_cast<Borrowed*>(p);
  const int64_t thread = work.thread.fetch_add(1);
  for (int64_t i; (i = work.next.fetch_add(1, std::memory_order_relaxed)) < work.count;) work.run(work.body, i, thread);
}

// A child has one thread, and what the others held is nobody's. It has lost torch's threads too.
void forget() {
  phase = 0, next = 0, inside = 0, asleep = 0, busy = false, size = 1, made = 1, torch_parallel = nullptr;
}

bool watch_forks() {
  static const bool watched = pthread_atfork(nullptr, nullptr, forget) == 0;
  return watched;
}

bool make_threads(int64_t threads) {
  const bool watched = watch_forks();
  for (; watched && made < threads; ++made) {
    pthread_t thread;
    if (pthread_create(&thread, nullptr, work, reinterpret_cast<void*>(made)) != 0) break;
    pthread_detach(thread);
  }
  return made > 1;
}

}  // namespace

bool Team::can_borrow() { return torch_parallel.load() != nullptr; }

void Team::borrow(void (*run)(void*, int64_t, int64_t), void* body, int64_t count, int64_t threads) {
  Borrowed work{run, body, count};
  torch_parallel.load()(take_borrowed, &work, unsigned(threads), 0);
}

extern "C" __attribute__((visibility("default"))) void dsmini_borrow(Parallel parallel) {
  torch_parallel = watch_forks() ? parallel : nullptr;
}

bool Team::hold(int64_t threads) {
  if (busy.exchange(true)) return false;
  threads = threads < MOST_THREADS ? threads : MOST_THREADS;
  if (!make_threads(threads)) {
    busy = false;
    return false;
  }
  size = threads;
  return true;
}

void Team::release() { busy = false; }

void Team::share(void (*run)(void*, int64_t, int64_t), void* body, int64_t count) {
  run_item = run, given = body, items = count;
  next.store(0);
  phase.fetch_add(1);
#if defined(__linux__)
  if (asleep.load() != 0) syscall(SYS_futex, &phase, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#endif
  take_items(0);
  phase.fetch_add(1);
  for (int64_t spins = 0; inside.load() != 0; ++spins) {
    if (spins < 4096)
      relax();
    else
      sched_yield();
  }
}
