"""optimize(): the outputs of the plain model, for every head, mask and edge case; bad input refused as there."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from minibert import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    optimize,
)
from minibert.fast import padding, plan
from minibert.fast.onednn import PlainLinear

HEADS = [
    BertModel,
    BertForMaskedLM,
    BertForPreTraining,
    BertForNextSentencePrediction,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertForQuestionAnswering,
    BertForMultipleChoice,
]
B, T, V = 4, 13, 120


def make(cls=BertModel, seed=0, **changes):
    """A small model with all its parameters away from their initial values."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 80, "num_hidden_layers": 3}
    model = cls(BertConfig(**{**sizes, "vocab_size": V, "max_position_embeddings": 32, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def text(seed=1, shape=(B, T)):
    return torch.randint(1, V, shape, generator=torch.Generator().manual_seed(seed))


def masks():
    """Every kind of mask, by name."""
    right, holes, left, empty = (torch.ones(B, T, dtype=torch.long) for _ in range(4))
    right[1, 7:] = right[3, 1:] = 0
    holes[0, 3:5] = holes[2, 1:9] = 0
    left[1, :6] = 0
    empty[2] = 0
    causal = torch.ones(T, T).tril().bool().expand(B, T, T)
    added = torch.zeros(B, 3, T, T).masked_fill(torch.rand(B, 3, T, T) < 0.3, -1e4)
    named = {"ones": right | 1, "right": right, "holes": holes, "left": left, "empty": empty, "boolean": right.bool()}
    return {"none": None, **named, "causal": causal, "added": added}


def close(fast, plain, atol=1e-5):
    torch.testing.assert_close(fast, plain, atol=atol, rtol=1e-5)


def on_tokens(x, mask):
    """The rows of x (B, T, ...) at real tokens: the outputs at padding mean nothing."""
    if mask is None or mask.ndim > 2 or x.shape[:2] != mask.shape:
        return x
    return x[mask.bool()]


@pytest.mark.parametrize("cls", HEADS)
def test_every_head_gives_the_plain_outputs(cls):
    model, ids, mask = make(cls), text(), masks()["right"]
    segments = (torch.arange(T) > 5).long().expand(B, T)
    if cls is BertForMultipleChoice:
        ids, mask, segments = (x.view(2, 2, T) for x in (ids, mask, segments))
    with torch.no_grad():
        plain = model(ids, mask, segments, output_hidden_states=True)
    fast = optimize(model)(ids, mask, segments, output_hidden_states=True)
    assert type(fast) is type(plain)
    assert fast.keys() == plain.keys()
    for name in set(plain) - {"hidden_states"}:
        close(on_tokens(fast[name], mask), on_tokens(plain[name], mask))
    for ours, theirs in zip(fast.hidden_states, plain.hidden_states, strict=True):
        rows = mask.view(B, T)
        close(on_tokens(ours, rows), on_tokens(theirs, rows))
        if cls is not BertForQuestionAnswering:  # whose logits compete with those at padding
            assert not on_tokens(ours, 1 - rows).any(), "padding must come back as zeros"


@pytest.mark.parametrize("name", masks())
def test_every_mask(name):
    model, ids, mask = make(), text(), masks()[name]
    with torch.no_grad():
        plain = model(ids, mask)
    fast = optimize(model)(ids, mask)
    close(on_tokens(fast.last_hidden_state, mask), on_tokens(plain.last_hidden_state, mask))
    close(fast.pooler_output, plain.pooler_output)


@pytest.mark.parametrize("cls", [BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification])
def test_losses_and_tuples(cls):
    model, ids, mask = make(cls), text(), masks()["right"]
    labels = text(2) % 2 if cls is not BertForSequenceClassification else torch.tensor([0, 1, 1, 0])
    if cls is not BertForSequenceClassification:
        labels = labels.masked_fill(mask == 0, -100)
    with torch.no_grad():
        plain = model(ids, mask, labels=labels)
    loss, logits = optimize(model)(ids, mask, labels=labels, return_dict=False)
    close(loss, plain.loss)
    close(on_tokens(logits, mask), on_tokens(plain.logits, mask))


def test_question_answering_and_pretraining_losses():
    model, starts = make(BertForQuestionAnswering), torch.tensor([0, 3, 2, 40])
    with torch.no_grad():
        plain = model(text(), start_positions=starts, end_positions=starts + 1)
    close(optimize(model)(text(), start_positions=starts, end_positions=starts + 1).loss, plain.loss)
    model, follows = make(BertForPreTraining), torch.tensor([0, 1, 0, 1])
    with torch.no_grad():
        plain = model(text(), labels=text(3), next_sentence_label=follows)
    fast = optimize(model)(text(), labels=text(3), next_sentence_label=follows)
    for name in ("loss", "mlm_loss", "nsp_loss"):
        close(getattr(fast, name), getattr(plain, name))


def test_attention_maps():
    model, ids = make(), text()
    for mask in (None, masks()["right"], masks()["holes"], masks()["causal"]):
        with torch.no_grad():
            plain = model(ids, mask, output_attentions=True).attentions
        fast = optimize(model)(ids, mask, output_attentions=True).attentions
        for ours, theirs in zip(fast, plain, strict=True):
            close(*(on_tokens(x.transpose(1, 2), mask) for x in (ours, theirs)))  # (B, H, T, T) -> (B, T, H, T)


def test_lists_of_ids():
    model, mask = make(), masks()["right"]
    fast = optimize(model)
    texts = [row[kept.bool()].tolist() for row, kept in zip(text(), mask, strict=True)]
    got, expected = fast(texts), fast(text(), mask)
    assert got.last_hidden_state.shape == expected.last_hidden_state.shape
    assert torch.equal(got.last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize("cls", [BertModel, BertForMaskedLM, BertForPreTraining, BertForTokenClassification])
@pytest.mark.parametrize("with_states", [False, True])
def test_positions(cls, with_states):
    fast, mask = optimize(make(cls)), masks()["right"]
    positions = torch.zeros(B, T, dtype=torch.bool)
    positions[0, 3] = positions[0, 9] = positions[1, 0] = positions[1, 6] = True  # and none of rows 2 and 3
    whole = fast(text(), mask)
    some = fast(text(), mask, positions=positions, output_hidden_states=with_states)
    for name in whole:
        expected = whole[name][positions] if whole[name].shape[:2] == (B, T) else whole[name]
        close(some[name], expected)


def test_no_positions_leave_the_pooled_output():
    fast = optimize(make())
    out = fast(text(), positions=torch.zeros(B, T, dtype=torch.bool))
    assert out.last_hidden_state.shape == (0, 48)
    close(out.pooler_output, fast(text()).pooler_output)
    words = optimize(make(BertForMaskedLM))(text(), positions=torch.zeros(B, T, dtype=torch.bool))
    assert words.logits.shape == (0, V)


def test_texts_do_not_see_each_other():
    fast, ids, mask = optimize(make()), text(), masks()["right"]
    changed = ids.clone()
    changed[1:] = text(9)[1:]
    close(fast(changed, mask).last_hidden_state[0], fast(ids, mask).last_hidden_state[0], atol=1e-6)
    alone = fast(ids[1:2, :7]).last_hidden_state[0]
    close(fast(ids, mask).last_hidden_state[1, :7], alone, atol=1e-6)


def test_what_padding_holds_does_not_matter():
    fast, mask = optimize(make()), masks()["right"]
    other = torch.where(mask.bool(), text(), text(5))
    assert torch.equal(fast(text(), mask).last_hidden_state, fast(other, mask).last_hidden_state)


def test_embeddings_and_positions_given():
    model = make()
    embeds, places = torch.randn(B, T, 48), (torch.arange(T).flip(0) + 3)[None]
    with torch.no_grad():
        plain = model(inputs_embeds=embeds, position_ids=places, attention_mask=masks()["right"])
    fast = optimize(model)(inputs_embeds=embeds, position_ids=places, attention_mask=masks()["right"])
    close(fast.pooler_output, plain.pooler_output)


@pytest.mark.parametrize("length", [1, 2, 32])
def test_shortest_and_longest(length):
    model, ids = make(), text(shape=(1, length))
    with torch.no_grad():
        close(optimize(model)(ids).last_hidden_state, model(ids).last_hidden_state)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_fast", "relu", "silu", "tanh", "quick_gelu", "mish"])
def test_activations(activation):
    model = make(BertForMaskedLM, hidden_act=activation)
    with torch.no_grad():
        close(optimize(model)(text()).logits, model(text()).logits)


def test_float64_is_packed_too():
    model, mask = make().double(), masks()["right"]
    with torch.no_grad():
        plain = model(text(), mask).last_hidden_state
    torch.testing.assert_close(
        on_tokens(optimize(model)(text(), mask).last_hidden_state, mask), on_tokens(plain, mask), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_eight_threads_at_once(dtype, monkeypatch):
    monkeypatch.setattr(plan, "_LOSS", float("inf"))  # refuse nothing, so that a slow CPU is tested too
    fast, model = optimize(make(), dtype), make()
    inputs = [text(seed, (3, 5 + seed)) for seed in range(16)]
    with torch.no_grad():
        expected = [model(ids).last_hidden_state for ids in inputs]
    with ThreadPoolExecutor(8) as pool:
        for got, want in zip(pool.map(lambda ids: fast(ids).last_hidden_state, inputs * 4), expected * 4, strict=True):
            close(got, want, **({} if dtype == "float32" else {"atol": 0.2}))


def test_parameters_are_shared_and_their_change_is_noticed():
    model = make()
    fast = optimize(model)
    assert fast.engine.embeddings is model.embeddings
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.mul_(2)
    with pytest.raises(RuntimeError, match="optimize it again"):
        fast(text())


def test_copies_and_pickles():
    fast = optimize(make())
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        close(other(text()).last_hidden_state, fast(text()).last_hidden_state)


def test_plan_has_receipts():
    fast = optimize(make())
    assert "float32" in repr(fast)
    assert "threads" in repr(fast)
    assert "GFLOP/s" in fast.explain()
    assert "MiB" in fast.explain()


def test_inference_only():
    fast = optimize(make())
    with pytest.raises(RuntimeError, match="inference only"):
        fast.train()
    with pytest.raises(RuntimeError, match="plain model"):
        fast.double()
    assert not fast.eval().training
    assert not fast(text()).last_hidden_state.requires_grad


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "exactly one of"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, "input_ids"),
        ({"input_ids": torch.full((1, 3), V)}, "input_ids must be from 0"),
        ({"input_ids": torch.rand(1, 3)}, "input_ids"),
        ({"input_ids": torch.ones(1, 33, dtype=torch.long)}, "33 tokens"),
        ({"input_ids": text(), "attention_mask": torch.ones(B, T + 1)}, "attention_mask"),
        ({"input_ids": text(), "token_type_ids": text()}, "token_type_ids"),
        ({"input_ids": [[1, 2], []]}, r"input_ids\[1\]"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [1, 2]}, r"input_ids\[0\]"),
        ({"input_ids": [[1]], "attention_mask": torch.ones(1, 1)}, "attention_mask"),
        ({"input_ids": text(), "positions": torch.ones(B, T)}, "positions must be a boolean"),
        ({"input_ids": text(), "positions": torch.ones(1, T).bool()}, "positions must be a boolean"),
        ({"input_ids": text(), "positions": [[0]]}, "positions must be a boolean"),
        ({"input_ids": text(), "attention_mask": masks()["right"], "positions": torch.ones(B, T).bool()}, "padding"),
    ],
)
def test_bad_input(kwargs, message):
    with pytest.raises(ValueError, match=message):
        optimize(make())(**kwargs)


def test_bad_arguments():
    with pytest.raises(TypeError, match="'labels'"):
        optimize(make())(text(), labels=text())
    with pytest.raises(ValueError, match="labels must be from"):
        optimize(make(BertForMaskedLM))(text(), labels=torch.full((B, T), V))
    with pytest.raises(ValueError, match="with labels"):
        optimize(make(BertForMaskedLM))(text(), labels=text(), positions=torch.ones(B, T).bool())
    with pytest.raises(ValueError, match="single tokens"):
        optimize(make(BertForSequenceClassification))(text(), positions=torch.ones(B, T).bool())
    with pytest.raises(TypeError, match="minibert model"):
        optimize(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="must be None or one of"):
        optimize(make(), dtype="float8")
    with pytest.raises(ValueError, match="optimize works on"):
        optimize(make().to("meta"))


def test_products_see_few_numbers_of_rows(monkeypatch):
    """oneDNN keeps code for each: calls of any lengths must not fill the memory."""
    counts = {tokens: padding.rounded(tokens) for tokens in range(1, 4097)}
    assert all(tokens <= rows <= tokens + max(3, tokens / 16) for tokens, rows in counts.items())
    assert len(set(counts.values())) <= 112
    seen = set()

    def recorded(self, x, dtype=None, call=PlainLinear.__call__):
        seen.add(len(x))
        return call(self, x, dtype)

    monkeypatch.setattr(PlainLinear, "__call__", recorded)
    monkeypatch.setattr(plan, "measure", lambda names, D, F, attempt=0: plan.Speeds({"plain": 1.0}, {}))
    model = make(BertForMaskedLM)
    fast = optimize(model, compile=False)
    for length in range(1, T + 1):
        ids = torch.randint(1, 120, (2, length))
        for positions in (None, torch.arange(2 * length).view(2, length) % 3 == 0):
            expected = model(ids).logits if positions is None else model(ids).logits[positions]
            close(fast(ids, positions=positions).logits, expected)
    assert seen <= set(counts.values())
