// The entries of products, decoding steps and Muon. A call is checked against the memory that its pointers have, then run.

#pragma once

#include "team.h"
#include "tiles.h"

#include <initializer_list>

// Memory of a thread that calls, kept from call to call unless it is large. Null if there is none left.
float* scratch_of(int64_t numbers);
void give_back_large_scratch();

namespace {

constexpr int64_t MOST = int64_t{1} << 40;  // of a size, so that products of three stay in 64 bits when checked

// Runs step(call, buffers) with the memory that Buffers asks for. False if there is none left.
template <class Buffers, class Call>
INLINE bool with_memory(const Call& c, void (*step)(const Call&, const Buffers&)) {
  float* memory = scratch_of(Buffers(c, nullptr).all);
  if (memory == nullptr) return false;
  step(c, Buffers(c, memory));
  return true;
}

// True if `count` elements of `size` bytes lie within the memory of a pointer.
INLINE bool within(const void* p, int64_t bytes, int64_t size, int64_t a, int64_t b = 1, int64_t c = 1, int64_t d = 1) {
  int64_t all = size;
  for (int64_t factor : {a, b, c, d})
    if (factor < 0 || __builtin_mul_overflow(all, factor, &all)) return false;
  return all <= bytes && (all == 0 || p != nullptr);
}
template <class T>
INLINE bool within(const Span<T>& span, int64_t size, int64_t a, int64_t b = 1, int64_t c = 1, int64_t d = 1) {
  return within(span.data, span.bytes, size, a, b, c, d);
}

INLINE bool sizes(std::initializer_list<int64_t> all) {
  for (int64_t size : all)
    if (size < 0 || size > MOST) return false;
  return true;
}

INLINE bool indices_fit(const int64_t* indices, int64_t count, int64_t experts) {
  for (int64_t i = 0; i < count; ++i)
    if (indices[i] < 0 || indices[i] >= experts) return false;
  return true;
}

// Rows [b, t, width] of `size` bytes a number, whose batches are `stride` bytes apart.
INLINE bool rows_fit(const Span<const char>& rows, int64_t stride, int64_t size, int64_t b, int64_t t, int64_t width) {
  if (stride < 0 || stride > MOST || !within(rows, size, t, width)) return false;
  return b == 1 || (stride >= size * t * width && within(rows.data, rows.bytes - size * t * width, stride, b - 1));
}

template <class Call>
int64_t enter(const Call* given, int64_t bytes, int64_t (*check)(const Call&), bool (*run)(const Call&)) {
  if (bytes != sizeof(Call)) return BAD_CALL;
  const Call call = *given;
  if (call.threads < 1 || call.threads > 256) return BAD_CALL;
  if (const int64_t error = check(call)) return error;
  const bool fine = run(call);
  give_back_large_scratch();
  return fine ? FINE : NO_MEMORY;
}

}  // namespace

// `check` and `name` stand in the file that has this: whether a call fits its memory, and its kernel, false without memory.
#define ENTRY(name, Call)                                                                                    \
  extern "C" __attribute__((visibility("default"))) int64_t dsmini_##name(const Call* call, int64_t bytes) { \
    return enter<Call>(call, bytes, check, name);                                                            \
  }
