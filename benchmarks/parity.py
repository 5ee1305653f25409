"""The parity certificate: how far each layer and head is from a float64 reference, for minibert and for transformers.

    python benchmarks/parity.py                          # a small BERT with random weights
    python benchmarks/parity.py --checkpoint DIRECTORY   # a pretraining checkpoint of your own

For each dtype x path x mask x batch: the largest absolute error over real tokens, and the same in units in the last
place (of that dtype, at the tensor's root mean square). For each path, also the first operation whose bits differ from
transformers' in the same dtype. Written as CSV, Markdown and a plot.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from common import RESULTS, append, machine
from torch import Tensor, nn

import minibert

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32}
T = 48
Record = dict[str, Tensor]


def random_checkpoint() -> transformers.BertForPreTraining:
    torch.manual_seed(0)
    config = transformers.BertConfig(hidden_size=256, num_attention_heads=4, intermediate_size=1024,
                                     num_hidden_layers=6, vocab_size=5000)  # fmt: skip
    model = transformers.BertForPreTraining(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.02 if parameter.ndim > 1 else 0.1))
    return model


def copies(source: nn.Module, dtype: torch.dtype, attention: str) -> tuple[nn.Module, nn.Module]:
    """transformers' model and ours in a dtype, both with weights in fresh memory."""
    config = transformers.BertConfig(**source.config.to_dict())
    config._attn_implementation = attention
    state = {name: value.clone() for name, value in source.state_dict().items()}
    theirs, ours = transformers.BertForPreTraining(config), minibert.BertForPreTraining(
        minibert.BertConfig.from_dict(source.config.to_dict()))  # fmt: skip
    for model in (theirs, ours):
        model.load_state_dict(state)
        model.eval().to(dtype)
    return theirs, ours


def paths(source: nn.Module, dtype: str) -> dict[str, nn.Module]:
    """Everything that computes in this dtype, by name."""
    theirs, ours = copies(source, DTYPES[dtype], "sdpa")
    if dtype == "int8":
        return {"minibert fast": minibert.optimize(ours, "int8")}
    eager, _ = copies(source, DTYPES[dtype], "eager")
    return {"transformers": theirs, "transformers eager": eager, "minibert": ours,
            "minibert fast": minibert.optimize(ours, dtype)}  # fmt: skip


def masks(B: int) -> dict[str, Tensor | None]:
    right, holes = torch.ones(B, T, dtype=torch.long), torch.ones(B, T, dtype=torch.long)
    for row in range(B):
        right[row, T - 7 * (row + 1) :] = 0
        holes[row, 5 + row : 20] = 0
    return {"none": None, "right": right, "left": right.flip(1), "holes": holes}


@torch.no_grad()
def states(model: nn.Module, ids: Tensor, mask: Tensor | None) -> Record:
    """Each layer's output and each head's."""
    out = model(ids, attention_mask=mask, output_hidden_states=True)
    layers = {f"layer {number}" if number else "embeddings": state for number, state in enumerate(out.hidden_states)}
    return {**layers, "MLM head": out.prediction_logits, "NSP head": out.seq_relationship_logits}


def errors(got: Record, exact: Record, mask: Tensor | None, dtype: torch.dtype) -> Iterator[tuple[str, float, float]]:
    """(layer or head, largest absolute error over real tokens, the same in ulps)."""
    for name, value in exact.items():
        ours = got[name]
        if mask is not None and value.ndim == 3:
            ours, value = ours[mask.bool()], value[mask.bool()]
        error = float((ours.double() - value).abs().max())
        rms = float(value.square().mean().sqrt())
        yield name, error, error / (torch.finfo(dtype).eps * 2.0 ** torch.tensor(rms).log2().floor().item())


def operations(model: nn.Module, ids: Tensor) -> Record:
    """The output of each named module, in the order of the computation."""
    record: Record = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            record[name] = output

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in model.named_modules()
             if isinstance(module, (nn.Linear, nn.LayerNorm, nn.Embedding))]  # fmt: skip
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return record


@torch.no_grad()
def fast_operations(fast: nn.Module, ids: Tensor) -> Record:
    """What the fast path has in place of those modules, one layer after the other."""
    from minibert.fast.attention import attend
    from minibert.fast.padding import packing

    plan = packing(None, *ids.shape, fast.encoder.dtype)
    x = fast.encoder.embed(plan, ids, None, None, None)
    record = {"bert.embeddings.LayerNorm": x}
    for number, layer in enumerate(fast.encoder.layers):
        at = f"bert.encoder.layer.{number}."
        parts = [part for linear in layer.inputs for part in linear(x).split(x.shape[1], 1)]
        record |= dict(zip((f"{at}attention.self.{name}" for name in ("query", "key", "value")), parts, strict=True))
        context = attend(*parts, plan, layer.heads)
        y = record[f"{at}attention.output.LayerNorm"] = layer.attention_norm(layer.projection.add(context, x))
        x = record[f"{at}output.LayerNorm"] = layer.feed_forward(y)
    return record


def first_difference(reference: Record, other: Record) -> str:
    """The first module, in the reference's order, whose output is not equal to the last bit."""
    for name, value in reference.items():
        if name in other and not torch.equal(other[name].reshape(value.shape).to(value.dtype), value):
            return name
    return "none: equal to the last bit"


def certify(source: nn.Module, dtype: str, batches: list[int]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    exact_model, _ = copies(source, torch.float64, "eager")
    models, table, firsts = paths(source, dtype), [], {}
    if dtype != "int8":
        # Weights are rounded before the comparison: their rounding is the dtype's choice, not the path's error
        rounded, _ = copies(source, DTYPES[dtype], "eager")
        exact_model.load_state_dict({name: value.double() for name, value in rounded.state_dict().items()})
    for B in batches:
        ids = torch.randint(1, source.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(B))
        for pattern, mask in masks(B).items():
            exact = states(exact_model, ids, mask)
            for path, model in models.items():
                # int8 has no ulp of its own: it is counted in those of bfloat16
                unit = torch.bfloat16 if dtype == "int8" else DTYPES[dtype]
                for name, error, ulp in errors(states(model, ids, mask), exact, mask, unit):
                    table.append({**machine(), "dtype": dtype, "path": path, "mask": pattern, "batch": B,
                                  "what": name, "max_error": f"{error:.3e}", "ulp": f"{ulp:.2f}"})  # fmt: skip
    if "transformers" in models:
        reference = operations(models["transformers"], ids)
        for path, model in models.items():
            other = fast_operations(model, ids) if path == "minibert fast" else operations(model, ids)
            firsts[path] = first_difference(reference, other)
    return table, firsts


def markdown(table: list[dict[str, Any]], firsts: dict[str, dict[str, str]]) -> str:
    """The worst of all masks and batches, one table a dtype."""
    lines = ["# Parity certificate", "", "Largest absolute error against float64, over all masks and batches.", ""]
    for dtype in dict.fromkeys(row["dtype"] for row in table):
        rows = [row for row in table if row["dtype"] == dtype]
        names = list(dict.fromkeys(row["path"] for row in rows))
        lines += [f"## {dtype}", "", f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
        for what in dict.fromkeys(row["what"] for row in rows):
            worst = [max((row for row in rows if row["what"] == what and row["path"] == path),
                         key=lambda row: float(row["max_error"])) for path in names]  # fmt: skip
            lines.append(f"| {what} | " + " | ".join(f"{w['max_error']} ({w['ulp']} ulp)" for w in worst) + " |")
        lines += ["", "First operation with other bits than transformers' in this dtype:", ""] * bool(firsts[dtype])
        lines += [f"- {path}: `{name}`" for path, name in firsts[dtype].items() if path != "transformers"] + [""]
    return "\n".join(lines)


def plot(table: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtypes = list(dict.fromkeys(row["dtype"] for row in table))
    figure, axes = pyplot.subplots(1, len(dtypes), figsize=(5 * len(dtypes), 4), squeeze=False)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        rows = [row for row in table if row["dtype"] == dtype]
        whats = list(dict.fromkeys(row["what"] for row in rows))
        for path in dict.fromkeys(row["path"] for row in rows):
            worst = [max(float(row["max_error"]) for row in rows if row["path"] == path and row["what"] == what)
                     for what in whats]  # fmt: skip
            axis.plot(whats, worst, marker="o", label=path)
        axis.set(title=dtype, yscale="log", ylabel="largest error against float64")
        axis.tick_params("x", rotation=60)
        axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--out", type=Path, default=RESULTS / "parity.csv")
    options = parser.parse_args()
    source = random_checkpoint()
    if options.checkpoint is not None:
        source = transformers.BertForPreTraining.from_pretrained(options.checkpoint).eval()
    table, firsts = [], {}
    for dtype in options.dtypes:
        rows, firsts[dtype] = certify(source, dtype, options.batches)
        table += rows
    append(table, options.out)
    text = markdown(table, firsts)
    options.out.with_suffix(".md").write_text(text)
    plot(table, options.out.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
