"""The closed form of the peak, as values: polynomials in the sizes of a workload, and how to print them.

`sdfit.study.derivation.derive` finds them; this module only knows what they are, so it needs numpy and the standard
library alone. Their products are those of `sdfit.equation.terms`, and of `BEYOND_TERMS` what a fit cannot identify or
does not need: E are the rows of ``prompt_embeds`` that the caller holds, the other letters are those of
`sdfit.equation.sizes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdfit.equation.sizes import Numbers, Sizes, vae_passes
from sdfit.equation.stages import STAGES
from sdfit.equation.terms import TERMS, products
from sdfit.errors import FitError
from sdfit.units import format_bytes
from sdfit.workload import CHUNK_TOKENS, VariantKey, Workload, variant_name

VAE_STAGES = tuple(stage for stage in STAGES if stage.startswith("vae_"))

LETTERS = {
    "B": "images per call",
    "n": "samples per UNet call: B, or 2B with classifier-free guidance",
    "A": "effective pixels of one image (both sides floored to a multiple of 8)",
    "L": "tokens as the UNet sees them (prompts are padded to 77)",
    "m": "images per VAE pass: 1 with slicing, else B",
    "P": "pixels per VAE pass: a tile with tiling, else A",
    "D": "pixels that earlier VAE passes of the call left behind",
    "E": "rows of prompt_embeds that the caller holds (0 if the prompt is text)",
}
BEYOND_TERMS = ("n·E", "B·L", "B·E", "A", "L·A", "B·A²", "P²")
"""The products that the closed form has and `TERMS` has not."""

_WHEN: dict[str, tuple[str, Callable[[Workload], bool]]] = {
    "": ("always", lambda w: True),
    "B=1": ("for one image", lambda w: w.batch_size == 1),
    "B>=2": ("for two images or more", lambda w: w.batch_size >= 2),
    "n=1": ("for one UNet sample", lambda w: w.unet_batch == 1),
    "n>=2": ("for two UNet samples or more", lambda w: w.unet_batch >= 2),
    "guided": ("with classifier-free guidance", lambda w: w.guided),
    "unguided": ("without classifier-free guidance", lambda w: not w.guided),
    "text": ("if the prompt is text", lambda w: not embedded_rows(w)),
    "embeds": ("if the prompt comes as prompt_embeds", lambda w: embedded_rows(w) > 0),
}
WHEN = tuple(_WHEN)
"""The regimes in which an operation exists."""

_NAMES = {
    "text_encoder": "text encoder",
    "vae_encoder_blocks": "VAE encoder, blocks",
    "vae_encoder_mid": "VAE encoder, mid block",
    "unet": "UNet",
    "unet_deep": "UNet, deep blocks",
    "vae_decoder_mid": "VAE decoder, mid block",
    "vae_decoder_blocks": "VAE decoder, blocks",
    "safety_checker": "safety checker",
}


def embedded_rows(w: Workload) -> int:
    """E: the rows of ``prompt_embeds`` that the caller holds; 0 if the prompt is text."""
    return w.prompt_length if w.prompt_length > CHUNK_TOKENS else 0


def products_at(sizes: Sizes, E: Numbers) -> dict[str, Numbers]:
    """Every product by name, numbers or arrays: those of `TERMS`, then those of `BEYOND_TERMS`.

    Examples
    --------
    >>> found = products_at(Sizes.of(8, 16, 77, 2, 4), 0)
    >>> found["n·A²"], found["B·L"]
    (65536, 154)
    """
    B, n, A, L, _, P, _ = sizes
    beyond = (n * E, B * L, B * E, A, L * A, B * A * A, P * P)
    return dict(zip((*TERMS, *BEYOND_TERMS), (*products(*sizes), *beyond), strict=True))


def letters(product: str) -> list[str]:
    """The sizes in a product, a squared one twice.

    Examples
    --------
    >>> letters("n·A²"), letters("1")
    (['n', 'A', 'A'], [])
    """
    return [factor[0] for factor in product.split("·") for _ in range(len(factor)) if product != "1"]


def in_regime(workload: Workload, when: str) -> bool:
    """Whether an operation with this condition runs for a workload: names of `WHEN`, joined by commas.

    Examples
    --------
    >>> in_regime(Workload(512, 512), "text, B=1")
    True
    """
    return all(_WHEN[part][1](workload) for part in when.split(", "))


def in_words(when: str) -> str:
    """Say in which regime an operation runs.

    Examples
    --------
    >>> in_words("text, B=1")
    'if the prompt is text, for one image'
    """
    return ", ".join(_WHEN[part][0] for part in when.split(", "))


def last_passes(workload: Workload) -> list[Sizes]:
    """The sizes of the VAE passes that can be the highest: of each P, the one that comes last."""
    sizes = Sizes.of_workload(workload)
    latest = {pixels: done for _, pixels, done in vae_passes(workload)}
    return [sizes._replace(P=pixels, D=done) for pixels, done in latest.items()]


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

    def at(self, values: Mapping[str, Numbers]) -> Numbers:
        """The bytes where the products have these values (see `products_at`); numbers or arrays."""
        return sum(coefficient * values[product] for product, coefficient in self.coefficients.items())

    def bytes_at(self, workload: Workload) -> float:
        """The bytes for a workload: of the VAE's passes the highest."""
        return float(self.at(self._highest(workload)))

    def _highest(self, workload: Workload) -> dict[str, Numbers]:
        # outside the VAE all passes give the same: there a polynomial has none of m, P, D
        rows = embedded_rows(workload)
        return max((products_at(sizes, rows) for sizes in last_passes(workload)), key=self.at)

    def terms_bytes(self, workload: Workload) -> dict[str, float]:
        """What each term is for a workload [bytes], the weights apart from the constant."""
        values = self._highest(workload)
        terms = {product: float(amount * values[product]) for product, amount in self.coefficients.items()}
        terms["1"] -= self.weights_bytes
        return {"weights": float(self.weights_bytes)} | terms

    def formula(self, *, latex: bool = False) -> str:
        """The polynomial on one line, the weights as a number of their own."""
        parts = [_latex_weights(self.weights_bytes) if latex else f"{self.weights_bytes:,} weights"]
        for product, coefficient in self.coefficients.items():
            amount = coefficient - self.weights_bytes if product == "1" else coefficient
            if amount:
                term = _number(amount) + ("" if product == "1" else f"·{product}")
                parts.append(_latex(term) if latex else term)
        return " + ".join(parts).replace("+ -", "- ")


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

    def stage_peaks(self, workload: Workload) -> dict[str, int]:
        """The peak of each stage [bytes]."""
        peaks: dict[str, int] = {}
        for amount, p in self._applying(workload):
            peaks[p.stage] = max(round(amount), peaks.get(p.stage, 0))
        return peaks

    def _applying(self, workload: Workload) -> list[tuple[float, Polynomial]]:
        """The polynomials that apply to a workload, with what they give [bytes]."""
        if workload.variant != self.variant:
            raise FitError(
                f"this closed form is of '{variant_name(self.variant)}', the workload is "
                f"'{variant_name(workload.variant)}'; derive that one",
                given=workload.variant,
            )
        return [(p.bytes_at(workload), p) for p in self.polynomials if in_regime(workload, p.when)]

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
        return max(self._applying(workload), key=lambda found: found[0])[1]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON, amounts in bytes."""
        return {
            "variant": variant_name(self.variant),
            "sizes": LETTERS,
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

    def to_text(self, *, tensors: int = 8) -> str:
        """The formula for a terminal; of each polynomial the ``tensors`` largest live tensors."""
        lines = [f"peak [bytes] of {variant_name(self.variant)} = the largest of", ""]
        for p in self.polynomials:
            lines.append(f"{_NAMES[p.stage]}{'' if not p.when else ', ' + in_words(p.when)}")
            lines.append(f"    {p.formula()}")
            lines.append(f"    at {p.operation} in {p.path}")
            lines += [f"      {line}" for line in tensor_lines(p.tensors, tensors)]
            lines.append("")
        used = {letter for p in self.polynomials for product in p.coefficients for letter in letters(product)}
        lines += [f"{letter}  {meaning}" for letter, meaning in LETTERS.items() if letter in used]
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


def _latex_weights(weights_bytes: int) -> str:
    return rf"\underbrace{{{_latex(_number(weights_bytes))}}}_{{\text{{weights}}}}"


def _latex(term: str) -> str:
    return term.replace(",", "{,}").replace("²", "^2").replace("·", r"\,")
