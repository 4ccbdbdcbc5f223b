// Residual streams of hyper-connections, forward and backward: their sums by weights of the token, and Sinkhorn's matrices.

#include "activations.h"
#include "panels.h"
#include "entry.h"

namespace {

// Sums. With rows x_j, of which the last may be a sublayer's output, and weights w_jk, forward is y_k = sum_j w_jk x_j, and
//
//     dx_j = sum_k w_jk dy_k,  dw_jk = x_j dy_k
//
// A row that is read is in the nearest cache after the first sum. An item is some tokens.

constexpr int64_t TOKENS = 16;

class Token {
 public:
  Token(const StreamsCall& c, int64_t t) : c_(c), t_(t), size_(c.bf16 ? 2 : 4) {}

  void forward() const {
    for (int64_t k = 0; k < c_.outputs; ++k)
      each([&](int64_t i, int64_t n) {
        F sum{};
        for (int64_t j = 0; j < rows(); ++j) sum += take(x(j), i, n) * splat(weights(j)[k]);
        put(c_.bf16, sum, n, c_.y + ((t_ * c_.outputs + k) * c_.dim + i) * size_);
      });
  }
  void backward() const {
    for (int64_t j = 0; j < rows(); ++j) {
      char* to = j < c_.streams ? c_.dx + (t_ * c_.streams + j) * c_.dim * size_ : c_.doutput + t_ * c_.dim * size_;
      each([&](int64_t i, int64_t n) {
        F sum{};
        for (int64_t k = 0; k < c_.outputs; ++k) sum += take(dy(k), i, n) * splat(weights(j)[k]);
        put(c_.bf16, sum, n, to + i * size_);
      });
      float* slopes = j < c_.streams ? c_.dmix + (t_ * c_.streams + j) * c_.outputs : c_.dpost + t_ * c_.outputs;
      for (int64_t k = 0; k < c_.outputs; ++k) {
        F sums{};
        each([&](int64_t i, int64_t n) { sums += take(x(j), i, n) * take(dy(k), i, n); });
        slopes[k] = sum(sums);
      }
    }
  }

 private:
  int64_t rows() const { return c_.streams + (c_.output != nullptr); }
  const char* x(int64_t j) const {
    return j < c_.streams ? c_.x + (t_ * c_.streams + j) * c_.dim * size_ : c_.output + t_ * c_.dim * size_;
  }
  const float* weights(int64_t j) const {
    return j < c_.streams ? c_.mix + (t_ * c_.streams + j) * c_.outputs : c_.post + t_ * c_.outputs;
  }
  const char* dy(int64_t k) const { return c_.dy + (t_ * c_.outputs + k) * c_.dim * size_; }
  F take(const char* row, int64_t i, int64_t n) const { return get(c_.bf16, row + i * size_, n); }
  template <class Body>
  void each(Body body) const {
    for (int64_t i = 0; i < c_.dim; i += LANES) body(i, least(LANES, c_.dim - i));
  }

  const StreamsCall& c_;
  const int64_t t_, size_;
};

bool streams(const StreamsCall& c) {
  Team team(c.threads, Team::LONG);
  team.each(divide_up(c.n, TOKENS), [&](int64_t item, int64_t) {
    for (int64_t t = item * TOKENS; t < least(c.n, (item + 1) * TOKENS); ++t)
      c.backward ? Token(c, t).backward() : Token(c, t).forward();
  });
  return true;
}

int64_t check(const StreamsCall& c) {
  if (!sizes({c.n, c.streams, c.outputs, c.dim}) || c.streams < 1 || c.outputs < 1 || c.dim < 1) return BAD_SHAPE;
  if (c.bf16 < 0 || c.bf16 > 1 || c.backward < 0 || c.backward > 1) return BAD_CALL;
  const int64_t size = c.bf16 ? 2 : 4;
  const bool output = c.output != nullptr;
  bool fits = within(c.x, size, c.n, c.streams, c.dim) && within(c.mix, 4, c.n, c.streams, c.outputs);
  if (output) fits = fits && within(c.output, size, c.n, c.dim) && within(c.post, 4, c.n, c.outputs);
  if (!c.backward) return fits && within(c.y, size, c.n, c.outputs, c.dim) ? FINE : OUT_OF_BOUNDS;
  fits = fits && within(c.dy, size, c.n, c.outputs, c.dim) && within(c.dx, size, c.n, c.streams, c.dim) &&
         within(c.dmix, 4, c.n, c.streams, c.outputs);
  if (output) fits = fits && within(c.doutput, size, c.n, c.dim) && within(c.dpost, 4, c.n, c.outputs);
  return fits ? FINE : OUT_OF_BOUNDS;
}

// Sinkhorn. Matrices are turned, so that a vector has one number of LANES matrices. p is the softmax of rows, c_0 = p + eps,
// and c_i = c_{i-1} / s with s = eps + the sums of c_{i-1} over columns, over rows, over columns and so on. With the
// gradient d of c_i that of c_{i-1} is (d - sum of d c_i) / s, with that of c_0 that of the logits p (d - sum of d p).

class Matrices {
 public:
  static int64_t memory_of(const SinkhornCall& c) {  // numbers: p and all c, the gradient; forward: p alone
    return c.n_streams * c.n_streams * LANES * (c.backward ? 2 * c.iterations + 2 : 1);
  }
  Matrices(const SinkhornCall& c, float* memory) : c_(c), n_(c.n_streams), numbers_(n_ * n_), memory_(memory) {}

  void run(int64_t first) const {
    const int64_t count = least(LANES, c_.n - first), divisions = 2 * c_.iterations - 1;
    take(c_.logits, first, count, memory_);
    each_line(false, [&](int64_t at, int64_t step) { softmax(memory_ + at, step); });
    float* made = memory_;
    next(made, [&](const float* p, float* to) {
      for (int64_t i = 0; i < numbers_ * LANES; i += LANES) store(to + i, load<F>(p + i) + splat(float(c_.eps)));
    });
    for (int64_t i = 0; i < divisions; ++i)
      next(made, [&](const float* from, float* to) {
        each_line(i % 2 == 0, [&](int64_t at, int64_t step) {
          const F sum = sum_of(from + at, step);
          each_number(step, [&](int64_t k) { store(to + at + k, load<F>(from + at + k) / sum); });
        });
      });
    if (!c_.backward) return give(made, first, count);
    float* d = made + numbers_ * LANES;
    take(c_.dy, first, count, d);
    for (int64_t i = divisions - 1; i >= 0; --i, made -= numbers_ * LANES)
      each_line(i % 2 == 0, [&](int64_t at, int64_t step) {
        const F sum = sum_of(made - numbers_ * LANES + at, step), mean = products(d + at, made + at, step);
        each_number(step, [&](int64_t k) { store(d + at + k, (load<F>(d + at + k) - mean) / sum); });
      });
    each_line(false, [&](int64_t at, int64_t step) {
      const F mean = products(d + at, memory_ + at, step);
      each_number(step, [&](int64_t k) { store(d + at + k, load<F>(memory_ + at + k) * (load<F>(d + at + k) - mean)); });
    });
    give(d, first, count);
  }

 private:
  // Makes the next matrices of those at `made`: after them where backward reads both, else in their place.
  template <class Body>
  void next(float*& made, Body body) const {
    const float* from = made;
    if (c_.backward) made += numbers_ * LANES;
    body(from, made);
  }
  // Calls body(place of the first number, numbers from one to the next) for each row or column.
  template <class Body>
  void each_line(bool columns, Body body) const {
    for (int64_t i = 0; i < n_; ++i) body((columns ? i : i * n_) * LANES, (columns ? n_ : 1) * LANES);
  }
  template <class Body>
  void each_number(int64_t step, Body body) const {
    for (int64_t i = 0; i < n_; ++i) body(i * step);
  }
  F sum_of(const float* line, int64_t step) const {
    F sum{};
    each_number(step, [&](int64_t k) { sum += load<F>(line + k); });
    return sum + splat(float(c_.eps));
  }
  F products(const float* a, const float* b, int64_t step) const {
    F sum{};
    each_number(step, [&](int64_t k) { sum += load<F>(a + k) * load<F>(b + k); });
    return sum;
  }
  void softmax(float* line, int64_t step) const {
    F most = load<F>(line), sum{};
    each_number(step, [&](int64_t k) { most = larger(most, load<F>(line + k)); });
    each_number(step, [&](int64_t k) {
      const F weight = exponential(load<F>(line + k) - most);
      store(line + k, weight), sum += weight;
    });
    each_number(step, [&](int64_t k) { store(line + k, load<F>(line + k) / sum); });
  }
  void take(const float* from, int64_t first, int64_t count, float* to) const {
    const auto row = [&](int64_t t) { return reinterpret_cast<const char*>(from + (first + t) * numbers_); };
    pack<Fp32Words>(false, numbers_, count, 1, row, to);
  }
  void give(const float* from, int64_t first, int64_t count) const {
    for (int64_t i = 0; i < numbers_; i += LANES) {
      F block[LANES];
      for (int64_t k = 0; k < LANES; ++k) block[k] = i + k < numbers_ ? load<F>(from + (i + k) * LANES) : F{};
      transpose(block);
      for (int64_t t = 0; t < count; ++t) store_some(c_.y + (first + t) * numbers_ + i, block[t], numbers_ - i);
    }
  }

  const SinkhornCall& c_;
  const int64_t n_, numbers_;
  float* const memory_;
};

bool sinkhorn(const SinkhornCall& c) {
  const int64_t each = Matrices::memory_of(c);
  float* memory = scratch_of(c.threads * each);
  if (memory == nullptr) return false;
  Team team(c.threads, Team::LONG);
  team.each(divide_up(c.n, LANES), [&](int64_t item, int64_t thread) { Matrices(c, memory + thread * each).run(item * LANES); });
  return true;
}

int64_t check(const SinkhornCall& c) {
  if (!sizes({c.n, c.n_streams, c.iterations}) || c.n_streams < 1 || c.n_streams > MOST_STREAMS || c.iterations < 1 ||
      c.iterations > MOST_SIDE)
    return BAD_SHAPE;
  if (c.backward < 0 || c.backward > 1) return BAD_CALL;
  const int64_t numbers = c.n_streams * c.n_streams;
  const bool fits = within(c.logits, 4, c.n, numbers) && within(c.y, 4, c.n, numbers);
  return fits && (!c.backward || within(c.dy, 4, c.n, numbers)) ? FINE : OUT_OF_BOUNDS;
}

}  // namespace

ENTRY(streams, StreamsCall)
ENTRY(sinkhorn, SinkhornCall)
