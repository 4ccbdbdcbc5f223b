"""What measures and what predicts: the machine's rates, counted operations, times, bytes that are kept."""
