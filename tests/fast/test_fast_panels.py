"""Products by our own kernels: right for every size, the same on any thread, and doing without them."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_fast import close, make, text

from minibert import BertForMaskedLM, optimize
from minibert.activations import Activation
from minibert.fast import compiler, panels, plan
from minibert.fast.panels import PanelBfloat16Linear, PanelInt8AfterGelu, PanelInt8Linear, PanelLinear
from minibert.fast.quantize import byte_range

ROWS = (0, 1, 2, 5, 6, 7, 12, 13, 16, 31, 97, 200)
SIZES = ((1, 1), (3, 16), (48, 15), (48, 17), (384, 64), (385, 33), (312, 936), (1200, 312), (1536, 384))


pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("kind", [PanelLinear, PanelBfloat16Linear])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_whole_numbers_come_out_exactly(inputs, outputs, kind):
    """Sums that float32 holds whatever their order: one weight out of place would show."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randint(-9, 10, size, generator=generator) for size in ((outputs, inputs), (outputs,)))
    layer = kind(weight.float(), bias.float())
    for rows in ROWS:
        x, residual = (torch.randint(-9, 10, (rows, n), generator=generator) for n in (inputs, outputs))
        expected = x @ weight.T + bias
        assert torch.equal(layer(x.float()), expected.float())
        assert torch.equal(layer.add(x.float(), residual.float()), (expected + residual).float())


@pytest.mark.parametrize("kind", [PanelInt8Linear, PanelInt8AfterGelu])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_bytes_come_out_exactly(inputs, outputs, kind):
    """The sums of bytes, whole numbers that float32 holds, are those of whole numbers."""
    generator = torch.Generator().manual_seed(0)
    levels, largest = byte_range(kind)
    weight = torch.randint(-levels, levels + 1, (outputs, inputs), generator=generator).clamp_(max=127).to(torch.int8)
    layer = kind.of_levels(weight, largest)
    for rows in ROWS:
        x = torch.randint(0, largest + 1, (rows, inputs), generator=generator)
        expected = (x - layer.centre) @ weight.long().T
        assert torch.equal(layer.multiply_bytes(x.to(torch.uint8)).long(), expected)


@pytest.mark.parametrize("kind", [PanelLinear, PanelBfloat16Linear])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_rounding_is_that_of_a_product(inputs, outputs, kind):
    """At most twice as far from float64 as torch's own product, on weights as they are kept."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator)
    x, weight = torch.randn(64, inputs, generator=generator), weight.to(kind.weights).float()
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())

    def error(y: torch.Tensor) -> float:
        return float((y - exact).square().mean().sqrt())

    least = float(exact.square().mean().sqrt()) * torch.finfo(torch.float32).eps
    assert error(kind(weight, bias)(x)) <= 2 * max(error(torch.nn.functional.linear(x, weight, bias)), least)


def test_a_row_is_the_same_in_any_company_and_on_any_number_of_threads():
    generator, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    weight, bias = torch.randn(312, 1200, generator=generator), torch.randn(312, generator=generator)
    x = torch.randn(211, 1200, generator=generator)
    for kind in (PanelLinear, PanelBfloat16Linear, PanelInt8Linear):
        layer = kind(weight, bias)
        whole = layer(x)
        try:
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                for part in (slice(0, 211), slice(0, 1), slice(3, 15), slice(100, 199)):
                    assert torch.equal(layer(x[part]), whole[part])
        finally:
            torch.set_num_threads(before)


def test_what_is_no_number_stays_in_its_row_and_column():
    x, weight = torch.ones(9, 40), torch.ones(50, 40)
    x[4, 7], weight[33, 5] = torch.nan, torch.inf
    y = PanelLinear(weight, torch.zeros(50))(x)
    expected = torch.full((9, 50), 40.0)
    expected[:, 33], expected[4] = torch.inf, torch.nan
    assert torch.equal(y.nan_to_num(-1), expected.nan_to_num(-1))


def test_inputs_that_are_not_side_by_side():
    x, weight = torch.arange(80.0).view(8, 10), torch.arange(30.0).view(3, 10)
    layer = PanelLinear(weight, torch.zeros(3))
    for view in (x.T.contiguous().T, x.flip(0), x.repeat(1, 2)[:, :10], x[::2]):
        assert torch.equal(layer(view), view @ weight.T)
    assert torch.equal(PanelLinear(weight.T.contiguous().T, torch.zeros(3))(x), x @ weight.T)


@pytest.mark.parametrize("x", [torch.ones(2, 5), torch.ones(2, 4, dtype=torch.float64)])
def test_what_does_not_fit_is_refused(x):
    with pytest.raises(RuntimeError):
        PanelLinear(torch.ones(3, 4), torch.zeros(3))(x)
    with pytest.raises(RuntimeError):
        PanelInt8Linear(torch.ones(3, 4), torch.zeros(3)).multiply_bytes(x)


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "relu", "mish"])
def test_an_activation_after_it(name):
    weight, x = torch.eye(20)[:7], torch.linspace(-4, 4, 60).view(3, 20)
    close(PanelLinear(weight, torch.ones(7), Activation(name))(x), Activation(name)(x[:, :7] + 1))


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "relu", "mish"])
@pytest.mark.parametrize("kind", [PanelLinear, PanelBfloat16Linear, PanelInt8Linear, PanelInt8AfterGelu])
def test_an_activation_is_that_of_its_own_product(name, kind):
    weight, x, bias = torch.eye(20)[:17], torch.linspace(-0.1, 4, 60).view(3, 20), torch.linspace(-3, 3, 17)
    close(kind(weight, bias, Activation(name))(x), Activation(name)(kind(weight, bias)(x)))


@pytest.mark.parametrize(("start", "end"), [(-1e-3, 1e-3), (-1, 1), (-8, -4), (-4, 0), (0, 8), (-100, 100)])
def test_gelu_is_as_exact_as_torch_s(start, end):
    x = torch.linspace(start, end, 160_000).view(-1, 16)
    y = PanelLinear(torch.eye(16), torch.zeros(16), Activation("gelu"))(x)
    exact, torchs = (torch.nn.functional.gelu(each) for each in (x.double(), x))
    error, allowed = ((each - exact).square().mean().sqrt() for each in (y, torchs))
    assert error <= 2 * allowed
    assert PanelLinear(torch.eye(16), torch.full((16,), torch.nan), Activation("gelu"))(x).isnan().all()


def attention(query, key, value, lengths, heads):
    """Text by text, by torch."""
    y, at = torch.zeros_like(query), 0
    for n in lengths:
        q, k, v = (x[at : at + n].unflatten(1, (heads, -1)).transpose(0, 1) for x in (query, key, value))
        y[at : at + n] = (torch.softmax(q @ k.transpose(1, 2), -1) @ v).transpose(0, 1).flatten(1)
        at += n
    return y


@pytest.mark.parametrize(("heads", "size"), [(1, 1), (2, 7), (3, 16), (12, 32), (2, 64), (1, 100)])
@pytest.mark.parametrize("lengths", [[1], [2], [16], [1, 1, 1], [5, 33, 1, 70], [200]])
def test_attention_is_that_of_each_text(heads, size, lengths):
    """Of all tokens and of some, with rows behind the last text; at most twice as far from float64 as torch's own."""
    generator, N, D = torch.Generator().manual_seed(0), sum(lengths), heads * size
    joined = torch.randn(N + 3, 3 * D, generator=generator)
    query, key, value = joined.split(D, 1)
    query = query * size**-0.5
    starts = torch.tensor([0, *lengths]).cumsum(0)
    attend = torch.ops.minibert_panels.attention.default
    exact = attention(query.double(), key.double(), value.double(), lengths, heads)
    y, expected = attend(query, key, value, starts, None, heads), attention(query, key, value, lengths, heads)
    least = torch.finfo(torch.float32).eps * exact.square().mean().sqrt()
    error, allowed = ((x - exact).square().mean().sqrt() for x in (y, expected))
    assert error <= 2 * max(allowed, least)
    assert not y[N:].any()
    for places in (torch.arange(N), starts[:-1], torch.arange(0, N, 3), torch.tensor([0, N - 1, N - 1])):
        assert torch.equal(attend(query[places], key, value, starts, places, heads), y[places])


def test_attention_on_any_number_of_threads():
    generator, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    query, key, value = torch.randn(90, 3 * 32, generator=generator).split(32, 1)
    starts = torch.tensor([0, 1, 60, 90])
    whole = torch.ops.minibert_panels.attention(query, key, value, starts, None, 2)
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            assert torch.equal(torch.ops.minibert_panels.attention(query, key, value, starts, None, 2), whole)
    finally:
        torch.set_num_threads(before)


def test_attention_to_what_is_no_number():
    """It stays in its text and head; scores beyond float32 give NaN as torch's softmax does, large ones a choice."""
    query, key, value = torch.ones(4, 8), torch.ones(4, 8), torch.arange(32.0).view(4, 8)
    starts = torch.tensor([0, 2, 4])
    key[1, 0], query[3, 4:] = torch.nan, 1e4
    key[2, 4:] = 2
    y = torch.ops.minibert_panels.attention(query, key, value, starts, None, 2)
    assert y[:2, :4].isnan().all()
    assert y[:2, 4:].isfinite().all()
    assert torch.equal(y[3, 4:], value[2, 4:])
    key[:] = torch.inf
    assert torch.ops.minibert_panels.attention(query, key, value, starts, None, 2).isnan().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"starts": torch.tensor([0, 3, 2])}, "starts"),
        ({"starts": torch.tensor([0, 9])}, "starts"),
        ({"starts": torch.tensor([1, 4])}, "starts"),
        ({"starts": torch.tensor([0])}, "starts"),
        ({"places": torch.tensor([0, 1])}, "places"),
        ({"places": torch.tensor([3, 1, 0, 2])}, "places"),
        ({"places": torch.tensor([0, 1, 2, 9])}, "places"),
        ({"starts": torch.tensor([0, 3, 4])[::2]}, "starts"),
        ({"places": torch.tensor([0, 9, 1, 9, 2, 9, 3])[::2]}, "places"),
        ({"heads": 3}, "do not fit"),
        ({"key": torch.ones(8, 4).T}, "one piece"),
        ({"value": torch.ones(3, 8)}, "do not fit"),
    ],
)
def test_attention_refuses_what_does_not_fit(changes, message):
    arguments = dict.fromkeys(("query", "key", "value"), torch.ones(4, 8))
    arguments |= {"starts": torch.tensor([0, 4]), "places": None, "heads": 2}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.minibert_panels.attention(**(arguments | changes))


def test_as_the_engine_s_kernel():
    """Layers, values and heads of a whole model, operation by operation."""
    model = make(BertForMaskedLM)
    fast = plan.CpuPlan("float32", plan._all(torch.float32, PanelLinear), ()).build(model)
    with torch.no_grad():
        close(fast(text()).logits, model(text()).logits)


@pytest.mark.parametrize(
    ("ratios", "expected"), [({16: 1.5, 1024: 0.9}, PanelLinear), ({16: 1.1, 1024: 0.8}, plan.PrepackedLinear)]
)
def test_it_is_taken_where_it_is_faster_on_the_whole(ratios, expected):
    measured = {"plain": 1.0, "float32": 2.0, plan._PANELS: 2.0, "int8": 4.0}
    speeds = plan.Speeds(measured, {}, against={plan._PANELS: ratios})
    assert plan._kernels("float32", speeds, True).linear is expected
    assert plan._kernels("int8", speeds, True).careful is expected
    del measured["float32"]
    assert plan._kernels("float32", speeds, True).linear is PanelLinear


def test_half_the_weights_where_that_is_faster():
    """Where this CPU has products in bfloat16 of its own, a race decides; else there is nothing else."""
    measured = {"plain": 1.0, "float32": 2.0, plan._HALF_PANELS: 2.0}
    kernels = plan._kernels("bfloat16", plan.Speeds(measured, {"bfloat16": "no kernels"}), True)
    assert kernels == plan._all(torch.float32, PanelBfloat16Linear)
    for ratios, expected in (({16: 1.5, 1024: 0.5}, plan.PrepackedLinear), ({16: 1.5, 1024: 0.9}, PanelBfloat16Linear)):
        speeds = plan.Speeds(measured | {"bfloat16": 4.0}, {}, against={plan._HALF_PANELS: ratios})
        assert plan._kernels("bfloat16", speeds, True).linear is expected
    half, full = PanelBfloat16Linear(torch.ones(32, 8), torch.ones(32)), PanelLinear(torch.ones(32, 8), torch.ones(32))
    assert full.nbytes == 2 * half.nbytes == full.weight.nbytes == 2 * half.weight.nbytes


def test_it_is_measured_and_must_be_right(monkeypatch):
    speeds = plan.measure([plan._PANELS], 384, 1536, attempt=98)
    assert speeds.measured[plan._PANELS] > 0
    assert list(speeds.against.get(plan._PANELS, {})) == ([16, 1024] if "float32" in speeds.measured else [])
    monkeypatch.setattr(PanelLinear, "_product", lambda self, x: x.new_zeros(len(x), self.outputs))
    speeds = plan.measure([plan._PANELS], 384, 1536, attempt=97)
    assert "wrong by" in speeds.obstacles[plan._PANELS]
    assert plan._kernels("float32", speeds, True).linear is not PanelLinear


def test_a_plan_from_where_there_is_a_kernel(monkeypatch):
    """Where it is opened there may be none: oneDNN computes."""
    model = make()
    for kernels, dtype, other in (
        (plan._all(torch.float32, PanelLinear), "float32", plan.UnfusedLinear),
        (plan._all(torch.float32, PanelBfloat16Linear), "bfloat16", plan.UnfusedLinear),
        (plan._int8(PanelInt8Linear, PanelLinear), "int8", plan.Int8Linear),
    ):
        fast = plan.CpuPlan(dtype, kernels, ()).build(model)
        content = pickle.dumps(fast)
        assert type(pickle.loads(content).engine.layers[0].up) is kernels.linear
        with monkeypatch.context() as patch:
            patch.setattr(panels, "load", lambda: "it is not compiled")
            opened = pickle.loads(content)
        assert type(opened.engine.layers[0].up) is other
        kinds = {type(linear) for linear in opened.engine.linears}
        assert not kinds & plan._WITHOUT_PANELS.keys()
        with torch.no_grad():
            expected = model(text()).last_hidden_state
        close(opened(text()).last_hidden_state, expected, atol=1e-5 if dtype == "float32" else 0.2)


class TestTheLibrary:
    """In processes of their own: a library once loaded stays."""

    def load(self, directory: Path, call: str = "load") -> str:
        code = f"from minibert.fast import panels; print(panels.{call}() or 'loaded')"
        places = {"MINIBERT_CACHE": str(directory), "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **places}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def test_a_second_process_finds_it(self, kernels):
        assert self.load(kernels) == "loaded"

    def test_none_is_made_unasked(self, tmp_path):
        assert self.load(tmp_path) == "it is not compiled"
        assert not list(tmp_path.iterdir())

    def test_a_damaged_one_is_not_loaded(self, kernels, tmp_path):
        path = kernels / "compiled" / panels._path().name
        there = tmp_path / "compiled"
        there.mkdir()
        there.joinpath(path.name).write_bytes(path.read_bytes()[:-1000])
        there.joinpath(path.with_suffix(".sha256").name).write_bytes(path.with_suffix(".sha256").read_bytes())
        assert self.load(tmp_path) == "it is not compiled"

    def test_a_foreign_one_is_said_to_be(self, tmp_path):
        """Whole, but no library."""
        there = tmp_path / "compiled" / panels._path().name
        there.parent.mkdir()
        panels.write(there, b"no library")
        panels.write(there.with_suffix(".sha256"), panels.hashlib.sha256(b"no library").hexdigest())
        assert self.load(tmp_path).startswith("it cannot be loaded (OSError")


@pytest.mark.parametrize(
    ("done", "expected"),
    [
        (SimpleNamespace(returncode=1, stderr="panels.cpp:\nfatal error: no such header"), "no such header"),
        (SimpleNamespace(returncode=0, stderr=""), "exit status 0"),
    ],
)
def test_a_compiler_that_fails(tmp_path, monkeypatch, done, expected):
    monkeypatch.setenv("MINIBERT_CACHE", str(tmp_path))
    monkeypatch.setattr(compiler, "subprocess", SimpleNamespace(run=lambda *args, **kwargs: done))
    assert expected in panels.make()
    assert not list(tmp_path.rglob("*.so"))


def test_no_compiler_or_no_place(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINIBERT_CACHE", str(tmp_path / "file"))
    assert "cannot be written to" in panels.make()
    monkeypatch.setattr(compiler, "compiler_obstacle", lambda: "there is no C++ compiler (g++, clang++)")
    assert panels.make() == "there is no C++ compiler (g++, clang++)"
    fast = optimize(make(), compile=True)
    assert "our own kernels: there is no C++ compiler" in fast.explain()
