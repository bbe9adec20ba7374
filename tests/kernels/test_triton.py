"""The Triton kernels, run by Triton's interpreter on the CPU and compiled for a GPU that need not be there.

Both happen in processes of their own: Triton decides when it is imported whether it interprets.
"""

import os
import subprocess
import sys

import pytest
import torch

from modelgrove_kernels.matmul import linear_lut4a8, linear_w4a8, prepack, prepack_branch
from modelgrove_kernels.packing import Packed, pack_nibbles
from modelgrove_kernels.reference import LookUp

pytest.importorskip("triton", reason="the GPU kernels are not tested: triton is not installed")

SHAPES = {
    "whole tiles": (64, 128, 64, 32, 16),
    "ragged": (33, 100, 70, 32, 5),
    "one token": (1, 96, 65, 64, 1),
    "one scale a row, odd width": (17, 97, 33, 98, 0),
    "a group of 48": (5, 120, 20, 48, 3),
    "a wide group": (20, 128, 30, 128, 40),
    "a group of several blocks": (3, 272, 20, 272, 2),
    "no token": (0, 64, 32, 32, 4),
}
"""Tokens, inputs, outputs, group and rank."""
VARIANTS = ["asymmetric", "look-up"]

INTERPRETED = """
import sys
import torch
from modelgrove_kernels.triton.linear import linear

cases = torch.load(sys.argv[1])
torch.save({name: linear(**case, look_up=name[1] == "look-up") for name, case in cases.items()}, sys.argv[2])
"""

COMPILED = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from modelgrove_kernels.triton.activations import _quantize_rows
from modelgrove_kernels.triton.linear import _linear


def assembly(kernel, types, constants):
    kinds = {name: types.get(name, "i32") for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return compile(ASTSource(kernel, kinds, places), target=GPUTarget("cuda", 80, 32)).asm["ptx"]


floats = ["x", "smooth", "down", "scales", "row_scales", "hidden", "weight_floats", "up", "bias", "y"]
types = dict.fromkeys(floats, "*fp32") | {"codes": "*i8", "activations": "*i8", "weight": "*u8"}
blocks = {"BLOCK_M": 16, "BLOCK_K": 128, "BLOCK_R": 32}
print(assembly(_quantize_rows, types, blocks | {"SMOOTHED": True}))
for look_up in [False, True]:
    group = {"GROUP": 128, "PADDED": 128, "WIDTH": 128}
    print(assembly(_linear, types, blocks | group | {"BLOCK_N": 64, "LOOK_UP": look_up, "BIASED": True}))
"""


def make(variant, tokens, columns, outputs, group, rank, smooth=True, bias=True):
    """What an operator computes with, all random: codes and padding too, which say more than those of a real weight."""
    random = torch.Generator().manual_seed(tokens * columns + outputs)
    groups = -(-columns // group)
    levels = (
        {"zeros": torch.randint(0, 16, (outputs, groups), generator=random, dtype=torch.uint8)}
        if variant == "asymmetric"
        else {"table": torch.randint(-127, 128, (outputs if rank % 2 else 1, 16), generator=random, dtype=torch.int8)}
    )
    return levels | {
        "x": torch.randn(tokens, columns, generator=random),
        "codes": pack_nibbles(torch.randint(0, 16, (outputs, groups * group), generator=random, dtype=torch.uint8)),
        "scales": torch.rand(outputs, groups, generator=random),
        "group": group,
        "smooth": torch.rand(columns, generator=random) + 0.1 if smooth else None,
        "down": torch.randn(rank, columns, generator=random) if rank else None,
        "up": torch.randn(outputs, rank, generator=random) if rank else None,
        "bias": torch.randn(outputs, generator=random) if bias else None,
    }


def special():
    """Rows of zeros, of one outlier, of the smallest and the largest float32, and with NaN or infinities."""
    case = make("asymmetric", 8, 96, 40, 32, 4)
    x = case["x"]
    x[0] = 0
    x[1, 17] = 1e6
    x[2] = 0
    x[2, :7] = torch.tensor([1, -2, 3, 100, 126.5, 127, -127]) * 2.0**-149
    x[3] *= 2.0**120
    x[4, 5] = torch.nan
    x[5, 95] = torch.inf
    x[6, 0] = -torch.inf
    return case | {"smooth": None, "down": None, "up": None}


def cases():
    random = {(name, variant): make(variant, *shape) for name, shape in SHAPES.items() for variant in VARIANTS}
    batch = make("asymmetric", 6, 64, 24, 32, 0)
    return random | {
        ("special", "asymmetric"): special(),
        ("plain", "asymmetric"): make("asymmetric", 9, 64, 24, 32, 0, smooth=False, bias=False),
        ("a batch", "asymmetric"): batch | {"x": batch["x"].view(2, 3, 64)},
        ("ties", "asymmetric"): ties(),
    }


def ties():
    """Activations exactly between two codes, of which the even one is meant; the weights are a unit matrix."""
    x = torch.arange(-127, 129).view(4, 64) / 2
    x[:, 0] = 127
    eye = pack_nibbles(torch.eye(64, dtype=torch.uint8))
    scales, zeros = torch.ones(64, 2), torch.zeros(64, 2, dtype=torch.uint8)
    return {"x": x, "codes": eye, "scales": scales, "zeros": zeros, "group": 32}


def arguments(x, codes, scales, group, zeros=None, table=None, smooth=None, down=None, up=None, bias=None):
    """The same as an operator takes it."""
    columns = x.shape[-1]
    whole = (
        Packed(codes, scales, zeros, columns, 4, group)
        if table is None
        else LookUp(codes, table, scales, columns, group)
    )
    branch = None if down is None else prepack_branch(down, up)
    return {
        "x": x,
        "weight": prepack(whole),
        "rows": len(codes),
        "group": group,
        "smooth": smooth,
        "branch": branch,
        "bias": bias,
    }


def expected(x, codes, scales, group, zeros=None, table=None, smooth=None, down=None, up=None, bias=None):
    """The specification in float64, but for the rounding to int8, whose float32 division decides ties."""
    inputs = x if smooth is None else x / smooth
    peak = inputs.abs().amax(-1, keepdim=True)
    step = torch.where(peak / 127 == 0, 1.0, peak / 127)
    rounded = (inputs / step).round().clamp(-127, 127).double() * step.double()
    code = torch.stack([codes & 15, codes >> 4], -1).flatten(1).long()
    if table is None:
        weight = (code - zeros.long().repeat_interleave(group, 1)).double()
    else:
        weight = table.double().expand(len(codes), -1).gather(1, code)
    weight = weight * scales.double().repeat_interleave(group, 1)
    y = rounded @ weight[:, : x.shape[-1]].T
    if down is not None:
        y = y + inputs.double() @ down.double().T @ up.double().T
    y = y if bias is None else y + bias.double()
    return torch.where(peak.isfinite(), y, torch.nan)


def run(script, *arguments, **environment):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton")
    torch.save({name: arguments(**case) for name, case in cases().items()}, folder / "cases.pt")
    run(INTERPRETED, folder / "cases.pt", folder / "results.pt", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("case", cases(), ids=" ".join)
def test_it_computes_what_the_specification_says(results, case):
    y, exact = results[case], expected(**cases()[case])
    assert (y.dtype, y.shape) == (torch.float32, exact.shape)
    assert torch.equal(y.isnan(), exact.isnan())
    # Float32 sums in another order: 1e-5 of the largest output of a row is what the specification allows.
    largest = torch.nn.functional.pad(exact.abs(), (0, 1)).amax(-1, keepdim=True)
    assert (y - exact).abs().le(1e-5 * largest).logical_or(exact.isnan()).all()


def test_rows_that_are_not_finite_are_nan_and_only_those(results):
    finite = results["special", "asymmetric"].isfinite()
    assert finite.all(1).tolist() == [True, True, True, True, False, False, False, True]
    assert not finite[4:7].any()


def test_halves_round_to_the_even_code(results):
    x, y = ties()["x"], results["ties", "asymmetric"]
    assert (x.frac() != 0).sum() > 100
    assert torch.equal(y, x.round())


def test_it_compiles_for_a_gpu_to_integer_matrix_instructions(tmp_path):
    printed = run(COMPILED, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    quantize, *products = printed.split(".version")[1:]
    # A GPU's `/` is off by up to two units in the last place; the codes would not be the CPU's.
    assert "div.rn.f32" in quantize
    assert "div.full" not in quantize
    assert len(products) == 2
    assert all("mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32" in product for product in products)


@pytest.mark.parametrize("operator", [linear_w4a8, linear_lut4a8])
def test_the_operators_have_an_implementation_for_gpus(operator):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(operator._qualname, "CUDA")
