// Normed rows of hidden states: the input of the head, or of a multi-token prediction block.

#include "activations.h"
#include "entry.h"

namespace {

bool norms(const NormsCall& c) {
  for (int64_t i = 0; i < c.n; ++i) rms_norm(c.x + i * c.dim, c.weight, c.dim, c.eps, c.y + i * c.dim);
  return true;
}

int64_t check(const NormsCall& c) {
  if (!sizes({c.n, c.dim}) || c.n < 1 || c.n > MOST_TOKENS || c.dim < 1) return BAD_SHAPE;
  const bool fits = within(c.x, 4, c.n, c.dim) && within(c.weight, 4, c.dim) && within(c.y, 4, c.n, c.dim);
  return fits ? FINE : OUT_OF_BOUNDS;
}

}  // namespace

ENTRY(norms, NormsCall)
