"""`compare`: each fault is called a bug, at its line; each other way to compute the same is called rounding."""

from __future__ import annotations

import copy
import linecache

import foreign
import mutants
import pytest
import torch
from mutants import FAULTS, HIDDEN, WAYS
from reference import HEADS, batch_for, twins

import minibert
from minibert.parity import compare
from minibert.parity.inputs import Case
from minibert.parity.steps import visible

# Where no line of mutants.py is at fault: the step, and what its line says
ELSEWHERE = {
    "eps 1e 5": ("bert.embeddings.LayerNorm", "self.LayerNorm"),
    "eps 1e 7": ("bert.embeddings.LayerNorm", "self.LayerNorm"),
    "mask by minus 1e4": ("attention.self.context", "scores + torch.zeros_like(keep"),
    "mask inverted": ("attention.self.context", "scores + torch.zeros_like(keep"),
    "mask ignored": ("attention.self.context", "F.softmax(scores"),
    "query and key swapped": ("attention.self.context", "key.transpose(2, 3)"),
    "scale by hidden size": ("attention.self.context", "torch.matmul(query, key.transpose(2, 3)) *"),
    "softmax over queries": ("attention.self.context", "F.softmax(scores"),
    "transposed head": ("bert.encoder.layer.0.attention.self.query", "self.query(hidden_states)"),
    "dropout left on": ("bert.encoder.layer.0.attention.self.query", "self.dropout("),
    "attention dropout left on": ("attention.self.context", "scaled_dot_product_attention"),
    "wrong norm weight": ("bert.encoder.layer.0.output.LayerNorm", "self.LayerNorm("),
    "layers in another order": ("bert.encoder.layer.0.attention.self.query", "self.query(hidden_states)"),
    "layers run backwards": ("bert.encoder.layer.2.attention.self.query", "self.query(hidden_states)"),
    "layer shared": ("bert.encoder.layer.1.attention.self.query", "self."),
    "a layer left out": ("bert.encoder.layer.2.attention.self.query", ""),
    "mask on queries": ("attention.self.context", "scores + torch.zeros_like(keep"),
    "decoder untied": ("cls.predictions.decoder", "self.decoder("),
    "residual from the layers input": ("bert.encoder.layer.0.output.residual", "+ residual"),
    "transform left out": ("cls.predictions.transform.dense", "self.decoder("),
    "autocast": ("bert.encoder.layer.0.attention.self.query", "self.query("),
    "padding masked by its id": ("attention.self.context", "scaled_dot_product_attention"),
    "one weight changed": ("bert.encoder.layer.1.intermediate.dense", "self.dense(hidden_states)"),
}


def inputs(tokens: int) -> list[dict[str, torch.Tensor]]:
    """Whole, with a padding token that is none, and padded at the right."""
    batch = batch_for("BertModel", batch=3, tokens=tokens)
    batch["input_ids"][0, -1] = 0
    mask = torch.ones(3, tokens, dtype=torch.long)
    mask[1, max(1, tokens // 2) :] = 0
    mask[2, -1] = 0
    return [batch, {**batch, "attention_mask": mask}]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny models gain nothing by more, and lose much where threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pair():
    reference, ours = twins("BertForPreTraining")
    for model in (reference, ours):
        with torch.no_grad():
            model.bert.encoder.layer[0].output.dense.bias.zero_()  # as checkpoints have it
            model.cls.predictions.bias.zero_()
    return reference, ours


@pytest.mark.parametrize(("name", "tokens"), [*((name, 2) for name in FAULTS), *((name, 9) for name in [*FAULTS][::6])])
def test_a_fault_is_a_bug_at_its_line(pair, name, tokens):
    reference, mutant = pair[0], copy.deepcopy(pair[1])
    FAULTS[name](mutant)
    report = compare(mutant, reference, inputs(tokens))
    assert report.verdict == "bug", report
    assert not report
    step, code = ELSEWHERE.get(name, ("", None))
    if code is not None:
        assert code in report.first.code
        assert report.first.step.endswith(step)
    else:
        file, line = report.first.line.split(":")
        assert file == "mutants.py"
        assert "# fault" in linecache.getline(mutants.__file__, int(line)), report
    assert report.first.twin_line.startswith("transformers/")


@pytest.mark.parametrize(
    ("way", "name"),
    [
        ("positions for each row", "residual twice"),
        ("positions added first", "values of another head"),
        ("residual added in place", "tanh gelu"),
        ("nothing computed for padding", "heads of the key interleaved"),
        ("norm by hand", "activation missing"),
        ("attention in two halves", "activation missing"),
        ("rows packed", "silu by hand"),
        ("texts one by one", "silu by hand"),
    ],
)
def test_a_fault_beside_what_is_none_is_at_its_line_too(pair, way, name):
    mutant = copy.deepcopy(pair[1])
    WAYS[way](mutant)
    FAULTS[name](mutant)
    report = compare(mutant, pair[0], inputs(9))
    assert report.verdict == "bug", report
    assert "# fault" in linecache.getline(mutants.__file__, int(report.first.line.split(":")[1])), report


@pytest.mark.parametrize("fault", [fault for fault in foreign.FAULTS if fault != "mask by minus 1e4"])
def test_a_fault_of_a_model_with_other_names_is_a_bug(fault):
    """By its outputs, on the weights as they are: that a mask is none for scores of a million is not seen so."""
    for reference in twins("BertModel"):
        report = compare(foreign.own(reference, fault), reference)
        assert report.verdict == "bug", report
        assert any("outputs alone" in note for note in report.notes)


def test_a_model_with_other_names_is_rounding():
    """Its parameters are found by their values."""
    for reference in twins("BertModel"):
        model = foreign.own(reference)
        for pair in ((model, reference), (reference, model)):
            report = compare(*pair, inputs(9), checks=("gradients", "train"))
            assert report.verdict in ("rounding", "same bits"), report
            assert report.passed
            assert report.checks["gradients"]["summary"].endswith(" to the last bit")


def test_rows_of_padding_do_not_count_and_all_of_a_text_does():
    """However many heads or classes there are: as many as tokens, say."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0]])
    case = Case("case", {"input_ids": mask, "attention_mask": mask})
    context = torch.randn(3, 3, 3, 4)  # (B, H, T, K)
    assert torch.equal(visible("attention.self.context#2", context, case), context.transpose(1, 2)[mask.bool()])
    assert visible("last_hidden_state", context[:, 0], case).shape == (6, 4)
    assert visible("start_logits", context[:, 0, :, 0], case).shape == (6,)
    for name in ("pooler_output", "bert.pooler.dense", "seq_relationship_logits", "logits", "classifier"):
        assert torch.equal(visible(name, context[:, 0, 0], case), context[:2, 0, 0])  # the third begins with padding


def test_every_fault_without_a_marked_line_is_listed():
    assert set(ELSEWHERE) <= set(FAULTS)


@pytest.mark.parametrize("head", HEADS)
def test_equal_to_the_last_bit(head):
    reference, ours = twins(head)
    cases = None if head == "BertForMultipleChoice" else inputs(9)
    report = compare(ours, reference, cases, require="bits")
    assert report.verdict == "same bits", report
    assert report.level == "bits"
    assert report.rows
    assert all(row.accumulated.bits and row.local.bits for row in report.rows if not row.beside)
    assert report.first is None


def test_outputs_that_are_exchanged_are_a_bug_where_they_are_made():
    reference, ours = twins("BertForQuestionAnswering")
    mutants.replace_forward(ours, mutants.span_exchanged)
    bug = compare(ours, reference, inputs(9)).bug
    assert bug.step == "start_logits"
    assert bug.line.startswith("minibert/heads.py") or bug.line.startswith("mutants.py")


def test_a_step_made_of_others_is_told_of_which(pair):
    mutant = copy.deepcopy(pair[1])
    FAULTS["residual from the layers input"](mutant)
    why = compare(mutant, pair[0], inputs(9)).bug.why
    assert "not of bert.encoder.layer.0.attention.output.LayerNorm" in why
    assert "of bert.embeddings.LayerNorm" in why


@pytest.mark.parametrize("name", HIDDEN)
def test_a_fault_of_the_gradient_alone_is_a_bug(pair, name):
    mutant = copy.deepcopy(pair[1])
    HIDDEN[name](mutant)
    report = compare(mutant, pair[0], inputs(9))
    assert report.level == "bits"
    assert report.verdict == report.checks["gradients"]["verdict"] == "bug", report
    assert not report
    assert compare(mutant, pair[0], inputs(9), checks=()).verdict == "same bits"


def test_all_checks_of_what_is_equal_pass(pair):
    report = compare(pair[1], pair[0], inputs(9), require="bits", checks=("gradients", "train", "invariance"))
    assert report, report
    assert {name: check["verdict"] for name, check in report.checks.items()}.items() >= {
        "gradients": "same bits", "train": "same bits"
    }.items()  # fmt: skip
    assert report.checks["invariance"]["verdict"] in ("same bits", "rounding")


def test_a_result_that_depends_on_the_batch_fails_the_invariance(pair):
    mutant = copy.deepcopy(pair[1])
    FAULTS["result depends on the batch"](mutant)
    check = compare(mutant, mutant, inputs(9), checks=["invariance"]).checks["invariance"]
    assert check["verdict"] == "bug"
    assert "stays in float64: alone" in check["summary"]


def alone(model):
    """Each text alone in place of a batch."""

    def run(**arguments):
        rows = [
            model(**{key: x[i : i + 1] for key, x in arguments.items()}) for i in range(len(arguments["input_ids"]))
        ]
        return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}

    return run


def padded(model):
    """Eight more tokens of padding."""

    def run(**arguments):
        B, T = arguments["input_ids"].shape
        given = {"attention_mask": torch.ones(B, T, dtype=torch.long), **arguments}
        longer = {key: torch.nn.functional.pad(x, (0, 8)) for key, x in given.items()}
        return {key: x[:, :T] if x.ndim == 3 else x for key, x in model(**longer).items()}

    return run


def two_threads(model):
    def run(**arguments):
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            return model(**arguments)
        finally:
            torch.set_num_threads(threads)

    return run


def moved(model, offset=None):
    """The same numbers elsewhere in memory: at an offset of bytes, or column by column."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if offset is None:
            parameter.data = parameter.data.mT.contiguous().mT if parameter.ndim == 2 else parameter.data
        else:
            memory = bytearray(parameter.nbytes + 64)
            there = torch.frombuffer(memory, dtype=parameter.dtype, count=parameter.numel(), offset=offset)
            parameter.data = there.view(parameter.shape).copy_(parameter.data)
    return model


AROUND = {
    "batch": alone,
    "padding": padded,
    "threads": two_threads,
    "offset 2": lambda model: moved(model, 2),
    "offset 4": lambda model: moved(model, 4),
    "columns": moved,
    "fast path": minibert.optimize,
    "compiled": lambda model: torch.compile(copy.deepcopy(model), backend="eager"),
}


@pytest.mark.parametrize("way", [*AROUND, *WAYS])
def test_another_way_to_compute_the_same_is_rounding(pair, way):
    reference, ours = pair
    if way in WAYS:
        ours = copy.deepcopy(ours)
        WAYS[way](ours)
    for tokens in (2, 31):
        report = compare(AROUND[way](ours) if way in AROUND else ours, reference, inputs(tokens))
        assert report.verdict in ("rounding", "same bits"), report
        assert report.passed


@pytest.mark.parametrize("head", ["BertModel", "BertForQuestionAnswering", "BertForMultipleChoice"])
def test_eager_attention_is_rounding_that_starts_at_the_context(head):
    eager, ours = twins(head, attention="eager")
    report = compare(ours, eager, require="bits")
    assert (report.verdict, report.level) == ("rounding", "exact")
    assert not report
    assert report.first.step.endswith("attention.self.context")
    assert "scaled_dot_product_attention" in report.first.code
    assert "matmul(attn_weights, value)" in report.first.twin_code
    assert compare(ours, eager, require="exact")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounding_and_a_fault_in_it_a_bug(pair, dtype):
    reference, ours = (copy.deepcopy(model).to(dtype) for model in pair)
    assert compare(ours, reference, inputs(9), require="bits").verdict == "same bits"
    assert compare(ours, pair[0], inputs(9)).verdict == "rounding"  # of weights, too
    FAULTS["eps 1e 5"](ours)
    report = compare(ours, reference, inputs(9))
    assert report.verdict == "bug"
    assert report.first.step == "bert.embeddings.LayerNorm"


def test_half_precision_within_float32_is_a_bug_and_float32_within_half_is_not(pair):
    def kernel(query, key, value, mask):
        scores = (query @ key.transpose(2, 3)).float() * query.shape[-1] ** -0.5
        scores = scores if mask is None else scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return scores.softmax(-1).to(value.dtype) @ value

    reference, ours = copy.deepcopy(pair)
    mutants.with_attention(ours, kernel)
    report = compare(ours, reference, inputs(9))
    assert report.verdict == "rounding", report
    assert any("computes in float32" in cast for cast in report.casts)
    assert set(report.casts) <= set(report.to_dict()["notes"])
    assert compare(ours.bfloat16(), reference.bfloat16(), inputs(9)).verdict == "rounding"
