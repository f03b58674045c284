"""A simulated card: the pipeline on meta tensors, its kernels' workspaces, its allocator."""
