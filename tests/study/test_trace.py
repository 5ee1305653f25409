"""Tracing: the same numbers as without, the same steps as transformers' twin, and nothing left behind."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import minibert
from minibert import BertConfig, study
from minibert.fast.flops import forward_flops

HEADS = [
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
    "BertForMultipleChoice",
]
SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 48, "max_position_embeddings": 16}  # fmt: skip
B, T = 3, 7


def make(head: str, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    labels = {} if head in ("BertForQuestionAnswering", "BertForMultipleChoice") else {"num_labels": 3}
    model = getattr(minibert, head)(BertConfig(**{**SIZES, **labels, **changes})).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def batch(head: str, mask: str = "none", B: int = B, T: int = T) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    leading = (B, 2) if head == "BertForMultipleChoice" else (B,)
    inputs = {"input_ids": torch.randint(1, 60, (*leading, T)), "token_type_ids": torch.randint(0, 2, (*leading, T))}
    if mask != "none":
        inputs["attention_mask"] = torch.ones(*leading, T, dtype=torch.long)
    if mask == "right":
        inputs["attention_mask"][0, ..., 4:] = 0
    if mask == "holes":
        inputs["attention_mask"][..., 2] = 0
    if mask == "row":
        inputs["attention_mask"][1] = 0
    return inputs


def twin_of(model: torch.nn.Module, attention: str = "sdpa") -> torch.nn.Module:
    config = transformers.BertConfig(**model.config.to_dict())
    twin = getattr(transformers, type(model).__name__)._from_config(config, attn_implementation=attention)
    twin.load_state_dict(model.state_dict())
    return twin.eval().to(model.dtype)


@pytest.mark.parametrize("head", HEADS)
def test_the_twin_has_the_weights_and_draws_no_random_numbers(head):
    model, before = make(head), torch.get_rng_state()
    twin = study.twin(model)
    assert torch.equal(torch.get_rng_state(), before)
    theirs = dict(twin.named_parameters(remove_duplicate=False))
    assert theirs.keys() == dict(model.named_parameters(remove_duplicate=False)).keys()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert torch.equal(theirs[name], parameter)
        assert theirs[name].data_ptr() != parameter.data_ptr()
    named = dict(twin.named_buffers())
    plain = dict(getattr(transformers, head)(twin.config).named_buffers())
    assert all(torch.equal(buffer, plain[name]) for name, buffer in named.items())
    assert named.keys() == plain.keys()


def hooks_of(model: torch.nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def outputs_equal(a, b) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a.keys() if isinstance(a[key], torch.Tensor))  # noqa: SIM118


@pytest.mark.parametrize(
    ("mask", "dtype"),
    [*((mask, torch.float32) for mask in ("none", "ones", "right", "holes", "row")),
     ("right", torch.float64), ("holes", torch.bfloat16), ("right", torch.float16)],
)  # fmt: skip
@pytest.mark.parametrize("head", HEADS)
def test_output_is_that_of_a_call_without_a_trace(head, mask, dtype):
    trace_changes_nothing(make(head).to(dtype), batch(head, mask))


def trace_changes_nothing(model, inputs):
    with torch.no_grad():
        plain = model(**inputs)
    trace = study.trace(model, inputs)
    assert outputs_equal(plain, trace.output)
    assert hooks_of(model) == 0
    assert all(torch.isfinite(step.tensor).all() or step.name.endswith("scores") for step in trace)


@pytest.mark.parametrize(("rows", "tokens", "mask"), [(1, 1, "none"), (1, 16, "right"), (16, 5, "holes")])
@pytest.mark.parametrize("head", HEADS)
def test_output_of_other_batches(head, rows, tokens, mask):
    trace_changes_nothing(make(head), batch(head, mask, rows, tokens))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("head", HEADS)
def test_twin_has_the_same_steps_and_bits(head, attention):
    model, inputs = make(head), batch(head, "right")
    ours, theirs = study.trace(model, inputs), study.trace(twin_of(model, attention), inputs)
    assert [step.name for step in ours] == [step.name for step in theirs]
    assert [step.letters for step in ours] == [step.letters for step in theirs]
    assert [(step.flops, step.params) for step in ours] == [(step.flops, step.params) for step in theirs]
    if attention == "sdpa":
        assert [step.name for step in ours if not torch.equal(step.tensor, theirs[step.name])] == []
    else:  # the first layer's scores and weights are computed from equal query and key, in the same way
        for part in ("query", "key", "value", "scores", "weights"):
            name = next(step.name for step in ours if step.name.endswith(f"layer.0.attention.self.{part}"))
            assert torch.equal(ours[name], theirs[name])
            assert theirs.step(name).source.file == "transformers/models/bert/modeling_bert.py"


def test_every_step_is_explained():
    for head in HEADS:
        trace = study.trace(make(head), batch(head))
        for step in trace:
            assert step.equation, step.name
            assert step.paper, step.name
            assert step.source.file in ("minibert/model.py", "minibert/heads.py"), step.name
            entered, left = step.letters.split(" -> ")
            for letters, numbers in zip((entered, left), step.numbers.split(" -> "), strict=True):
                known = {**trace.sizes, **{str(n): n for n in (1, 2)}}
                spelled = [known[letter] for letter in letters.strip("()").split(", ")]
                assert spelled == [int(n) for n in numbers.strip("()").replace(",)", ")").split(", ")], step
        assert trace.params == make(head).num_parameters()


def test_source_is_the_code_that_ran():
    trace = study.trace(make("BertModel"), batch("BertModel"))
    source = trace.step("encoder.layer.1.attention.self.query").source
    lines = Path(sys.modules["minibert.model"].__file__).read_text(encoding="utf-8").splitlines()
    assert "self.query(" in lines[source.line - 1]
    assert source.code.startswith("self.query(")
    assert "matmul" in trace.step("encoder.layer.1.attention.self.scores").source.code
    assert "softmax" in trace.step("encoder.layer.1.attention.self.weights").source.code
    assert "scaled_dot_product_attention" in trace.step("encoder.layer.1.attention.self.context").source.code


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_times_values_is_the_fused_context(dtype):
    trace = study.trace(make("BertModel").to(dtype), batch("BertModel", "right"))
    for layer, weights in enumerate(trace.attentions):
        prefix = f"encoder.layer.{layer}.attention.self."
        value = trace[prefix + "value"].view(B, T, 4, 8).transpose(1, 2)
        context = trace[prefix + "context"]
        ulp = torch.finfo(dtype).eps * context.abs().max()
        assert ((weights @ value - context).abs().max() / ulp).item() <= 4
        assert torch.allclose(weights.sum(-1), torch.ones(B, 4, T, dtype=dtype))


def test_flops_are_the_counter_s_and_the_formula_s():
    model = make("BertForPreTraining")
    inputs = batch("BertForPreTraining")
    trace = study.trace(model, inputs)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin_of(model, "eager")(**inputs)  # attention by plain products: the counter misses the fused kernel on a CPU
    assert trace.flops == counter.get_total_flops()
    assert trace.flops == forward_flops(model.config, [T] * B, predictions=B * T, pooled=B) + 2 * B * 2 * 32


def test_maps_that_were_asked_for_are_the_steps():
    model = make("BertForMaskedLM")
    trace = study.trace(model, {**batch("BertForMaskedLM", "right"), "output_attentions": True})
    assert len(trace.output.attentions) == len(trace.attentions) == 2
    assert all(map(torch.equal, trace.output.attentions, trace.attentions))
    states = study.trace(model, {**batch("BertForMaskedLM"), "output_hidden_states": True})
    assert all(map(torch.equal, states.output.hidden_states, states.states))


def test_training_mode_draws_the_same_numbers():
    model = make("BertForPreTraining").train()
    inputs = batch("BertForPreTraining")
    inputs |= {"labels": inputs["input_ids"], "next_sentence_label": torch.tensor([0, 1, 1])}
    torch.manual_seed(5)
    plain = model(**inputs)
    torch.manual_seed(5)
    trace = study.trace(model, inputs, grad=True)
    assert outputs_equal(plain, trace.output)
    assert "bert.encoder.layer.0.output.dropout" in trace
    assert [step.name for step in trace if "cross_entropy" in step.name] == ["cross_entropy", "cross_entropy#2"]
    plain.loss.backward()
    expected = model.bert.embeddings.LayerNorm.weight.grad.clone()
    model.zero_grad()
    trace.output.loss.backward()
    assert torch.equal(model.bert.embeddings.LayerNorm.weight.grad, expected)
    assert trace["bert.embeddings.sum"].grad.abs().sum() > 0


def test_works_inside_inference_mode_and_needs_no_graph():
    model, inputs = make("BertModel"), batch("BertModel")
    with torch.inference_mode():
        trace = study.trace(model, inputs)
    assert not trace.output.last_hidden_state.requires_grad
    ids = study.trace(model, inputs["input_ids"])
    assert not torch.equal(ids.output[0], trace.output[0])  # segments were left out


def test_hooks_are_gone_after_an_error():
    model = make("BertForMaskedLM")
    kept = model.bert.pooler, model.bert.encoder.layer[1].output.dense.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        study.trace(model, batch("BertForMaskedLM"))
    assert hooks_of(model) == 1
    kept[1].remove()
    with pytest.raises(ValueError, match="input_ids"):
        study.trace(model, {"input_ids": torch.tensor([[999]])})
    assert hooks_of(model) == 0
    with torch.no_grad():
        assert torch.isfinite(model(**batch("BertForMaskedLM")).logits).all()


def test_refused_by_name():
    model, inputs = make("BertModel"), batch("BertModel")
    with pytest.raises(ValueError, match="OptimizedModel is optimized"):
        study.trace(minibert.optimize(model), inputs)
    with pytest.raises(ValueError, match="compiled"):
        study.trace(torch.compile(model), inputs)
    inner = make("BertModel")
    inner.encoder.layer[1].compile()
    with pytest.raises(ValueError, match=r"encoder.layer.1 in this BertModel is compiled"):
        study.trace(inner, inputs)
    with pytest.raises(TypeError, match="Linear"):
        study.trace(torch.nn.Linear(2, 2), inputs)
    with pytest.raises(TypeError, match="got str"):
        study.trace("bert-base-uncased", inputs)
    with pytest.raises(TypeError, match="inputs must be a mapping"):
        study.trace(model, "a text")
    with pytest.raises(ValueError, match="causal"), pytest.MonkeyPatch.context() as patch:
        kernel = torch.nn.functional.scaled_dot_product_attention
        patch.setattr("minibert.model.attention", lambda q, k, v, mask, dropout_p: kernel(q, k, v, None, 0.0, True))
        study.trace(model, inputs)
    with pytest.raises(ValueError, match="is_decoder"):
        study.trace(transformers.BertModel(transformers.BertConfig(**SIZES, is_decoder=True)), inputs)


def test_what_replaces_a_module_is_seen():
    class Adapter(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.down, self.up = base, torch.nn.Linear(32, 2), torch.nn.Linear(2, 32)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    model = make("BertModel")
    plain = study.trace(model, batch("BertModel"))
    model.encoder.layer[0].attention.self.query = Adapter(model.encoder.layer[0].attention.self.query)
    trace = study.trace(model, batch("BertModel"))
    name = "encoder.layer.0.attention.self.query"
    assert torch.equal(trace[f"{name}.base"], plain[name])
    assert not torch.equal(trace[name], plain[name])
    assert trace.params == model.num_parameters()
    assert trace.flops == plain.flops + 2 * 2 * B * T * 32 * 2


def test_a_shared_layer_is_two_steps():
    model = make("BertModel")
    model.encoder.layer[1] = model.encoder.layer[0]
    trace = study.trace(model, batch("BertModel"))
    assert torch.equal(trace["encoder.layer.0.output.LayerNorm#2"], trace.output.last_hidden_state)
    assert len(trace.attentions) == 2
    assert len(trace.states) == 3
    assert trace.params == model.num_parameters()


def test_a_value_changed_in_place_is_an_error():
    model = make("BertModel")

    def double(module, args):
        args[0].mul_(2)

    plain = study.trace(model, batch("BertModel"))
    model.encoder.layer[0].attention.register_forward_pre_hook(double)
    with pytest.raises(RuntimeError, match="in place"):
        study.trace(model, batch("BertModel"))
    embeddings = plain["embeddings.LayerNorm"].clone()
    given = {"embeddings.LayerNorm": plain["embeddings.LayerNorm"]}
    for more in ({}, {"given": given}):
        trace = study.trace(model, batch("BertModel"), copies=True, **more)
        assert torch.equal(trace["embeddings.LayerNorm"], embeddings)
        assert torch.equal(plain["embeddings.LayerNorm"], embeddings)
        with torch.no_grad():
            assert torch.equal(trace.output.last_hidden_state, model(**batch("BertModel")).last_hidden_state)


def test_print_save_and_unknown_names(tmp_path):
    from safetensors import safe_open

    trace = study.trace(make("BertForMaskedLM"), batch("BertForMaskedLM"))
    text = str(trace)
    assert text.splitlines()[0] == "BertForMaskedLM: B=3 T=7 D=32 H=4 K=8 F=48 V=60 L=3"
    assert len(text.splitlines()) == len(trace) + 3
    assert "minibert/model.py:" in text
    trace.save(tmp_path / "trace.safetensors")
    with safe_open(tmp_path / "trace.safetensors", "pt") as file:
        assert set(file.keys()) == {step.name for step in trace}
        assert all(torch.equal(file.get_tensor(step.name), step.tensor) for step in trace)
        assert "softmax" in file.metadata()["bert.encoder.layer.0.attention.self.weights"]
    with pytest.raises(KeyError, match=r"bert\.encoder\.layer\.0\.attention\.self\.query"):
        trace["bert.encoder.layer.0.attention.query"]
    assert "bert.embeddings.sum" in trace


def test_a_trace_sees_its_own_thread_alone():
    """Others trace and call the same model meanwhile: hooks are the model's, and run for all."""
    model = make("BertForMaskedLM")
    inputs = [torch.randint(1, 60, (1, length)) for length in (3, 5, 7, 9)] * 6
    alone = [study.trace(model, ids) for ids in inputs]

    def one(number: int) -> tuple[study.Trace, torch.Tensor]:
        return study.trace(model, inputs[number]), model(inputs[number]).logits

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(one, range(len(inputs))))
    for expected, (got, logits) in zip(alone, together, strict=True):
        assert [step.name for step in got.steps] == [step.name for step in expected.steps]
        for step in expected.steps:
            assert torch.equal(got[step.name], expected[step.name]), step.name
        assert torch.equal(logits, expected.output.logits)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
