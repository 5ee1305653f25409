"""Compiles a Pass into a package: `python -m minibert.fast.compiling SHAPE.json PACKAGE.pt2`.

A program of its own, since compiling loads much, starts processes and may be ended by a compiler's crash.
"""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import torch
from torch._inductor.fx_passes import mkldnn_fusion
from torch.export import Dim, export

from minibert.fast.graph import KINDS, Pass, Places, Shape
from minibert.fast.quantize import FbgemmInt8Linear

# Weights stay outside; threads are those of whoever calls, not of who compiled
OPTIONS = {
    "aot_inductor.package_constants_in_so": False,
    "always_keep_tensor_constants": True,  # numbers that are handed in are not to be written into the code
    "cpp.dynamic_threads": True,
    "compile_threads": 1,
}


# FBGEMM's product, under a name of our own while the pass is recorded: torch takes its own operation apart, down to
# pointers to numbers that a recording has not. The package then calls torch's, whose arguments are the same.
FBGEMM = "fbgemm_linear_int8_weight_fp32_activation"


def stand_in() -> torch.library.Library:
    """Defines the name, with shapes and no numbers."""
    library = torch.library.Library("minibert", "DEF")
    library.define(str(getattr(torch.ops.aten, FBGEMM).default._schema).removeprefix("aten::"))
    library.impl(FBGEMM, lambda x, weight, *others: x.new_empty(x.shape[0], weight.shape[0]), "Meta")
    return library


def call_torchs_own(package: Path) -> None:
    """Put torch's operation in the place of the stand-in, in a package."""
    recorded = package.rename(package.with_name("recorded.pt2"))
    with zipfile.ZipFile(recorded) as source, zipfile.ZipFile(package, "w") as target:
        for item in source.infolist():
            content = source.read(item)
            if item.filename.endswith(".wrapper.json"):
                content = content.replace(f'"minibert::{FBGEMM}"'.encode(), f'"aten::{FBGEMM}"'.encode())
            target.writestr(item, content)


def compile_pass(shape: Shape, package: Path) -> None:
    """Write the package for a shape. Raises whatever torch or the compiler raise."""
    N, B, T, M = (Dim(name, min=least, max=1 << 20) for name, least in (("N", 1), ("B", 1), ("T", 2), ("M", 1)))
    places = Places.of([13, 5, 3])
    ids, picked = torch.zeros(3, 21, dtype=torch.long), torch.zeros(5, dtype=torch.long)
    example = (ids, places.source, places.mask, places.row, places.column, picked)
    dynamic = ({1: N}, {0: B, 1: T}, {0: B, 1: T}, {0: N}, {0: N}, {0: M})
    if not shape.fuses:  # nor may the compiler join what is apart
        mkldnn_fusion._mkldnn_fusion_init = lambda: None
    library = (
        stand_in() if issubclass(KINDS[shape.linear], FbgemmInt8Linear) else None
    )  # kept: the name goes with the variable
    with torch.no_grad(), torch.fx.experimental._config.patch(backed_size_oblivious=True):
        program = export(Pass(shape).eval(), example, dynamic_shapes=dynamic)
        torch._inductor.aoti_compile_and_package(program, package_path=str(package), inductor_configs=OPTIONS)
    if library is not None:
        call_torchs_own(package)


if __name__ == "__main__":
    wanted = json.loads(Path(sys.argv[1]).read_text())
    compile_pass(Shape(**{**wanted, "epsilons": tuple(wanted["epsilons"])}), Path(sys.argv[2]))
