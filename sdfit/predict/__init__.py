"""From an artifact to a number: find a model, load it, ask it."""
