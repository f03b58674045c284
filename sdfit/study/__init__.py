"""Looking into things; nothing in the flow from grid to prediction imports it."""
