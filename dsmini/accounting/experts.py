"""Distinct routed experts that a step's tokens choose together: those whose weights must be read.

Worked example, DeepSeek-V3, 8 of 256 experts a token: one token reads 8 experts of a layer, 32 tokens 163, 256 tokens
all 256 but for a tenth of one.
"""

from dsmini.config import ModelConfig


def expected_experts(config: ModelConfig, tokens: float) -> float:
    """Return how many of a layer's routed experts this many tokens choose together: e (1 - (1 - k/e)^tokens).

    Derivation: with uniform routing, all experts alike and tokens independent, a token misses a given expert with
    probability 1 - k/e, whatever groups it is limited to; all tokens miss it with the power; the expectation is the sum
    over experts. Real tokens of one text are alike and choose fewer.

    Raises: ValueError for fewer than 0 tokens.
    """
    if tokens < 0:
        raise ValueError(f"tokens={tokens}; 0 or more")
    e, k = config.n_routed_experts, config.n_activated_experts
    return e * (1 - (1 - k / e) ** tokens)


def distinct_experts(c: ModelConfig, tokens: int, experts: float | None) -> float:
    """Return the number of distinct experts that was given, if it can be, or the expected one."""
    if experts is None:
        return expected_experts(c, tokens)
    most = min(c.n_routed_experts, tokens * c.n_activated_experts)
    if not c.n_activated_experts <= experts <= most:
        raise ValueError(
            f"experts={experts} distinct ones for {tokens} tokens that choose {c.n_activated_experts} of "
            f"{c.n_routed_experts}; use {c.n_activated_experts} to {most}, or leave it out"
        )
    return experts
