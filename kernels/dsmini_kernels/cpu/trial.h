// Calls of all functions of a library with sizes that no vector divides, in memory of exact sizes: build.py tries a new
// library with them, and tests run them under sanitizers.

#pragma once

#include "tiles.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace {

constexpr int64_t NUMBER_BYTES[] = {4, 2, 1, 1};  // of types of a cache, and of a weight but those of four bits

// Bytes of any type.
struct Lent {
  void* data;
  int64_t bytes;
  template <class T>
  operator Span<T>() const {
    return {static_cast<T*>(data), bytes};
  }
};

// The memory of a call, all zero.
class Memory {
 public:
  ~Memory() {
    while (count_ > 0) free(held_[--count_]);
  }
  Lent bytes(int64_t size) {
    if (size == 0) return {nullptr, 0};
    void* data = calloc(1, size);
    if (data == nullptr || count_ == MOST) abort();
    held_[count_++] = data;
    return {data, size};
  }
  Matrix matrix(int64_t rows, int64_t columns, int64_t type, int64_t count = 1) {
    const int64_t stride = type < WEIGHT_E2M1 ? columns * NUMBER_BYTES[type] : divide_up(columns, 2);
    Matrix made{bytes(count * rows * stride), type, count * rows, columns, stride, {}};
    made.scales = bytes(count * made.scale_bytes(rows));
    return made;
  }
  // Experts of token-expert pairs: most pairs have the first, an odd number the last, and none the one before.
  Lent chosen(int64_t pairs, int64_t experts) {
    const Lent indices = bytes(8 * pairs);
    int64_t* at = static_cast<int64_t*>(indices.data);
    for (int64_t i = 0; i < pairs; ++i) at[i] = i % 7 == 3 ? experts - 1 : i % 3 % (experts - 2);
    return indices;
  }

 private:
  static constexpr int MOST = 64;
  void* held_[MOST];
  int count_ = 0;
};

// The name of the first function that refused a call, or null.
struct Trial {
  const char* failed = nullptr;
  template <class Call>
  void run(const char* name, int64_t (*function)(const Call*, int64_t), const Call& call) {
    if (failed == nullptr && function(&call, sizeof call) != FINE) failed = name;
  }
};

}  // namespace

// Returns null, or what does not work.
extern "C" __attribute__((visibility("default"))) const char* dsmini_try();
