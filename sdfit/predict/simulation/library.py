"""The programs of the pipeline's modules and the sizes of its weights, as shipped: ``programs.npz``.

Found once from diffusers' and transformers' own modules (``python -m sdfit.study.lab programs``), and held against them by
a test. Plain arrays of whole numbers; nothing in the file is run.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdfit.equation.stages import RESIDENT_WHEN_STREAMED, STAGES
from sdfit.equation.weights import PARAMETERS
from sdfit.errors import SdfitError
from sdfit.files import read_bytes
from sdfit.predict.simulation.programs import (
    CHECKER,
    DECODER,
    ENCODER,
    KINDS,
    TEXT,
    UNET,
    Layer,
    Lengths,
    Program,
    Shape,
    sides,
)
from sdfit.predict.simulation.streaming import Moves
from sdfit.workload import CHOICES, SLICES, STREAMED, VAE_SCALE, Workload

FILE = Path(__file__).with_name("programs.npz")
LARGEST_BYTES = 1 << 20
DTYPES = ("float16", "float32")
"""bfloat16 takes what float16 takes; which modules' programs are equal is seen when they are found."""
ATTENTIONS, VAES = CHOICES["attention"], CHOICES["vae"]
INT8 = "unet_int8"
"""The UNet whose linear layers have 8 bits."""
WEIGHTS = (*PARAMETERS, INT8)
_WORDS = {
    "kinds": KINDS,
    "dtypes": DTYPES,
    "attentions": ATTENTIONS,
    "vaes": VAES,
    "stages": STAGES,
    "weights": WEIGHTS,
    "offloads": tuple(STREAMED),
}
"""What numbers in the file stand for. The file holds these words too: a stage that is added later shifts no number."""
_POOLS = ("steps", "products", "layers", "marks", "made", "calls", "modules", "loops")


Brought = dict[int, tuple[int, ...]]
"""By module, numbered among its component's from 1, which of the component's weights it brings, in their order."""


class NotSimulated(SdfitError):
    """A workload whose run is not written out, or whose modules have no program at these sizes."""


class Key(NamedTuple):
    """What tells the programs of a module apart."""

    kind: str
    dtype: str
    attention: str = "sdpa"
    vae: str = "kl"
    single: bool = True
    even: bool = True
    int8: bool = False

    @classmethod
    def of(cls, kind: str, workload: Workload, lengths: Lengths) -> Key:
        """Name the program of a call: fields that do not reach a module are at their default.

        `enable_attention_slicing` reaches the UNet alone; the text encoder and the checker call PyTorch's fused attention
        unless it is switched off; the tiny VAE has no attention. One sample runs other operations than several, and latents
        that are no multiples of 8 make the UNet hand sizes on.
        """
        attention = workload.attention
        if (kind != UNET and attention in SLICES) or (kind in (TEXT, CHECKER) and attention != "math"):
            attention = "sdpa"
        vae = workload.vae if kind in (ENCODER, DECODER) else "kl"
        even = kind != UNET or lengths.height % VAE_SCALE == lengths.width % VAE_SCALE == 0
        int8 = kind == UNET and workload.execution == "int8"
        return cls(kind, _dtype(workload), attention if vae == "kl" else "sdpa", vae, lengths.batch == 1, even, int8)


class Library:
    """Programs by key, and weights by component.

    Parameters
    ----------
    programs : dict of Key to Program
    weights : dict of (str, str) to tuple of int
        Sizes of a component's weights and buffers, rounded as the allocator rounds [bytes], by dtype and by a name of
        `WEIGHTS`.
    brought : dict of (str, str) to dict
        Of a component under an offload of `sdfit.workload.STREAMED`: which of its weights come and go with which module
        (see `sdfit.predict.simulation.streaming.Moves`). None of a component that diffusers cannot offload like that.
    found_in : dict of str to str or None
        The releases of PyTorch and other packages in which all of it was found; None of one that was not there.
    """

    def __init__(
        self,
        programs: Mapping[Key, Program],
        weights: Mapping[tuple[str, str], tuple[int, ...]],
        brought: Mapping[tuple[str, str], Brought],
        found_in: Mapping[str, str | None],
    ) -> None:
        self.programs, self.weights, self.brought = dict(programs), dict(weights), dict(brought)
        self.found_in = dict(found_in)

    def program(self, kind: str, workload: Workload, lengths: Lengths, *, one_pixel: bool = False) -> Program:
        """The program of a call.

        Parameters
        ----------
        one_pixel : bool
            Also where a feature map has one pixel, which PyTorch takes for laid out either way: it leaves out some copies of a few KB
            there that the program has.

        Raises
        ------
        NotSimulated
            If there is none.
        """
        pairs = zip(sides(lengths.height, kind)[1:], sides(lengths.width, kind)[1:], strict=True)
        if not one_pixel and kind not in (TEXT, CHECKER) and any(height == width == 1 for height, width in pairs):
            raise NotSimulated(
                "a feature map of one pixel, as of an image of 64x64 or of 8x8 left over by tiles, is laid out in any order; "
                "ask for 8 pixels more"
            )
        found = self.programs.get(Key.of(kind, workload, lengths))
        if found is None:
            raise NotSimulated(f"no program of the {kind} is known for {workload}")
        return found

    def weights_of(self, workload: Workload) -> dict[str, tuple[int, ...]]:
        """The weights of a workload's pipeline, by component, in the order in which it holds them."""
        return {component: self.weights[_dtype(workload), name] for component, name in _names(workload).items()}

    def moves_of(self, workload: Workload) -> dict[str, Moves]:
        """What moves in a workload's pipeline, by component: nothing where components stay, or go as a whole."""
        offload, found = workload.offload, {}
        for component, name in _names(workload).items():
            if offload not in STREAMED or component in RESIDENT_WHEN_STREAMED[offload]:
                continue
            sizes = self.weights[_dtype(workload), name]
            brought = {module: [sizes[w] for w in which] for module, which in self.brought[name, offload].items()}
            found[component] = Moves(brought, empties=offload == "sequential")
        return found

    def left_behind(self, workload: Workload) -> list[int]:
        """Sizes of what stays on the card of components whose weights come and go: buffers, under sequential offload [bytes]."""
        found = []
        for component, name in _names(workload).items():
            if workload.offload in STREAMED and component not in RESIDENT_WHEN_STREAMED[workload.offload]:
                moving = {w for which in self.brought[name, workload.offload].values() for w in which}
                sizes = self.weights[_dtype(workload), name]
                found += [size for number, size in enumerate(sizes) if number not in moving]
        return found

    def to_bytes(self) -> bytes:
        """The file: what is equal is stored once."""
        pools: dict[str, dict[bytes, tuple[int, Any]]] = {name: {} for name in _POOLS}
        rows = []
        for key, program in self.programs.items():
            numbers = [
                pools[name].setdefault(values.tobytes(), (len(pools[name]), values))[0]
                for name, values in _arrays(program).items()
            ]
            choices = (
                KINDS.index(key.kind),
                DTYPES.index(key.dtype),
                ATTENTIONS.index(key.attention),
                VAES.index(key.vae),
            )
            rows.append([*choices, key.single, key.even, key.int8, *numbers])
        stored: dict[str, Any] = {"programs": np.array(rows, dtype=np.int16)}
        for name, pool in pools.items():
            _store(stored, name, [values for _, values in pool.values()])
        _store(stored, "weights", [np.array(self.weights[d, n], dtype=np.int32) for d in DTYPES for n in WEIGHTS])
        rows = [[WEIGHTS.index(name), list(STREAMED).index(offload)] for name, offload in self.brought]
        stored["brought"] = np.array(rows, dtype=np.int16)
        each = [[(m, w) for m, which in brought.items() for w in which] for brought in self.brought.values()]
        _store(stored, "moves", [np.array(pairs, dtype=np.int16).T.ravel() for pairs in each])
        stored["words"] = np.array(json.dumps({name: [str(word) for word in words] for name, words in _WORDS.items()}))
        stored["found_in"] = np.array(json.dumps(self.found_in))
        file = io.BytesIO()
        np.savez_compressed(file, **stored)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Library:
        """The twin of `to_bytes`."""
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            stored = {name: file[name] for name in file.files}
        words: dict[str, list[str]] = json.loads(str(stored["words"]))
        kinds, dtypes, attentions, vaes, stages, weights, offloads = (words[name] for name in _WORDS)
        pools = {name: _restored(stored, name) for name in _POOLS}
        programs = {}
        for kind, dtype, attention, vae, single, even, int8, *numbers in stored["programs"].tolist():
            steps, products, layers, marks, made, calls, modules, loops = (
                pools[name][n] for name, n in zip(_POOLS, numbers, strict=True)
            )
            key = Key(
                kinds[kind], dtypes[dtype], attentions[attention], vaes[vae], bool(single), bool(even), bool(int8)
            )
            programs[key] = Program(
                key.kind,
                steps.astype(np.int64),
                products.reshape(-1, 5).astype(np.int64),
                tuple(
                    Layer(Shape(*row[:3]), tuple(row[3:7]), Shape(*row[7:])) for row in layers.reshape(-1, 10).tolist()
                ),
                tuple((first, stages[stage]) for first, stage in marks.reshape(-1, 2).tolist()),
                tuple(made.tolist()),
                np.cumsum(calls, dtype=np.int64),
                modules.astype(np.int64),
                tuple((first, second, last) for first, second, last in loops.reshape(-1, 3).tolist()),
                SLICES.get(key.attention, 0),
            )
        names = [(dtype, name) for dtype in dtypes for name in weights]
        sizes = (tuple(values.tolist()) for values in _restored(stored, "weights"))
        brought: dict[tuple[str, str], Brought] = {}
        for (name, offload), flat in zip(stored["brought"].tolist(), _restored(stored, "moves"), strict=True):
            found = brought.setdefault((weights[name], offloads[offload]), {})
            for module, weight in flat.reshape(2, -1).T.tolist():
                found[module] = (*found.get(module, ()), weight)
        return cls(programs, dict(zip(names, sizes, strict=True)), brought, json.loads(str(stored["found_in"])))


@cache
def shipped_library() -> Library:
    """The library of the installed sdfit; read once."""
    return Library.from_bytes(read_bytes(FILE, LARGEST_BYTES))


def _dtype(workload: Workload) -> str:
    return "float32" if workload.dtype == "float32" else "float16"


def _names(workload: Workload) -> dict[str, str]:
    """Of a workload's components, in the order in which its pipeline holds them, the names of `WEIGHTS`."""
    unet = INT8 if workload.execution == "int8" else "unet"
    names = {"vae": "vae" if workload.vae == "kl" else "vae_tiny", "text_encoder": "text_encoder", "unet": unet}
    return names | ({"safety_checker": "safety_checker"} if workload.safety_checker else {})


def _arrays(program: Program) -> dict[str, Any]:
    """A program's fields as flat arrays."""
    layers = [[*layer.image, *layer.weight, *layer.out] for layer in program.layers]
    marks = [[first, STAGES.index(stage)] for first, stage in program.marks]
    calls = np.diff(program.calls, prepend=0)
    values = (program.steps, program.products, layers, marks, program.made, calls, program.modules, program.loops)
    types = (np.int16, np.int32, *(np.int16,) * 6)
    return {
        name: np.array(value, dtype=dtype).ravel() for name, value, dtype in zip(_POOLS, values, types, strict=True)
    }


def _store(stored: dict[str, Any], name: str, parts: Sequence[Any]) -> None:
    stored[name] = np.concatenate(parts)
    stored[f"{name}_ends"] = np.cumsum([len(part) for part in parts], dtype=np.int32)


def _restored(stored: Mapping[str, Any], name: str) -> list[Any]:
    return np.split(stored[name], stored[f"{name}_ends"][:-1])
