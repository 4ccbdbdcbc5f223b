// Absorbed attention of each query to the rows of a cache that it chose, for any number of queries.
//
// All heads of a query read the same rows. A CPU that multiplies BF16 numbers takes rows in BF16 as they are (pairs.h). All
// else is computed as in a decoding step, in FP32.

#include "pairs.h"
#include "entry.h"

namespace {

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
// Heads [first, first + count) of a query, with as many vectors as they need.
void attend_heads(const TopkAttentionCall& c, const Own& own, const char* q, const char* rows, int64_t n, int64_t first,
                  int64_t count, char* out) {
  const int64_t vectors = divide_up(count, LANES), heads = vectors * LANES, stride = 2 * c.width;
  pack<Bf16Words>(true, c.width, count, vectors, [&](int64_t h) { return q + (first + h) * stride; }, own.q);
  begin_part(heads, own.high, own.total, own.sums, c.latent);
  const PanelOfHeads panel{vectors, heads, c.width, c.latent, own.q, own.logits, own.values, own.keep, own.sums, own.high, own.total};
  for (int64_t at = 0; at < n; at += SOME) {
    const auto row_at = [&](int64_t t) { return rows + own.list[least(at + t, n - 1)] * stride; };
    add_keys(panel, row_at, least(SOME, n - at), SOME, float(c.scale), count);
  }
  for (int64_t h = 0; h < count; ++h)
    put_mean(own.sums + h * c.latent, own.total[h], c.latent, out + 2 * (first + h) * c.latent);
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
