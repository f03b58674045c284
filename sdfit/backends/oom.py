"""What an error says about memory: whether it means that there was too little, and how much was asked for."""

from __future__ import annotations

import re

import torch

_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_REQUEST = re.compile(r"Tried to allocate ([0-9.]+) (bytes|KiB|MiB|GiB)")
_ALLOCATION_FAILED = re.compile(r"out of memory|_ALLOC_FAILED", re.IGNORECASE)
_NO_ENGINE = re.compile(r"unable to find an engine", re.IGNORECASE)
_HOST = re.compile(r"DefaultCPUAllocator", re.IGNORECASE)


def requested_bytes(message: str) -> int:
    """The request that failed, from PyTorch's message: the least that its rounded text allows; 0 if it names none.

    Examples
    --------
    >>> requested_bytes("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")
    2142114938
    >>> requested_bytes("Tried to allocate 512 bytes.")
    512
    """
    match = _REQUEST.search(message)
    if match is None:
        return 0
    unit = _UNITS[match[2]]
    return int((float(match[1]) - (0.005 if unit > 1 else 0)) * unit)


def is_out_of_memory(error: BaseException, failures: int = 0) -> bool:
    """Whether a failure means that the device had too little memory.

    Besides PyTorch's own error, libraries report in their words that an allocation of theirs failed. cuDNN says that
    there is no plan both where none exists and where none fitted: it is the latter if requests failed on the way.

    Parameters
    ----------
    error : BaseException
    failures : int
        Requests that the allocator could not serve during the run.

    Examples
    --------
    >>> is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"))
    True
    >>> is_out_of_memory(ValueError("out of memory"))
    False
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    if not isinstance(error, RuntimeError) or _HOST.search(text):
        return False
    return bool(_ALLOCATION_FAILED.search(text) or (failures and _NO_ENGINE.search(text)))
