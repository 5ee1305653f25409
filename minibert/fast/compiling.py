"""Compiles a Pass into a package: `python -m minibert.fast.compiling SHAPE.json PACKAGE.pt2`.

A program of its own, since compiling loads much, starts processes and may be ended by a compiler's crash.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch._inductor.fx_passes import mkldnn_fusion
from torch.export import Dim, export

from minibert.fast import panels
from minibert.fast.graph import Pass, Shape

# Weights stay outside; threads are those of whoever calls, not of who compiled
OPTIONS = {
    "aot_inductor.package_constants_in_so": False,
    "always_keep_tensor_constants": True,  # numbers that are handed in are not to be written into the code
    "cpp.dynamic_threads": True,
    "compile_threads": 1,
}


def compile_pass(shape: Shape, package: Path) -> None:
    """Write the package for a shape. Raises whatever torch or the compiler raise."""
    N, B, M = (Dim(name, min=1, max=1 << 20) for name in ("N", "B", "M"))
    example = (torch.zeros(3, 21, dtype=torch.long), torch.tensor([0, 13, 18, 21]), torch.tensor([0, 3, 4, 13, 18]))
    dynamic = ({1: N}, {0: B + 1}, {0: M})
    if not shape.fuses:  # nor may the compiler join what is apart
        mkldnn_fusion._mkldnn_fusion_init = lambda: None
    if obstacle := panels.load():
        raise RuntimeError(obstacle)
    panels.record()
    with torch.no_grad(), torch.fx.experimental._config.patch(backed_size_oblivious=True):
        program = export(Pass(shape).eval(), example, dynamic_shapes=dynamic)
        torch._inductor.aoti_compile_and_package(program, package_path=str(package), inductor_configs=OPTIONS)


if __name__ == "__main__":
    wanted = json.loads(Path(sys.argv[1]).read_text())
    compile_pass(Shape(**{**wanted, "epsilons": tuple(wanted["epsilons"])}), Path(sys.argv[2]))
