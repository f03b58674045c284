"""The closed form of the peak, as values: polynomials in the sizes of a workload, and how to print them.

`sdfit.study.derivation.derive` finds them; this module only knows what they are, so it needs numpy and the standard library alone.

Sizes
-----
B  images per call                       n  samples per UNet call: B, or 2·B with classifier-free guidance
A  effective pixels of one image         L  tokens as the UNet sees them
P  pixels per VAE pass: a tile with tiling, else A
D  pixels that the passes before this one left behind, over the batch (VAE slices and tiles, overlaps counted)
E  rows of ``prompt_embeds`` that the caller holds: L if the prompt came as embeddings, 0 if it came as text
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from sdfit.equation.stages import STAGES
from sdfit.equation.terms import TILE_PIXELS, TILE_STRIDE
from sdfit.errors import FitError
from sdfit.units import format_bytes
from sdfit.workload import CHUNK_TOKENS, VariantKey, Workload, variant_name

VAE_STAGES = tuple(stage for stage in STAGES if stage.startswith("vae_"))

SIZES = {
    "B": "images per call",
    "n": "samples per UNet call: B, or 2B with classifier-free guidance",
    "A": "effective pixels of one image (both sides floored to a multiple of 8)",
    "L": "tokens as the UNet sees them (prompts are padded to 77)",
    "P": "pixels per VAE pass: a tile with tiling, else A",
    "D": "pixels that earlier VAE passes of the call left behind",
    "E": "rows of prompt_embeds that the caller holds (0 if the prompt is text)",
}
WHEN = {
    "": "always",
    "B=1": "for one image",
    "B>=2": "for two images or more",
    "n=1": "for one UNet sample",
    "n>=2": "for two UNet samples or more",
    "guided": "with classifier-free guidance",
    "unguided": "without classifier-free guidance",
    "text": "if the prompt is text",
    "embeds": "if the prompt comes as prompt_embeds",
}
"""The regimes in which an operation exists, and how to say so."""

_NAMES = {
    "text_encoder": "text encoder",
    "vae_encoder_blocks": "VAE encoder, blocks",
    "vae_encoder_mid": "VAE encoder, mid block",
    "unet": "UNet",
    "vae_decoder_mid": "VAE decoder, mid block",
    "vae_decoder_blocks": "VAE decoder, blocks",
    "safety_checker": "safety checker",
}


def sizes_of(workload: Workload) -> dict[str, int]:
    """The sizes that do not change from pass to pass.

    Examples
    --------
    >>> sizes_of(Workload(512, 512, batch_size=2))
    {'B': 2, 'n': 4, 'A': 262144, 'L': 77, 'E': 0}
    """
    return {
        "B": workload.batch_size,
        "n": workload.unet_batch,
        "A": workload.pixels,
        "L": workload.tokens,
        "E": workload.prompt_length if workload.prompt_length > CHUNK_TOKENS else 0,
    }


def in_regime(workload: Workload, when: str) -> bool:
    """Whether an operation with this condition runs for a workload: keys of `WHEN`, joined by commas.

    Examples
    --------
    >>> in_regime(Workload(512, 512), "text, B=1")
    True
    """
    holds = {
        "": True,
        "B=1": workload.batch_size == 1,
        "B>=2": workload.batch_size >= 2,
        "n=1": workload.unet_batch == 1,
        "n>=2": workload.unet_batch >= 2,
        "guided": workload.guided,
        "unguided": not workload.guided,
        "text": workload.prompt_length <= CHUNK_TOKENS,
        "embeds": workload.prompt_length > CHUNK_TOKENS,
    }
    return all(holds[part] for part in when.split(", "))


def in_words(when: str) -> str:
    """Say in which regime an operation runs.

    Examples
    --------
    >>> in_words("text, B=1")
    'if the prompt is text, for one image'
    """
    return ", ".join(WHEN[part] for part in when.split(", "))


def vae_passes(workload: Workload) -> Iterator[tuple[int, int, int]]:
    """List the passes that the VAE makes: (images, P, D) of each, in order.

    One for the whole batch; with slicing one for each image; with tiling, of an image with a side above 512, one for
    each tile of 512 pixels, 384 apart, cut off at the edge. Source: `AutoencoderKL._tiled_encode`, `tiled_decode`.

    Examples
    --------
    >>> list(vae_passes(Workload(512, 512, batch_size=2, vae_slicing=True)))
    [(1, 262144, 0), (1, 262144, 262144)]
    >>> list(vae_passes(Workload(512, 640, vae_tiling=True)))
    [(1, 262144, 0), (1, 131072, 262144), ...]
    """
    slices = workload.batch_size if workload.vae_slicing else 1
    images = workload.batch_size // slices
    height, width = workload.effective_height, workload.effective_width
    done = 0
    for _ in range(slices):
        if workload.vae_tiling and max(height, width) > TILE_PIXELS:
            inside = done
            for top in range(0, height, TILE_STRIDE):
                for left in range(0, width, TILE_STRIDE):
                    pixels = min(TILE_PIXELS, height - top) * min(TILE_PIXELS, width - left)
                    yield images, pixels, inside
                    inside += images * pixels
        else:
            yield images, height * width, done
        done += images * height * width


def last_passes(workload: Workload) -> list[dict[str, int]]:
    """The sizes of the VAE passes that can be the highest: of each P, the one that comes last."""
    latest = {pixels: done for _, pixels, done in vae_passes(workload)}
    return [sizes_of(workload) | {"P": pixels, "D": done} for pixels, done in latest.items()]


def value(product: str, sizes: Mapping[str, Any]) -> Any:
    """Multiply a product out: ``"n*A*A"``, with numbers or arrays for the sizes.

    Examples
    --------
    >>> value("n*A*A", {"n": 2, "A": 10}), value("1", {})
    (200, 1)
    """
    return 1 if product == "1" else prod(sizes[letter] for letter in product.split("*"))


def pretty(product: str) -> str:
    """Write a product as a person would.

    Examples
    --------
    >>> pretty("n*A*A"), pretty("n*L")
    ('n·A²', 'n·L')
    """
    return product.replace("A*A", "A²").replace("P*P", "P²").replace("*", "·")


@dataclass(frozen=True, slots=True)
class Polynomial:
    """The live bytes at one operation, exactly, for every size.

    Parameters
    ----------
    stage : str
    path, operation : str
        The module that runs (or ``pipeline.<function>``), and the aten operation in it.
    nth : int
        How many operations of that name the module ran before it in the same pass.
    when : str
        In which regime it runs: keys of `WHEN`, joined by commas.
    coefficients : dict of str to float
        By product of sizes. The constant contains the resident weights.
    weights_bytes : int
        Resident weights in this stage [bytes], rounded tensor by tensor to 512.
    tensors : tuple of dict
        What is live there at the reference workload, besides the weights: ``path``, ``operation``, ``shape``,
        ``dtype``, ``size_bytes``.
    """

    stage: str
    path: str
    operation: str
    nth: int
    when: str
    coefficients: dict[str, float]
    weights_bytes: int
    tensors: tuple[dict[str, Any], ...] = ()

    def at(self, sizes: Mapping[str, Any]) -> Any:
        """The bytes at these sizes; numbers or arrays."""
        return sum(coefficient * value(product, sizes) for product, coefficient in self.coefficients.items())

    def bytes_at(self, workload: Workload) -> float:
        """The bytes for a workload: of the VAE's passes the highest."""
        if self.stage in VAE_STAGES:
            return float(max(self.at(sizes) for sizes in last_passes(workload)))
        return float(self.at(sizes_of(workload)))

    def terms_bytes(self, workload: Workload) -> dict[str, float]:
        """What each term is for a workload [bytes], the weights apart from the constant."""
        sizes: Mapping[str, int] = sizes_of(workload)
        if self.stage in VAE_STAGES:
            sizes = max(last_passes(workload), key=self.at)
        terms = {"weights": float(self.weights_bytes)}
        for product, coefficient in self.coefficients.items():
            amount = coefficient * value(product, sizes)
            terms[pretty(product)] = float(amount - self.weights_bytes if product == "1" else amount)
        return terms

    def formula(self, *, latex: bool = False) -> str:
        """The polynomial on one line, the weights as a number of their own."""
        parts = [(f"{self.weights_bytes:,}", "weights")]
        for product, coefficient in self.coefficients.items():
            amount = coefficient - self.weights_bytes if product == "1" else coefficient
            if amount:
                parts.append((_number(amount), "" if product == "1" else product))
        if latex:
            written = [_latex_term(number, product) for number, product in parts]
        else:
            written = [
                number + ("" if not p else " weights" if p == "weights" else "·" + pretty(p)) for number, p in parts
            ]
        return " + ".join(written).replace("+ -", "- ")


@dataclass(frozen=True, slots=True)
class Derivation:
    """The closed form of one variant: ``peak = max over the polynomials that apply``.

    Parameters
    ----------
    variant : tuple
        As `Workload.variant`.
    polynomials : tuple of Polynomial
        By stage in the order of `STAGES`, the undominated ones.
    reference : Workload
        At which the tensors were listed.
    points : tuple of Workload
        What it was derived from.
    residual_bytes : int
        The largest difference between a kept polynomial and the traces it was derived from.
    """

    variant: VariantKey
    polynomials: tuple[Polynomial, ...]
    reference: Workload
    points: tuple[Workload, ...] = field(repr=False)
    residual_bytes: int = 0

    def _check(self, workload: Workload) -> None:
        if workload.variant != self.variant:
            raise FitError(
                f"this closed form is of '{variant_name(self.variant)}', the workload is "
                f"'{variant_name(workload.variant)}'; derive that one",
                given=workload.variant,
            )

    def stage_polynomials(self, workload: Workload) -> dict[str, Polynomial]:
        """Of each stage, the polynomial that is highest for a workload."""
        self._check(workload)
        highest: dict[str, tuple[float, Polynomial]] = {}
        for polynomial in self.polynomials:
            if in_regime(workload, polynomial.when):
                amount = polynomial.bytes_at(workload)
                if polynomial.stage not in highest or amount > highest[polynomial.stage][0]:
                    highest[polynomial.stage] = (amount, polynomial)
        return {stage: polynomial for stage, (_, polynomial) in highest.items()}

    def stage_peaks(self, workload: Workload) -> dict[str, int]:
        """The peak of each stage [bytes]."""
        return {stage: round(p.bytes_at(workload)) for stage, p in self.stage_polynomials(workload).items()}

    def predict_bytes(self, workload: Workload) -> int:
        """The peak of a workload of this variant [bytes].

        Raises
        ------
        FitError
            If the workload is of another variant.
        """
        return max(self.stage_peaks(workload).values())

    def binding(self, workload: Workload) -> Polynomial:
        """The polynomial that sets the peak of a workload."""
        return max(self.stage_polynomials(workload).values(), key=lambda p: p.bytes_at(workload))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON, amounts in bytes."""
        return {
            "variant": variant_name(self.variant),
            "sizes": SIZES,
            "reference": self.reference.to_dict(),
            "derived_from": [point.to_dict() for point in self.points],
            "residual_bytes": self.residual_bytes,
            "polynomials": [
                {
                    "stage": p.stage,
                    "when": in_words(p.when),
                    "module": p.path,
                    "operation": p.operation,
                    "weights_bytes": p.weights_bytes,
                    "coefficients_bytes": p.coefficients,
                    "live_tensors": [dict(tensor) for tensor in p.tensors],
                }
                for p in self.polynomials
            ],
        }

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def to_text(self, *, tensors: int = 8) -> str:
        """The formula for a terminal; of each polynomial the ``tensors`` largest live tensors."""
        lines = [f"peak [bytes] of {variant_name(self.variant)} = the largest of", ""]
        for p in self.polynomials:
            lines.append(f"{_NAMES[p.stage]}{'' if not p.when else ', ' + in_words(p.when)}")
            lines.append(f"    {p.formula()}")
            lines.append(f"    at {p.operation} in {p.path}")
            lines += [f"      {line}" for line in tensor_lines(p.tensors, tensors)]
            lines.append("")
        used = {letter for p in self.polynomials for product in p.coefficients for letter in product.split("*")}
        lines += [f"{letter}  {meaning}" for letter, meaning in SIZES.items() if letter in used]
        r = self.reference
        lines += [
            "",
            f"Tensors are of {r.height}x{r.width}, batch {r.batch_size}, guidance {r.guidance_scale:g}. "
            f"Derived from {len(self.points)} simulated runs, met within {self.residual_bytes:,} bytes.",
        ]
        return "\n".join(lines)

    def to_latex(self) -> str:
        """The formula as an aligned LaTeX block (needs amsmath)."""
        rows = []
        for p in self.polynomials:
            name = _NAMES[p.stage] + (f", {in_words(p.when)}" if p.when else "")
            rows.append(rf"  & {p.formula(latex=True)} && \text{{{name}}}")
        body = " \\\\\n".join(rows)
        return (
            "\\begin{equation*}\n"
            f"M = \\max\\left\\{{\\begin{{aligned}}\n{body}\n\\end{{aligned}}\\right.\n"
            "\\end{equation*}"
        )


def tensor_lines(tensors: tuple[dict[str, Any], ...], most: int) -> list[str]:
    """Rows of a table of live tensors, the largest first, the rest as one row."""
    ordered = sorted(tensors, key=lambda tensor: -int(tensor["size_bytes"]))
    shown, rest = ordered[:most], ordered[most:]
    lines = [
        f"{format_bytes(t['size_bytes']):>11}  {t['dtype']:8} {'x'.join(map(str, t['shape'])) or 'scalar':18} "
        f"{t['path']} ({t['operation']})"
        for t in shown
    ]
    if rest:
        lines.append(f"{format_bytes(sum(t['size_bytes'] for t in rest)):>11}  {len(rest)} smaller tensors")
    return lines


def _number(amount: float) -> str:
    return f"{round(amount):,}" if amount == round(amount) else f"{amount:,.10g}"


def _latex_term(number: str, product: str) -> str:
    number = number.replace(",", r"{,}")
    if product == "weights":
        return rf"\underbrace{{{number}}}_{{\text{{weights}}}}"
    letters = product.replace("A*A", "A^2").replace("P*P", "P^2").replace("*", r"\,")
    return number + (rf"\,{letters}" if letters else "")
