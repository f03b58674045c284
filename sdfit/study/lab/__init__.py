"""A whole session with a card as one command: grids, required capacities, proofs, the fit, the card as a smaller one."""
