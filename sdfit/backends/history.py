"""What PyTorch's allocator recorded of a run, as a file of our own: the snapshot, and what ran.

It is `torch.cuda.memory._dump_snapshot`'s pickle, compressed, with one more entry (`ABOUT`) that PyTorch's viewer passes over.
`sdfit calibrate` reads it.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
from collections.abc import Collection
from typing import Any

from sdfit.files import Kind
from sdfit.workload import VariantKey, Workload

ABOUT = "sdfit"
"""The entry that says what ran: the workload and the environment."""
HISTORY = Kind("history", (".gz",), b"sdfit-history")
ENDING = ".pickle.gz"
_PACKAGES = ("/site-packages/", "/dist-packages/", "/lib/python")


def packed(snapshot: dict[str, Any], about: dict[str, Any]) -> bytes:
    """Make the file's content.

    Parameters
    ----------
    snapshot : dict
        Of `torch.cuda.memory._snapshot`; the paths in its frames lose what is the machine's own.
    about : dict
        Plain values.

    Examples
    --------
    >>> import gzip, pickle
    >>> frame = {"name": "f", "filename": "/home/me/env/lib/python3.11/site-packages/torch/nn/modules/conv.py", "line": 3}
    >>> content = packed({"device_traces": [[{"action": "alloc", "frames": [frame]}]]}, {})
    >>> pickle.loads(gzip.decompress(content))["device_traces"][0][0]["frames"][0]["filename"]
    'torch/nn/modules/conv.py'
    """
    seen: set[int] = set()
    for entry in _entries(snapshot):
        for frame in entry.get("frames") or ():
            if id(frame) not in seen:  # frames are shared among entries
                seen.add(id(frame))
                frame["filename"] = _short(frame["filename"])
    out = io.BytesIO()
    # the mark in the header says whose file it is; no time, so that equal runs give equal files
    with gzip.GzipFile(HISTORY.mark.decode(), "wb", 6, out, mtime=0) as file:
        # through JSON: versions are objects of PyTorch's own, which no reader of plain values takes
        pickle.dump({**snapshot, ABOUT: json.loads(json.dumps(about))}, file, protocol=4)
    return out.getvalue()


def _entries(snapshot: dict[str, Any]) -> list[dict[str, Any]]:
    segments = snapshot.get("segments", [])
    blocks = [block for segment in segments for block in segment["blocks"]]
    return [*segments, *blocks, *(entry for trace in snapshot["device_traces"] for entry in trace)]


def _short(filename: str) -> str:
    for packages in _PACKAGES[:2]:
        if packages in filename:
            return filename.rpartition(packages)[2]
    return filename.rpartition("/")[2]


def worth_recording(workloads: Collection[Workload]) -> list[Workload]:
    """The first workload of each variant that convolves one image at a time, and the first of more.

    The two tell a kernel's batched plan from its plan for one image; the rest follows from the sizes.

    Examples
    --------
    >>> plan = [Workload(512, 512), Workload(768, 512), Workload(512, 512, batch_size=2), Workload(64, 64, batch_size=4)]
    >>> [w.batch_size for w in worth_recording(plan)]
    [1, 2]
    """
    first: dict[tuple[VariantKey, bool], Workload] = {}
    for workload in workloads:
        first.setdefault((workload.variant, workload.batch_size > 1), workload)
    return list(first.values())
