"""What the peak is: stages, sizes, terms, regimes, metrics and weights; numbers in, numbers out."""
