"""For the makers: a whole session with a card, its proofs, kernels one by one, published rows traced and replayed."""
