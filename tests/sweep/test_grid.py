"""Grid files: what they plan, that the plan is always the same, and what is refused."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

from sdfit.errors import GridError
from sdfit.sweep import grid
from sdfit.workload import Workload


def planned(folder: Path, text: str) -> grid.Plan:
    """Load a grid written down."""
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return grid.load(str(path))


@pytest.mark.parametrize("name", ["quick", "default", "holdout"])
def test_shipped_grids_load_the_same_each_time(name: str) -> None:
    """Two readings give the same workloads in the same order, none twice."""
    one, two = grid.load(name), grid.load(name)
    assert one == two
    assert len(set(one.workloads)) == len(one.workloads) == sum(count for _, count in one.blocks)
    assert str(len(one.workloads)) in one.summary()


def test_the_default_grid_covers_what_was_asked() -> None:
    """At least 400 runs, 40 shapes of float16 sdpa, a third of them odd, 25 of each other variant, all axes."""
    plan = grid.load("default")
    assert len(plan.workloads) >= 400
    deep = [w for w in plan.workloads if w.variant == Workload(512, 512).variant]
    shapes = {(w.effective_height, w.effective_width) for w in deep}
    odd = {s for s in shapes if s[0] // 8 % 2 or s[1] // 8 % 2 or s[0] % 64 or s[1] % 64}
    assert len(shapes) >= 40 and len(odd) >= len(shapes) / 3
    assert {w.batch_size for w in deep} >= {1, 2, 4, 8, 16}
    assert {w.prompt_length for w in deep} >= {8, 77, 154, 231} and {w.guided for w in deep} == {True, False}
    for field, value in (
        ("attention", "eager"), ("attention", "sliced"), ("attention", "math"), ("dtype", "bfloat16"),
        ("dtype", "float32"), ("vae_slicing", True), ("vae_tiling", True),
    ):  # fmt: skip
        assert sum(getattr(w, field) == value for w in plan.workloads) >= 25, (field, value)


def test_the_holdout_shares_no_shape_with_the_default_grid() -> None:
    """At least 120 runs, at sizes that the fit never sees."""
    holdout, default = grid.load("holdout"), grid.load("default")
    shapes = {(w.effective_height, w.effective_width) for w in default.workloads}
    assert len(holdout.workloads) >= 120
    assert not shapes & {(w.effective_height, w.effective_width) for w in holdout.workloads}


def test_factorial_listed_and_random_blocks(tmp_path: Path) -> None:
    """Each kind of block gives what it says; a workload named twice runs once."""
    plan = planned(
        tmp_path,
        """
        seed = 3
        [[block]]
        shapes = [[512, 768], 512]
        batch_size = [1, 2]
        guidance_scale = [1.0, 7.5]
        [[block]]
        workloads = [{height = 512, width = 512, batch_size = 1, guidance_scale = 1.0}, {height = 64, width = 72, dtype = "float32"}]
        [[block]]
        random = {count = 5, min_side = 100, max_side = 200}
        """,
    )
    assert plan.blocks == (("block 1", 8), ("block 2", 1), ("block 3", 5))
    assert Workload(64, 72, dtype="float32") in plan.workloads
    assert Workload(512, 768, batch_size=2, guidance_scale=1.0) in plan.workloads
    drawn = [w for w in plan.workloads if 100 <= w.height <= 200]
    assert len(drawn) == 5 and all(100 <= w.width <= 200 for w in drawn)


def test_thinning_keeps_every_shape(tmp_path: Path) -> None:
    """``keep`` of a factorial leaves each shape in, and another seed keeps others."""
    text = "seed = {}\n[[block]]\nshapes = [256, 512, 768, 1024]\nbatch_size = [1,2,4,8]\nprompt_length = [8, 77]\nkeep = 8"
    one, two = planned(tmp_path, text.format(1)), planned(tmp_path, text.format(2))
    for plan in (one, two):
        assert [sum(w.height == side for w in plan.workloads) for side in (256, 512, 768, 1024)] == [2, 2, 2, 2]
    assert set(one.workloads) != set(two.workloads) and one.sha256 != two.sha256


def test_max_batch_pixels_bounds_every_kind(tmp_path: Path) -> None:
    """No workload of a factorial, a list or a draw exceeds it."""
    cap = "max_batch_pixels = 600_000\n"
    plan = planned(
        tmp_path,
        f"""
        [[block]]
        shapes = [512, 1024]
        batch_size = [1, 2, 4]
        {cap}
        [[block]]
        random = {{count = 20, min_side = 256, max_side = 2000}}
        {cap}
        """,
    )
    assert max(w.batch_size * w.pixels for w in plan.workloads) <= 600_000


def test_draws_that_are_nearly_all_too_large_end_soon(tmp_path: Path) -> None:
    """One in 5,000 is small enough: each found one once set the count of misses back, and 100,000 took an hour."""
    started = time.process_time()
    with pytest.raises(GridError, match="leaves no room"):
        planned(
            tmp_path, "[[block]]\nmax_batch_pixels = 4800\nrandom = {count = 100_000, min_side = 64, max_side = 16384}"
        )
    assert time.process_time() - started < 10


def test_one_pipeline_after_the_other() -> None:
    """Workloads that need the same pipeline stand together, since building one takes longer than a run."""
    keys = [(w.dtype, w.vae, w.safety_checker, w.offload) for w in grid.load("default").workloads]
    changes = sum(a != b for a, b in itertools.pairwise(keys))
    assert changes == len(set(keys)) - 1


BLOCK = "[[block]]\nshapes = [512]\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("this is not toml", "not a TOML file"),
        ("a = " + "[" * 5000, "not a TOML file: maximum recursion depth"),
        (f"seed = {'9' * 5000}", "not a TOML file: Exceeds the limit"),
        ("", r"has no \[\[block\]\]"),
        ("[block]\nshapes = [512]", r"has no \[\[block\]\]"),
        ("block = []", r"has no \[\[block\]\]"),
        ("block = [1]", "block 1.*must be a table"),
        ("sede = 1\n" + BLOCK, "unknown key 'sede'; did you mean 'seed'"),
        ("seed = -1\n" + BLOCK, "seed is -1"),
        ("seed = 1.5\n" + BLOCK, "seed is 1.5"),
        ("num_inference_steps = 0\n" + BLOCK, "num_inference_steps is 0"),
        ("num_inference_steps = true\n" + BLOCK, "num_inference_steps is True"),
        (BLOCK + "batchsize = [1]", "unknown key 'batchsize'; did you mean 'batch_size'"),
        (BLOCK + "batch_size = []", "the axis 'batch_size' is empty"),
        ("[[block]]\nshapes = []", "the axis 'shapes' is empty"),
        ("[[block]]\nworkloads = []", "the axis 'workloads' is empty"),
        ("[[block]]\nname = 'x'\nbatch_size = [1]", r"'x'.*exactly one of shapes, workloads, random"),
        (BLOCK + "random = {count=1, min_side=64, max_side=64}", "it has shapes, random"),
        (BLOCK + "batch_size = [0]", "batch_size is 0; it must be from 1 to"),
        (BLOCK + "dtype = ['float8']", "dtype must be one of float16"),
        (BLOCK + "guidance_scale = [nan]", "guidance_scale must be a finite number"),
        (BLOCK + "keep = 0", "keep is 0"),
        (BLOCK + "keep = true", "keep is True"),
        (BLOCK + "max_batch_pixels = 'many'", "max_batch_pixels is 'many'"),
        (BLOCK + "max_batch_pixels = nan", "max_batch_pixels is nan"),
        (BLOCK + "max_batch_pixels = 5", "leaves none of its workloads"),
        ("[[block]]\nshapes = [[512]]", r"a shape is a side or \[height, width\], not \[512\]"),
        ("[[block]]\nshapes = ['512x512']", "a shape is"),
        ("[[block]]\nshapes = [[512.0, 512]]", "height must be a whole number"),
        ("[[block]]\nshapes = [32]", "height is 32; it must be from 64"),
        ("[[block]]\nworkloads = [5]", "a workload is a table"),
        (
            "[[block]]\nbatch_size = [1, 2]\nworkloads = [{height = 512, width = 512}]",
            "batch_size does not go with workloads",
        ),
        (
            f"[[block]]\nshapes = {[512] * 1000}\nbatch_size = {[1] * 100}\nprompt_length = {[77] * 100}\nvae = {['kl'] * 10}",
            "it has 100000000 combinations; a grid may have 100000, so give fewer values",
        ),
        (
            f"[[block]]\nshapes = {[512] * 600}\nbatch_size = {[1] * 100}\n" * 2,
            "'block 2': it has 60000 combinations; a grid may have 100000, and the blocks before it leave 40000",
        ),
        ("[[block]]\nrandom = {count = 60000, min_side = 512, max_side = 512}\n" * 2, "'block 2': it has 60000 draws"),
        (
            "[[block]]\nrandom = {count = 100000, min_side = 512, max_side = 512}\nmax_batch_pixels = 9",
            "leaves no room",
        ),
        (f"[[block]]\nrandom = {{count = 1, min_side = 512, max_side = {'9' * 400}}}", "random needs count"),
        ("[[block]]\nrandom = {count = true, min_side = 512, max_side = 512}", "random needs count"),
        (f"seed = {2**63}\n" + BLOCK, "seed is 9223372036854775808; it must be a whole number from 0 to"),
        (
            "num_inference_steps = 1001\n" + BLOCK,
            "num_inference_steps is 1001; it must be a whole number from 1 to 1000",
        ),
        (f"description = '{'x' * (1 << 20)}'\n" + BLOCK, "it has 10486.. bytes, and may have 1048576 at most"),
        (f"[[block]]\nname = '{'x' * 5000}'\nshapes = [0]", "'x{100}': height is 0"),
        ("[[block]]\nworkloads = [{height = 512}]", "it has no width"),
        ("[[block]]\nworkloads = [{height = 512, width = 512, batch = 2}]", "did you mean 'batch_size'"),
        ("[[block]]\nrandom = {count = 1, min_side = 900, max_side = 100}", "random needs count"),
        ("[[block]]\nrandom = {count = 1, low = 1, max_side = 100}", "unknown key 'low'"),
        ("[[block]]\nrandom = 5", "random must be a table"),
        ("[[block]]\nrandom = {count = 1, min_side = 512, max_side = 512}\nmax_batch_pixels = 9", "leaves no room"),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused(tmp_path: Path, text: str, words: str) -> None:
    """Each mistake is one sentence that names the file, the block and the value."""
    with pytest.raises(GridError, match=words) as caught:
        planned(tmp_path, text)
    assert "mine.toml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_grid_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    """An unknown name lists the shipped grids; bytes that are no text are refused."""
    with pytest.raises(GridError, match="no grid 'fast'; there are: breadth, decisions, default, "):
        grid.load("fast")
    path = tmp_path / "bytes.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(GridError, match="not a TOML file"):
        grid.load(str(path))


def test_a_grid_of_the_current_folder_comes_before_the_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """./sweeps/quick.toml is taken for 'quick'."""
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "quick.toml").write_text(BLOCK, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert grid.load("quick").workloads == (Workload(512, 512),)
