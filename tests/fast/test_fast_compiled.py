"""The compiled pass: one package for any batch, kept on disk, shared, never trusted unseen; and doing without it."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from test_fast import B, T, close, make, masks, on_tokens, text

from minibert import BertForMaskedLM, BertForSequenceClassification, BertModel, optimize
from minibert.fast import compiled, compiler, panels, plan
from minibert.fast.graph import Pass, Shape, shape_of, weights
from minibert.fast.padding import pack_rows

SIZES = {"num_hidden_layers": 2}
PREPACKED = plan._all(torch.float32, plan.PrepackedLinear)

needs_onednn = pytest.mark.skipif(bool(plan._obstacle("float32")), reason="torch is built without oneDNN")
needs_compiler = pytest.mark.skipif(bool(compiler.compiler_obstacle()), reason="no C++ compiler")


def small(cls=BertModel, **changes):
    return make(cls, **{**SIZES, **changes})


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache with the package for `small` models, compiled in this test run, once."""
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIBERT_CACHE", str(directory))
        patch.delenv("MINIBERT_COMPILE", raising=False)
        fast = optimize(small(), compile=True)
        assert fast.engine.compiled, fast.explain()
    return directory


@pytest.fixture
def compiled_cache(cache, monkeypatch):
    """Use that cache, and compile nothing more."""
    monkeypatch.setenv("MINIBERT_CACHE", str(cache))
    monkeypatch.delenv("MINIBERT_COMPILE", raising=False)
    monkeypatch.setattr(compiled, "_compile", lambda *args: pytest.fail("compiled again"))
    return cache


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A cache of its own, and a compiler that takes no time: it writes a package that cannot be run."""
    monkeypatch.setenv("MINIBERT_CACHE", str(tmp_path))
    monkeypatch.delenv("MINIBERT_COMPILE", raising=False)
    runs = []

    def run(command, **kwargs):
        runs.append(command)
        with open(command[-1], "wb") as file:
            file.write(b"no package")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(compiler, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(compiler, "compiler_obstacle", lambda: "")
    monkeypatch.setattr(panels, "load", lambda: "")  # our own kernels are made by a run of the compiler of their own
    monkeypatch.setattr(panels, "make", compiler.compiler_obstacle)
    return runs


@needs_onednn
@needs_compiler
@pytest.mark.parametrize(
    "linear", [plan.PrepackedLinear, plan.UnfusedLinear, plan.PanelLinear, plan.PanelBfloat16Linear]
)
def test_what_is_compiled_computes_what_the_engine_does(linear, kernels):
    kernels = plan._all(torch.float32, linear)
    engine = plan.CpuPlan("float32", kernels, ()).build(small()).engine
    graph = Pass(shape_of(small(), kernels)).eval()
    for rows in ([[5]], [[7] * 9], [[5, 6, 7], [9] * 30, [8]]):
        batch = pack_rows(rows)
        starts = torch.tensor([0, *accumulate(batch.packing.lengths)])
        inputs = (batch.ids_3N, starts, torch.arange(batch.packing.tokens))
        with torch.no_grad():
            close(torch.func.functional_call(graph, weights(engine), inputs), engine.encode(batch).last_MD)


@needs_onednn
@needs_compiler
class TestOnePackage:
    def test_serves_every_batch_without_compiling_again(self, compiled_cache):
        model = small()
        fast = optimize(model)
        assert "one graph" in fast.explain()
        draw = random.Random(0)
        batches = [[n] for n in (1, 2, 3, 31, 32)] + [[1, 1], [32] * 5, [1, 32, 7], [2] * 9]
        batches += [[draw.randint(1, 32) for _ in range(draw.randint(1, 12))] for _ in range(12)]
        for lengths in batches:
            rows = [[draw.randrange(1, 120) for _ in range(n)] for n in lengths]
            with torch.no_grad():
                expected = torch.cat([model(torch.tensor([row])).last_hidden_state[0] for row in rows])
            close(fast.encode_rows(rows)[0], expected)
            close(fast.encode_rows(rows, first_only=True)[0], expected[torch.tensor([0, *lengths]).cumsum(0)[:-1]])
        assert len(list(compiled_cache.rglob("*.pt2"))) == 1

    def test_many_tokens_go_through_it_in_parts(self, compiled_cache, monkeypatch):
        fast = optimize(small())
        rows = [[5 + n] * n for n in (3, 9, 1, 32, 7, 7, 20, 1)]
        whole, firsts = fast.encode_rows(rows)[0], fast.encode_rows(rows, first_only=True)[0]
        for most in (1, 12, 40):
            monkeypatch.setattr(compiled, "_TOKENS", most)
            close(fast.encode_rows(rows)[0], whole)
            close(fast.encode_rows(rows, first_only=True)[0], firsts)

    def test_without_its_kernels_it_is_not_run(self, compiled_cache, monkeypatch):
        monkeypatch.setattr(panels, "load", lambda: "it is not compiled")
        fast = optimize(small())
        assert fast.engine.compiled is None
        with torch.no_grad():
            close(fast(text()).last_hidden_state, small()(text()).last_hidden_state)

    @pytest.mark.parametrize("name", masks())
    def test_every_mask(self, compiled_cache, name):
        model, mask = small(), masks()[name]
        with torch.no_grad():
            plain = model(text(), mask)
        fast = optimize(model)(text(), mask)
        close(on_tokens(fast.last_hidden_state, mask), on_tokens(plain.last_hidden_state, mask))
        close(fast.pooler_output, plain.pooler_output)

    def test_what_it_does_not_give_comes_from_the_engine(self, compiled_cache):
        model, mask = small(), masks()["right"]
        with torch.no_grad():
            plain = model(text(), mask, output_hidden_states=True, output_attentions=True)
            embedded = model(inputs_embeds=model.embeddings.word_embeddings(text()), attention_mask=mask)
        fast = optimize(model)
        out = fast(text(), mask, output_hidden_states=True, output_attentions=True)
        close(on_tokens(out.hidden_states[1], mask), on_tokens(plain.hidden_states[1], mask))
        assert len(out.attentions) == 2
        given = fast(inputs_embeds=model.embeddings.word_embeddings(text()).detach(), attention_mask=mask)
        close(given.pooler_output, embedded.pooler_output)

    def test_other_weights_and_heads_share_it_and_hold_nothing_twice(self, compiled_cache):
        for cls in (BertForMaskedLM, BertForSequenceClassification):
            model = small(cls, seed=5)
            fast = optimize(model)
            with torch.no_grad():
                close(fast(text()).logits, model(text()).logits)
            held = fast.engine.compiled.weights
            assert held["words"].data_ptr() == model.bert.embeddings.word_embeddings.weight.data_ptr()
            assert held["layers.1.up.weight"] is not None
            assert held["layers.1.up.bias"].data_ptr() == model.bert.encoder.layer[1].intermediate.dense.bias.data_ptr()
            nothing = fast(text(), positions=torch.zeros(B, T).bool()) if cls is BertForMaskedLM else None
            assert nothing is None or nothing.logits.shape == (0, 120)

    def test_is_used_unasked_and_not_where_it_is_refused(self, compiled_cache, monkeypatch):
        monkeypatch.setattr(plan, "measure", lambda *args: pytest.fail("what was compiled was measured then"))
        assert optimize(small()).engine.compiled
        assert optimize(small(), compile=True).engine.compiled
        monkeypatch.undo()
        monkeypatch.setenv("MINIBERT_CACHE", str(compiled_cache))
        assert not optimize(small(), compile=False).engine.compiled
        monkeypatch.setenv("MINIBERT_COMPILE", "0")
        fast = optimize(small())
        assert not fast.engine.compiled
        assert "compiled: no, as asked" in fast.explain()

    def test_threads_pickles_copies_and_changes(self, compiled_cache):
        model = small()
        fast = optimize(model)
        rows = [[[5] * (1 + i % 9), [7] * (1 + i % 4)] for i in range(64)]
        expected = [fast.encode_rows(pair)[0] for pair in rows]
        with ThreadPoolExecutor(8) as pool:
            for got, want in zip(pool.map(lambda pair: fast.encode_rows(pair)[0], rows), expected, strict=True):
                close(got, want, atol=1e-6)
        for other in (pickle.loads(pickle.dumps(fast)), copy.deepcopy(fast)):
            assert other.engine.compiled
            close(other.encode_rows(rows[3])[0], expected[3], atol=1e-6)
        with torch.no_grad():
            model.encoder.layer[0].output.LayerNorm.weight *= 2
        with pytest.raises(RuntimeError, match="optimize it again"):
            fast(text())
        assert not torch.equal(optimize(model).encode_rows(rows[3])[0], expected[3])

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    def test_fork(self, compiled_cache):
        """A child of a process that has computed; on one thread, as in every worker of a DataLoader."""
        fast = optimize(small())
        expected = fast.encode_rows([[5, 6, 7]])[0]
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            os._exit(0 if torch.allclose(fast.encode_rows([[5, 6, 7]])[0], expected, atol=1e-6) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    def test_a_package_that_computes_something_else_is_not_used(self, compiled_cache, monkeypatch):
        monkeypatch.setattr(compiled.CompiledPass, "__call__", lambda self, batch: torch.ones(16, 48))
        fast = optimize(small())
        assert fast.engine.compiled is None
        assert "wrong by" in fast.explain()
        assert fast(text()).last_hidden_state.shape == (B, T, 48)

    @pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b"",
                                        lambda content: content[:-9] + b"\0" * 9])  # fmt: skip
    def test_a_damaged_package_is_not_run_but_made_anew(self, compiled_cache, damage, monkeypatch):
        (file,) = compiled_cache.rglob("*.pt2")
        whole = file.read_bytes()
        made = []
        try:
            file.write_bytes(damage(whole))
            assert "operation by operation" in optimize(small()).explain()

            def compile_again(shape, measured):
                made.append(shape)
                file.write_bytes(whole)
                return compiled.find(shape)

            monkeypatch.setattr(compiled, "_compile", compile_again)
            assert optimize(small(), compile=True).engine.compiled
            assert len(made) == 1
        finally:
            file.write_bytes(whole)


@needs_onednn
@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", plan._BYTES_PANELS, plan._HALF_PANELS])
def test_other_dtypes_in_one_graph(kernels, tmp_path, monkeypatch, name):
    if plan._obstacle(name):
        pytest.skip(plan._obstacle(name))
    dtype = plan._dtype_of(name)
    monkeypatch.setenv("MINIBERT_CACHE", str(tmp_path))
    monkeypatch.delenv("MINIBERT_COMPILE", raising=False)
    speeds = plan.Speeds({"plain": 1.0, "float32": 2.0, name: 4.0}, {})
    monkeypatch.setattr(plan, "measure", lambda names, D, F, attempt=0: speeds)
    model = small(hidden_size=96)
    fast, eager = optimize(model, dtype, compile=True), optimize(model, dtype, compile=False)
    assert fast.engine.compiled, fast.explain()
    assert fast.plan.kernels.linear is plan._FLOAT32[name]
    monkeypatch.setattr(compiled, "_compile", lambda *args: pytest.fail("compiled again"))
    assert optimize(model, dtype, compile=True).plan == fast.plan
    for rows in ([[5, 6, 7]], [[9] * 32, [8] * 3], [[7] * 32] * 20):
        with torch.no_grad():
            exact = torch.cat([model(torch.tensor([row])).last_hidden_state[0] for row in rows])
        wrong = [float((each.encode_rows(rows)[0] - exact).norm() / exact.norm()) for each in (fast, eager)]
        assert wrong[0] < max(0.02, 1.5 * wrong[1])


def test_one_of_many_compiles(empty_cache):
    shape = shape_of(small(), PREPACKED)
    with ThreadPoolExecutor(6) as pool:
        packages = list(pool.map(lambda _: compiled.make(shape), range(6)))
    assert len(empty_cache) == 1
    assert len(set(packages)) == 1
    assert compiled.find(shape).path == packages[0].path
    assert [file.suffix for file in sorted(compiler.directory().iterdir())] == [".json", ".lock", ".pt2"]


def test_what_it_will_cost_is_said_before(empty_cache, caplog):
    compiled.make(shape_of(small(), PREPACKED))
    assert "compiling 2 layers of 48 for this CPU: about" in caplog.text
    caplog.clear()
    compiled.make(shape_of(small(), PREPACKED))
    assert not caplog.text


def test_by_default_nothing_is_compiled_and_the_receipt_says_how(empty_cache):
    fast = optimize(small())
    assert not empty_cache
    assert "operation by operation" in fast.explain()
    with pytest.raises(ValueError, match="compile='yes'"):
        optimize(small(), compile="yes")


@needs_onednn
def test_a_package_that_cannot_be_run(empty_cache, monkeypatch):
    monkeypatch.setenv("MINIBERT_COMPILE", "1")
    fast = optimize(small())
    assert len(empty_cache) == 1
    assert "the package cannot be run" in fast.explain()
    with torch.no_grad():
        close(fast(text()).last_hidden_state, small()(text()).last_hidden_state)


@needs_onednn
def test_without_a_compiler_all_is_as_before(empty_cache, monkeypatch):
    monkeypatch.setattr(compiler, "compiler_obstacle", lambda: "there is no C++ compiler (g++, clang++)")
    fast = optimize(small(), compile=True)
    assert "compiled: no, there is no C++ compiler" in fast.explain()
    with torch.no_grad():
        close(fast(text()).last_hidden_state, small()(text()).last_hidden_state)


def test_the_compiler_is_looked_for(monkeypatch):
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    assert "g++" in compiler.compiler_obstacle()
    monkeypatch.setenv("CXX", "my-compiler")
    assert "my-compiler" in compiler.compiler_obstacle()
    monkeypatch.setattr(compiler.shutil, "which", lambda name: name if name == "my-compiler" else None)
    assert not compiler.compiler_obstacle()


@needs_onednn
def test_a_compiler_that_fails(empty_cache, monkeypatch):
    failed = SimpleNamespace(returncode=1, stderr="Traceback\nCppCompileError: no such header")
    monkeypatch.setattr(compiler, "subprocess", SimpleNamespace(run=lambda command, **kwargs: failed))
    fast = optimize(small(), compile=True)
    assert "the compiler failed: CppCompileError: no such header" in fast.explain()
    assert not list(compiler.directory().glob("*.pt2"))


@needs_onednn
def test_a_cache_that_cannot_be_written(empty_cache, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINIBERT_CACHE", str(tmp_path / "file"))
    assert "cannot be written to" in optimize(small(), compile=True).explain()


def test_where_packages_are_kept(monkeypatch, tmp_path):
    monkeypatch.delenv("MINIBERT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler.directory() == tmp_path / "minibert" / "compiled"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compiler.directory().parts[-3:] == (".cache", "minibert", "compiled")


def test_a_package_depends_on_shape_cpu_torch_and_code(monkeypatch):
    shape = shape_of(small(), PREPACKED)
    assert shape_of(small(seed=9), PREPACKED) == shape
    assert Shape(**json.loads(json.dumps(shape.as_dict())) | {"epsilons": shape.epsilons}) == shape
    keys = {compiled.key(shape)}
    for changes in ({"num_hidden_layers": 3}, {"hidden_act": "relu"}, {"layer_norm_eps": 1e-5}, {"vocab_size": 121},
                    {"num_attention_heads": 6}):  # fmt: skip
        keys.add(compiled.key(shape_of(small(**changes), PREPACKED)))
    for linear in (plan.Int8Linear, plan.PanelInt8Linear):
        keys.add(compiled.key(shape_of(small(), plan._int8(linear, plan.PrepackedLinear))))
    monkeypatch.setattr(compiler, "cpu", lambda: ("another",))
    keys.add(compiled.key(shape))
    monkeypatch.setattr(compiled, "_code", lambda: "changed")
    keys.add(compiled.key(shape))
    monkeypatch.setattr(torch, "__version__", "9.9")
    keys.add(compiled.key(shape))
    assert len(keys) == 11


def test_layers_of_different_sizes_are_no_graph():
    model = small()
    dense = model.encoder.layer[0].intermediate.dense, model.encoder.layer[0].output.dense
    model.encoder.layer[0].intermediate.dense = torch.nn.Linear(48, 40)
    model.encoder.layer[0].output.dense = torch.nn.Linear(40, 48)
    assert "differ in size" in shape_of(model, PREPACKED)
    assert dense
    with torch.no_grad():
        close(optimize(model)(text()).last_hidden_state, model(text()).last_hidden_state)
    model.encoder.layer = torch.nn.ModuleList()
    assert "no layers" in shape_of(model, PREPACKED)
    assert "PlainLinear" in shape_of(small(), plan._all(torch.float32, plan.PlainLinear))


def test_rows_computed_together():
    draw = random.Random(1)
    for _ in range(50):
        lengths = [draw.choice([1, 7, 40, 128, 512]) for _ in range(draw.randint(1, 90))]
        groups = compiled.split(lengths)
        assert [length for group in groups for length in group] == lengths
        assert all(group and (len(group) == 1 or sum(group) <= compiled._TOKENS) for group in groups)
    assert compiled.split([32] * 32) == [[32] * 32]
    assert compiled.split([5000]) == [[5000]]
    assert len(compiled.split([512] * 64)) == 64 * 512 // compiled._TOKENS
