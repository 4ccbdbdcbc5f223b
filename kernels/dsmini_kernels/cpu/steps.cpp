// The entries of products, decoding steps and Muon: check a call against the memory that its pointers have, and run it.

#include "steps.h"
#include "tiles.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace {

struct Scratch {
  float* memory = nullptr;
  int64_t numbers = 0;
  ~Scratch() { free(memory); }
  void give_back() {
    free(memory);
    memory = nullptr, numbers = 0;
  }
};
thread_local Scratch kept;

constexpr int64_t MOST_KEPT = 1 << 24;  // numbers of memory that a thread keeps for its next call

constexpr int64_t MOST = int64_t{1} << 40;  // of a size, so that products of three stay in 64 bits when checked

// True if `count` elements of `size` bytes lie within the memory of a pointer.
bool within(const void* p, int64_t bytes, int64_t size, int64_t a, int64_t b = 1, int64_t c = 1, int64_t d = 1) {
  int64_t all = size;
  for (int64_t factor : {a, b, c, d})
    if (factor < 0 || __builtin_mul_overflow(all, factor, &all)) return false;
  return all <= bytes && (all == 0 || p != nullptr);
}

bool sizes(std::initializer_list<int64_t> all) {
  for (int64_t size : all)
    if (size < 0 || size > MOST) return false;
  return true;
}

int64_t check(const Indexer& i, const AttentionCall& c) {
  if (i.topk == 0) return FINE;
  if (!sizes({i.heads, i.width, i.topk}) || i.heads < 1 || i.width < c.rope || i.width < 2 || (i.width & (i.width - 1)) != 0)
    return BAD_SHAPE;
  int64_t queries;
  if (__builtin_mul_overflow(i.heads, i.width, &queries) || c.room > INT32_MAX) return BAD_SHAPE;
  if (i.wq.type != c.wq_b.type || i.type < 0 || i.type > 1) return BAD_CALL;
  if (!i.wq.fits(queries, c.q_rank ? c.q_rank : c.dim) || !i.wk.fits(i.width, c.dim) || !i.weights.fits(i.heads, c.dim) ||
      !within(i.norm, i.norm_bytes, 4, i.width) || !within(i.bias, i.bias_bytes, 4, i.width) ||
      i.row != (i.type == 0 ? 4 : 2) * i.width || !within(i.cache, i.cache_bytes, i.row, c.b, c.room))
    return OUT_OF_BOUNDS;
  return FINE;
}

int64_t check(const AttentionCall& c) {
  if (!sizes({c.b, c.s, c.dim, c.heads, c.nope, c.rope, c.latent, c.value, c.q_rank, c.room, c.cache_row})) return BAD_SHAPE;
  if (c.b < 1 || c.s < 1 || c.b * c.s > MOST_TOKENS || c.dim < 1 || c.heads < 1 || c.nope < 1 || c.rope % 2 != 0 ||
      c.latent < 1 || c.value < 1 || (c.tables != 1 && c.tables != c.b))
    return BAD_SHAPE;
  int64_t queries, kv_up, width;
  if (__builtin_mul_overflow(c.heads, c.nope + c.rope, &queries) || __builtin_mul_overflow(c.heads, c.nope + c.value, &kv_up) ||
      __builtin_mul_overflow(c.heads, c.value, &width))
    return BAD_SHAPE;
  const int64_t q_in = c.q_rank ? c.q_rank : c.dim;
  if ((c.q_rank ? !c.wq_a.fits(c.q_rank, c.dim) : !c.wq_a.none()) || !c.wq_b.fits(queries, q_in) ||
      !c.wkv_a.fits(c.latent + c.rope, c.dim) || !c.wkv_b.fits(kv_up, c.latent) || !c.wo.fits(c.dim, width))
    return OUT_OF_BOUNDS;
  if (!within(c.x, c.x_bytes, 4, c.b, c.s, c.dim) || !within(c.y, c.y_bytes, 4, c.b, c.s, c.dim) ||
      !within(c.attn_norm, c.attn_norm_bytes, 4, c.dim) || !within(c.q_norm, c.q_norm_bytes, 4, c.q_rank) ||
      !within(c.kv_norm, c.kv_norm_bytes, 4, c.latent) || !within(c.cos, c.table_bytes, 4, c.tables, c.s, c.rope / 2) ||
      !within(c.sin, c.table_bytes, 4, c.tables, c.s, c.rope / 2) || !within(c.starts, c.starts_bytes, 8, c.b))
    return OUT_OF_BOUNDS;
  const int64_t numbers = c.latent + c.rope, tiles = (c.latent + BLOCK - 1) / BLOCK;
  const int64_t row = c.cache_type == 0 ? 4 * numbers : c.cache_type == 1 ? 2 * numbers : c.latent + 4 * tiles + 2 * c.rope;
  if (c.cache_type < 0 || c.cache_type > 2 || c.cache_row != row || !within(c.cache, c.cache_bytes, row, c.b, c.room))
    return OUT_OF_BOUNDS;
  for (int64_t i = 0; i < c.b; ++i)
    if (c.starts[i] < 0 || c.starts[i] > c.room - c.s) return OUT_OF_BOUNDS;
  return check(c.index, c);
}

int64_t check(const GroupedCall& c) {
  if (!sizes({c.b, c.s, c.dim, c.key_heads, c.group, c.width, c.value, c.room, c.cache_row})) return BAD_SHAPE;
  if (c.b < 1 || c.s < 1 || c.b * c.s > MOST_TOKENS || c.dim < 1 || c.key_heads < 1 || c.group < 1 || c.width < 2 ||
      c.width % 2 != 0 || c.value < 1 || (c.tables != 1 && c.tables != c.b))
    return BAD_SHAPE;
  int64_t heads, queries, keys, values, width;
  if (__builtin_mul_overflow(c.key_heads, c.group, &heads) || __builtin_mul_overflow(heads, c.width, &queries) ||
      __builtin_mul_overflow(c.key_heads, c.width, &keys) || __builtin_mul_overflow(c.key_heads, c.value, &values) ||
      __builtin_mul_overflow(heads, c.value, &width))
    return BAD_SHAPE;
  if (!c.wq.fits(queries, c.dim) || !c.wk.fits(keys, c.dim) || !c.wv.fits(values, c.dim) || !c.wo.fits(c.dim, width))
    return OUT_OF_BOUNDS;
  if (!within(c.x, c.x_bytes, 4, c.b, c.s, c.dim) || !within(c.y, c.y_bytes, 4, c.b, c.s, c.dim) ||
      !within(c.norm, c.norm_bytes, 4, c.dim) || !within(c.cos, c.table_bytes, 4, c.tables, c.s, c.width / 2) ||
      !within(c.sin, c.table_bytes, 4, c.tables, c.s, c.width / 2) || !within(c.starts, c.starts_bytes, 8, c.b))
    return OUT_OF_BOUNDS;
  if (c.cache_type < 0 || c.cache_type > 1 || c.cache_row != (c.cache_type == 0 ? 4 : 2) * (keys + values) ||
      !within(c.cache, c.cache_bytes, c.cache_row, c.b, c.room))
    return OUT_OF_BOUNDS;
  for (int64_t i = 0; i < c.b; ++i)
    if (c.starts[i] < 0 || c.starts[i] > c.room - c.s) return OUT_OF_BOUNDS;
  return FINE;
}

int64_t check(const FeedForwardCall& c) {
  if (!sizes({c.n, c.dim, c.inter, c.experts, c.expert_inter, c.k, c.groups, c.kept_groups})) return BAD_SHAPE;
  if (c.n < 1 || c.n > MOST_TOKENS || c.dim < 1 || c.experts > MOST_EXPERTS) return BAD_SHAPE;
  if (c.score < 0 || c.score >= SCORES) return BAD_CALL;
  if (c.w1.type != c.w3.type) return BAD_CALL;
  if (c.inter ? !c.w1.fits(c.inter, c.dim) || !c.w3.fits(c.inter, c.dim) || !c.w2.fits(c.dim, c.inter)
              : !c.w1.none() || !c.w2.none() || !c.w3.none())
    return OUT_OF_BOUNDS;
  if (!within(c.x, c.x_bytes, 4, c.n, c.dim) || !within(c.y, c.y_bytes, 4, c.n, c.dim) ||
      !within(c.norm, c.norm_bytes, 4, c.dim))
    return OUT_OF_BOUNDS;
  if (c.experts == 0) return c.k == 0 && c.expert_inter == 0 ? FINE : BAD_SHAPE;
  if (c.groups < 1 || c.experts % c.groups != 0 || c.kept_groups < 1 || c.kept_groups > c.groups || c.k < 1 ||
      c.k > c.experts / c.groups * c.kept_groups || c.expert_inter < 1)
    return BAD_SHAPE;
  if (c.groups > 1 && c.bias != nullptr && c.experts / c.groups < 2) return BAD_SHAPE;
  if (!c.e1.fits_stack(c.experts, c.expert_inter, c.dim) || !c.e3.fits_stack(c.experts, c.expert_inter, c.dim) ||
      !c.e2.fits_stack(c.experts, c.dim, c.expert_inter) || c.e1.type != c.e3.type)
    return OUT_OF_BOUNDS;
  if (!within(c.gate, c.gate_bytes, 4, c.experts, c.dim) || (c.bias != nullptr && !within(c.bias, c.bias_bytes, 4, c.experts)) ||
      !within(c.indices, c.indices_bytes, 8, c.n, c.k) || !within(c.weights, c.weights_bytes, 4, c.n, c.k) ||
      !within(c.scores, c.scores_bytes, 4, c.n, c.experts) || !within(c.counts, c.counts_bytes, 8, c.experts))
    return OUT_OF_BOUNDS;
  return FINE;
}

int64_t check(const LinearCall& c) {
  if (!sizes({c.n, c.w.rows, c.w.columns}) || c.n < 1 || c.bf16 < 0 || c.bf16 > 1) return BAD_SHAPE;
  const int64_t size = c.bf16 ? 2 : 4;
  if (!c.w.fits(c.w.rows, c.w.columns) || !within(c.x, c.x_bytes, size, c.n, c.w.columns) ||
      !within(c.y, c.y_bytes, size, c.n, c.w.rows))
    return OUT_OF_BOUNDS;
  return FINE;
}

int64_t check(const NormsCall& c) {
  if (!sizes({c.n, c.dim}) || c.n < 1 || c.n > MOST_TOKENS || c.dim < 1) return BAD_SHAPE;
  const bool two = c.second != nullptr;
  if (!within(c.first, c.first_bytes, 4, c.n, c.dim) || !within(c.first_norm, c.first_norm_bytes, 4, c.dim) ||
      (two && (!within(c.second, c.second_bytes, 4, c.n, c.dim) || !within(c.second_norm, c.second_norm_bytes, 4, c.dim))) ||
      !within(c.y, c.y_bytes, 4, c.n, two ? 2 : 1, c.dim))
    return OUT_OF_BOUNDS;
  return FINE;
}

bool indices_fit(const int64_t* indices, int64_t count, int64_t experts) {
  for (int64_t i = 0; i < count; ++i)
    if (indices[i] < 0 || indices[i] >= experts) return false;
  return true;
}

int64_t check(const ExpertsCall& c) {
  if (!sizes({c.n, c.dim, c.inter, c.experts, c.k}) || c.dim < 1 || c.inter < 1 || c.k < 1 || c.experts > MOST_STACK)
    return BAD_SHAPE;
  if (c.bf16 < 0 || c.bf16 > 1) return BAD_CALL;
  const int64_t size = c.bf16 ? 2 : 4;
  if (!c.w1.fits_stack(c.experts, c.inter, c.dim) || !c.w3.fits_stack(c.experts, c.inter, c.dim) ||
      !c.w2.fits_stack(c.experts, c.dim, c.inter))
    return OUT_OF_BOUNDS;
  if (!within(c.x, c.x_bytes, size, c.n, c.dim) || !within(c.y, c.y_bytes, size, c.n, c.dim) ||
      !within(c.indices, c.indices_bytes, 8, c.n, c.k) || !within(c.weights, c.weights_bytes, 4, c.n, c.k))
    return OUT_OF_BOUNDS;
  return indices_fit(c.indices, c.n * c.k, c.experts) ? FINE : OUT_OF_BOUNDS;
}

int64_t check(const TrainedCall& c) {
  if (!sizes({c.n, c.dim, c.inter, c.experts, c.k}) || c.dim < 1 || c.inter < 1 || c.k < 1 || c.experts > MOST_STACK)
    return BAD_SHAPE;
  if (c.bf16 < 0 || c.bf16 > 1 || c.backward < 0 || c.backward > 1) return BAD_CALL;
  for (const Matrix* w : {&c.w1, &c.w2, &c.w3})
    if (w->type != WEIGHT_FP32 || w->stride != 4 * w->columns) return BAD_CALL;
  if (!c.w1.fits_stack(c.experts, c.inter, c.dim) || !c.w3.fits_stack(c.experts, c.inter, c.dim) ||
      !c.w2.fits_stack(c.experts, c.dim, c.inter))
    return OUT_OF_BOUNDS;
  const int64_t size = c.bf16 ? 2 : 4;
  if (!within(c.x, c.x_bytes, size, c.n, c.dim) || !within(c.indices, c.indices_bytes, 8, c.n, c.k) ||
      !within(c.weights, c.weights_bytes, 4, c.n, c.k) || !within(c.gate, c.gate_bytes, size, c.n, c.k, c.inter) ||
      !within(c.up, c.up_bytes, size, c.n, c.k, c.inter))
    return OUT_OF_BOUNDS;
  if (c.backward ? !within(c.dy, c.dy_bytes, size, c.n, c.dim) || !within(c.dx, c.dx_bytes, size, c.n, c.dim) ||
                       !within(c.dweights, c.dweights_bytes, 4, c.n, c.k) ||
                       !within(c.dw1, c.dw1_bytes, 4, c.experts, c.inter, c.dim) ||
                       !within(c.dw2, c.dw2_bytes, 4, c.experts, c.inter, c.dim) ||
                       !within(c.dw3, c.dw3_bytes, 4, c.experts, c.inter, c.dim)
                 : !within(c.y, c.y_bytes, size, c.n, c.dim))
    return OUT_OF_BOUNDS;
  return indices_fit(c.indices, c.n * c.k, c.experts) ? FINE : OUT_OF_BOUNDS;
}

int64_t check(const MuonCall& c) {
  if (!sizes({c.pieces, c.steps}) || c.steps < 1 || c.steps > 100) return BAD_SHAPE;
  if (c.bf16 < 0 || c.bf16 > 1 || c.by_gram < 0 || c.by_gram > 1) return BAD_CALL;
  if (!within(c.piece, c.piece_bytes, sizeof(MuonPiece), c.pieces) ||
      !within(c.coefficients, c.coefficients_bytes, 24, c.steps))
    return OUT_OF_BOUNDS;
  for (int64_t k = 0; k < c.pieces; ++k) {
    const MuonPiece& piece = c.piece[k];
    if (piece.count < 0 || piece.rows < 1 || piece.columns < 1 || piece.rows > MOST_SIDE || piece.columns > MOST_SIDE)
      return BAD_SHAPE;
    if (!within(piece.p, piece.p_bytes, 4, piece.count, piece.rows, piece.columns) ||
        !within(piece.g, piece.g_bytes, 4, piece.count, piece.rows, piece.columns) ||
        !within(piece.m, piece.m_bytes, 4, piece.count, piece.rows, piece.columns))
      return OUT_OF_BOUNDS;
  }
  return FINE;
}

// Rows [b, t, width] of `size` bytes a number, whose batches are `stride` bytes apart.
bool rows_fit(const void* p, int64_t bytes, int64_t stride, int64_t size, int64_t b, int64_t t, int64_t width) {
  if (stride < 0 || stride > MOST || !within(p, bytes, size, t, width)) return false;
  return b == 1 || (stride >= size * t * width && within(p, bytes - size * t * width, stride, b - 1));
}

int64_t check(const PicksCall& c) {
  if (!sizes({c.b, c.s, c.t, c.heads, c.width, c.topk}) || c.b < 1 || c.s < 1 || c.t < 1 || c.t > INT32_MAX || c.heads < 1 ||
      c.width < 1 || c.topk < 1 || c.topk > c.t)
    return BAD_SHAPE;
  if (c.bf16 < 0 || c.bf16 > 1 || (c.hidden_batch != 1 && c.hidden_batch != c.b)) return BAD_CALL;
  const int64_t size = c.bf16 ? 2 : 4;
  if (!within(c.q, c.q_bytes, size, c.b, c.s, c.heads, c.width) || !rows_fit(c.k, c.k_bytes, c.k_stride, size, c.b, c.t, c.width) ||
      !within(c.weights, c.weights_bytes, 4, c.b, c.s, c.heads) || !within(c.hidden, c.hidden_bytes, 1, c.hidden_batch, c.s, c.t) ||
      !within(c.picks, c.picks_bytes, 8, c.b, c.s, c.topk))
    return OUT_OF_BOUNDS;
  return FINE;
}

int64_t check(const PickedCall& c) {
  if (!sizes({c.b, c.s, c.t, c.heads, c.width, c.latent, c.k}) || c.b < 1 || c.s < 1 || c.t < 1 || c.t > INT32_MAX ||
      c.heads < 1 || c.latent < 1 || c.latent > c.width || c.k < 1)
    return BAD_SHAPE;
  if (c.bf16 < 0 || c.bf16 > 1) return BAD_CALL;
  const int64_t size = c.bf16 ? 2 : 4;
  if (!within(c.q, c.q_bytes, size, c.b, c.s, c.heads, c.width) ||
      !rows_fit(c.rows, c.rows_bytes, c.rows_stride, size, c.b, c.t, c.width) ||
      !within(c.out, c.out_bytes, size, c.b, c.s, c.heads, c.latent) || !within(c.picks, c.picks_bytes, 8, c.b, c.s, c.k))
    return OUT_OF_BOUNDS;
  for (int64_t query = 0; query < c.b * c.s; ++query) {
    bool some = false;
    for (int64_t i = 0; i < c.k; ++i) {
      const int64_t pick = c.picks[query * c.k + i];
      if (pick < -1 || pick >= c.t) return OUT_OF_BOUNDS;
      some = some || pick >= 0;
    }
    if (!some) return BAD_SHAPE;
  }
  return FINE;
}

template <class Call>
int64_t enter(const Call* given, int64_t bytes, bool (*run)(const Call&)) {
  if (bytes != sizeof(Call)) return BAD_CALL;
  const Call call = *given;
  if (call.threads < 1 || call.threads > 256) return BAD_CALL;
  if (const int64_t error = check(call)) return error;
  const bool fine = run(call);
  if (kept.numbers > MOST_KEPT) kept.give_back();
  return fine ? FINE : NO_MEMORY;
}

}  // namespace

float* scratch_of(int64_t numbers) {
  if (numbers > kept.numbers) {
    kept.give_back();
    void* memory = nullptr;
    const bool fine = numbers < MOST && posix_memalign(&memory, 64, numbers * 4) == 0;
    kept.memory = fine ? static_cast<float*>(memory) : nullptr;
    kept.numbers = fine ? numbers : 0;
  }
  return kept.memory;
}

#define ENTRY(name, Call)                                                                                    \
  extern "C" __attribute__((visibility("default"))) int64_t dsmini_##name(const Call* call, int64_t bytes) { \
    return enter<Call>(call, bytes, name);                                                                   \
  }
ENTRY(linear, LinearCall)
ENTRY(norms, NormsCall)
ENTRY(attention, AttentionCall)
ENTRY(grouped, GroupedCall)
ENTRY(feed_forward, FeedForwardCall)
ENTRY(muon, MuonCall)
ENTRY(experts, ExpertsCall)
ENTRY(trained_experts, TrainedCall)
ENTRY(topk_keys, PicksCall)
ENTRY(topk_attention, PickedCall)

// A step of many blocks: calls one after the other, each after a header of its entry and its bytes (build.py, ENTRIES).
extern "C" __attribute__((visibility("default"))) int64_t dsmini_blocks(const char* calls, int64_t bytes) {
  enum Entry : int64_t { ATTENTION = 3, GROUPED = 4, FEED_FORWARD = 5 };
  const auto run = [&](auto call, auto entry, int64_t size) -> int64_t {
    if (size != int64_t(sizeof call)) return BAD_CALL;
    memcpy(&call, calls, sizeof call);
    return entry(&call, size);
  };
  while (bytes > 0) {
    int64_t header[2];
    if (bytes < int64_t(sizeof header)) return BAD_CALL;
    memcpy(header, calls, sizeof header);
    calls += sizeof header, bytes -= sizeof header;
    const int64_t size = header[1];
    if (size < 0 || size > bytes) return BAD_CALL;
    const int64_t error = header[0] == ATTENTION      ? run(AttentionCall(), dsmini_attention, size)
                          : header[0] == GROUPED      ? run(GroupedCall(), dsmini_grouped, size)
                          : header[0] == FEED_FORWARD ? run(FeedForwardCall(), dsmini_feed_forward, size)
                                                      : int64_t{BAD_CALL};
    if (error) return error;
    calls += size, bytes -= size;
  }
  return FINE;
}
