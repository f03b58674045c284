"""The closed form of the peak, found from the pipeline itself, and a run explained tensor by tensor."""
