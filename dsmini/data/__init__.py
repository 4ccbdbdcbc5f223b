"""The corpus: text read, tokenised once, mapped into memory, and cut into batches in the order of training."""
