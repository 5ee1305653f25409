"""What optimize refuses, what an optimized model notices, and what surrounds a call without changing it."""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.utils.prune
from test_fast import B, T, V, close, make, masks, text
from torch import nn

from minibert import (
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    optimize,
)
from minibert import model as plain_model
from minibert.fast import plan, quantize
from minibert.model import BertLayer


class LoRA(nn.Module):
    """An adapter in a layer's place, with the layer's own name for what it adapts."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias

    def forward(self, x):
        return self.base(x) + x


class SubLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Tagger(BertForTokenClassification):
    def __init__(self, config):
        super().__init__(config)
        self.lstm = nn.LSTM(config.hidden_size, config.hidden_size, batch_first=True)


def _layer(model):
    return model.bert.encoder.layer[1]


def lora(model):
    own = _layer(model).attention.self
    own.query = LoRA(own.query)


def subclassed(model):
    _layer(model).output.dense = SubLinear(80, 48)


def hook(model):
    _layer(model).register_forward_hook(lambda module, args, out: out * 2)


def pre_hook(model):
    model.bert.embeddings.register_forward_pre_hook(lambda module, args: None)


def hook_on_the_model(model):
    model.register_forward_hook(lambda module, args, out: out)


def patched(model):
    _layer(model).forward = lambda *args, **kwargs: args[0]


def parametrized(model):
    nn.utils.parametrizations.weight_norm(_layer(model).intermediate.dense)


def pruned(model):
    nn.utils.prune.l1_unstructured(_layer(model).intermediate.dense, "weight", 0.5)


def extra_part(model):
    _layer(model).adapter = nn.Linear(48, 48)


def extra_parameter(model):
    _layer(model).gate = nn.Parameter(torch.ones(4))


def other_activation(model):
    _layer(model).intermediate.intermediate_act_fn = nn.ReLU()


def other_norm(model):
    _layer(model).output.LayerNorm = nn.Identity()


def no_bias(model):
    _layer(model).attention.self.key = nn.Linear(48, 48, bias=False)


def norm_without_weights(model):
    _layer(model).output.LayerNorm = nn.LayerNorm(48, elementwise_affine=False)


def limited_embeddings(model):
    model.bert.embeddings.word_embeddings = nn.Embedding(V, 48, max_norm=1.0)


def mixed_dtypes(model):
    _layer(model).output.LayerNorm.double()


def parameter_of_another_kind(model):
    class Quantized(nn.Parameter):
        pass

    dense = _layer(model).output.dense
    dense.weight = Quantized(dense.weight.detach())


def dropout_that_drops(model):  # Monte Carlo dropout
    _layer(model).output.dropout.train()


CHANGES = [lora, subclassed, hook, pre_hook, hook_on_the_model, patched, parametrized, pruned, extra_part,
           extra_parameter, other_activation, other_norm, no_bias, norm_without_weights, limited_embeddings,
           mixed_dtypes, parameter_of_another_kind, dropout_that_drops]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_not_known_exactly_is_refused_by_name(change):
    model = make(BertForSequenceClassification)
    change(model)
    with pytest.raises(TypeError, match=r"optimize: BertForSequenceClassification(\.bert\.[\w.]+)? \w"):
        optimize(model)


def test_the_module_is_named():
    model = make(BertForSequenceClassification)
    hook(model)
    with pytest.raises(TypeError, match=r"bert\.encoder\.layer\.1 has a forward hook"):
        optimize(model)


def test_subclasses_classes_that_were_patched_and_hooks_on_all_modules(monkeypatch):
    with pytest.raises(TypeError, match="class of its own"):
        optimize(make(Tagger))
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    try:
        with pytest.raises(TypeError, match="hook on all modules"):
            optimize(make())
    finally:
        handle.remove()
    with monkeypatch.context() as patch:
        patch.setattr(plain_model, "attention", lambda *args: args[0])
        with pytest.raises(TypeError, match="another attention"):
            optimize(make())
    monkeypatch.setattr(BertLayer, "forward", lambda self, x, *args: x)
    with pytest.raises(TypeError, match="forward was replaced"):
        optimize(make())


def replaced(model):
    model.load_state_dict(make(seed=7).state_dict(), assign=True)


def loaded(model):
    model.load_state_dict(make(seed=7).state_dict())


def one_parameter(model):
    model.encoder.layer[0].output.dense.bias = nn.Parameter(torch.zeros(48))


def one_module(model):
    model.encoder.layer[2] = BertLayer(model.config).eval()


def one_layer_less(model):
    del model.encoder.layer[1]


def one_layer_more(model):
    model.encoder.layer.append(BertLayer(model.config).eval())


def no_pooler(model):
    model.pooler = None


def cast(model):
    model.double()


def given_other_data(model):
    model.encoder.layer[0].output.dense.weight.data = torch.zeros(48, 80)


def trained(model):
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[3] += 1


def hooked(model):
    model.encoder.layer[0].register_forward_hook(lambda module, args, out: out)


def forward_put_in(model):
    model.encoder.layer[0].forward = lambda x, *args: x


def another_class(model):
    model.encoder.layer[0].__class__ = type("Layer", (BertLayer,), {"forward": lambda self, x, *args: x})


def another_epsilon(model):
    model.encoder.layer[0].output.LayerNorm.eps = 0.5


def other_heads(model):
    model.encoder.layer[0].attention.self.attention_head_size //= 2


def another_function(model):
    model.encoder.layer[0].intermediate.intermediate_act_fn.name = "relu"


STALE = [replaced, loaded, one_parameter, one_module, one_layer_less, one_layer_more, no_pooler, cast,
         given_other_data, trained, hooked, forward_put_in, another_class, another_epsilon, other_heads,
         another_function]  # fmt: skip


@pytest.mark.parametrize("change", STALE, ids=lambda change: change.__name__)
def test_a_change_after_optimize_is_noticed(change):
    model = make()
    fast = optimize(model)
    fast(text())
    assert fast.is_current()
    change(model)
    assert not fast.is_current()
    with pytest.raises(RuntimeError, match="optimize it again"):
        fast(text())
    with pytest.raises(RuntimeError, match="optimize it again"):
        fast.encode_rows([[1, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edits_that_torch_does_not_count_are_noticed(dtype):
    """As of moving averages, which write into `.data`, and of numpy."""
    for edit in (
        lambda x: x.data.mul_(0.5),
        lambda x: x.data.copy_(torch.zeros_like(x)),
        lambda x: x.detach().numpy().__imul__(2),
    ):
        model = make().to(dtype)
        fast = optimize(model)
        fast(text())
        edit(model.encoder.layer[0].output.dense.weight)
        with pytest.raises(RuntimeError, match="parameters were changed after optimize"):
            fast(text())


def test_such_edits_are_noticed_wherever_a_weight_lies():
    """As in a file that was mapped into memory, where numbers may begin at any byte."""
    model = make()
    memory = torch.zeros(48 * 48 * 4 + 1, dtype=torch.uint8).numpy()
    weight = torch.from_numpy(memory[1:].view("f4").reshape(48, 48))
    assert weight.data_ptr() % 4 == 1
    model.encoder.layer[2].attention.output.dense.weight = nn.Parameter(weight)
    fast = optimize(model)
    fast(text())
    assert fast.is_current()
    weight.numpy()[:] = 1
    assert not fast.is_current()
    weight.numpy()[:] = 0
    assert fast.is_current()
    model.embeddings.position_embeddings.weight.data[20:] += 1
    assert not fast.is_current()
    samples = fast._held.samples
    assert samples.memory.flags.aligned  # or it would be copied whole
    assert samples.memory.itemsize == 1
    assert optimize(make().double())._held.samples.memory.itemsize == 8


def test_a_merged_adapter_is_noticed():
    """PEFT puts the layer back that was there before, with other numbers in the same memory."""
    import peft

    model = make(BertForSequenceClassification)
    fast = optimize(model)
    before = fast(text()).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], init_lora_weights=False))
    merged = adapted.merge_and_unload()
    assert merged is model
    with pytest.raises(RuntimeError, match="parameters were changed after optimize"):
        fast(text())
    assert not torch.allclose(optimize(model)(text()).logits, before)


def test_a_model_of_nan_has_not_changed():
    model = make()
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.fill_(float("nan"))
    fast = optimize(model)
    fast(text())
    assert fast.is_current()


def test_another_attention_after_optimize_is_noticed(monkeypatch):
    fast = optimize(make())
    monkeypatch.setattr(plain_model, "attention", lambda query, key, value, mask, dropout_p=0.0: value)
    with pytest.raises(RuntimeError, match="optimize it again"):
        fast(text())


FUSED = ["SGD", "Adagrad", "Adam", "AdamW"]
STEPS = [(name, True) for name in FUSED] + [(name, False) for name in (*FUSED, "RMSprop", "Adafactor")]


@pytest.mark.parametrize(("name", "fused"), STEPS)
def test_a_step_of_any_optimizer_is_noticed(name, fused):
    """torch's fused kernels change parameters without counting it; transformers' Trainer uses them by default."""
    model = make()
    fast = optimize(model)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1, **({"fused": True} if fused else {}))
    fast(text())
    model(text()).pooler_output.sum().backward()
    assert fast.is_current()  # as long as nothing has stepped
    optimizer.step()
    with pytest.raises(RuntimeError, match="parameters were changed after optimize"):
        fast(text())
    torch.testing.assert_close(optimize(model)(text()).pooler_output, model(text()).pooler_output)


@pytest.mark.parametrize("cls", [BertForMaskedLM, BertForTokenClassification, BertForPreTraining])
def test_labels_at_padding_cost_what_the_plain_model_says(cls):
    model, mask = make(cls), masks()["right"]
    labels = torch.ones(B, T, dtype=torch.long)
    with torch.no_grad():
        plain = model(text(), mask, labels=labels)
    fast = optimize(model)(text(), mask, labels=labels)
    close(fast.loss, plain.loss)
    token_logits = "prediction_logits" if cls is BertForPreTraining else "logits"
    close(fast[token_logits], plain[token_logits])  # at padding too


def test_answers_compete_with_padding_as_in_the_plain_model():
    model, mask = make(BertForQuestionAnswering), masks()["right"]
    with torch.no_grad():
        model.qa_outputs.bias -= 50.0  # zeros at padding would be the best answers
        starts, ends = torch.tensor([1, 2, 3, 0]), torch.tensor([2, 3, 4, 0])
        plain = model(text(), mask, start_positions=starts, end_positions=ends)
    fast = optimize(model)(text(), mask, start_positions=starts, end_positions=ends)
    close(fast.loss, plain.loss, atol=1e-4)
    close(fast.start_logits, plain.start_logits, atol=1e-4)
    assert torch.equal(fast.end_logits.argmax(1), plain.end_logits.argmax(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_a_call_changes_nothing(dtype):
    model = make(BertForMaskedLM)
    fast = optimize(model)
    alone = fast(text(), masks()["right"], output_attentions=True)
    with torch.autocast("cpu", dtype):
        inside = fast(text(), masks()["right"], output_attentions=True)
    assert torch.equal(alone.logits, inside.logits)
    assert inside.attentions[0].dtype == torch.float32
    with torch.autocast("cpu", dtype):
        made_inside = optimize(model)(text(), masks()["right"])
    close(made_inside.logits, alone.logits)


def test_maps_come_in_the_models_dtype():
    for model, dtype in ((make(), None), (make().bfloat16(), "float32")):
        maps = optimize(model, dtype)(text(), masks()["right"], output_attentions=True).attentions
        assert {x.dtype for x in maps} == {model.dtype}


def test_dropped_layers_leave_no_maps():
    model = make()
    model.encoder.layer = model.encoder.layer[:1]
    assert len(optimize(model)(text(), output_attentions=True).attentions) == 1


def test_maps_of_tokens_that_may_attend_to_nothing_are_uniform():
    model, mask = make(), masks()["empty"]
    with torch.no_grad():
        plain = model(text(), mask, output_attentions=True).attentions[0][2]
    close(optimize(model)(text(), mask, output_attentions=True).attentions[0][2], plain)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_call_keeps_the_mask():
    """Recorded without padding, run with it: by torch.jit, by torch.export, of either model."""
    model = make().requires_grad_(False)
    ids, mask = text(), masks()["right"]
    with torch.no_grad():
        expected = model(ids, mask).last_hidden_state
        for module in (model, optimize(model)):
            traced = torch.jit.trace(lambda ids, mask, m=module: m(ids, mask).last_hidden_state, (ids, masks()["ones"]))
            close(traced(ids, mask), expected)


def test_fake_tensors_hold_no_values():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = make()
        out = model(torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.long))
        assert out.last_hidden_state.shape == (2, 5, 48)
    meta = make().to("meta")
    ids = torch.ones(2, 5, dtype=torch.long, device="meta")
    assert meta(ids, torch.ones_like(ids)).last_hidden_state.shape == (2, 5, 48)


def test_the_process_keeps_its_threads(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    plan._measured.cache_clear()
    optimize(make())
    assert not calls


def test_measured_once_in_a_process(monkeypatch):
    plan._measured.cache_clear()
    optimize(make())
    monkeypatch.setattr(plan, "race", lambda *args: pytest.fail("measured again"))
    optimize(make(seed=3))
    optimize(make(hidden_size=96))  # smaller than what is measured


def test_threads_at_once_measure_once():
    plan._measured.cache_clear()
    barrier = threading.Barrier(4)

    def work(_):
        barrier.wait()
        return optimize(make())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert plan._measured.cache_info().misses <= 3  # attempts


def test_a_pickled_model_keeps_its_plan(monkeypatch):
    fast = optimize(make())
    data = pickle.dumps(fast)
    monkeypatch.setattr(plan, "measure", lambda *args: pytest.fail("measured again"))
    other = pickle.loads(data)
    assert other.plan.kernels == fast.plan.kernels
    close(other(text()).last_hidden_state, fast(text()).last_hidden_state)


def test_operations_that_are_gone_leave_the_plain_path(monkeypatch):
    def gone(*args, **kwargs):
        raise AttributeError("no such operation")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", gone)
    plan._measured.cache_clear()
    fast = optimize(make())
    plan._measured.cache_clear()
    assert "not as this version of torch has it" in fast.explain()
    assert "PlainLinear" in fast.explain()
    close(fast(text()).last_hidden_state, make()(text()).last_hidden_state.detach())


def test_operations_that_changed_are_left_out(monkeypatch):
    real = torch.ops.mkldnn._linear_pointwise.default
    monkeypatch.setattr(torch.ops.mkldnn._linear_pointwise, "default", lambda *args: real(*args) * 1.5)
    plan._measured.cache_clear()
    fast = optimize(make())
    plan._measured.cache_clear()
    assert "wrong by" in fast.explain()
    close(fast(text()).last_hidden_state, make()(text()).last_hidden_state.detach())


@pytest.mark.skipif(any(map(plan._obstacle, ("int8", plan._FBGEMM))), reason="one library alone has products of bytes")
@pytest.mark.parametrize(
    ("owner", "name", "other"),
    [
        (torch, "fbgemm_pack_quantized_matrix", quantize.Int8Linear),
        (torch, "fbgemm_linear_int8_weight_fp32_activation", quantize.Int8Linear),
        (torch.ops.onednn, "qlinear_prepack", quantize.FbgemmInt8Linear),
    ],
)
def test_int8_by_the_library_that_is_left(owner, name, other, monkeypatch):
    def gone(*args, **kwargs):
        raise AttributeError(f"no {name}")

    caches = (plan._measured, quantize._exact_range, quantize._hear_deprecation)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(owner, name, gone)
    monkeypatch.setattr(plan, "_LOSS", float("inf"))  # not the speed is asked for
    try:
        fast = optimize(make(), "int8", compile=False)
    finally:
        for cache in caches:
            cache.cache_clear()
    assert fast.plan.kernels.linear is other
    assert f"not as this version of torch has it (AttributeError: no {name})" in fast.explain()


@pytest.mark.parametrize("name", plan._INT8)
def test_products_of_extreme_bytes_are_exact(name, kernels):
    """The CPUs that add two products in 16 bits get weights of 7 bits; a kernel that saturates is not offered."""
    if plan._obstacle(name):
        pytest.skip(plan._obstacle(name))
    weight = torch.full((64, 512), 3.0)
    weight[::2] = -3.0
    for kind in (plan._INT8[name], plan._AFTER_GELU[plan._INT8[name]]):
        levels, largest = quantize.byte_range(kind)
        layer = kind(weight, torch.zeros(64))
        assert layer.centre + layer.levels == pytest.approx(largest, abs=0.01)
        steps = torch.full((5, 512), float(largest - layer.centre))
        exact = steps.long() @ (weight.sign().long() * levels).t()
        got = layer.multiply(steps) / layer.scale[: len(weight)]
        close(got, exact.float(), atol=0.5)


def test_int8_that_saturates_is_refused(monkeypatch):
    def saturated(self, steps):
        return (steps @ torch.ones(256, 64)).clamp(-1000, 1000)

    quantize._exact_range.cache_clear()
    monkeypatch.setattr(quantize.Int8Linear, "multiply", saturated)
    try:
        assert quantize.weight_levels() == 0
        assert "saturate" in plan._obstacle("int8")
    finally:
        quantize._exact_range.cache_clear()


def test_plain_kernels_share_the_parameters(monkeypatch):
    """What torch computes from the model's own weights costs no memory, and the receipt says what the rest costs."""
    slow = plan.Speeds({"plain": 2.0, "float32": 1.0}, {})
    monkeypatch.setattr(plan, "measure", lambda names, D, F, attempt=0: slow)
    model = make(BertForMaskedLM)
    fast = optimize(model)
    own = {p.data_ptr() for p in model.parameters()}
    linears = [linear for layer in fast.engine.layers for linear in layer.linears] + fast.engine.head.linears
    assert all(linear.weight.data_ptr() in own for linear in linears)
    assert fast.engine.nbytes == 0
    cast = optimize(make().bfloat16(), "float32")
    assert cast.engine.nbytes == 3 * 4 * (4 * 48 * 48 + 2 * 48 * 80)


def test_rows_of_ids():
    model = make()
    fast = optimize(model)
    rows = [[5, 6, 7], [8], [9, 10, 11, 12]]
    states, lengths = fast.encode_rows(rows)
    assert lengths == [3, 1, 4]
    padded = fast(rows).last_hidden_state
    close(states, torch.cat([padded[i, : len(row)] for i, row in enumerate(rows)]))
    first, _ = fast.encode_rows(rows, first_only=True)
    close(first, padded[:, 0])
    segments = [[0, 1, 1], [1], [0, 0, 0, 1]]
    with torch.no_grad():
        expected = model(torch.tensor([rows[0]]), token_type_ids=torch.tensor([segments[0]])).last_hidden_state[0]
    close(fast.encode_rows(rows, segments)[0][:3], expected)
    for bad in ([], [[]], [[1.5]], [["a"]], [[V]], [[5], [-1]], [[True]], [[2**63]], [[[5]]], [list(range(1, 40))],
                "abc", [1]):  # fmt: skip
        with pytest.raises(ValueError, match="rows"):
            fast.encode_rows(bad)
    with pytest.raises(ValueError, match="segments"):
        fast.encode_rows(rows, [[0], [0], [0]])
