"""Memory that a trace cannot see: what kernels hold while they run.

Two of three things, found by explaining published measurements, fifteen of them to the byte (``tests/backends/test_workspaces.py``):

1. **Convolutions.** A cuDNN plan for tensor cores works on channels-last data. Around an NCHW tensor it copies: the
   input, the filter and, on some architectures, the output, all in one block that lives as long as the call. `Rule`
   says which operands are copied, per architecture, dtype and batch.
2. **cuBLAS.** Each handle keeps a workspace from its first matrix product on (`Architecture.cublas_bytes`).

The third is what stays around the weights: `sdfit.predict.simulation.unsplit`.

`workspaces_for` gives the object that `sdfit.backends.trace.tracer.Tracer` takes. What no published number shows is said in
the entries' evidence: nothing was measured by this project on the cards of this table.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from sdfit.equation.weights import rounded
from sdfit.errors import SdfitError, nearest
from sdfit.files import fingerprint
from sdfit.predict.cards import architecture_of, find_card
from sdfit.predict.simulation.shapes import Shapes, shapes_of
from sdfit.workload import Workload

HALF = ("float16", "bfloat16")
PAD_BYTES = 512
"""One granule more than the copies is in every workspace that was explained to the byte (OM-020, INV-001)."""
MAX_ELEMENTS = 2**31 - 1
"""Above it PyTorch runs a convolution in pieces of the batch, of at most `PIECE_ELEMENTS` each."""
PIECE_ELEMENTS = 2**28
"""`split_batch_dim_to_32bit_out` in PyTorch's aten/src/ATen/native/cudnn; its ``max_worksize``."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Which operands of a convolution its kernel copies.

    Parameters
    ----------
    dtypes : tuple of str
        Of the input.
    copies : tuple of {'input', 'output', 'weight', 'winograd'}
        Empty: no workspace; an operand named twice is copied twice. ``winograd``: filter, input and output in Winograd's
        domain, of F(4x4, 3x3) in float32.
    evidence : str
        Published rows, or source files.
    min_batch : int
        Images in the convolution's input from which on the rule holds.
    channels : (int, int), optional
        Only convolutions with these input and output channels.
    only : {'all', 'aligned', 'heavy'}
        ``aligned``: 3x3 convolutions whose channels are multiples of 8 both ways; ``heavy``: 3x3 convolutions of stride 1
        whose filter is larger than their feature maps, once both are cut into Winograd's tiles.
    element_bytes : int, optional
        Bytes per element of the copies, where they are not of the operands' own dtype.
    side : int, optional
        Only filters of this side.
    strided : bool, optional
        Only convolutions that make their feature maps smaller, or only those that do not.
    max_batch, max_pixels : int, optional
        Only up to so many images, and pixels of the result.
    pad_bytes : int
        What is in the workspace beside the copies.
    """

    dtypes: tuple[str, ...]
    copies: tuple[str, ...]
    evidence: str
    min_batch: int = 1
    channels: tuple[int, int] | None = None
    element_bytes: int | None = None
    only: str = "all"
    side: int | None = None
    strided: bool | None = None
    max_batch: int | None = None
    max_pixels: int | None = None
    pad_bytes: int = PAD_BYTES

    def holds(self, dtype: str, image: tuple[int, ...], weight: tuple[int, ...], out: tuple[int, ...]) -> bool:
        """Whether a convolution of these shapes falls under the rule."""
        outs, ins = weight[0], image[1]
        if dtype not in self.dtypes or image[0] < self.min_batch or self.channels not in (None, (ins, outs)):
            return False
        if self.side not in (None, weight[-1]) or self.strided not in (None, is_strided(image, out)):
            return False
        if image[0] > (self.max_batch or image[0]) or out[2] * out[3] > (self.max_pixels or out[2] * out[3]):
            return False
        if self.only == "all":
            return True
        if weight[-1] != 3:
            return False
        if self.only == "heavy":
            return image[2:] == out[2:] and ins * outs > winograd_tiles(out) * (ins + outs)
        return ins % 8 == outs % 8 == 0


def is_strided(image: tuple[int, ...], out: tuple[int, ...]) -> bool:
    """Whether a convolution makes its feature maps smaller by more than its margins.

    Examples
    --------
    >>> is_strided((1, 128, 513, 513), (1, 128, 256, 256)), is_strided((1, 4, 64, 64), (1, 4, 62, 62))
    (True, False)
    """
    return 4 * out[2] < 3 * image[2]


class Measured(NamedTuple):
    """What a kernel held on a card, to the byte as the allocator rounds: the evidence, and for these shapes the answer."""

    shapes: Shapes
    held_bytes: int


_BATCHED_UPSAMPLER = Rule(
    HALF, (), "OM-020 21 67 68 108 109 29 33 76 80 116 120: the 256->256 convolution after the last upsampling holds "
    "nothing from two images on; other 256->256 convolutions never set the peak",
    min_batch=2, channels=(256, 256),
)  # fmt: skip
_BOTH_WAYS = Rule(
    HALF, ("input", "output", "weight"),
    "OM-019 20 21 and their like on RTX 4090 and T4, to the byte; INV-001 3 9 11; bfloat16: SAY-006. That the first and "
    "last convolution and those of 1x1 copy nothing shows in reserved memory: INV-002 4 10 12 14",
    only="aligned",
)  # fmt: skip
_ONE_WAY = Rule(
    HALF, ("input", "weight"),
    "HFB-001 2 3 8 10 14 16: kernels that read channels-last and write NCHW (cuDNN's '..._nhwc2nchw_...')",
    only="aligned",
)  # fmt: skip
_PARTIAL_RESULTS = (
    (64**2, 2, "INV-028 34 46 56"),
    (512**2, 3, "INV-028 32 34 44 46 52 54 56: 96x96 to 512x512"),
    (768**2, 1, "INX-D1536-F-R"),
    (None, 2, "INX-D2048-F-R: 1024x1024"),
)
"""Of a float32 convolution of 512 to 512 channels: up to how many pixels, how many copies of the result. Where between the
sizes of the evidence one number gives way to the next is not known, nor why the third is less than its neighbours."""
_FLOAT32 = (
    Rule(("float32",), (), "INV-044 52: reserved memory", channels=(128, 128), side=3, strided=True),
    *(
        Rule(("float32",), ("input", "weight", *["output"] * copies), f"{evidence}: reserved memory, to its 2 MiB",
             channels=(512, 512), side=3, strided=False, max_pixels=most)
        for most, copies, evidence in _PARTIAL_RESULTS
    ),
    Rule(("float32",), ("input", "weight", "output"), "INX-D1536-F-R: reserved memory. At other sizes two inputs or less",
         channels=(512, 256), side=3),
    Rule(("float32",), ("input", "weight"), "INV-027 31 33 43 51 55 (RTX 4090), SAY-004 (A100), both with TF32 "
         "convolutions. Of 256 to 128 channels: the VAE of FLUX, decoded by the same source", only="aligned"),
)  # fmt: skip
"""Of one image. Kernels that read channels-last; those that sum over 512 channels seem to do it in parts."""
_WIDENED = Rule(
    HALF, ("input", "output", "weight"),
    "GP-001 GP-004: float32 copies of everything, as cards without fast float16 arithmetic compute it",
    element_bytes=4,
)  # fmt: skip
_WINOGRAD = Rule(
    (*HALF, "float32"), ("winograd",),
    "GP-002 GP-005: under model offload the UNet sets the peak, at a convolution of 2560 to 1280 channels. The formula is "
    "that of profiles of ResNet-50 on a V100 (pytorch/kineto), float32 with cudnn.benchmark on; that feature maps larger "
    "than the filter are left to another plan follows from GP-001 GP-004, where the decoder sets the peak",
    only="heavy",
)  # fmt: skip
_FLOAT32_UNSEEN = tuple(replace(rule, evidence="none on this architecture; taken from sm89") for rule in _FLOAT32)


@dataclass(frozen=True, slots=True)
class Architecture:
    """What is known of one GPU architecture.

    Parameters
    ----------
    name : str
        Compute capability, as ``sm75``.
    gpus : tuple of str
        Cards of it that have published rows, by the names of `sdfit.study.comparison.published`.
    rules : tuple of Rule
        The first that fits a convolution holds; none fits: no workspace.
    cublas_bytes : int
        What a cuBLAS handle keeps [bytes]; PyTorch's aten/src/ATen/cuda/CublasHandlePool.cpp: 32 MiB where the compute
        capability is 9, 10, 11 or 12. A later source leaves it to cuBLAS unless TORCH_CUBLAS_WORKSPACE_CACHE is set.
    note : str
        What the entries rest on, where it is less than the rows of their rules.
    products : tuple of (str, int)
        What a matrix product of this aten operation holds while it runs, whatever its shapes [bytes].
    measured : tuple of Measured
        Operations whose kernels were seen on a card (`sdfit.study.calibration`); they come before rules and products.
    """

    name: str
    gpus: tuple[str, ...]
    rules: tuple[Rule, ...]
    cublas_bytes: int
    note: str = ""
    products: tuple[tuple[str, int], ...] = ()
    measured: tuple[Measured, ...] = ()

    def facts(self) -> list[Any]:
        """All that changes what a trace adds, as plain values; words about it, and what is not used, left out."""
        plain = Rule((), (), "")
        late = ("side", "strided", "max_batch", "max_pixels", "pad_bytes")
        rules = [asdict(replace(rule, evidence="")) for rule in self.rules]
        rules = [{k: v for k, v in rule.items() if k not in late or v != getattr(plain, k)} for rule in rules]
        found: list[Any] = [rules, self.cublas_bytes]
        return found + ([self.products, self.measured] if self.products or self.measured else [])


_CUBLAS, _CUBLAS_SM90 = 8_519_680, 33_554_432
_MODERN = (_BATCHED_UPSAMPLER, _BOTH_WAYS)
_NO_ROW = "no published row: everything but the cuBLAS size is taken from sm80 and sm89"
_NO_ROW_BLACKWELL = _NO_ROW + "; versions of PyTorch that give 32 MiB to sm90 alone take 8,519,680 B, as on sm89"

ARCHITECTURES: dict[str, Architecture] = {
    a.name: a
    for a in (
        Architecture("sm60", ("p100",), (_WINOGRAD, _WIDENED, *_FLOAT32_UNSEEN), _CUBLAS),
        Architecture("sm61", ("gtx1070",), (_WINOGRAD, _WIDENED, *_FLOAT32_UNSEEN), _CUBLAS),
        Architecture("sm70", ("v100",), (_ONE_WAY, *_FLOAT32_UNSEEN), _CUBLAS,
                     "one image only. Float32 has no published run. Profiles of it (resnet50-* in data/snapshots) hold "
                     "a Winograd plan in three layers of 3x3, but with cudnn.benchmark on, which takes the fastest plan "
                     "that fits, heavy or not; sdfit's runs have it off"),
        Architecture("sm75", ("t4",), (*_MODERN, *_FLOAT32_UNSEEN), _CUBLAS, "misses COL-003, see `T4_EXCESS`"),
        Architecture("sm80", ("a100",), (*_MODERN, *_FLOAT32), _CUBLAS),
        Architecture("sm86", ("a10",), (*_MODERN, *_FLOAT32_UNSEEN), _CUBLAS, "one image only, rest as sm80 and sm89"),
        Architecture("sm89", ("rtx4090",), (*_MODERN, *_FLOAT32), _CUBLAS),
        Architecture("sm90", ("h200", "h100"), (*_MODERN, *_FLOAT32_UNSEEN), _CUBLAS_SM90, _NO_ROW),
        Architecture("sm100", ("b200",), (*_MODERN, *_FLOAT32_UNSEEN), _CUBLAS_SM90, _NO_ROW_BLACKWELL),
        Architecture("sm120", ("rtx5090",), (*_MODERN, *_FLOAT32_UNSEEN), _CUBLAS_SM90, _NO_ROW_BLACKWELL),
    )
}  # fmt: skip
"""The table, by compute capability."""
T4_EXCESS = 784
"""Bytes per pixel by which COL-003 (1200x1800, one image) exceeds the rules: a bound; the cause is not established.

Against materialised attention: the same session ran 2048x2048 within 0.1 % of the rules, where one score matrix of the
VAE's mid block alone would take 8.6 GB; and three score matrices at 1200x1800 with whole (N, 512) tensors beside them
print as 9.05 or 9.08 GiB, not the 9.06 published, once cuBLAS and the unsplit blocks are counted. The likelier reading,
not shown either: a convolution plan with a workspace of 1.8 kB per pixel instead of 1.0, taken where it fits. At
2048x2048 it would not fit on the card, and PyTorch goes on to cuDNN's next plan when a workspace cannot be allocated.
"""


class Workspaces:
    """The workspaces of one architecture, as `sdfit.backends.trace.tracer.Tracer` asks for them.

    Parameters
    ----------
    architecture : Architecture

    Notes
    -----
    It does not know the scratch of attention kernels, nor what ``cudnn.benchmark`` or channels-last weights would change.

    It leaves cuBLASLt out on purpose. A linear layer with a bias holds 1 MiB there for the call (mercury-e171b6 in
    ``data/snapshots``; PyTorch's default), or nothing of its own in versions of PyTorch that let it use cuBLAS's
    workspace. Tried on seven workloads, 1 MiB raises the stages of text encoder and the VAE's mid blocks by up to 1 MiB,
    the peak of no whole run, and reserved or required memory by one segment of 2 MiB in three of them.

    Of the UNet alone, whose stage rarely sets the peak, the source of the OM rows has figures too: the trace agrees with
    them within 0.1 % from four samples on (T4: from one), but A100 and RTX 4090 hold 38 MB more with two samples and
    83 MB more with one.
    """

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self._products = dict(architecture.products)
        self._measured = dict(architecture.measured)

    @property
    def label(self) -> str:
        """The name and the fingerprint of the table: records and models say by it which one they rest on."""
        return f"{self.architecture.name} {fingerprint(self.architecture.facts())}"

    @property
    def standing_bytes(self) -> int:
        """What is there from the first matrix product to the end [bytes]; a trace counts it from its beginning."""
        return self.architecture.cublas_bytes

    @property
    def convolutions_only(self) -> bool:
        """Whether `convolution` is all that there is to it."""
        return not (self._products or self._measured)

    def bare(self) -> Workspaces:
        """Those of kernels that hold nothing while they run; what is there all the time stays."""
        return Workspaces(replace(self.architecture, rules=(), products=(), measured=()))

    def __call__(self, workload: Workload, func: Any, args: tuple[Any, ...], out: Any) -> int:
        """Bytes that the kernel of one aten operation holds while it runs."""
        if self._measured:
            held = self._measured.get(shapes_of(func, args, out))
            if held is not None:
                return held
        if func.name() != "aten::convolution":
            return self._products.get(func.name().removeprefix("aten::"), 0)
        image, weight = args[0], args[1]
        dtype = str(image.dtype).removeprefix("torch.")
        return self.convolution(dtype, tuple(image.shape), tuple(weight.shape), tuple(out.shape))

    def convolution(self, dtype: str, image: tuple[int, ...], weight: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Bytes that the kernel of a convolution holds; see `convolution_bytes`."""
        return convolution_bytes(self.architecture, dtype, image, weight, out)


def convolution_bytes(
    architecture: Architecture,
    dtype: str,
    image: tuple[int, ...],
    weight: tuple[int, ...],
    out: tuple[int, ...],
) -> int:
    """Workspace of one convolution [bytes].

    Parameters
    ----------
    image, weight, out : tuple of int
        Shapes (B, C, H, W), (K, C, R, S), (B, K, P, Q).

    Examples
    --------
    The last upsampler of the VAE at 512x512 on a T4, one image: 128 MiB in, 128 MiB out, 1.1 MiB of filter.

    >>> shape = (1, 256, 512, 512)
    >>> convolution_bytes(ARCHITECTURES["sm75"], "float16", shape, (256, 256, 3, 3), shape)
    269615616
    >>> convolution_bytes(ARCHITECTURES["sm70"], "float16", shape, (256, 256, 3, 3), shape)
    135397888
    """
    for rule in architecture.rules:
        if rule.holds(dtype, image, weight, out):
            break
    else:
        return 0
    if not rule.copies:
        return 0
    images = _images_at_once(image, out)
    if rule.copies == ("winograd",):
        (outs, ins), tiles = weight[:2], winograd_tiles((images, *out[1:]))
        return rounded(36 * 4 * (ins * outs + tiles * (ins + outs)))
    each = {"input": _elements(image[1:]) * images, "output": _elements(out[1:]) * images, "weight": _elements(weight)}
    size = rule.element_bytes or (4 if dtype == "float32" else 2)
    return rounded(sum(each[name] for name in rule.copies) * size) + rule.pad_bytes


def winograd_tiles(out: tuple[int, ...]) -> int:
    """Tiles of 4x4 that a result (B, K, P, Q) is cut into, in all its images.

    Examples
    --------
    >>> winograd_tiles((2, 1280, 16, 18))
    40
    """
    return out[0] * -(-out[2] // 4) * -(-out[3] // 4)


def _images_at_once(image: tuple[int, ...], out: tuple[int, ...]) -> int:
    largest = max(_elements(image), _elements(out))
    if largest <= MAX_ELEMENTS:
        return image[0]
    return max(PIECE_ELEMENTS // (largest // image[0]), 1)


def _elements(shape: Iterable[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def workspaces_for(name: str) -> Workspaces:
    """Get the workspaces of an architecture, by compute capability or by card.

    Parameters
    ----------
    name : str
        ``sm75``, or a card such as ``t4``, as `sdfit.predict.cards.find_card` takes it.

    Raises
    ------
    SdfitError
        If the table does not hold it.

    Examples
    --------
    >>> workspaces_for("t4").architecture.name, workspaces_for("RTX 3060").architecture.name
    ('sm75', 'sm86')
    """
    for architecture in ARCHITECTURES.values():
        if name.lower() in (architecture.name, *architecture.gpus):
            return Workspaces(architecture)
    found = architecture_of(name)
    if found is None:
        card = find_card(name)
        found = architecture_of(card.architecture) if card is not None else None
    if found is not None:
        return Workspaces(ARCHITECTURES[found])
    known = [*ARCHITECTURES, *(gpu for a in ARCHITECTURES.values() for gpu in a.gpus)]
    raise SdfitError(f"no kernel workspaces are known for '{name}'{nearest(name, known)}", given=name)
