"""The fast path in bfloat16 and int8: close to float32, refused where slow, chosen only where fast."""

import pytest
import torch
from test_fast import close, make, masks, text

from minibert import BertForMaskedLM, BertModel, optimize
from minibert.activations import Activation
from minibert.fast import onednn, plan
from minibert.fast.encoder import GELUS
from minibert.fast.onednn import PlainLinear, PrepackedLinear, UnfusedLinear
from minibert.fast.panels import PanelBfloat16Linear, PanelInt8AfterGelu, PanelInt8Linear
from minibert.fast.quantize import (
    Bfloat16Linear,
    FbgemmInt8AfterGelu,
    FbgemmInt8Linear,
    Int8AfterGelu,
    Int8Linear,
    norm_magnitudes,
    smoothing_factors,
)

pytestmark = pytest.mark.usefixtures("kernels")


def error(got, exact):
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def fast_at(name):
    """Skip unless this CPU computes a dtype fast."""
    speeds = plan.measure([name], 128, 256)
    if name in speeds.obstacles or speeds.of(name) < speeds.float32:
        pytest.skip(f"this CPU is slow at {name}")


MISSING = {name: reason for name in ("bfloat16", "int8", plan._FBGEMM) if (reason := plan._obstacle(name))}
# The libraries that have products of bytes, and what is for any numbers and for what a GELU gave
INT8 = [
    pytest.param(*kinds, marks=pytest.mark.skipif(name in MISSING, reason=f"{name}: {MISSING.get(name)}"), id=name)
    for name, kinds in (
        ("int8", (Int8Linear, Int8AfterGelu)),
        (plan._FBGEMM, (FbgemmInt8Linear, FbgemmInt8AfterGelu)),
        (plan._BYTES_PANELS, (PanelInt8Linear, PanelInt8AfterGelu)),
    )
]


@pytest.fixture
def always_fast(monkeypatch):
    """Let every dtype through, to test its numbers on a busy machine and on CPUs that have no kernels for it."""
    speeds = {"plain": 1.0, "float32": 2.0, "bfloat16": 4.0, "int8": 8.0}
    fast = plan.Speeds(speeds, MISSING)
    monkeypatch.setattr(plan, "measure", lambda names, D, F, attempt=0: fast)


@pytest.mark.parametrize("rows", [1, 5, 200])
@pytest.mark.parametrize(("inputs", "outputs"), [(48, 80), (64, 64), (384, 1536)])
def test_linear_layers(rows, inputs, outputs):
    torch.manual_seed(0)
    x, residual = torch.randn(rows, inputs), torch.randn(rows, outputs)
    weight, bias = torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs)
    exact = x.double() @ weight.double().T + bias
    allowed = {
        **dict.fromkeys((PlainLinear, PrepackedLinear, UnfusedLinear), 1e-6),
        **dict.fromkeys((Bfloat16Linear, PanelBfloat16Linear), 0.01),
        **dict.fromkeys((Int8Linear, FbgemmInt8Linear, PanelInt8Linear), 0.02),
    }
    for name, linear in (("bfloat16", Bfloat16Linear), (plan._FBGEMM, FbgemmInt8Linear)):
        if name in MISSING:
            del allowed[linear]
    for linear, bound in allowed.items():
        layer = linear(weight, bias)
        assert error(layer(x), exact) < bound, linear
        assert error(layer.add(x, residual), exact + residual) < bound, linear


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "relu", "mish"])
def test_an_activation_within_the_product_or_after_it(name):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 64), torch.randn(80, 64) / 8, torch.randn(80)
    exact = Activation(name)(x.double() @ weight.double().T + bias)
    for linear in (PlainLinear, PrepackedLinear, UnfusedLinear):
        assert error(linear(weight, bias, Activation(name))(x), exact) < 1e-6, linear


def test_the_faster_gelu_is_taken_and_said(monkeypatch):
    for unfused, expected in ((frozenset(), PrepackedLinear), (frozenset({"float32"}), UnfusedLinear)):
        speeds = plan.Speeds({"plain": 1.0, "float32": 2.0}, {}, unfused)
        monkeypatch.setattr(plan, "measure", lambda names, D, F, attempt=0, speeds=speeds: speeds)
        fast = optimize(make(), compile=False)
        assert type(fast.engine.layers[0].up) is expected
        assert ("GELU is slower than a pass of its own" in fast.explain()) == bool(unfused)
        close(fast(text()).last_hidden_state, make()(text()).last_hidden_state)


def test_without_onednns_gelu_the_other_is_taken(monkeypatch):
    monkeypatch.setitem(onednn.POST_OPS, "gelu", ("no such operation", "none"))
    speeds = plan.measure([], 384, 1536, attempt=99)
    assert speeds.unfused == {"float32"} & speeds.measured.keys()


@pytest.mark.parametrize(("linear", "after_gelu"), INT8)
def test_int8_scales_each_token_and_each_channel(linear, after_gelu):
    torch.manual_seed(0)
    x = torch.randn(6, 64) * torch.tensor([1e-3, 1.0, 1e3, 1e-6, 0.0, 30.0])[:, None]
    weight = torch.randn(48, 64) * torch.logspace(-4, 2, 48)[:, None]
    exact, got = x.double() @ weight.double().T, linear(weight, torch.zeros(48))(x)
    for row in (0, 1, 2, 3, 5):
        assert error(got[row] / weight.norm(dim=1), exact[row] / weight.norm(dim=1)) < 0.02
    assert not got[4].any()


@pytest.mark.parametrize(("linear", "after_gelu"), INT8)
def test_int8_after_gelu_uses_the_sign_bit(linear, after_gelu):
    torch.manual_seed(0)
    x = torch.nn.functional.gelu(torch.randn(50, 256) * 2)
    weight = torch.randn(64, 256)
    zeros = torch.zeros(64)
    activations_only = weight.sign()  # exact in eight bits
    exact = x.double() @ activations_only.double().T
    signed, unsigned = linear(activations_only, zeros), after_gelu(activations_only, zeros)
    finer = unsigned.levels / signed.levels  # 1.25 where weights get more levels instead, else 1.9
    assert finer > 1.2
    assert error(unsigned(x), exact) < 1.1 / finer * error(signed(x), exact)


@pytest.mark.parametrize(("linear", "after_gelu"), INT8)
def test_int8_after_gelu_is_better_than_for_any_numbers(linear, after_gelu):
    """Whatever bytes of weights and of x may be on this CPU."""
    torch.manual_seed(0)
    x, weight = torch.nn.functional.gelu(torch.randn(50, 256) * 2), torch.randn(64, 256)
    exact = x.double() @ weight.double().T
    assert error(after_gelu(weight, torch.zeros(64))(x), exact) < error(linear(weight, torch.zeros(64))(x), exact)


@pytest.mark.parametrize(("linear", "after_gelu"), INT8)
def test_int8_of_a_norms_channels_that_differ(linear, after_gelu):
    """Some channels of a LayerNorm are always larger than the rest, and count no more for that in trained models, whose
    weights for them are small: divided by what the norm says, they take no more levels than others."""
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(256)
    with torch.no_grad():
        norm.weight[::50], norm.bias[7] = 12.0, -6.0
        x = norm(torch.randn(40, 256))
    weight, bias = torch.randn(64, 256) / norm.weight.detach(), torch.randn(64)
    exact = x.double() @ weight.double().T + bias
    smoothed = error(linear(weight, bias, None, norm_magnitudes(norm))(x), exact)
    assert smoothed < 0.6 * error(linear(weight, bias)(x), exact)
    factors = smoothing_factors(weight, norm_magnitudes(norm))
    assert torch.isclose(factors.mean(), torch.tensor(1.0))
    assert factors.min() > 0
    assert smoothing_factors(torch.zeros(3, 4), torch.zeros(4)).isfinite().all()


@pytest.mark.parametrize(("linear", "after_gelu"), INT8)
def test_int8_of_a_token_depends_on_no_other(linear, after_gelu):
    """FBGEMM by itself takes one scale for all rows: from the largest and the smallest number that come."""
    torch.manual_seed(0)
    any_numbers = torch.randn(400, 384) * torch.logspace(-3, 3, 400)[:, None]
    for kind, x in ((linear, any_numbers), *((after_gelu, Activation(name)(any_numbers)) for name in GELUS)):
        layer = kind(torch.randn(64, 384), torch.randn(64))
        together = layer(x)
        for rows in ([0], [17], [399], [3, 200], list(range(0, 400, 7))):
            assert torch.equal(layer(x[rows]), together[rows]), (kind, rows)


@pytest.mark.parametrize(
    ("short", "long", "expected"), [(1.9, 1.0, True), (1.9, 0.6, True), (0.9, 0.9, False), (1.2, 0.7, False)]
)
def test_the_library_of_int8_must_gain_more_on_short_texts_than_it_loses(short, long, expected):
    measured = {"plain": 1.0, "int8": 8.0, plan._FBGEMM: 7.0, plan._BYTES_PANELS: 9.0}
    for compiles, other in ((False, plan._FBGEMM), (True, plan._BYTES_PANELS)):
        speeds = plan.Speeds(measured, {}, against={other: {16: short, 1024: long}})
        chosen = plan._INT8[other if expected else "int8"]
        kernels = plan._kernels("int8", speeds, compiles)
        assert (kernels.linear, kernels.after_gelu) == (chosen, plan._AFTER_GELU[chosen])
        assert f"{short:.2f} on 16 tokens, {long:.2f} on 1024 tokens" in "".join(speeds.receipts())


def test_the_library_of_int8_that_is_there():
    """A graph can have oneDNN's products and our own; if there are none, FBGEMM's go operation by operation."""
    for names, compiles, expected in (
        ([plan._FBGEMM], False, FbgemmInt8Linear), ([plan._FBGEMM], True, FbgemmInt8Linear),
        (["int8"], False, Int8Linear), (["int8"], True, Int8Linear),
        ([plan._FBGEMM, plan._BYTES_PANELS], True, PanelInt8Linear), (["int8", plan._BYTES_PANELS], False, Int8Linear),
    ):  # fmt: skip
        speeds = plan.Speeds({"plain": 1.0, **dict.fromkeys(names, 7.0)}, {}, against={plan._BYTES_PANELS: {16: 2.0}})
        assert plan._kernels("int8", speeds, compiles).linear is expected, names


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.03), ("int8", 0.05)])
@pytest.mark.parametrize("mask", ["none", "right", "left", "empty", "causal"])
def test_outputs_are_close(always_fast, dtype, bound, mask):
    model = make(hidden_size=96)
    with torch.no_grad():
        exact = model(text(), masks()[mask])
    got = optimize(model, dtype)(text(), masks()[mask])
    assert got.pooler_output.dtype == torch.float32
    assert error(got.pooler_output, exact.pooler_output) < bound


def test_bfloat16_is_as_exact_as_the_plain_model_in_bfloat16(always_fast):
    model, half = make(BertForMaskedLM, hidden_size=96), make(BertForMaskedLM, hidden_size=96).bfloat16()
    with torch.no_grad():
        exact, plain = model.double()(text()).logits, half(text()).logits
    ours = optimize(half)(text()).logits
    assert ours.dtype == torch.bfloat16
    assert error(ours, exact) < 1.5 * error(plain, exact)


def test_long_batches_in_int8_go_in_parts(always_fast):
    fast, ids = optimize(make(hidden_size=96), "int8"), text(shape=(20, 30))  # 600 tokens, of which 256 at once
    layer, whole = fast.engine.layers[0], fast(ids).last_hidden_state
    assert layer.rows == 256
    for layer in fast.engine.layers:
        layer.rows = None
    close(whole, fast(ids).last_hidden_state)


def test_half_models_of_int8_and_float32(always_fast):
    half = make().bfloat16()
    with torch.no_grad():
        exact = half.float()(text()).pooler_output
    half = half.bfloat16()
    for dtype in ("float32", "int8"):
        assert error(optimize(half, dtype)(text()).pooler_output, exact) < 0.05


def test_slow_dtypes_are_refused_with_the_reason(monkeypatch):
    slow = plan.Speeds({"plain": 100.0, "float32": 200.0, "bfloat16": 20.0}, {"int8": "emulated, 90 times slower"})
    monkeypatch.setattr(plan, "measure", lambda names, D, F, attempt=0: slow)
    with pytest.raises(ValueError, match=r"20 GFLOP/s, float32 has 200.*use compile=True .*, 'auto' or"):
        optimize(make(), "bfloat16")
    monkeypatch.setattr(plan.panels, "make", lambda: "there is no C++ compiler")
    with pytest.raises(ValueError, match="has 200; our own kernels: there is no C\\+\\+ compiler\\); use 'auto' or"):
        optimize(make(), "bfloat16", compile=True)
    with pytest.raises(ValueError, match="emulated, 90 times slower"):
        optimize(make(), torch.int8)
    assert optimize(make(), "auto").plan.dtype == "float32"


def test_a_missing_kernel_is_refused(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    with pytest.raises(ValueError, match="no kernels"):
        optimize(make(), "float16")


def test_auto_takes_bfloat16_where_it_is_fast(always_fast):
    fast = optimize(make(), "auto")
    assert fast.plan.dtype == "bfloat16"
    assert "fastest" in fast.explain()
    close(fast(text()).last_hidden_state, optimize(make())(text()).last_hidden_state, atol=0.2)


def test_int8_keeps_values_and_heads_in_more_bits(always_fast):
    fast = optimize(make(BertForMaskedLM), "int8")
    layer = fast.engine.layers[0]
    careful, attention = (PrepackedLinear, "float32") if "bfloat16" in MISSING else (Bfloat16Linear, "bfloat16")
    assert [type(linear) for linear in layer.inputs] == [Int8Linear, careful]
    assert type(fast.engine.head.decoder) is careful
    assert type(layer.down) is Int8AfterGelu
    assert f"values and heads on {careful.__name__}, attention in {attention}" in fast.explain()
    relu = optimize(make(BertModel, hidden_act="relu"), "int8")
    assert type(relu.engine.layers[0].down) is Int8Linear


def test_measured_speeds_name_what_was_measured():
    fast_at("int8")
    receipts = plan.measure(["int8"], 256, 1024).receipts()
    assert [line.split(":")[0] for line in receipts][:3] == ["plain", "float32", "int8"]
