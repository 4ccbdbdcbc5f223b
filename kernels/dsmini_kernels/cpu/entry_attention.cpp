// The call of V4's attention of a few queries (entry_attention.h).

#include "entry_attention.h"

namespace {

void step(const EntryAttentionCall& c, const EntryBuffers& m) {
  Team team(c.threads, Team::LONG);
  attend_entries(c, m, team);
}

bool entry_attention(const EntryAttentionCall& c) { return with_memory<EntryBuffers>(c, step); }

int64_t check(const EntryAttentionCall& c) {
  if (!sizes({c.b, c.s, c.heads, c.width, c.k}) || c.b < 1 || c.s < 1 || c.b * c.s > MOST_TOKENS || c.heads < 1 ||
      c.heads > MOST_STACK || c.width < 1 || c.width > MOST_WIDTH)
    return BAD_SHAPE;
  const bool picks = c.chosen != nullptr;
  if (c.bf16 < 0 || c.bf16 > 1 || (c.masked_batch != 1 && c.masked_batch != c.b) ||
      (c.hidden_batch != 1 && c.hidden_batch != c.b) || (!picks && c.k != 0))
    return BAD_CALL;
  const int64_t size = c.bf16 ? 2 : 4;
  if (!within(c.q, size, c.b, c.s, c.heads, c.width) || !within(c.out, size, c.b, c.s, c.heads, c.width) ||
      !within(c.sink, 4, c.heads) || !key_rows_fit(c.near, c.b, c.width) || !key_rows_fit(c.entries, c.b, c.width) ||
      !within(c.masked, 1, c.masked_batch, c.s, c.near.count) ||
      !(picks ? within(c.chosen, 8, c.b, c.s, c.k) : within(c.hidden, 1, c.hidden_batch, c.s, c.entries.count)))
    return OUT_OF_BOUNDS;
  for (int64_t i = 0; picks && i < c.b * c.s * c.k; ++i)
    if (c.chosen[i] < -1 || c.chosen[i] >= c.entries.count) return OUT_OF_BOUNDS;
  return FINE;
}

}  // namespace

ENTRY(entry_attention, EntryAttentionCall)
