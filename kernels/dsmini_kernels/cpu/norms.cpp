// Normed rows of one or two inputs, side by side: the input of a multi-token prediction block, or of the head.

#include "activations.h"
#include "entry.h"

namespace {

bool norms(const NormsCall& c) {
  const int64_t width = c.second == nullptr ? c.dim : 2 * c.dim;
  for (int64_t i = 0; i < c.n; ++i) {
    rms_norm(c.first + i * c.dim, c.first_norm, c.dim, c.first_eps, c.y + i * width);
    if (c.second != nullptr) rms_norm(c.second + i * c.dim, c.second_norm, c.dim, c.second_eps, c.y + i * width + c.dim);
  }
  return true;
}

int64_t check(const NormsCall& c) {
  if (!sizes({c.n, c.dim}) || c.n < 1 || c.n > MOST_TOKENS || c.dim < 1) return BAD_SHAPE;
  const bool two = c.second != nullptr;
  if (!within(c.first, 4, c.n, c.dim) || !within(c.first_norm, 4, c.dim) ||
      (two && (!within(c.second, 4, c.n, c.dim) || !within(c.second_norm, 4, c.dim))) ||
      !within(c.y, 4, c.n, two ? 2 : 1, c.dim))
    return OUT_OF_BOUNDS;
  return FINE;
}

}  // namespace

ENTRY(norms, NormsCall)
