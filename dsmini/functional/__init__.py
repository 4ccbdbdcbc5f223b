"""Operations with more than one implementation: the equation first, then the eager version, then the declaration."""
