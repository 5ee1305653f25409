"""One text through one model: every fact that the page shows, as plain lists and numbers."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import minibert
from minibert.heads import BertForMultipleChoice
from minibert.study import myths
from minibert.study.probe import METHODS, attribute, leave_out, lens, log_probabilities, patch, zero_head
from minibert.study.steps import google_variable, names
from minibert.study.trace import Step, Trace, trace
from minibert.study.twin import proof, twin, ulps
from minibert.text.tokenizer import BertTokenizer

BUDGET = 4e11  # floating-point operations that one question may cost: some seconds on two cores
LENS_TOKENS = 64  # that the lens looks at, where a text has more
Facts = dict[str, Any]


def encode(model: nn.Module, tokenizer: BertTokenizer, text: str, pair: str | None = None) -> dict[str, Tensor]:
    """What the model is called with. Raises ValueError for an empty text or one too long for the model."""
    for name, value in (("text", text), ("second text", pair)):
        if value is not None and not value.strip():
            raise ValueError(f"{name} is empty: give some words")
    inputs = dict(tokenizer(text, pair, return_tensors="pt"))
    T, limit = inputs["input_ids"].shape[1], model.config.max_position_embeddings
    if T > limit:
        raise ValueError(f"the text is {T} tokens long: this model takes at most {limit}")
    return inputs


def examine(
    model: nn.Module, tokenizer: BertTokenizer, text: str, pair: str | None = None, compare: str | None = None,
    reference: bool = True,
) -> tuple[Trace, Facts]:  # fmt: skip
    """Trace one text, or a pair, and ask all questions about it; `compare` is another text to set beside it.

    reference: compare with transformers' twin where it is installed. Raises ValueError for an empty or too long text.
    """
    inputs = encode(model, tokenizer, text, pair)
    called = {k: v[None] for k, v in inputs.items()} if isinstance(model, BertForMultipleChoice) else inputs
    seen = trace(model, called)
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    masked = [i for i, id_ in enumerate(inputs["input_ids"][0].tolist()) if id_ == tokenizer.mask_token_id]
    other = twin(model) if reference else None
    shown = masked[:1] or [0]
    facts: Facts = {
        "model": type(model).__name__, "text": text, "pair": pair, "sizes": seen.sizes, "masked": masked,
        "tokens": _tokens(model, seen, inputs, tokens),
        "walk": [_row(step, seen.flops, shown[0]) for step in seen],
        "proof": None if other is None else proof(seen, trace(other, called)),
        "kernel": _kernel(seen), "heads": _heads(seen, tokens), "lens": None, "mattered": None, "compare": None,
    }  # fmt: skip
    if hasattr(getattr(model, "cls", None), "predictions"):
        facts["lens"] = _lens(model, tokenizer, seen, masked)
        facts["mattered"] = _mattered(model, tokenizer, inputs, seen, masked)
        if compare is not None:
            facts["compare"] = _compare(model, tokenizer, seen, shown[0], compare)
    lines = {step.module: str(step.source) for step in seen if step.params}
    facts["names"] = [{**n._asdict(), "line": lines.get(n.name.rpartition(".")[0])} for n in names(model)]
    facts["myths"] = myths.measure(model, tokenizer, inputs, seen, facts)
    facts["manifest"] = _manifest(model, other is not None)
    return seen, facts


def _tokens(model: nn.Module, seen: Trace, inputs: Mapping[str, Tensor], tokens: list[str]) -> list[Facts]:
    norms = [
        seen.ending(f"embeddings.{part}_embeddings")[0].tensor[0].float().norm(dim=-1).tolist()
        for part in ("word", "token_type", "position")
    ]
    mask = inputs["attention_mask"][0].tolist()
    rows = zip(tokens, inputs["input_ids"][0].tolist(), inputs["token_type_ids"][0].tolist(), mask, *norms, strict=True)
    keys = ("token", "id", "segment", "mask", "word_norm", "segment_norm", "position_norm")
    return [{"position": i, **dict(zip(keys, row, strict=True))} for i, row in enumerate(rows)]


def _row(step: Step, total: int, at: int) -> Facts:
    x = step.tensor.float()
    vector = x[0] if x.ndim else x[None]
    while vector.ndim > 1:  # of a head the first, of the tokens the one that is asked about
        vector = vector[at if vector.ndim == 2 and len(vector) > at else 0]
    if not torch.isfinite(x.sum()):
        x = x[torch.isfinite(x)]
    low, mean, high = (f(x).item() for f in (torch.min, torch.mean, torch.max))
    return {
        "name": step.name, "line": str(step.source), "code": step.source.code, "equation": step.equation,
        "letters": step.letters, "numbers": step.numbers, "flops": step.flops,
        "share": (step.flops or 0) / (total or 1), "bytes": step.bytes,
        "params": step.params, "min": low, "mean": mean, "max": high, "beside": step.beside,
        "slice": [round(v, 3) for v in vector[:8].tolist()], "paper": step.paper, "google": step.google,
        "variable": google_variable(f"{step.module}.weight") if step.params else None,
    }  # fmt: skip


def _kernel(seen: Trace) -> list[float]:
    """Attention weights times values against the fused kernel's context, in ulps, a number a layer."""
    H = seen.sizes["H"]
    parts = zip(seen.attentions, seen.ending("self.value"), seen.ending("self.context"), strict=True)
    return [ulps(w @ v.tensor.unflatten(-1, (H, -1)).transpose(1, 2), c.tensor) for w, v, c in parts]


def _heads(seen: Trace, tokens: list[str]) -> list[Facts]:
    """Where each head looks on average: shares of the weight, and its entropy in bits."""
    special = [i for i, token in enumerate(tokens) if token in ("[CLS]", "[SEP]")]
    rows = []
    for layer, weights in enumerate(seen.attentions):
        w = weights[0].float()
        entropy = -(w * w.clamp_min(1e-12).log2()).sum(-1).mean(-1)
        diagonals = [w.diagonal(d, 1, 2).sum(-1) / w.shape[-1] for d in (0, -1, 1)]
        shares = torch.stack([*diagonals, w[:, :, special].sum(-1).mean(-1), entropy], 1).tolist()
        keys = ("itself", "previous", "next", "special", "entropy")
        rows += [{"layer": layer, "head": h, **dict(zip(keys, row, strict=True))} for h, row in enumerate(shares)]
    return rows


def _words(tokenizer: BertTokenizer, ids: list[int]) -> list[str]:
    """The pieces of these ids; a model may have more ids than the tokenizer has pieces."""
    return [token or f"id {i}" for token, i in zip(tokenizer.convert_ids_to_tokens(ids), ids, strict=True)]


def _lens(model: nn.Module, tokenizer: BertTokenizer, seen: Trace, masked: list[int]) -> Facts:
    T = seen.sizes["T"]
    at = sorted((masked + [i for i in range(T) if i not in masked])[:LENS_TOKENS])
    layers = lens(model, seen, 5, at)
    words = [[_words(tokenizer, row) for row in layer.ids[0].tolist()] for layer in layers]
    next_sentence = [x.next_sentence[0, 0].item() for x in layers if x.next_sentence is not None]
    settled = []
    for i in range(len(at)):  # the first layer from which on the answer stays
        tops = [layer[i][0] for layer in words]
        settled.append(max((n + 1 for n, word in enumerate(tops) if word != tops[-1]), default=0))
    chances = [[[round(p, 4) for p in row] for row in layer.probabilities[0].tolist()] for layer in layers]
    return {"at": at, "words": words, "chances": chances, "settled": settled, "next_sentence": next_sentence}


def _mattered(
    model: nn.Module, tokenizer: BertTokenizer, inputs: Mapping[str, Tensor], seen: Trace, masked: list[int]
) -> Facts:
    T, N, H = seen.sizes["T"], len(seen.attentions), seen.sizes["H"]
    answers = seen.ending("predictions.decoder")[0].tensor[0].float().log_softmax(-1)  # (T, V)
    at = masked[0] if masked else int(answers.max(-1).values[1:-1].argmin()) + 1 if T > 2 else 0
    target = answers[at].argmax().item()
    scores: dict[str, list[float] | None] = {
        method: attribute(model, inputs, at, method, target, seen).tolist()
        for method in METHODS
        if method != "leave_one_out"
    }
    passes, groups = min(T, int(BUDGET / seen.flops)), None
    if passes >= min(T, 8):
        size = -(-T // passes)
        groups = [list(range(i, min(i + size, T))) for i in range(0, T, size)]
        lost = leave_out(model, inputs, at, target, groups).tolist()
        scores["leave_one_out"] = [lost[i // size] for i in range(T)]
    found = {m: scores[m] for m in METHODS if scores.get(m) is not None}
    agreement = [[_rank_correlation(found[a], found[b], at) for b in found] for a in found]
    alone, together = N * H * seen.flops <= BUDGET, N * seen.flops <= BUDGET
    each = [[h] for h in range(H)] if alone else [[*range(H)]] if together else []
    ablated = []
    for layer in range(N):
        for heads in each:
            off = {f"bert.encoder.layer.{layer}.attention.self": zero_head(model, *heads)}
            with torch.no_grad(), patch(model, off):
                now = log_probabilities(model, inputs, at)
            word = _words(tokenizer, [now.argmax().item()])[0]
            lost_now = (answers[at, target] - now[target]).item()
            ablated.append({"layer": layer, "heads": heads, "lost": lost_now, "word": word})
    return {
        "at": at, "word": _words(tokenizer, [target])[0], "chance": answers[at, target].exp().item(),
        "scores": found, "group": None if groups is None else len(groups[0]), "agreement": agreement,
        "ablated": ablated,
    }  # fmt: skip


def _rank_correlation(a: list[float], b: list[float], at: int) -> float:
    """Spearman's, over all tokens but the one that is asked about."""
    ranks = [torch.tensor([v for i, v in enumerate(x) if i != at]).argsort().argsort().double() for x in (a, b)]
    if len(ranks[0]) < 3:
        return float("nan")
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def _compare(model: nn.Module, tokenizer: BertTokenizer, seen: Trace, at: int, text: str) -> Facts:
    """Another text beside the first: how alike [CLS] and the first [MASK] are after each layer, and the answers."""
    inputs = encode(model, tokenizer, text)
    ids = inputs["input_ids"][0].tolist()
    there = ids.index(tokenizer.mask_token_id) if tokenizer.mask_token_id in ids else 0
    other = trace(model, inputs)
    cosine = torch.nn.functional.cosine_similarity
    rows = []
    for layer, (a, b) in enumerate(zip(lens(model, seen, 1, [at]), lens(model, other, 1, [there]), strict=True)):
        x, y = seen.states[layer][0].float(), other.states[layer][0].float()
        words = _words(tokenizer, [a.ids[0, 0, 0].item(), b.ids[0, 0, 0].item()])
        rows.append({"layer": layer, "cls": cosine(x[0], y[0], 0).item(), "at": cosine(x[at], y[there], 0).item(),
                     "words": words})  # fmt: skip
    return {"text": text, "tokens": tokenizer.convert_ids_to_tokens(ids), "at": [at, there], "rows": rows}


def _manifest(model: nn.Module, compared: bool) -> Facts:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    found = {"minibert": minibert.__version__, "torch": torch.__version__, "python": platform.python_version()}
    if compared:
        import transformers

        found["transformers"] = transformers.__version__
    return {"versions": found, "weights_sha256": digest.hexdigest(), "dtype": str(model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()}  # fmt: skip
