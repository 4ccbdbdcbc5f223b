// Functions of FP32 vectors and rows: exp, silu, RMSNorm, and rotation by position.

#pragma once

#include "lanes.h"

#include <initializer_list>
#include <math.h>

namespace {

// e^x within 2 units in the last place; 0 below -87.3, about 3e38 above 88.3. NaN stays NaN.
inline F exponential(F x) {
  const F low = splat(-87.3f), high = splat(88.3f);
  const I zero = x < low;
  x = zero ? low : x;
  x = x > high ? high : x;
  const F magic = splat(12582912.0f), turns = x * splat(1.44269504f) + magic, n = turns - magic;
  const F r = (x - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
  F y = splat(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = y * r + splat(c);
  const F power = (F)(((I)turns + (127 - 0x4B400000)) << 23);
  const F result = y * power;
  return zero ? F{} : result;
}

inline F silu(F x) { return x / (splat(1.0f) + exponential(-x)); }

// Calls body(vector of numbers i to i + LANES, i) along n numbers; the last vector is filled up with zeros.
template <class Body>
inline void each_vector(const float* x, int64_t n, Body body) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) body(load<F>(x + i), i);
  if (i < n) body(load_some(x + i, n - i), i);
}

// out = x / sqrt(mean(x^2) + eps) * weight; x and out may be the same. A weight of null is ones.
inline void rms_norm(const float* x, const float* weight, int64_t n, double eps, float* out) {
  F squares{};
  each_vector(x, n, [&](F v, int64_t) { squares += v * v; });
  float all[LANES];
  store(all, squares);
  double total = 0;
  for (float one : all) total += one;
  const F inverse = splat(float(1 / sqrt(total / n + eps)));
  each_vector(x, n, [&](F v, int64_t i) {
    store_some(out + i, weight == nullptr ? v * inverse : v * inverse * load_some(weight + i, n - i), n - i);
  });
}

// Rotates adjacent pairs by their angles, in place: (a + ib)(cos + i sin).
inline void rotate(float* x, int64_t pairs, const float* cos, const float* sin) {
  for (int64_t j = 0; j < pairs; ++j) {
    const float a = x[2 * j], b = x[2 * j + 1];
    x[2 * j] = a * cos[j] - b * sin[j], x[2 * j + 1] = b * cos[j] + a * sin[j];
  }
}
inline void rotate_back(float* x, int64_t pairs, const float* cos, const float* sin) {
  for (int64_t j = 0; j < pairs; ++j) {
    const float a = x[2 * j], b = x[2 * j + 1];
    x[2 * j] = a * cos[j] + b * sin[j], x[2 * j + 1] = b * cos[j] - a * sin[j];
  }
}

}  // namespace
