// RMSNorm in training: y = x r w with r = 1 / sqrt(mean(x^2) + eps) of each row, and with the gradient dy of y
//
//     dx = r (dy w - x r mean(dy w x r)),  dw = sum over rows of dy x r
//
// An item is a block of rows. Sums over rows are added block by block, whatever the number of threads.

#include "dots.h"
#include "entry.h"

#include <math.h>

namespace {

constexpr int SUMS = 4;  // so that one addition need not wait for the one before

// A row's numbers as vectors: calls body(place, numbers there: a vector's or fewer, which of SUMS).
template <class Body>
void each(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + SUMS * LANES <= n; i += SUMS * LANES) UNROLL for (int s = 0; s < SUMS; ++s) body(i + s * LANES, LANES, s);
  for (; i < n; i += LANES) body(i, least(LANES, n - i), 0);
}
template <class T>
inline F take(const char* x, int64_t i, int64_t n) {
  x += i * sizeof(typename T::Bits);
  return n == LANES ? T::get(x) : get(sizeof(typename T::Bits) == 2, x, n);
}
float total(const F (&sums)[SUMS]) { return sum((sums[0] + sums[1]) + (sums[2] + sums[3])); }

template <class T>
void forward(const TrainedNormCall& c, int64_t row) {
  constexpr int64_t size = sizeof(typename T::Bits);
  const char* x = c.x + row * c.x_stride;
  F squares[SUMS] = {};
  each(c.dim, [&](int64_t i, int64_t n, int s) {
    const F v = take<T>(x, i, n);
    squares[s] += v * v;
  });
  c.inverse[row] = float(1 / sqrt(total(squares) / double(c.dim) + c.eps));
  const F inverse = splat(c.inverse[row]);
  each(c.dim, [&](int64_t i, int64_t n, int) {
    put(size == 2, take<T>(x, i, n) * inverse * load_some(c.weight + i, n), n, c.y + (row * c.dim + i) * size);
  });
}

template <class T>
void backward(const TrainedNormCall& c, int64_t row, float* sums) {
  constexpr int64_t size = sizeof(typename T::Bits);
  const char *x = c.x + row * c.x_stride, *dy = c.dy + row * c.dim * size;
  const F inverse = splat(c.inverse[row]);
  F products[SUMS] = {};
  each(c.dim, [&](int64_t i, int64_t n, int s) {
    const F product = take<T>(dy, i, n) * take<T>(x, i, n) * inverse;
    store(sums + i, load<F>(sums + i) + product);
    products[s] += product * load_some(c.weight + i, n);
  });
  const F mean = splat(total(products) / c.dim) * inverse;
  each(c.dim, [&](int64_t i, int64_t n, int) {
    const F dx = (take<T>(dy, i, n) * load_some(c.weight + i, n) - take<T>(x, i, n) * mean) * inverse;
    put(size == 2, dx, n, c.y + (row * c.dim + i) * size);
  });
}

template <class T>
void run_rows(const TrainedNormCall& c, int64_t from, int64_t to, float* sums) {
  for (int64_t row = from; row < to; ++row) c.backward ? backward<T>(c, row, sums) : forward<T>(c, row);
}

bool trained_norm(const TrainedNormCall& c) {
  const int64_t rows = larger<int64_t>(16, divide_up(c.n, 64)), blocks = divide_up(c.n, rows);
  const int64_t width = round_up(c.dim, 16);
  float* sums = scratch_of(c.backward ? blocks * width : 1);
  if (sums == nullptr) return false;
  Team team(c.threads, Team::LONG);
  team.each(blocks, [&](int64_t block, int64_t) {
    float* of_block = c.backward ? sums + block * width : nullptr;
    if (c.backward) memset(of_block, 0, width * 4);
    const auto run = c.bf16 ? run_rows<Bf16> : run_rows<Fp32>;
    run(c, block * rows, least(c.n, (block + 1) * rows), of_block);
  });
  if (c.backward)
    each(c.dim, [&](int64_t i, int64_t n, int) {
      F sum{};
      for (int64_t block = 0; block < blocks; ++block) sum += load<F>(sums + block * width + i);
      store_some(c.dw + i, sum, n);
    });
  return true;
}

int64_t check(const TrainedNormCall& c) {
  if (!sizes({c.n, c.dim}) || c.n < 1 || c.dim < 1) return BAD_SHAPE;
  if (c.bf16 < 0 || c.bf16 > 1 || c.backward < 0 || c.backward > 1) return BAD_CALL;
  const int64_t size = c.bf16 ? 2 : 4;
  if (!rows_fit(c.x, c.x_stride, size, c.n, 1, c.dim) || !within(c.weight, 4, c.dim) ||
      !within(c.inverse, 4, c.n) || !within(c.y, size, c.n, c.dim))
    return OUT_OF_BOUNDS;
  if (c.backward && (!within(c.dy, size, c.n, c.dim) || !within(c.dw, 4, c.dim)))
    return OUT_OF_BOUNDS;
  return FINE;
}

}  // namespace

ENTRY(trained_norm, TrainedNormCall)
