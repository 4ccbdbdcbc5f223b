// Residual streams around a layer in a decoding step: what it reads of them, and how its output is written to them.
//
// A sublayer reads one weighted sum of the streams and writes to all, which a doubly stochastic matrix mixes. All weights
// follow from one small product with the normed streams (dsmini/nn/hyper_connections.py). Norm and product are one pass:
// what a product reads is divided by the root mean square afterwards.

#include "activations.h"
#include "dots.h"
#include "entry.h"

namespace {

constexpr int64_t SOME_ROWS = 4;  // of fn, that are an item
typedef float Row __attribute__((vector_size(4 * MOST_STEP_STREAMS)));

int64_t rows_of(const StreamStepCall& c) { return c.streams * (c.iterations ? 2 + c.streams : 2); }

struct StreamBuffers {
  int64_t all = 0, wide;
  float *flat, *mixes, *inverse;
  StreamBuffers(const StreamStepCall& c, float* memory) {
    wide = padded(c.streams * c.dim);
    const auto take = [&](int64_t numbers) {
      float* at = memory == nullptr ? nullptr : memory + all;
      all += round_up(numbers, 16);
      return at;
    };
    flat = take(c.n * wide), mixes = take(c.n * rows_of(c)), inverse = take(c.n);
  }
};

float sigmoid(float x) { return 1 / (1 + expf(-x)); }

// A matrix whose rows and columns sum to about 1, in registers. It has n rows; numbers after the first n of each are 0.
void sinkhorn(Row (&comb)[MOST_STEP_STREAMS], int64_t n, int64_t iterations, float eps) {
  const auto divide_rows = [&](float more) {
    for (int64_t i = 0; i < n; ++i) {
      float all = 0;
      for (int64_t k = 0; k < n; ++k) all += comb[i][k];
      comb[i] = comb[i] / (Row{} + (all + more));
    }
  };
  for (int64_t i = 0; i < n; ++i) {
    float top = -INFINITY;
    for (int64_t k = 0; k < n; ++k) top = comb[i][k] > top ? comb[i][k] : top;
    for (int64_t k = 0; k < n; ++k) comb[i][k] = expf(comb[i][k] - top);
  }
  divide_rows(0);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < n; ++k) comb[i][k] += eps;
  for (int64_t at = 0; at < iterations; ++at) {
    if (at > 0) divide_rows(eps);
    Row all = Row{} + eps;
    for (int64_t i = 0; i < n; ++i) all += comb[i];
    for (int64_t i = 0; i < n; ++i) comb[i] = comb[i] / all;
  }
}

// The weights of a token, and the sum that the sublayer reads.
void read_token(const StreamStepCall& c, const StreamBuffers& m, int64_t token) {
  const int64_t n = c.streams;
  const float* mixes = m.mixes + token * rows_of(c);
  const auto logit = [&](int64_t part, int64_t i) { return c.scale[part] * (mixes[i] * m.inverse[token]) + c.base[i]; };
  float pre[MOST_STEP_STREAMS];
  for (int64_t i = 0; i < n; ++i) {
    pre[i] = sigmoid(logit(0, i)) + float(c.eps);
    c.post[token * n + i] = 2 * sigmoid(logit(1, n + i)) + float(c.post_eps);
  }
  if (c.iterations) {
    Row comb[MOST_STEP_STREAMS] = {};
    for (int64_t i = 0; i < n * n; ++i) comb[i / n][i % n] = logit(2, 2 * n + i);
    sinkhorn(comb, n, c.iterations, float(c.eps));
    for (int64_t i = 0; i < n * n; ++i) c.comb[token * n * n + i] = comb[i / n][i % n];
  }
  const float* x = c.x + token * n * c.dim;
  for (int64_t at = 0; at < c.dim; at += LANES) {
    F total{};
    for (int64_t i = 0; i < n; ++i) total += splat(pre[i]) * load_some(x + i * c.dim + at, c.dim - at);
    store_some(c.y + token * c.dim + at, total, c.dim - at);
  }
}

// The new streams of a token, in the place of the old ones.
void write_token(const StreamStepCall& c, int64_t token) {
  const int64_t n = c.streams;
  float* x = c.x + token * n * c.dim;
  const float *post = c.post + token * n, *comb = c.comb + token * n * n;
  for (int64_t at = 0; at < c.dim; at += LANES) {
    const int64_t some = c.dim - at;
    F old[MOST_STEP_STREAMS];
    for (int64_t i = 0; i < n; ++i) old[i] = load_some(x + i * c.dim + at, some);
    const F output = load_some(c.y + token * c.dim + at, some);
    for (int64_t k = 0; k < n; ++k) {
      F total = c.iterations ? F{} : old[k];
      for (int64_t j = 0; c.iterations && j < n; ++j) total += splat(comb[j * n + k]) * old[j];
      store_some(x + k * c.dim + at, splat(post[k]) * output + total, some);
    }
  }
}

void step(const StreamStepCall& c, const StreamBuffers& m) {
  Team team(c.threads);
  if (c.write) return team.each(c.n, [&](int64_t token, int64_t) { write_token(c, token); });
  const int64_t all = c.streams * c.dim, rows = rows_of(c);
  const Span<const char> numbers{reinterpret_cast<const char*>(c.fn.data), c.fn.bytes};
  const Matrix fn{numbers, WEIGHT_FP32, rows, all, all * 4, {nullptr, 0}};
  team.each(c.n, [&](int64_t token, int64_t) {
    const float* x = c.x + token * all;
    F squares{};
    each_vector(x, all, [&](F v, int64_t) { squares += v * v; });
    m.inverse[token] = float(1 / sqrt(double(sum(squares)) / all + c.norm_eps));
    arrange(x, all, WEIGHT_FP32, m.flat + token * m.wide);
  });
  team.each(divide_up(rows, SOME_ROWS), [&](int64_t item, int64_t) {
    const int64_t from = item * SOME_ROWS;
    product(fn, from, least(rows, from + SOME_ROWS), m.flat, m.wide, c.n, m.mixes + from, rows);
  });
  team.each(c.n, [&](int64_t token, int64_t) { read_token(c, m, token); });
}

bool stream_step(const StreamStepCall& c) { return with_memory<StreamBuffers>(c, step); }

int64_t check(const StreamStepCall& c) {
  if (!sizes({c.n, c.dim, c.streams, c.iterations}) || c.n < 1 || c.n > MOST_TOKENS || c.dim < 1 || c.streams < 1 ||
      c.streams > MOST_STEP_STREAMS)
    return BAD_SHAPE;
  if (c.write < 0 || c.write > 1) return BAD_CALL;
  if (!within(c.x, 4, c.n, c.streams, c.dim) || !within(c.y, 4, c.n, c.dim) || !within(c.post, 4, c.n, c.streams) ||
      (c.iterations && !within(c.comb, 4, c.n, c.streams, c.streams)) || !within(c.fn, 4, rows_of(c), c.streams, c.dim) ||
      !within(c.base, 4, rows_of(c)) || !within(c.scale, 4, c.iterations ? 3 : 2))
    return OUT_OF_BOUNDS;
  return FINE;
}

}  // namespace

ENTRY(stream_step, StreamStepCall)
