"""Every kernel goes through Triton's compiler for an H100, which needs no GPU: what the interpreter does not see, types
that change in a loop or a tile that does not fit, comes up here."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the kernels need triton: pip install triton==3.7.1")
D, FF, V, WIDTH = 768, 3072, 30522, 30528  # sizes of bert-base; a row of logits is padded to a multiple of 16


def arguments():
    """Per kernel: its file, its name, the constants it is compiled for, and launch options."""
    from minibert.fast.triton.bias_gelu import BLOCK, ROWS, WARPS
    from minibert.fast.triton.cross_entropy import BLOCK as PART
    from minibert.fast.triton.launch import row_tile
    from minibert.fast.triton.linear_gelu import GROUP, TILES

    tile = row_tile(D)
    warps = {"num_warps": tile.pop("num_warps")}
    norm = {"D": D, "BIAS": True, "RESIDUAL": True, **tile}
    yield "layer_norm", "forward_kernel", norm, warps
    yield "embedding", "forward_kernel", {"D": D, **tile}, warps
    yield "bias_gelu", "forward_kernel", {"F": FF, "ROWS": ROWS, "BLOCK": BLOCK}, {"num_warps": WARPS}
    for name in ("forward_kernel", "backward_kernel"):
        yield "cross_entropy", name, {"V": V, "WIDTH": WIDTH, "BLOCK": PART}, {"num_warps": 8}
    for t in TILES:
        sizes = {"TILE_N": t.N, "TILE_F": t.F, "TILE_D": t.D}
        constants = {"F": FF, "D": D, "EXACT": False, "GROUP": GROUP, **sizes}
        yield "linear_gelu", "forward_kernel", constants, {"num_warps": t.warps, "num_stages": t.stages}


INTEGERS = {"ids": "*i64", "labels": "*i64", "words": "*i64", "hits": "*i1", "N": "i32", "ignored": "i32"}
FLOATS = dict.fromkeys(("losses", "log_sums", "d_losses"), "*fp32") | {"eps": "fp32"}


def compile_all() -> None:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for file, name, constants, options in arguments():
        kernel = getattr(importlib.import_module(f"minibert.fast.triton.{file}"), name)
        types = {**INTEGERS, **FLOATS} | ({"words": "*bf16"} if file == "embedding" else {})
        signature = {arg: "constexpr" if arg in constants else types.get(arg, "*bf16") for arg in kernel.arg_names}
        places = {arg: (kernel.arg_names.index(arg),) for arg in kernel.arg_names}
        # torch's memory is aligned, and the launcher would find that out
        aligned = {places[arg]: [["tt.divisibility", 16]] for arg, kind in signature.items() if kind.startswith("*")}
        source = ASTSource(kernel, signature, {places[arg]: value for arg, value in constants.items()}, aligned)
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        wide, tensor_cores = ".v4.b32" in built.asm["ptx"], "wgmma" in built.asm["ptx"]
        print(file, name, f"shared={built.metadata.shared}", f"wide={wide}", f"tensor_cores={tensor_cores}")


def test_kernels_compile_for_an_h100(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 9
    for line in lines:
        assert int(line.split("shared=")[1].split()[0]) <= 227 * 1024, line  # what a block of an H100 may have
        assert ("tensor_cores=True" in line) == line.startswith("linear_gelu"), line
        assert "wide=True" in line, f"{line}: memory is not read 16 bytes at a time"


if __name__ == "__main__":
    compile_all()
