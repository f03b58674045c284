"""What lies below the tensors: kernel workspaces, and PyTorch's caching allocator."""
