// A team of threads that shares the items of a phase. The thread that calls posts a phase and takes items until none is
// left. The others take items too if they are awake: nobody waits for a thread that has not begun. So a call costs no
// more than on one thread where other processes hold the cores.
//
// A long call takes torch's threads instead, where there are any (build.py): after an operation of torch these look
// for work for milliseconds, and hold the cores that a team of our own would want.
//
// Which thread computes an item is chance, so an item must be the same arithmetic wherever it runs, and no two items
// may write the same number. Results then do not depend on the number of threads.

#pragma once

#include <cstdint>

// A call's hold of the team. While another thread of the process holds it, the call runs alone.
class Team {
 public:
  enum Length { SHORT, LONG };
  __attribute__((always_inline)) explicit Team(int64_t threads, Length length = SHORT)
      : borrowed_(length == LONG && threads > 1 && can_borrow() ? threads : 0), held_(threads > 1 && !borrowed_ && hold(threads)) {}
  __attribute__((always_inline)) ~Team() {
    if (held_) release();
  }
  Team(const Team&) = delete;

  // Calls body(item, thread) for items 0 to count - 1, and returns when all are done. Threads have numbers from 0 on.
  template <class Body>
  void each(int64_t count, Body body) {
    if (borrowed_ && count > 1)
      return borrow([](void* p, int64_t item, int64_t thread) { (*static_cast<Body*>(p))(item, thread); }, &body, count, borrowed_);
    if (!held_ || count < 2) {
      for (int64_t i = 0; i < count; ++i) body(i, 0);
      return;
    }
    share([](void* p, int64_t item, int64_t thread) { (*static_cast<Body*>(p))(item, thread); }, &body, count);
  }

 private:
  static bool can_borrow();
  static void borrow(void (*run)(void*, int64_t, int64_t), void* body, int64_t count, int64_t threads);
  static bool hold(int64_t threads);
  static void release();
  static void share(void (*run)(void*, int64_t, int64_t), void* body, int64_t count);

  const int64_t borrowed_;  // number of torch's threads
  const bool held_;
};
