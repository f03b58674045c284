"""Kernel workspaces operator by operator: what is listed, how it is measured, how it is kept. No card is needed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from cpu_counters import CpuCounters  # noqa: E402

from sdfit.backends.trace.tracer import Tracer  # noqa: E402
from sdfit.errors import RecordsError  # noqa: E402
from sdfit.predict.simulation.workspaces import workspaces_for  # noqa: E402
from sdfit.study.lab.commands import main  # noqa: E402
from sdfit.study.lab.operators import (  # noqa: E402
    Held,
    Operator,
    _table_of,
    measure,
    operators_of,
    sweep_operators,
    table,
)
from sdfit.workload import Workload  # noqa: E402

CONVOLUTION = Operator("convolution", "float32", ((1, 8, 32, 32), (16, 8, 3, 3)), 1, 1)
ATTENTION = Operator("attention", "float32", ((1, 1, 64, 32),) * 3)


class Scratchy(CpuCounters):
    """CPU tensors on a device whose every kernel holds a known number of bytes."""

    scratch_bytes = 12_288

    def peaks(self) -> tuple[int, int]:
        allocated, reserved = super().peaks()
        return allocated + self.scratch_bytes, reserved

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"name": "t4"}


def test_the_operators_of_a_workload_are_those_that_run() -> None:
    """The VAE's last upsampler and the first self-attention are there, each shape once."""
    found = operators_of([Workload(512, 512, guidance_scale=1.0, safety_checker=False)])
    upsampler = Operator("convolution", "float16", ((1, 256, 512, 512), (256, 256, 3, 3)), 1, 1)
    assert upsampler in found and len(found) == len(set(found))
    assert Operator("attention", "float16", ((1, 8, 4096, 40),) * 3) in found
    assert Operator("attention", "float16", ((1, 8, 64, 160), (1, 8, 77, 160), (1, 8, 77, 160))) in found


@pytest.mark.parametrize("operator", [CONVOLUTION, ATTENTION])
def test_what_a_kernel_holds_is_what_lies_above_inputs_and_output(operator: Operator) -> None:
    """On a device whose kernels hold 12,288 bytes more than plain CPU tensors show, exactly that is added."""
    assert measure(operator, Scratchy()) - measure(operator, CpuCounters()) == 12_288


def test_a_convolution_on_plain_cpu_tensors_holds_nothing() -> None:
    """The storages of CPU tensors show the inputs and the output, and no workspace."""
    assert measure(CONVOLUTION, CpuCounters()) == 0


def test_the_table_beside_it_is_the_one_the_trace_uses() -> None:
    """For every convolution of a pipeline the table's figure is what the trace adds at that operation."""
    added: dict[tuple[Any, ...], int] = {}
    kernels = workspaces_for("t4")

    def workspace(workload: Workload, func: Any, args: tuple[Any, ...], out: Any) -> int:
        held = kernels(workload, func, args, out)
        if func is torch.ops.aten.convolution.default:
            added[tuple(args[0].shape), tuple(args[1].shape), args[3][0]] = held
        return held

    workload = Workload(256, 264, guidance_scale=1.0, safety_checker=False)
    Tracer(workspace).run(workload)
    says = _table_of("t4")
    found = [o for o in operators_of([workload]) if o.kind == "convolution"]
    assert len(found) > 50
    assert [says(o) for o in found] == [added[(*o.shapes, o.stride)] for o in found]


def test_a_file_is_gone_on_with_and_a_foreign_one_refused(tmp_path: Path) -> None:
    """What a file holds is not measured again; a torn last line is; another kind of file is left alone."""
    path = tmp_path / "operators.jsonl"
    sweep_operators([CONVOLUTION], Scratchy(), path)
    before = path.read_bytes()
    path.write_bytes(before + b'{"operator"')
    found = sweep_operators([CONVOLUTION, ATTENTION], Scratchy(), path)
    assert path.read_bytes().startswith(before) and [h.operator for h in found] == [CONVOLUTION, ATTENTION]
    assert json.loads(path.read_text().splitlines()[0])["environment"]["name"] == "t4"
    (tmp_path / "other.jsonl").write_text('{"sdfit_records": 1}\n')
    with pytest.raises(RecordsError, match="not the environment of an sdfit operators file"):
        sweep_operators([CONVOLUTION], Scratchy(), tmp_path / "other.jsonl")


def test_an_operator_that_fails_is_a_row(tmp_path: Path) -> None:
    """Shapes that do not go together, or too little memory, give a row with the reason."""
    wrong = replace(CONVOLUTION, shapes=((1, 8, 32, 32), (16, 4, 3, 3)))
    (row,) = sweep_operators([wrong], Scratchy(), tmp_path / "o.jsonl")
    assert row.held_bytes is None and "channels" in str(row.message)
    assert "channels" in table([row])


def test_the_table_shows_what_holds_most_first() -> None:
    """The operators are in the order of what they hold."""
    text = table([Held(ATTENTION, 512, None), Held(CONVOLUTION, 4096, 2048)])
    assert text.splitlines()[1].startswith("convolution") and "4.0 KiB" in text and "2.0 KiB" in text


def test_the_command_needs_a_card(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a card it stops and says so; its plan needs none."""
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    assert main(["operators"]) == 1
    assert "no CUDA card" in capsys.readouterr().err
    monkeypatch.setattr("sdfit.study.lab.operators.WORKLOADS", (Workload(64, 64, safety_checker=False),))
    assert main(["operators", "--dry-run"]) == 0
    assert "operators of 1 workloads" in capsys.readouterr().out
