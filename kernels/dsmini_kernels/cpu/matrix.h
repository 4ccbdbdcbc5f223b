// Memory that Python lends for a call, and a weight in it. structs.py reads both structs, as those of calls.h.

#pragma once

#include <cstdint>

// WEIGHT_E4M3_BF16: codes like those of WEIGHT_E4M3, whose products are wanted in BF16, where that is faster.
enum WeightType : int64_t { WEIGHT_FP32, WEIGHT_BF16, WEIGHT_E4M3, WEIGHT_E4M3_BF16, WEIGHT_TYPES };
constexpr int64_t BLOCK = 128;  // rows and columns that share a scale, in E4M3

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
  int64_t stride;            // bytes from a row to the next
  Span<const float> scales;  // [rows / BLOCK, columns / BLOCK], rounded up, contiguous; of E4M3 only

  INLINE bool none() const { return data == nullptr && rows == 0; }
  INLINE bool codes() const { return type >= WEIGHT_E4M3; }
  INLINE const char* row(int64_t i) const { return data + i * stride; }
  INLINE const float* scales_of(int64_t i) const { return scales + i / BLOCK * ((columns + BLOCK - 1) / BLOCK); }

  // True if this is a matrix of that shape, and all of it lies within its memory.
  INLINE bool fits(int64_t want_rows, int64_t want_columns) const { return fits_stack(1, want_rows, want_columns); }

  // True if this is `count` matrices of that shape, one after the other, each with scales of its own.
  INLINE bool fits_stack(int64_t count, int64_t want_rows, int64_t want_columns) const {
    int64_t want;
    if (__builtin_mul_overflow(count, want_rows, &want)) return false;
    if (type < 0 || type >= WEIGHT_TYPES || rows != want || columns != want_columns) return false;
    if (rows < 0 || columns < 0 || stride < 0) return false;
    if (rows == 0 || columns == 0) return true;
    constexpr int64_t SIZES[] = {4, 2, 1, 1};
    int64_t last, row, end, all;
    if (__builtin_mul_overflow(rows - 1, stride, &last) || __builtin_mul_overflow(columns, SIZES[type], &row) ||
        __builtin_add_overflow(last, row, &end) || stride < row || data == nullptr || end > data.bytes)
      return false;
    if (!codes()) return true;
    const int64_t down = count * ((want_rows - 1) / BLOCK + 1), across = (columns - 1) / BLOCK + 1;
    return !__builtin_mul_overflow(down, across, &all) && !__builtin_mul_overflow(all, int64_t{4}, &all) &&
           scales != nullptr && all <= scales.bytes;
  }
};

// Matrix number `index` of a stack of matrices with `rows` rows each.
INLINE Matrix part_of(const Matrix& stack, int64_t index, int64_t rows) {
  Matrix one = stack;
  one.data.data += index * rows * stack.stride, one.data.bytes -= index * rows * stack.stride, one.rows = rows;
  if (stack.codes()) one.scales.data += index * ((rows + BLOCK - 1) / BLOCK) * ((stack.columns + BLOCK - 1) / BLOCK);
  return one;
}
