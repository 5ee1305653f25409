"""The GPU path: with torch's kernels, with padded buckets and with Triton's under the interpreter on any machine; as
`optimize` chooses it where there is a GPU (pytest -m gpu)."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from reference import HEADS, TINY, batch_for, masks, twins

import minibert
from minibert import optimize
from minibert.fast.cuda import PLAIN, gpu_plan
from minibert.fast.graphs import TEXTS, TOKENS, Bucket, bucket_for, write_host
from minibert.fast.pieces import TRITON, measured
from minibert.fast.varlen import Texts, attend, varlen_obstacle

CUDA = torch.cuda.is_available()
PLANS = {
    "torch": PLAIN,
    "buckets": replace(PLAIN, graphs=True),
    "triton": replace(PLAIN, small=TRITON, large=TRITON),
}
ON_CPU = ["torch", "buckets", pytest.param("triton", marks=pytest.mark.skipif(CUDA, reason="compiled for the GPU"))]
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
EVERYWHERE = [*ON_CPU, GPU] if CUDA else ON_CPU
B, T = 4, 17


def fast(model, variant):
    if variant == "triton":
        pytest.importorskip("triton")
    plan = replace(PLANS.get(variant, PLAIN), dtype=str(model.dtype).removeprefix("torch."))
    return optimize(model.cuda()) if variant == "cuda" else plan.build(model)


def close(ours, theirs, atol=2e-5):
    """float32, in another order. Output scales are about 1."""
    torch.testing.assert_close(ours.cpu(), theirs, atol=atol, rtol=1e-4)


def on_tokens(x, mask):
    return x if mask is None or mask.ndim > 2 or x.shape[:2] != mask.shape else x[mask.bool().to(x.device)]


@pytest.mark.parametrize("variant", EVERYWHERE)
@pytest.mark.parametrize("head", HEADS)
def test_every_head_against_transformers(head, variant):
    reference, model = twins(head)
    batch = batch_for(head)
    mask = masks(B, T)["right"]
    if head == "BertForMultipleChoice":
        mask = mask[:, None].repeat(1, 3, 1)
    if head == "BertForPreTraining":  # the reference projects every token
        batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
    if "labels" in batch and batch["labels"].shape == mask.shape:
        batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
    for name in ("start_positions", "end_positions"):  # a padded token's score is the projection's bias here
        batch.pop(name, None)
    with torch.no_grad():
        expected = reference(**batch, attention_mask=mask)
    on_device = {name: x.cuda() if variant == "cuda" else x for name, x in batch.items()}
    got = fast(model, variant)(**on_device, attention_mask=mask)
    assert set(got) == set(expected)
    for name in expected:
        close(on_tokens(got[name], mask), on_tokens(expected[name], mask))


@pytest.mark.parametrize("variant", EVERYWHERE)
@pytest.mark.parametrize("kind", masks(2, 2))
def test_every_mask(kind, variant):
    reference, model = twins("BertModel")
    ids, mask = batch_for("BertModel")["input_ids"], masks(B, T)[kind]
    with torch.no_grad():
        expected = reference(ids, mask, output_hidden_states=True)
    model = fast(model, variant)
    got = model(ids, mask)
    close(on_tokens(got.last_hidden_state, mask), on_tokens(expected.last_hidden_state, mask))
    if kind != "left":
        close(got.pooler_output, expected.pooler_output)
    states = model(ids, mask, output_hidden_states=True).hidden_states
    for ours, theirs in zip(states, expected.hidden_states, strict=True):
        close(on_tokens(ours, mask), on_tokens(theirs, mask))


@pytest.mark.parametrize("variant", EVERYWHERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_rows_are_finite(variant, dtype):
    model = fast(twins("BertModel", hidden_size=48)[1].to(dtype), variant)
    mask = torch.ones(B, T, dtype=torch.long)
    mask[2], mask[1, 5:] = 0, 0
    got = model(batch_for("BertModel")["input_ids"], mask)
    assert got.last_hidden_state.isfinite().all()
    assert got.pooler_output.isfinite().all()
    assert not got.last_hidden_state[1, 5:].any(), "padding comes back as zeros"


@pytest.mark.parametrize("variant", EVERYWHERE)
def test_texts_do_not_see_each_other(variant):
    """Neighbours and padding may be anything, infinities included: a text's own output stays."""
    _, model = twins("BertModel")
    model = fast(model, variant)
    ids, mask = batch_for("BertModel")["input_ids"], masks(B, T)["right"]
    mask[0] = 0
    mask[0, :6] = 1
    alone = model(ids[:1, :6]).last_hidden_state[0]
    for other in (ids.flip(0), ids.roll(3, 1)):
        other[0] = ids[0]
        together = model(torch.where(mask.bool(), other, 7), mask).last_hidden_state[0, :6]
        close(together, alone.cpu(), atol=2e-6)


def test_neighbours_of_nan_stay_clean():
    """What one text holds, not even NaN, reaches another through attention."""
    qkv = torch.randn(12, 3 * 8)
    texts = Texts(torch.tensor([0, 4, 4, 9], dtype=torch.int32), 6, varlen=False)  # the second is empty
    clean = attend(qkv, 2, texts)
    dirty = qkv.clone()
    dirty[4:9] = torch.nan
    dirty[9:] = torch.nan  # in no text
    assert torch.equal(attend(dirty, 2, texts)[:4], clean[:4])
    q, k, v = qkv[:4].view(4, 3, 2, 4).permute(1, 2, 0, 3)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(4, 8)
    close(clean[:4], expected)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_attention_is_isolated_and_right(dtype):
    qkv = torch.randn(300, 3 * 64, device="cuda", dtype=dtype)
    starts = torch.tensor([0, 1, 130, 130, 290, 290], device="cuda", dtype=torch.int32)  # ten tokens in no text
    got = attend(qkv, 4, Texts(starts, 192, varlen=True))[:290].float()
    expected = attend(qkv.float(), 4, Texts(starts, 192, varlen=False))[:290]
    assert (got - expected).abs().max() < 8 * torch.finfo(dtype).eps
    dirty = qkv.clone()
    dirty[130:] = torch.nan
    assert torch.equal(attend(dirty, 4, Texts(starts, 192, varlen=True))[:130].float(), got[:130])
    index = torch.tensor([0, 5, 129, 131], device="cuda")
    asking = index, Texts(torch.tensor([0, 1, 3, 3, 4, 4], device="cuda", dtype=torch.int32), 2, varlen=True)
    some = attend(qkv, 4, Texts(starts, 192, varlen=True), asking).float()
    assert (some - expected[index]).abs().max() < 8 * torch.finfo(dtype).eps


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_graphs_give_what_eager_gives():
    """The same kernels on a few rows more, replayed on one stream and another; no kernel is compiled on the way."""
    model = optimize(twins("BertModel", hidden_size=48)[1].cuda().bfloat16())
    texts = [[[5] * n, [7] * (n // 2 + 1)] for n in (3, 9, 17, 30)]
    graphs, model.engine.graphs = model.engine.graphs, None
    expected = [model(batch).pooler_output.float() for batch in texts]
    model.engine.graphs = graphs
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            got = [model(batch).pooler_output.float() for batch in texts]
        torch.cuda.synchronize()
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("variant", EVERYWHERE)
@pytest.mark.parametrize("head", ["BertModel", "BertForMaskedLM", "BertForPreTraining"])
def test_positions(head, variant):
    _, model = twins(head)
    model = fast(model, variant)
    ids, mask = batch_for(head)["input_ids"], masks(B, T)["right"]
    positions = torch.zeros(B, T, dtype=torch.bool)
    positions[0, 0] = positions[1, 0] = positions[3, 0] = True
    whole, some = model(ids, mask), model(ids, mask, positions=positions)
    for name in whole:
        expected = whole[name][positions] if whole[name].shape[:2] == (B, T) else whole[name]
        close(some[name], expected.cpu())


@pytest.mark.parametrize("variant", EVERYWHERE)
def test_no_positions(variant):
    ids, nowhere = batch_for("BertModel")["input_ids"], torch.zeros(B, T, dtype=torch.bool)
    assert fast(twins("BertForMaskedLM")[1], variant)(ids, positions=nowhere).logits.shape == (0, TINY["vocab_size"])
    model = fast(twins("BertModel")[1], variant)
    close(model(ids, positions=nowhere).pooler_output, model(ids).pooler_output.cpu())


@pytest.mark.parametrize("variant", EVERYWHERE)
def test_attention_maps(variant):
    _, model = twins("BertModel", attention="eager")
    ids = batch_for("BertModel")["input_ids"]
    for kind in ("none", "right", "holes", "4D"):
        mask = masks(B, T)[kind]
        with torch.no_grad():
            expected = model.cpu()(ids, mask, output_attentions=True).attentions
        got = fast(model, variant)(ids, mask, output_attentions=True).attentions
        for ours, theirs in zip(got, expected, strict=True):
            close(*(on_tokens(x.transpose(1, 2), mask) for x in (ours, theirs)))  # (B, H, T, T) -> (B, T, H, T)


@pytest.mark.parametrize("variant", EVERYWHERE)
def test_embeddings_lists_and_repeated_calls(variant):
    _, model = twins("BertModel")
    embeds, mask = torch.randn(B, T, TINY["hidden_size"]), masks(B, T)["right"]
    with torch.no_grad():
        expected = model(inputs_embeds=embeds, attention_mask=mask)
    model = fast(model, variant)
    close(model(inputs_embeds=embeds, attention_mask=mask).pooler_output, expected.pooler_output)
    first = model([[5, 6, 7], [8]]).last_hidden_state
    kept = first.clone()
    model([[9, 9, 9, 9], [3]])
    assert torch.equal(first, kept), "a result must outlive the next call"
    assert torch.equal(model([[5, 6, 7], [8]]).last_hidden_state, kept)


@pytest.mark.parametrize("variant", EVERYWHERE)
def test_inference_mode_and_autocast_around_a_call(variant):
    model, ids = fast(twins("BertModel")[1], variant), batch_for("BertModel")["input_ids"]
    with torch.inference_mode():
        first = model(ids).last_hidden_state.clone()
    with torch.autocast(model.device.type, torch.bfloat16):
        assert torch.equal(model(ids).last_hidden_state, first)
    assert torch.equal(model(ids).last_hidden_state, first)


def test_gelu_of_other_kinds_falls_back():
    _, model = twins("BertForMaskedLM", hidden_act="gelu_new")
    ids = batch_for("BertModel")["input_ids"]
    with torch.no_grad():
        close(PLAIN.build(model)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", GPU] if CUDA else ["cpu"])
def test_error_is_bounded_by_that_of_transformers(device, dtype):
    """Against float64, the error is at most twice that of transformers computing in the same dtype."""
    reference, model = twins("BertModel", hidden_size=48, intermediate_size=96)
    ids, mask = batch_for("BertModel")["input_ids"].to(device), masks(B, T)["right"].to(device)
    with torch.no_grad():
        exact = reference.double().to(device)(ids, mask).last_hidden_state[mask.bool()]
        theirs = reference.to(dtype)(ids, mask).last_hidden_state[mask.bool()]
    half = model.to(device, dtype)
    ours = fast(half, "cuda" if device == "cuda" else "torch")
    error = (ours(ids, mask).last_hidden_state[mask.bool()].double() - exact).abs().mean()
    assert error <= 2 * (theirs.double() - exact).abs().mean()


def test_buckets():
    assert bucket_for([5]) == Bucket(16, 1, 16)
    assert bucket_for([17]) == Bucket(32, 1, 32)
    assert bucket_for([100, 3, 3, 30]) == Bucket(192, 4, 128)
    assert bucket_for([1] * 5) == Bucket(16, 16, 16)
    assert bucket_for([TOKENS[-1] + 1]) is None
    assert bucket_for([1] * (TEXTS[-1] + 1)) is None


def test_what_a_graph_reads():
    ids = torch.arange(1, 22).view(3, 7)
    batch = write_host(ids, [4, 3], Bucket(16, 4, 16), pinned=False)
    assert torch.equal(batch[:48].view(3, 16)[:, :7], ids)
    assert not batch[:48].view(3, 16)[:, 7:].any()
    assert batch[48:].tolist() == [0, 4, 7, 7, 7]


def test_slots_are_few():
    """One a bucket, however many shapes come."""
    model = fast(twins("BertModel")[1], "buckets")
    for length in range(1, 33):
        model([[5] * length])
    assert set(model.engine.graphs.slots) == {Bucket(16, 1, 16), Bucket(32, 1, 32)}


def test_measured_keeps_what_is_right_and_fast():
    """On a clock that calls Triton fastest: chosen if its result agrees, left out if it fails."""
    pytest.importorskip("triton")
    if CUDA:
        pytest.skip("kernels are compiled for the GPU")
    tables, small = twins("BertModel")[1].embeddings, pytest.MonkeyPatch()
    with small.context() as patch:
        patch.setattr("minibert.fast.pieces.SIZES", {"small": 5})
        pieces, receipts = measured(tables, 53, "gelu", torch.float32, lambda f, _: 2.0 if "torch" in str(f) else 1.0)
        assert pieces["small"] == TRITON
        assert any("triton gelu" in line for line in receipts)
        patch.setattr("minibert.fast.pieces.triton_embed", lambda *_: torch.zeros(5, 36))
        pieces, receipts = measured(tables, 53, "relu", torch.float32, lambda f, _: 2.0 if "torch" in str(f) else 1.0)
        assert "triton" not in str(pieces["small"].up)
        assert "triton" not in str(pieces["small"].embed)
        assert any("left out: wrong by" in line for line in receipts)


def test_explain_and_repr():
    model = PLANS["buckets"].build(twins("BertForMaskedLM")[1])
    assert "float32, scaled_dot_product_attention, CUDA graphs" in repr(model)
    assert "MiB" in model.explain()
    assert "one graph a size" in model.explain()


def test_cuda_without_cuda_is_a_clear_error():
    with pytest.raises(RuntimeError, match="needs a CUDA device, but the model is on cpu"):
        gpu_plan(twins("BertModel")[1], None)
    assert "the model is on cpu" in varlen_obstacle(torch.device("cpu"), torch.bfloat16, 64)
    assert "16 bits" in varlen_obstacle(torch.device("cuda"), torch.float32, 64)


def test_bad_input():
    model = PLAIN.build(twins("BertModel")[1])
    with pytest.raises(ValueError, match="input_ids must be from 0"):
        model(torch.full((1, 3), 101))
    with pytest.raises(ValueError, match="attention_mask must have shape"):
        model(torch.ones(1, 3).long(), torch.ones(1, 4))
    with pytest.raises(ValueError, match="a tensor"):
        model(torch.ones(1, 3).long(), attention_mask=[[1, 1, 1]])
    with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
        model(torch.ones(1, 3).long(), mask=None)
    assert minibert.BertModel is type(model.model)


def test_a_cpu_imports_nothing_of_this():
    code = """
import sys
from minibert import BertConfig, BertModel, optimize
sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
optimize(BertModel(BertConfig(vocab_size=9, **sizes)))([[1, 2, 3]])
print(*sys.modules)
"""
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "minibert.fast.optimized" in loaded
    gpu = {
        "triton",
        "minibert.fast.triton",
        *(f"minibert.fast.{name}" for name in ("cuda", "graphs", "pieces", "varlen")),
    }
    assert not gpu & set(loaded)
