"""From records to an artifact: coefficients, bounds, metrics, scores, and the card that says so."""
