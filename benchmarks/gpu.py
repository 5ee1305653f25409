"""Everything that minibert claims on a GPU, measured in one command within ten minutes.

    python benchmarks/gpu.py [--only full,latency] [--minutes 10] [--output benchmarks/results/gpu.csv]
    python benchmarks/gpu.py --dry-run    # tiny shapes, on the CPU, nothing saved: does the script itself work?

Sections, in the order of their importance; one that would begin after the minutes are over is left out, and named:
    peak       the bf16 matrix product that all shares of the peak are shares of
    accuracy   error against float64 at most twice that of transformers; texts do not see each other; masked rows finite
    full       inference on full batches: bert-base, bf16, 256 x 128 and 64 x 512
    natural    inference on texts of natural lengths; transformers pads each batch to its longest text
    latency    one text of 16 and of 128 tokens
    training   steps of pretraining at 128 and 512 tokens: forward, backward, clip, AdamW, dropout on
    kernels    each Triton kernel against torch and torch.compile, forward and backward

Contenders take turns; answers are compared before times are. transformers runs eager, with SDPA, and SDPA compiled.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import torch
import transformers
from common import RESULTS, Contender, alternate, append, check, rows, show
from torch import Tensor, nn

import minibert
from minibert.fast.flops import forward_flops, matmul_peak, training_flops
from minibert.fast.pretraining import PackedPretrainingLoss

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """Sizes of a real run, or of a dry one."""

    device: str
    dtype: torch.dtype
    sizes: dict[str, int]
    full: tuple[tuple[int, int], ...]
    natural: tuple[int, int, int]  # batches, texts a batch, the longest text
    latency: tuple[int, ...]
    training: tuple[tuple[int, int], ...]
    rounds: int
    backend: str
    peak_size: int

    def compiled(self, model: Any, **options: Any) -> Any:
        return torch.compile(model, backend=self.backend) if self.device == "cpu" else torch.compile(model, **options)


REAL = Setting("cuda", torch.bfloat16, {}, ((256, 128), (64, 512)), (8, 64, 512), (16, 128), ((256, 128), (64, 512)),
               20, "inductor", 8192)  # fmt: skip
DRY = Setting("cpu", torch.float32, {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2, "intermediate_size": 128}, ((8, 16), (2, 32)), (2, 4, 32), (5,), ((4, 16),),
              2, "eager", 64)  # fmt: skip


def optimized(model: nn.Module, s: Setting) -> nn.Module:
    """What `optimize` makes on a GPU; in a dry run the same code on the CPU."""
    if s.device == "cuda":
        return minibert.optimize(model)
    from dataclasses import replace

    from minibert.fast.cuda import PLAIN

    return replace(PLAIN, graphs=True, dtype=str(model.dtype).removeprefix("torch.")).build(model)


def twins(s: Setting, head: str, attention: str = "sdpa", **changes: Any) -> tuple[nn.Module, nn.Module]:
    """transformers' model and minibert's with the same random weights, in s.dtype, in eval mode."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**s.sizes, **changes})
    config._attn_implementation = attention
    theirs = getattr(transformers, head)(config).eval()
    ours = getattr(minibert, head)(minibert.BertConfig(**{**s.sizes, **changes})).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(s.device, s.dtype), ours.to(s.device, s.dtype)


def texts(s: Setting, B: int, T: int, seed: int = 0) -> Tensor:
    vocabulary = s.sizes.get("vocab_size", 30522)
    return torch.randint(1, vocabulary, (B, T), generator=torch.Generator().manual_seed(seed)).to(s.device)


def table_of(section: str, shape: str, contenders: list[Contender], baseline: str, s: Setting, flops: float = 0.0,
             tokens: int = 0) -> Rows:  # fmt: skip
    """Time in turn, print; rows with tokens a second, operations a second and their share of the measured peak."""
    alternate(contenders, s.rounds, warmup=3 if s.device == "cuda" else 1)
    ceiling = matmul_peak(s.device, s.dtype, s.peak_size)
    table = rows(f"gpu {section}", shape, contenders, baseline)
    for row in table:
        seconds = row["median_ms"] / 1e3
        row["tokens_per_s"] = round(tokens / seconds)
        row["tflops"], row["peak_share"] = round(flops / seconds / 1e12, 2), round(flops / seconds / ceiling, 3)
    show(table)
    for row in table if flops else []:
        print(f"  {row['contender']:32} {row['tflops']:8.1f} TFLOP/s, {row['peak_share']:.1%} of the peak")
    return table


def peak(s: Setting) -> Rows:
    n = s.peak_size
    a, b = (torch.randn(n, n, device=s.device, dtype=s.dtype) for _ in range(2))
    return table_of("peak", f"{n} x {n} x {n}", [Contender("torch.matmul", lambda: a @ b)], "torch.matmul", s, 2 * n**3)


@torch.no_grad()
def accuracy(s: Setting) -> Rows:
    table = []
    B, T = s.full[0][0] // 4 + 1, s.full[0][1]
    ids, mask = texts(s, B, T), torch.ones(B, T, dtype=torch.long, device=s.device)
    mask[1, T // 2 :] = mask[-1, 3:] = 0
    kept = mask.bool()
    for dtype in (torch.bfloat16, torch.float16):
        theirs, ours = twins(s, "BertModel")
        fast = optimized(ours.to(dtype), s)
        exact = [theirs.double()(ids, mask).last_hidden_state[kept]]
        theirs.to(dtype)
        peer = Contender("transformers SDPA", lambda model=theirs: [model(ids, mask).last_hidden_state[kept]])
        own = Contender("minibert", lambda model=fast: [model(ids, mask).last_hidden_state[kept]])
        check(peer, exact)
        own.tolerance = 2 * peer.error
        check(own, exact)
        table += table_of("accuracy", f"{B} x {T}, {dtype}", [own, peer], "transformers SDPA", s)
        alone = fast(ids[1:2, : T // 2]).last_hidden_state[0]
        drift = float((fast(ids, mask).last_hidden_state[1, : T // 2] - alone).abs().max())
        assert drift <= own.tolerance, f"a text changes by {drift:.1e} with its neighbours"
        masked = mask.clone()
        masked[0] = 0
        assert fast(ids, masked).last_hidden_state.isfinite().all(), "a masked row is not finite"
        print(f"  {dtype}: a text moves by {drift:.1e} with its neighbours; masked rows are finite")
    return table


@torch.no_grad()
def inference(s: Setting, section: str, shape: str, batches: list[dict[str, Tensor]], lengths: list[int],
              ways: dict[str, dict[str, Any]]) -> Rows:  # fmt: skip
    """minibert and transformers on the same batches, in the same dtype. ways: the options of each torch.compile."""
    torch._dynamo.reset()  # what was compiled for other shapes must not make these dynamic
    theirs, ours = twins(s, "BertModel")
    eager, fast = twins(s, "BertModel", "eager")[0], optimized(ours, s)
    print(f"\n{fast.explain()}" if section == "full" else "")
    exact = [theirs.float()(**batch).pooler_output for batch in batches]
    models = {"transformers eager": eager, "transformers SDPA": theirs.to(s.dtype)}
    models |= {f"transformers SDPA {name}": s.compiled(theirs, **options) for name, options in ways.items()}

    def contender(name: str, model: Callable[..., Any]) -> Contender:
        # Cloned, because a compiled model may write its next answer over the last
        return Contender(name, lambda: [model(**batch).pooler_output.clone() for batch in batches])

    peers, own = [contender(name, model) for name, model in models.items()], contender("minibert", fast)
    for peer in peers:
        check(peer, exact)
    own.tolerance = 2 * max(peer.error for peer in peers) + 1e-5
    check(own, exact)
    flops = forward_flops(ours.config, lengths, pooled=len(lengths))
    return table_of(section, shape, [own, *peers], "transformers SDPA compiled", s, flops, sum(lengths))


def full(s: Setting) -> Rows:
    ways = {"compiled": {"dynamic": False}}
    return [row for B, T in s.full
            for row in inference(s, "full", f"{B} x {T}", [{"input_ids": texts(s, B, T)}], [T] * B, ways)]  # fmt: skip


def natural(s: Setting) -> Rows:
    """Lengths log-normal around 64 tokens, as sentences and paragraphs mixed are; few are long, most are short."""
    count, B, longest = s.natural
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(count, B, generator=generator) * 0.8 + 4.16).exp().round().long().clamp(8, longest)
    batches = []
    for number, lengths in enumerate(drawn):
        T = int(lengths.max())
        mask = (torch.arange(T) < lengths[:, None]).long().to(s.device)
        batches.append({"input_ids": texts(s, B, T, seed=number), "attention_mask": mask})
    share = drawn.sum() / sum(batch["input_ids"].numel() for batch in batches)
    shape = f"{count} batches of {B}, mean {drawn.float().mean():.0f}, {share:.0%} not padding"
    return inference(s, "natural", shape, batches, drawn.flatten().tolist(), {"compiled": {"dynamic": True}})


def latency(s: Setting) -> Rows:
    table = []
    for T in s.latency:
        ways = {"compiled": {"dynamic": False}, "compiled, graphs": {"dynamic": False, "mode": "reduce-overhead"}}
        table += inference(s, "latency", f"1 x {T}", [{"input_ids": texts(s, 1, T)}], [T], ways)
    return table


def training(s: Setting) -> Rows:
    """Weights in float32, products in bfloat16 by autocast; the same fused AdamW for both."""
    table = []
    for R, T in s.training:
        torch._dynamo.reset()
        theirs, ours = (model.float() for model in twins(s, "BertForPreTraining"))
        fields, inputs = pretraining_batch(s, R, T)
        predictions, loss = len(fields["masked_labels"]), PackedPretrainingLoss(ours)

        def our_loss(loss: Any = loss, fields: Any = fields, predictions: int = predictions, R: int = R) -> Tensor:
            sums = loss(**fields)
            return sums[0] / predictions + sums[2] / R

        with torch.no_grad(), torch.autocast(s.device, torch.bfloat16):  # without dropout, before compiling
            expected, got = float(theirs(**inputs).loss), float(our_loss())
        assert abs(got - expected) <= 0.01 * expected, f"loss {got:.4f}, but transformers has {expected:.4f}"
        loss.compile(dynamic=False)
        compiled = s.compiled(theirs, dynamic=False)
        contenders = [
            trainer("minibert", ours, our_loss, s),
            trainer("transformers SDPA compiled", theirs, lambda: compiled(**inputs).loss, s),  # noqa: B023
        ]
        flops = training_flops(ours.config, [T] * R, predictions, pooled=R)
        table += table_of("training", f"{R} x {T}", contenders, "transformers SDPA compiled", s, flops, R * T)
    return table


def trainer(name: str, model: nn.Module, loss_of: Callable[[], Tensor], s: Setting) -> Contender:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast(s.device, torch.bfloat16):
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Contender(name, step)


def pretraining_batch(s: Setting, R: int, T: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Full rows with 15% of the words to predict, for PackedPretrainingLoss and for transformers."""
    ids = texts(s, R, T)
    generator = torch.Generator().manual_seed(1)
    places = torch.rand(R, T, generator=generator).argsort(1)[:, : max(1, int(0.15 * T))].to(s.device)
    flat = (places + torch.arange(R, device=s.device)[:, None] * T).flatten().sort().values
    words = ids.flatten()[flat]
    follows = torch.randint(2, (R,), generator=generator).to(s.device)
    rows_of = torch.arange(1, R + 1, device=s.device)[:, None].expand(R, T).contiguous()
    fields = {
        "input_ids": ids,
        "token_type_ids": torch.zeros_like(ids),
        "position_ids": torch.arange(T, device=s.device).expand(R, T).contiguous(),
        "pair": rows_of,
        "cls_positions": torch.arange(R, device=s.device) * T,
        "next_sentence_label": follows,
        "masked_positions": flat,
        "masked_labels": words,
    }
    labels = torch.full_like(ids.flatten(), -100).scatter(0, flat, words).view(R, T)
    return fields, {"input_ids": ids, "labels": labels, "next_sentence_label": follows}


def kernels(s: Setting) -> Rows:
    from gpu_kernels import CASES

    torch._dynamo.reset()
    table = []
    for name, case in CASES.items():
        ours, plain, inputs = case(s)
        compiled = s.compiled(plain, dynamic=False)
        contenders = [Contender(kind, lambda f=f, x=inputs: list(f(*x))) for kind, f in
                      (("triton", ours), ("torch", plain), ("torch.compile", compiled))]  # fmt: skip
        reference = [x.detach() for x in plain(*inputs)]
        largest = max(float(x.abs().max()) for x in reference)
        for one in contenders:
            one.tolerance = 8 * torch.finfo(s.dtype).eps * max(1.0, largest)
            check(one, reference)
        table += table_of("kernels", name, contenders, "torch", s)
    return table


SECTIONS: dict[str, Callable[[Setting], Rows]] = {
    "peak": peak, "accuracy": accuracy, "full": full, "natural": natural, "latency": latency, "training": training,
    "kernels": kernels,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="sections, with commas between them", default=",".join(SECTIONS))
    parser.add_argument("--minutes", type=float, default=10.0, help="begin no section after so many")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.csv")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, nothing saved")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"no section {', '.join(unknown)}: there are {', '.join(SECTIONS)}")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device: --dry-run tries the script without one")
    setting = DRY if options.dry_run else REAL
    output = Path(tempfile.mkdtemp()) / "gpu.csv" if options.dry_run else options.output
    if options.dry_run:
        print("dry run: does the script work? Times on a CPU, of tiny shapes, say nothing")
    begun, left_out = time.perf_counter(), []
    for name in (name for name in SECTIONS if name in chosen):
        if time.perf_counter() - begun > 60 * options.minutes:
            left_out.append(name)
            continue
        append(SECTIONS[name](setting), output)
        print(f"-- {name} done after {(time.perf_counter() - begun) / 60:.1f} minutes", flush=True)
    print(f"left out, for want of time: {', '.join(left_out)}" if left_out else f"all done: {output}")


if __name__ == "__main__":
    main()
