"""Operations with more than one implementation. Each file has the equation first, then the fast PyTorch version."""
