// Normed rows of one or two inputs, side by side: the input of a multi-token prediction block, or of the head.

#include "activations.h"
#include "steps.h"

bool norms(const NormsCall& c) {
  const int64_t width = c.second == nullptr ? c.dim : 2 * c.dim;
  for (int64_t i = 0; i < c.n; ++i) {
    rms_norm(c.first + i * c.dim, c.first_norm, c.dim, c.first_eps, c.y + i * width);
    if (c.second != nullptr) rms_norm(c.second + i * c.dim, c.second_norm, c.dim, c.second_eps, c.y + i * width + c.dim);
  }
  return true;
}
