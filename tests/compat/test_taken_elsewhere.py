"""Our models taken by others' tools: ONNX export, quantization, gathering of DataParallel, pickling, deep copies."""

from __future__ import annotations

import copy
import pickle

import onnxruntime
import pytest
import torch
from reference import assert_as_exact, twins
from torch import nn
from torch.nn.parallel import scatter_gather

import minibert
from minibert.outputs import BaseModelOutput

UNPADDED = (torch.tensor([[2, 5, 7, 9, 3]]), torch.ones(1, 5, dtype=torch.long))
PADDED = (
    torch.tensor([[2, 5, 7, 9, 8, 11, 3], [2, 5, 3, 0, 0, 0, 0], [2, 8, 9, 3, 0, 0, 0]]),
    torch.tensor([[1] * 7, [1] * 3 + [0] * 4, [1] * 4 + [0] * 3]),
)


@pytest.mark.parametrize("dynamo", [True, False], ids=["torch.export", "tracing"])
@pytest.mark.parametrize("head", ["BertModel", "BertForTokenClassification"])
def test_onnx_export(tmp_path, head, dynamo):
    """Exported with an example without padding, it is right for padded batches of other sizes."""
    _, model = twins(head)
    path = tmp_path / "model.onnx"
    names = {"input_ids": {0: "batch", 1: "tokens"}, "attention_mask": {0: "batch", 1: "tokens"}}
    example = UNPADDED if not dynamo else tuple(part.expand(2, -1) for part in UNPADDED)
    shapes = {"dynamic_shapes": {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in names}}
    torch.onnx.export(
        model,
        example,
        str(path),
        input_names=list(names),
        output_names=["first"],
        dynamo=dynamo,
        **(shapes if dynamo else {"dynamic_axes": names}),
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for ids, mask in (UNPADDED, PADDED):
        found = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
        with torch.no_grad():
            expected, exact = model(ids, mask)[0], copy.deepcopy(model).double()(ids, mask)[0]
        kept = mask.bool()
        assert_as_exact(torch.from_numpy(found)[kept], expected[kept], exact[kept])


def test_a_trace_of_an_unpadded_example_takes_padding():
    _, model = twins("BertModel")
    model.requires_grad_(False)  # as constants of a recorded function may not
    with torch.no_grad():
        traced = torch.jit.trace(lambda ids, mask: model(ids, mask, return_dict=False)[0], UNPADDED)
        for ids, mask in (UNPADDED, PADDED):
            kept, exact = mask.bool(), copy.deepcopy(model).double()(ids, mask)[0]
            assert_as_exact(traced(ids, mask)[kept], model(ids, mask)[0][kept], exact[kept])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_quantization():
    reference, ours = twins("BertForSequenceClassification")
    results = []
    for model in (reference, ours):
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        with torch.no_grad():
            results.append(quantized(*PADDED).logits)
    assert torch.equal(*results)
    with torch.no_grad():
        assert not torch.equal(results[1], ours(*PADDED).logits)  # it did quantize


def test_outputs_are_gathered_by_data_parallel(monkeypatch):
    """Its own code rebuilds the record; the copy between GPUs alone is replaced, by a joining on the CPU."""
    together = staticmethod(lambda device, dim, *parts: torch.cat(parts, dim))
    monkeypatch.setattr(scatter_gather.Gather, "apply", together)
    _, model = twins("BertForSequenceClassification", num_labels=2)
    options = {"output_hidden_states": True, "labels": torch.tensor([0, 1, 1])}
    with torch.no_grad():
        whole = model(*PADDED, **options)
        parts = [
            model(PADDED[0][some], PADDED[1][some], output_hidden_states=True, labels=options["labels"][some])
            for some in (slice(0, 2), slice(2, 3))
        ]
    for part in parts:
        part["loss"] = part["loss"][None]  # of a shape that can be joined, as DataParallel itself makes it
    joined = scatter_gather.gather(parts, "cpu")
    assert type(joined) is type(whole)
    assert joined.keys() == whole.keys()
    with torch.no_grad():
        assert_as_exact(joined.logits, whole.logits, copy.deepcopy(model).double()(*PADDED).logits)
    assert joined.loss.shape == (2,)
    assert [state.shape for state in joined.hidden_states] == [state.shape for state in whole.hidden_states]


def test_outputs_are_mappings_that_can_be_changed():
    _, model = twins("BertForSequenceClassification", num_labels=2)
    out = model(*PADDED)
    out["logits"] = out["logits"] + 1
    assert torch.equal(out.logits, out["logits"])
    assert torch.equal(out[0], out.logits)
    assert {**out}.keys() == out.keys() == {"logits"}
    assert type(pickle.loads(pickle.dumps(out))) is type(out)
    assert out == out
    assert out != model(*PADDED)
    assert isinstance(hash(BaseModelOutput(last_hidden_state=torch.zeros(1))), int)


def test_models_are_copied_and_pickled():
    _, model = twins("BertForMaskedLM")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(other(*PADDED).logits, model(*PADDED).logits)
        assert other.cls.predictions.decoder.weight is other.bert.embeddings.word_embeddings.weight
    assert isinstance(model, minibert.BertPreTrainedModel)
