// Absorbed attention of each query to the rows of a cache that it chose, for any number of queries.
//
// All heads of a query read the same rows. A CPU that multiplies BF16 numbers takes rows in BF16 as they are: for the
// logits with the heads as the tokens of a panel, for the values with the weights of two keys as a word. The result of a
// block of keys is added to FP32 sums, relative to the largest logit so far (Milakov and Gimelshein 2018). All else is
// computed as in a decoding step, in FP32.

#include "attention.h"
#include "panels.h"
#include "entry.h"

namespace {

#if BF16_UNITS
constexpr int64_t SOME = 64;              // keys of a block
constexpr int64_t CHUNK = 2 * LANES;      // numbers of a row in a vector
constexpr int64_t HEADS_AT_ONCE = 8;      // whose sums stay in registers
#endif

bool in_pairs(const TopkAttentionCall& c) {
#if BF16_UNITS
  return c.bf16 && c.latent % CHUNK == 0 && c.width % 2 == 0 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// The memory of a thread; sizes in numbers.
struct Own {
  int64_t all = 0, vectors, heads, q_stride, sums_stride;
  int32_t* list;
  float *q, *logits, *values, *sums, *high, *total, *keep, *scratch;
  int64_t* last;

  Own(const TopkAttentionCall& c, float* memory) {
    const auto take = [&](int64_t numbers) {
      float* at = memory == nullptr ? nullptr : memory + all;
      all += round_up(numbers, 16);
      return at;
    };
    list = reinterpret_cast<int32_t*>(take(round_up(c.k, 64)));
#if BF16_UNITS
    if (in_pairs(c)) {
      vectors = divide_up(least(c.heads, MOST_VECTORS * LANES), LANES), heads = vectors * LANES;
      sums_stride = c.latent;
      q = take(heads * words_of<Bf16Words>(c.width));
      logits = take(SOME * heads);
      values = take(SOME / 2 * c.latent);
      sums = take(heads * sums_stride);
      high = take(heads), total = take(heads), keep = take(heads);
      return;
    }
#endif
    heads = c.heads, q_stride = round_up(c.width, UNIT), sums_stride = round_up(c.latent, UNIT);
    q = take(heads * q_stride);
    sums = take(heads * sums_stride);
    high = take(heads), total = take(heads);
    last = reinterpret_cast<int64_t*>(take(2 * heads));
    scratch = take(scratch_for(heads, q_stride));
  }
};

struct Buffers {
  int64_t all = 0, each;
  float* owned;
  Buffers(const TopkAttentionCall& c, float* memory) {
    each = Own(c, nullptr).all, owned = memory, all = c.threads * each;
  }
};

void attend_in_fp32(const TopkAttentionCall& c, const Own& own, const char* q, const char* rows, int64_t n, char* out) {
  const int64_t size = c.bf16 ? 2 : 4, type = c.bf16 ? CACHE_BF16 : CACHE_FP32;
  for (int64_t h = 0; h < c.heads; ++h) {
    float* to = own.q + h * own.q_stride;
    decode_numbers(type, q + h * c.width * size, c.width, to);
    for (int64_t i = 0; i < c.width; ++i) to[i] *= float(c.scale);
    memset(to + c.width, 0, (own.q_stride - c.width) * 4);
    own.last[h] = n - 1;
  }
  const Rows stored{rows, type, c.width * size, c.latent, c.width - c.latent};
  attend_part(stored, 0, n, own.q, own.q_stride, c.heads, own.last, own.high, own.total, own.sums, own.sums_stride,
              own.scratch, own.list);
  for (int64_t h = 0; h < c.heads; ++h) {
    float* sums = own.sums + h * own.sums_stride;
    for (int64_t i = 0; i < c.latent; ++i) sums[i] /= own.total[h];
    encode_numbers(type, sums, c.latent, out + h * c.latent * size);
  }
}

#if BF16_UNITS
// The weights of `some` keys in the place of their logits: for each two keys a vector of words, of the heads.
void weights_of_block(const Own& own, int64_t some, float scale) {
  const int64_t heads = own.heads;
  for (int64_t v = 0; v < own.vectors; ++v) {
    const F before = load<F>(own.high + v * LANES);
    F top = before;
    for (int64_t t = 0; t < some; ++t) {
      const F logit = load<F>(own.logits + t * heads + v * LANES) * splat(scale);
      top = logit > top ? logit : top;
    }
    F total{};
    for (int64_t t = 0; t < SOME; t += 2) {
      F p[2];
      UNROLL for (int j = 0; j < 2; ++j) {
        const F logit = rounded_product(load<F>(own.logits + (t + j) * heads + v * LANES), splat(scale));
        p[j] = t + j < some ? exponential(logit - top) : F{};
        total += p[j];
      }
      store(own.logits + t / 2 * heads + v * LANES, word_of(p[0], p[1]));
    }
    const F keep = exponential(before - top);
    store(own.high + v * LANES, top), store(own.keep + v * LANES, keep);
    store(own.total + v * LANES, load<F>(own.total + v * LANES) * keep + total);
  }
}

// sums = sums * keep + weights times values, for HEADS_AT_ONCE heads and all columns.
__attribute__((target("avx512bf16"))) void add_block(const Own& own, int64_t first, int64_t pairs, int64_t columns) {
  for (int64_t at = 0; at < columns; at += CHUNK) {
    F total[HEADS_AT_ONCE][2];
    UNROLL for (int h = 0; h < HEADS_AT_ONCE; ++h) UNROLL for (int k = 0; k < 2; ++k)
      total[h][k] = load<F>(own.sums + (first + h) * columns + at + k * LANES) * splat(own.keep[first + h]);
    const float *values = own.values + at, *weights = own.logits + first;
    for (int64_t pair = 0; pair < pairs; ++pair, values += columns, weights += own.heads) {
      const __m512bh v[2] = {(__m512bh)load<__m512i>(values), (__m512bh)load<__m512i>(values + LANES)};
      UNROLL for (int h = 0; h < HEADS_AT_ONCE; ++h) {
        const __m512bh weight = (__m512bh)_mm512_set1_epi32(load<int32_t>(weights + h));
        UNROLL for (int k = 0; k < 2; ++k) total[h][k] = (F)_mm512_dpbf16_ps((__m512)total[h][k], weight, v[k]);
      }
    }
    UNROLL for (int h = 0; h < HEADS_AT_ONCE; ++h) UNROLL for (int k = 0; k < 2; ++k)
      store(own.sums + (first + h) * columns + at + k * LANES, total[h][k]);
  }
}

// Heads [first, first + count) of a query, with as many vectors as they need. Columns of the sums stay in the order in
// which two rows are interleaved: of 32 numbers, four and four of each eighth go to two vectors.
void attend_heads(const TopkAttentionCall& c, const Own& whole, const char* q, const char* rows, int64_t n, int64_t first,
                  int64_t count, char* out) {
  Own own = whole;
  own.vectors = divide_up(count, LANES);
  const int64_t heads = own.heads = own.vectors * LANES;
  const int64_t stride = 2 * c.width;
  pack<Bf16Words>(true, c.width, count, own.vectors, [&](int64_t h) { return q + (first + h) * stride; }, own.q);
  memset(own.sums, 0, heads * c.latent * 4);
  for (int64_t h = 0; h < heads; ++h) own.high[h] = -INFINITY, own.total[h] = 0;
  const auto row_at = [&](int64_t i) { return rows + own.list[least(i, n - 1)] * stride; };
  for (int64_t at = 0; at < n; at += SOME) {
    const int64_t some = least(SOME, n - at), pairs = divide_up(some, 2);
    for (int64_t t = 0; t < some; t += ROWS_AT_ONCE) {
      const char* four[ROWS_AT_ONCE];
      for (int64_t r = 0; r < ROWS_AT_ONCE; ++r) {
        four[r] = row_at(at + t + r);
        prefetch(row_at(at + SOME + t + r), stride);
      }
      multiply<Bf16Words>(four, own.q, own.vectors, c.width, 0, own.logits + t * heads);
    }
    weights_of_block(own, some, float(c.scale));
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const char *a = row_at(at + 2 * pair), *b = row_at(at + 2 * pair + 1);
      float* to = own.values + pair * c.latent;
      for (int64_t i = 0; i < c.latent; i += CHUNK) {
        const __m512i one = load<__m512i>(a + 2 * i), two = load<__m512i>(b + 2 * i);
        store(to + i, _mm512_unpacklo_epi16(one, two)), store(to + i + LANES, _mm512_unpackhi_epi16(one, two));
      }
    }
    for (int64_t h = 0; h < count; h += HEADS_AT_ONCE) add_block(own, h, pairs, c.latent);
  }
  for (int64_t h = 0; h < count; ++h) {
    const F total = splat(own.total[h]);
    for (int64_t at = 0; at < c.latent; at += CHUNK) {
      const float* sums = own.sums + h * c.latent + at;
      const __m512 low = (__m512)(load<F>(sums) / total), high = (__m512)(load<F>(sums + LANES) / total);
      const __m512i front = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
      const __m512i back = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
      char* to = out + 2 * ((first + h) * c.latent + at);
      put(true, (F)_mm512_permutex2var_ps(low, front, high), LANES, to);
      put(true, (F)_mm512_permutex2var_ps(low, back, high), LANES, to + 2 * LANES);
    }
  }
}

void attend_in_pairs(const TopkAttentionCall& c, const Own& own, const char* q, const char* rows, int64_t n, char* out) {
  const Cut cut(c.heads);
  for (int64_t first = 0; first < c.heads; first += cut.tokens) {
    attend_heads(c, own, q, rows, n, first, least(cut.tokens, c.heads - first), out);
  }
}
#else
void attend_in_pairs(const TopkAttentionCall&, const Own&, const char*, const char*, int64_t, char*) {}
#endif

void step(const TopkAttentionCall& c, const Buffers& m) {
  Team team(c.threads, Team::LONG);
  const int64_t size = c.bf16 ? 2 : 4;
  const bool pairs = in_pairs(c);
  team.each(c.b * c.s, [&](int64_t item, int64_t thread) {
    const Own own(c, m.owned + thread * m.each);
    const int64_t* indices = c.topk_indices + item * c.k;
    int64_t n = 0;
    for (int64_t i = 0; i < c.k; ++i)
      if (indices[i] >= 0) own.list[n++] = int32_t(indices[i]);
    const char *q = c.q + item * c.heads * c.width * size, *rows = c.rows + item / c.s * c.rows_stride;
    (pairs ? attend_in_pairs : attend_in_fp32)(c, own, q, rows, n, c.out + item * c.heads * c.latent * size);
  });
}

bool topk_attention(const TopkAttentionCall& c) { return with_memory<Buffers>(c, step); }

int64_t check(const TopkAttentionCall& c) {
  if (!sizes({c.b, c.s, c.t, c.heads, c.width, c.latent, c.k}) || c.b < 1 || c.s < 1 || c.t < 1 || c.t > INT32_MAX ||
      c.heads < 1 || c.latent < 1 || c.latent > c.width || c.k < 1)
    return BAD_SHAPE;
  if (c.bf16 < 0 || c.bf16 > 1) return BAD_CALL;
  const int64_t size = c.bf16 ? 2 : 4;
  if (!within(c.q, size, c.b, c.s, c.heads, c.width) ||
      !rows_fit(c.rows, c.rows_stride, size, c.b, c.t, c.width) ||
      !within(c.out, size, c.b, c.s, c.heads, c.latent) || !within(c.topk_indices, 8, c.b, c.s, c.k))
    return OUT_OF_BOUNDS;
  for (int64_t i = 0; i < c.b * c.s * c.k; ++i)
    if (c.topk_indices[i] < -1 || c.topk_indices[i] >= c.t) return OUT_OF_BOUNDS;
  return FINE;
}

}  // namespace

ENTRY(topk_attention, TopkAttentionCall)
