// Memory that Python lends for a call, and a weight in it. structs.py reads both structs, as those of calls.h.

#pragma once

#include <cstdint>

// Codes are E4M3 with an FP32 scale for each block, or E2M1, two a byte with the first in the low half, with a scale in UE8M0
// for each FOUR_BLOCK. ..._BF16: products of such codes are wanted in BF16, where that is faster.
enum WeightType : int64_t { WEIGHT_FP32, WEIGHT_BF16, WEIGHT_E4M3, WEIGHT_E4M3_BF16, WEIGHT_E2M1, WEIGHT_E2M1_BF16, WEIGHT_TYPES };
constexpr int64_t BLOCK = 128;      // rows and columns that share a scale, in E4M3
constexpr int64_t FOUR_BLOCK = 32;  // numbers of a row that share a scale, in E2M1: codes of four bits

// Inlined always: a function with linkage that was compiled for AVX-512 might be linked for a CPU without it.
#define INLINE __attribute__((always_inline)) inline

// Runs a function on several threads, as GOMP_parallel does.
typedef void Parallel(void (*)(void*), void*, unsigned, unsigned);

// An address, and the bytes from there on.
template <class T>
struct Span {
  T* data;
  int64_t bytes;
  INLINE operator T*() const { return data; }
};

struct Matrix {
  Span<const char> data;
  int64_t type;
  int64_t rows, columns;
  int64_t stride;           // bytes from a row to the next
  Span<const char> scales;  // contiguous: FP32 [rows / BLOCK, columns / BLOCK] or bytes [rows, columns / FOUR_BLOCK], rounded up

  INLINE bool none() const { return data == nullptr && rows == 0; }
  INLINE bool codes() const { return type >= WEIGHT_E4M3; }
  INLINE bool fours() const { return type >= WEIGHT_E2M1; }
  INLINE const char* row(int64_t i) const { return data + i * stride; }
  INLINE const float* scales_of(int64_t i) const {
    return reinterpret_cast<const float*>(scales.data) + i / BLOCK * ((columns + BLOCK - 1) / BLOCK);
  }
  INLINE const char* exponents_of(int64_t i) const { return scales + i * ((columns + FOUR_BLOCK - 1) / FOUR_BLOCK); }
  // Bytes of the scales of a matrix of `count` such rows.
  INLINE int64_t scale_bytes(int64_t count) const {
    if (fours()) return count * ((columns + FOUR_BLOCK - 1) / FOUR_BLOCK);
    return codes() ? 4 * ((count + BLOCK - 1) / BLOCK) * ((columns + BLOCK - 1) / BLOCK) : 0;
  }

  // True if this is a matrix of that shape, not in E2M1, and all of it lies within its memory.
  INLINE bool fits(int64_t want_rows, int64_t want_columns) const { return !fours() && fits_stack(1, want_rows, want_columns); }

  // True if this is `count` matrices of that shape, one after the other, each with scales of its own.
  INLINE bool fits_stack(int64_t count, int64_t want_rows, int64_t want_columns) const {
    int64_t want;
    if (__builtin_mul_overflow(count, want_rows, &want)) return false;
    if (type < 0 || type >= WEIGHT_TYPES || rows != want || columns != want_columns) return false;
    if (rows < 0 || columns < 0 || stride < 0) return false;
    if (rows == 0 || columns == 0) return true;
    constexpr int64_t HALVES[] = {8, 4, 2, 2, 1, 1};  // of a byte, for a number
    int64_t last, row, end, all;
    if (__builtin_mul_overflow(rows - 1, stride, &last) || __builtin_mul_overflow(columns, HALVES[type], &row)) return false;
    row = row / 2 + row % 2;
    if (__builtin_add_overflow(last, row, &end) || stride < row || data == nullptr || end > data.bytes)
      return false;
    if (!codes()) return true;
    return !__builtin_mul_overflow(count, scale_bytes(want_rows), &all) && scales != nullptr && all <= scales.bytes;
  }
};

// Matrix number `index` of a stack of matrices with `rows` rows each.
INLINE Matrix part_of(const Matrix& stack, int64_t index, int64_t rows) {
  Matrix one = stack;
  one.data.data += index * rows * stack.stride, one.data.bytes -= index * rows * stack.stride, one.rows = rows;
  if (stack.codes()) one.scales.data += index * stack.scale_bytes(rows);
  return one;
}
