// Memory of the threads that call.

#include "entry.h"

#include <cstdlib>

namespace {

struct Scratch {
  float* memory = nullptr;
  int64_t numbers = 0;
  ~Scratch() { free(memory); }
  void give_back() {
    free(memory);
    memory = nullptr, numbers = 0;
  }
};
thread_local Scratch kept;

constexpr int64_t MOST_KEPT = 1 << 24;  // numbers of memory that a thread keeps for its next call

}  // namespace

float* scratch_of(int64_t numbers) {
  if (numbers > kept.numbers) {
    kept.give_back();
    void* memory = nullptr;
    const bool fine = numbers < MOST && posix_memalign(&memory, 64, numbers * 4) == 0;
    kept.memory = fine ? static_cast<float*>(memory) : nullptr;
    kept.numbers = fine ? numbers : 0;
  }
  return kept.memory;
}

void give_back_large_scratch() {
  if (kept.numbers > MOST_KEPT) kept.give_back();
}
