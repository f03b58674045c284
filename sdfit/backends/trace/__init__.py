"""A simulated card: the pipeline on meta tensors, where `sdfit.predict.simulation` does not answer, and what that is found from and held against."""
