"""The corpus: text read, tokenized once, mapped into memory, and cut into batches in the order of training."""
