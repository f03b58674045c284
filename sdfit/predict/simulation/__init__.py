"""A run simulated without torch: what its modules allocate, what its kernels hold, how the allocator packs it."""
