"""One recorded run of a card beside its trace: what its kernels hold, to the byte."""
