"""SentenceEncoder.encode and its settings by sentence-transformers' names, with its numbers."""

from __future__ import annotations

import copy
import logging
import pickle
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import torch
from reference import assert_as_exact, rounding
from sentence_transformers.util import quantize_embeddings
from sentence_transformers.util import semantic_search as reference_search

from minibert import BertConfig, BertModel, BertTokenizer, SentenceEncoder, optimize, semantic_search
from minibert.embedding import base
from minibert.embedding.modules import MODES, Dense, Normalize, Pooling

TEXTS = ["The bank is closed today.", "", "Wolves", "She sat on the bank of the river and watched the boats go by."]
PAIRS = [("Is the bank closed?", "It is."), ("Wolves", ""), ("a " * 50, "b " * 60)]


@pytest.fixture(scope="module")
def close(tiny_dir) -> Callable[[Any, Any], bool]:
    """Of one shape, and off by no more than four times what float32 costs the states of the tiny model's tokens.

    Vectors are means of them, or one of them: another order of the sums, as in a batch of another size, costs no more.
    """
    within = 4 * rounding(BertModel.from_pretrained(tiny_dir))

    def compare(a: Any, b: Any) -> bool:
        a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
        return a.shape == b.shape and np.abs(a - b).max(initial=0.0) <= within

    return compare


@pytest.fixture(scope="module")
def peer(tiny_dir) -> sentence_transformers.SentenceTransformer:
    return sentence_transformers.SentenceTransformer(str(tiny_dir), device="cpu")


# Texts, and what comes out


def test_texts_by_any_name(tiny):
    expected = tiny.encode(TEXTS)
    for name in ("inputs", "sentences", "texts"):
        assert np.array_equal(tiny.encode(**{name: TEXTS}), expected)
        assert np.array_equal(tiny.encode_query(**{name: TEXTS}), expected)
        assert np.array_equal(np.concatenate(list(tiny.encode_stream(**{name: TEXTS}))), expected)
    with pytest.raises(TypeError, match="inputs, sentences and texts are names of one argument"):
        tiny.encode(TEXTS, sentences=TEXTS)
    with pytest.raises(TypeError, match="encode takes no argument 'normalise'"):
        tiny.encode(TEXTS, normalise=True)
    with pytest.raises(TypeError, match="texts must be a str or an iterable of str, got None"):
        tiny.encode()


@pytest.mark.parametrize("wrong", [{"a", "b"}, np.arange(3), bytearray(b"x")])
def test_texts_without_an_order_are_refused(tiny, wrong):
    with pytest.raises(TypeError, match="texts must be a str or an iterable of str"):
        tiny.encode(wrong)


def test_arrays_and_columns_of_strings(tiny, close):
    expected = tiny.encode(TEXTS)
    assert np.array_equal(tiny.encode(np.array(TEXTS)), expected)
    assert np.array_equal(tiny.encode(np.array(TEXTS, dtype=object)), expected)
    assert np.array_equal(tiny.encode(tuple(TEXTS)), expected)
    assert close(tiny.encode(np.array("Wolves")), expected[2])


def test_pairs_of_texts(tiny, peer, close):
    expected = peer.encode(PAIRS)
    assert close(tiny.encode(PAIRS), expected)
    assert close(tiny.encode([list(pair) for pair in PAIRS]), expected)
    assert close(tiny.encode([*PAIRS, *TEXTS]), np.concatenate([expected, peer.encode(TEXTS)]))
    assert close(tiny.encode(PAIRS, prompt="Say: "), peer.encode(PAIRS, prompt="Say: "))
    assert close(tiny.encode(np.array([["a", "b"], ["c", "d"]])), peer.encode([("a", "b"), ("c", "d")]))
    assert close(tiny.encode([("a", "b")])[0], tiny.encode([("a", "b"), "c"])[0])
    with pytest.raises(TypeError, match=r"texts\[1\] must be a str or a pair of them, got tuple"):
        tiny.encode(["a", ("b", "c", "d")])
    with pytest.raises(TypeError, match=r"texts\[0\]\[1\] must be a str, got int 3"):
        tiny.encode([("b", 3)])


@pytest.mark.parametrize("precision", ["float32", "int8", "uint8", "binary", "ubinary", None])
def test_precision(tiny, precision):
    texts = [f"text {'x' * i}" for i in range(12)]
    full = tiny.encode(texts)
    found = tiny.encode(texts, precision=precision)
    expected = quantize_embeddings(full, precision or "float32")
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)
    tensor = tiny.encode(texts, precision=precision, convert_to_tensor=True)
    assert np.array_equal(tensor.numpy(), expected)
    assert tiny.encode([], precision=precision).shape == (0, expected.shape[1])
    assert tiny.encode("one", precision=precision).shape == expected[0].shape


def test_unknown_precision_and_output(tiny):
    with pytest.raises(ValueError, match="precision must be one of float32, int8"):
        tiny.encode(TEXTS, precision="int4")
    with pytest.raises(ValueError, match="output_value must be one of 'sentence_embedding'"):
        tiny.encode(TEXTS, output_value="words")
    with pytest.raises(ValueError, match="task must be one of"):
        tiny.encode(TEXTS, task="sing")


def test_forms(tiny):
    array = tiny.encode(TEXTS)
    tensors = tiny.encode(TEXTS, convert_to_numpy=False)
    assert isinstance(tensors, list)
    assert all(torch.equal(tensor, torch.from_numpy(row)) for tensor, row in zip(tensors, array, strict=True))
    assert isinstance(tiny.encode(TEXTS, convert_to_numpy=False, convert_to_tensor=True), torch.Tensor)
    assert tiny.encode([], convert_to_numpy=False) == []
    assert tiny.encode([], convert_to_tensor=True).shape == (0, 32)


def test_states_of_tokens(tiny, peer, close):
    expected = peer.encode(TEXTS, output_value="token_embeddings")
    found = tiny.encode(TEXTS, output_value="token_embeddings")
    assert all(close(a, b) for a, b in zip(found, expected, strict=True))
    assert close(tiny.encode("Wolves", output_value="token_embeddings"), expected[2])
    assert tiny.encode([], output_value="token_embeddings") == []


@pytest.mark.parametrize("prompt", [None, "Say: "])
def test_all_there_is(tiny, peer, prompt, close):
    found = tiny.encode([*TEXTS, *PAIRS], output_value=None, prompt=prompt, truncate_dim=5)
    expected = peer.encode([*TEXTS, *PAIRS], output_value=None, prompt=prompt, truncate_dim=5)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        length = int(theirs["attention_mask"].sum())  # theirs has the padding of its batch
        for name in ("input_ids", "token_type_ids", "attention_mask", "token_embeddings"):
            assert close(ours[name], theirs[name][:length]), name
        assert close(ours["sentence_embedding"], theirs["sentence_embedding"])
        assert ours.get("prompt_length") == theirs.get("prompt_length")


# Devices and processes


def test_device(tiny):
    assert np.array_equal(tiny.encode(TEXTS, device="cpu"), tiny.encode(TEXTS))
    with pytest.raises(ValueError, match="device='gpu'"):
        tiny.encode(TEXTS, device="gpu")
    with pytest.raises(ValueError, match="device='gpu'"):
        SentenceEncoder.from_pretrained("anything", device="gpu")
    with pytest.raises(ValueError, match="device='meta' holds no numbers"):
        tiny.encode(TEXTS, device="meta")
    with pytest.raises(ValueError, match="give one of pool, processes and several devices"):
        tiny.encode(TEXTS, device=["cpu"], processes=2)
    with pytest.raises(TypeError, match="pool must come from start_multi_process_pool, got dict"):
        tiny.encode(TEXTS, pool={})


def test_a_gpu_is_taken_where_there_is_one(tiny_dir, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        "minibert.embedding.encoder.as_device", lambda device, **_: asked.append(device) or torch.device("cpu")
    )
    SentenceEncoder.from_pretrained(tiny_dir)
    SentenceEncoder.from_pretrained(tiny_dir, device="cpu")
    SentenceEncoder.from_pretrained(tiny_dir, device=1)
    assert asked == ["cuda", "cpu", "cuda:1"]


@pytest.mark.slow
def test_a_pool_of_processes(tiny, close):
    texts = [f"{'very ' * (i % 11)}long {i}" for i in range(40)]
    expected = tiny.encode(texts)
    with tiny.start_multi_process_pool(["cpu", "cpu"]) as pool:
        assert close(tiny.encode(texts, pool=pool, chunk_size=7), expected)
        assert close(tiny.encode_multi_process(texts, pool, prompt="a "), tiny.encode(texts, prompt="a "))
        assert close(tiny.encode([], pool=pool), np.empty((0, 32)))
        everything = tiny.encode(texts[:3], pool=pool, output_value=None)
        assert [item["input_ids"].tolist() for item in everything] == [
            item["input_ids"].tolist() for item in tiny.encode(texts[:3], output_value=None)
        ]
        # int8 has the ranges of all texts, and not of those that one process got
        ours, theirs = (tiny.encode(texts, precision="int8", **how) for how in ({}, {"pool": pool, "chunk_size": 7}))
        assert np.abs(ours.astype(int) - theirs).max() <= 1
        assert [worker._initargs[0] for worker in pool._workers] == [[], []]  # nothing holds the pickled model
    with pytest.raises(RuntimeError):
        tiny.encode(texts, pool=pool)


def test_workers_drop_what_they_were_started_from(tiny, monkeypatch, close):
    from minibert.embedding import workers

    monkeypatch.setattr(workers.signal, "signal", lambda *_: None)
    copies = [pickle.dumps(tiny)]
    workers._start(copies, torch.get_num_threads(), "cpu")
    assert copies == []
    assert close(workers._embed(["Wolves"], tiny.options())[0][0], tiny.encode("Wolves"))
    del workers._encoder


# What it is made of


@pytest.mark.parametrize("fast", [True, False])
def test_copies(tiny_dir, fast):
    encoder = SentenceEncoder.from_pretrained(tiny_dir, fast=fast, prompts={"query": "q: "}, truncate_dim=9)
    for other in (pickle.loads(pickle.dumps(encoder)), copy.deepcopy(encoder)):
        assert np.array_equal(other.encode_query(TEXTS), encoder.encode_query(TEXTS))
        assert type(other.model) is type(encoder.model)
        assert other.plain is not encoder.plain


def test_to(tiny_dir, close):
    for fast in (True, False):
        encoder = SentenceEncoder.from_pretrained(tiny_dir, fast=fast, device="cpu")
        expected = encoder.encode(TEXTS)
        assert encoder.dtype == torch.float32
        assert encoder.to(torch.float64) is encoder
        assert encoder.dtype == torch.float64
        assert encoder.encode(TEXTS, convert_to_tensor=True).dtype == torch.float64
        assert close(encoder.encode(TEXTS), expected)
        assert np.array_equal(encoder.to(device="cpu", dtype=torch.float32).encode(TEXTS), expected)
        assert type(encoder.model).__name__ == ("OptimizedModel" if fast else "BertModel")


def trained(model):
    """By kernels whose changes torch does not count."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.tensor([[1, 2]])).last_hidden_state.square().sum().backward()
    optimizer.step()


def hooked(model):
    model.encoder.layer[0].register_forward_hook(lambda module, inputs, output: output * 2)


def adapted(model):
    layer = model.encoder.layer[0].attention.self
    layer.query = torch.nn.Sequential(layer.query, torch.nn.Linear(32, 32))


@pytest.mark.parametrize("change", [trained, hooked, adapted, torch.nn.Module.double], ids=lambda x: x.__name__)
def test_what_became_of_the_model_is_computed(tiny_dir, change, close):
    torch.manual_seed(0)
    encoder = SentenceEncoder.from_pretrained(tiny_dir, device="cpu")
    before = encoder.encode(TEXTS)
    change(encoder.plain)
    exact = SentenceEncoder(copy.deepcopy(encoder.plain).double(), encoder.tokenizer)
    plain = SentenceEncoder(copy.deepcopy(encoder.plain), encoder.tokenizer)
    found, expected = (each.encode(TEXTS, convert_to_tensor=True) for each in (encoder, plain))
    if change is torch.nn.Module.double:
        torch.testing.assert_close(found, expected)
    else:
        assert_as_exact(found, expected, exact.encode(TEXTS, convert_to_tensor=True))
        assert not close(found, before)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("cast", ["double", "bfloat16", "half", "float", "cpu", "eval"])
def test_casts_by_name(tiny_dir, cast, fast):
    encoder = SentenceEncoder.from_pretrained(tiny_dir, fast=fast, device="cpu")
    peer = sentence_transformers.SentenceTransformer(str(tiny_dir), device="cpu")
    assert getattr(encoder, cast)() is encoder
    vectors, expected = (x.encode(TEXTS, convert_to_tensor=True) for x in (encoder, getattr(peer, cast)()))
    assert vectors.dtype == expected.dtype
    if cast == "double":  # nothing here is more exact, and sums of another order differ in the last places
        torch.testing.assert_close(vectors, expected)
    else:
        exact = sentence_transformers.SentenceTransformer(str(tiny_dir), device="cpu").double()
        assert_as_exact(vectors, expected, exact.encode(TEXTS, convert_to_tensor=True))


def test_tokenize(tiny, peer):
    for texts in (TEXTS, PAIRS, TEXTS[:1]):
        ours, theirs = tiny.tokenize(texts), peer.preprocess(texts)
        for name in ("input_ids", "token_type_ids", "attention_mask"):
            assert torch.equal(ours[name], theirs[name]), name
    assert torch.equal(tiny.preprocess(TEXTS, "query: ")["input_ids"], peer.preprocess(TEXTS, "query: ")["input_ids"])
    with pytest.raises(TypeError, match=r"inputs\[1\]"):
        tiny.tokenize(["a", 3])


def test_prompts_that_do_not_count(tiny, tiny_dir, close):
    peer = sentence_transformers.SentenceTransformer(str(tiny_dir), device="cpu")
    counted = tiny.encode(TEXTS, prompt="query: ")
    for encoder in (tiny, peer):
        encoder.set_pooling_include_prompt(False)
    assert close(tiny.encode(TEXTS, prompt="query: "), peer.encode(TEXTS, prompt="query: "))
    assert not close(tiny.encode(TEXTS, prompt="query: "), counted)


def test_arguments_of_sentence_transformers_constructor(tiny_dir, tmp_path):
    expected = SentenceEncoder.from_pretrained(tiny_dir, device="cpu", dtype=torch.float64)
    encoder = SentenceEncoder.from_pretrained(
        tiny_dir, device="cpu", cache_folder=tmp_path, trust_remote_code=True, use_auth_token=False, backend="torch",
        model_kwargs={"torch_dtype": "float64", "attn_implementation": "eager", "use_safetensors": True},
        processor_kwargs=None, config_kwargs={},
    )  # fmt: skip
    assert encoder.dtype == torch.float64
    assert np.array_equal(encoder.encode(TEXTS), expected.encode(TEXTS))
    encoder.save_pretrained(tmp_path / "saved", model_name="a", create_model_card=False, safe_serialization=True)
    assert encoder.get_max_seq_length() == SentenceEncoder.from_pretrained(tmp_path / "saved").max_seq_length
    for name, value, error in (
        ("backend", "onnx", ValueError),
        ("modules", [], TypeError),
        ("processor_kwargs", {"model_max_length": 8}, TypeError),
        ("model_kwargs", {"load_in_8bit": True}, ValueError),
        ("model_kwargs", {"nonsense": 1}, TypeError),
        ("model_kwargs", {"attn_implementation": "flash"}, ValueError),
    ):
        with pytest.raises(error, match=next(iter(value)) if name == "model_kwargs" else name):
            SentenceEncoder.from_pretrained(tiny_dir, **{name: value})
    with pytest.raises(TypeError, match="nonsense"):
        encoder.save_pretrained(tmp_path / "saved", nonsense=1)
    for cls in (SentenceEncoder, BertModel, BertConfig):
        with pytest.raises(ValueError, match="token and use_auth_token") as told:
            cls.from_pretrained(tiny_dir, token="hf_first", use_auth_token="hf_second")
        assert "hf_" not in str(told.value)  # no secret in a log
        cls.from_pretrained(tiny_dir, token="hf_first", use_auth_token="hf_first")


def test_the_cache_that_the_environment_names(tiny, tiny_dir, tmp_path, monkeypatch):
    place = tmp_path / "home" / "models--me--tiny"
    shutil.copytree(tiny_dir, place / "snapshots" / ("0" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path / "home"))
    encoder = SentenceEncoder.from_pretrained("me/tiny", local_files_only=True, device="cpu")
    assert np.array_equal(encoder.encode(TEXTS), tiny.encode(TEXTS))
    for name in ("cache_dir", "cache_folder"):
        with pytest.raises(FileNotFoundError, match="me/tiny"):
            SentenceEncoder.from_pretrained("me/tiny", local_files_only=True, **{name: tmp_path})
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", "")
    with pytest.raises(FileNotFoundError, match="me/tiny"):
        SentenceEncoder.from_pretrained("me/tiny", local_files_only=True)


def test_what_optimize_refuses_is_computed_plainly_with_a_notice(tiny_dir, monkeypatch, caplog):
    def refuse(model, dtype=None):
        raise TypeError("encoder.layer.0.attention.self.query is a Linear with hooks")

    monkeypatch.setattr(base, "optimize", refuse)
    with caplog.at_level(logging.WARNING, "minibert"):
        encoder = SentenceEncoder.from_pretrained(tiny_dir)
    assert type(encoder.model) is BertModel
    (record,) = caplog.records
    assert "plain model: encoder.layer.0.attention.self.query" in record.getMessage()
    assert encoder.encode(TEXTS).shape == (4, 32)


def test_settings_are_checked_when_they_are_set(tiny):
    for name, wrong in [
        ("similarity_fn_name", "maxsim"),
        ("truncate_dim", 0),
        ("truncate_dim", "8"),
        ("default_prompt_name", "nobody"),
        ("max_seq_length", 2),
        ("max_seq_length", 65),
    ]:
        before = getattr(tiny, name)
        with pytest.raises(ValueError, match=name):
            setattr(tiny, name, wrong)
        assert getattr(tiny, name) == before
    with pytest.raises(TypeError, match=r"prompts\['query'\] must be a str, got int 3"):
        tiny.prompts = {"query": 3}
    tiny.similarity_fn_name = sentence_transformers.SimilarityFunction.DOT_PRODUCT
    assert tiny.similarity_fn_name == "dot"
    with tiny.truncate_embeddings(3):
        assert tiny.get_embedding_dimension() == tiny.encode("a").shape[0] == 3
    assert tiny.truncate_dim is None


def test_prompts_that_are_not_there(tiny):
    tiny.prompts = {"other": "o: "}
    assert np.array_equal(tiny.encode_document(TEXTS), tiny.encode(TEXTS))
    assert np.array_equal(tiny.encode_query(TEXTS), tiny.encode(TEXTS))
    tiny.default_prompt_name = "other"
    assert np.array_equal(tiny.encode_document(TEXTS), tiny.encode(TEXTS, prompt="o: "))
    tiny.prompts["query"] = 5  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"prompts\['query'\] must be a str, got int 5"):
        tiny.encode_query(TEXTS)
    tiny.prompts = {"corpus": "c: ", "passage": "p: "}
    assert np.array_equal(tiny.encode_document(TEXTS), tiny.encode(TEXTS, prompt="p: "))


def test_a_prompt_and_its_name(tiny, caplog):
    assert np.array_equal(tiny.encode(TEXTS, prompt="x ", prompt_name="query"), tiny.encode(TEXTS, prompt="x "))
    assert "prompt and prompt_name are both given: 'query' is not used" in caplog.text


def test_a_tokenizers_own_call_is_used(tiny, tiny_dir):
    class Shouting(BertTokenizer):
        def __call__(self, text, *args, **options):
            return super().__call__([each.upper() for each in text], *args, **options)

    own = SentenceEncoder(tiny.model, Shouting.from_pretrained(tiny_dir))
    assert np.array_equal(own.encode("a wolf"), tiny.encode("A WOLF"))
    assert not np.array_equal(own.encode("a wolf"), tiny.encode("a wolf"))


def test_left_truncation_with_a_prompt_keeps_the_end(tiny_dir, peer, close):
    """The text is behind the prompt: characters that it needs are not taken off the text's end."""
    encoder = SentenceEncoder.from_pretrained(tiny_dir)
    encoder.tokenizer.truncation_side = "left"
    text = "the very last word is wolves"
    assert close(encoder.encode(text, prompt="A long prompt: "), encoder.encode("A long prompt: " + text))
    theirs = copy.deepcopy(peer)
    theirs.tokenizer.truncation_side = "left"
    long = " ".join(f"word{i}" for i in range(60))
    assert close(encoder.encode([long], prompt="Say: "), theirs.encode([long], prompt="Say: "))


MODULES = {
    **{mode: (mode, []) for mode in MODES},
    "joined in order": (["cls", "mean"], []),
    "joined in another order": (["mean", "cls"], []),
    "without the prompt": (Pooling("mean", include_prompt=False), []),
    "dense": ("mean", [Dense(32, 8, True, torch.nn.Tanh(), False), Normalize()]),
    "residual": ("cls", [Dense(32, 16, False, torch.nn.Identity(), True)]),
}


@pytest.mark.parametrize("name", MODULES)
def test_saved_encoders_are_opened_by_both(name, tiny_dir, tmp_path, tiny):
    pooling, after = MODULES[name]
    pooling = pooling if isinstance(pooling, Pooling) else Pooling(pooling)
    encoder = SentenceEncoder(
        tiny.model, tiny.tokenizer, pooling, after, max_seq_length=11, prompts={"query": "q: ", "document": None},
        default_prompt_name="query", similarity_fn_name="dot", truncate_dim=7,
    )  # fmt: skip
    encoder.save_pretrained(tmp_path / "saved")
    again = SentenceEncoder.from_pretrained(tmp_path / "saved")
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    exact = copy.deepcopy(theirs).double().encode(TEXTS, convert_to_tensor=True)
    for other in (again, theirs):
        # Eight times: there are few numbers
        assert_as_exact(*(torch.from_numpy(x.encode(TEXTS)) for x in (encoder, other)), exact, factor=8)
        assert other.prompts == encoder.prompts
        assert (other.similarity_fn_name, other.default_prompt_name, other.max_seq_length) == ("dot", "query", 11)
        assert other.get_embedding_dimension() == 7
    encoder.save(tmp_path / "saved")  # over itself
    over_itself = torch.from_numpy(SentenceEncoder.from_pretrained(tmp_path / "saved").encode(TEXTS))
    assert_as_exact(over_itself, torch.from_numpy(theirs.encode(TEXTS)), exact, factor=8)


def test_other_modules_cannot_be_saved(tiny, tmp_path):
    encoder = SentenceEncoder(tiny.model, tiny.tokenizer, "mean", [torch.nn.ReLU()])
    with pytest.raises(TypeError, match="ReLU cannot be saved"):
        encoder.save_pretrained(tmp_path / "saved")
    for activation in (torch.nn.ELU(0.5), torch.nn.Hardtanh(), torch.nn.Sequential(torch.nn.Tanh())):
        encoder = SentenceEncoder(tiny.model, tiny.tokenizer, "mean", [Dense(32, 8, True, activation, False)])
        with pytest.raises(TypeError, match="Dense with the activation .* cannot be saved"):
            encoder.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    dense = Dense(32, 8, True, torch.nn.ReLU(inplace=True), False)
    encoder = SentenceEncoder(tiny.model, tiny.tokenizer, "mean", [dense])
    encoder.save_pretrained(tmp_path / "saved")
    assert type(SentenceEncoder.from_pretrained(tmp_path / "saved").after[0].activation) is torch.nn.ReLU


def test_settings_instead_of_those_in_the_files(tiny, tiny_dir, tmp_path):
    tiny.prompts = {"query": "q: ", "passage": "p: "}
    tiny.save_pretrained(tmp_path)
    encoder = SentenceEncoder.from_pretrained(
        tmp_path, prompts={"query": "Q: "}, default_prompt_name="passage", similarity_fn_name="dot", truncate_dim=4
    )
    assert encoder.prompts == {"query": "Q: ", "passage": "p: ", "document": ""}
    assert (encoder.default_prompt_name, encoder.similarity_fn_name, encoder.truncate_dim) == ("passage", "dot", 4)
    with pytest.raises(ValueError, match="default_prompt_name='nobody': the model has the prompts 'query'"):
        SentenceEncoder.from_pretrained(tiny_dir, default_prompt_name="nobody")
    given: Any = {"query": None, "passage": ""}  # None leaves what the files say, an empty text does not
    peer = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu", prompts=dict(given))
    assert SentenceEncoder.from_pretrained(tmp_path, prompts=given).prompts == peer.prompts
    assert peer.prompts == {"query": "q: ", "passage": "", "document": ""}
    with pytest.raises(TypeError, match="prompts must be a dict"):
        SentenceEncoder.from_pretrained(tmp_path, prompts=["query"])  # type: ignore[arg-type]


# Comparing


def test_similarity_of_whatever_comes(tiny):
    array = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    frozen = array.copy()
    frozen.flags.writeable = False
    others = [array.astype(kind) for kind in (np.float64, ">f4", np.longdouble)]
    others += [torch.from_numpy(array), array.tolist(), list(array), np.asfortranarray(array)]
    others += [array[::-1].copy()[::-1]]  # backwards in memory
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("cosine", "dot", "euclidean", "manhattan"):
            tiny.similarity_fn_name = name
            expected, exact = (tiny.similarity(x, x) for x in (array, array.astype(np.float64)))
            pairs, turned = array[::-1].copy(), exact.flip(1).diagonal()
            assert_as_exact(tiny.similarity_pairwise(array, pairs), expected.flip(1).diagonal(), turned, factor=8)
            for other in (frozen, *others):
                assert_as_exact(tiny.similarity(array, other), expected, exact)
                assert_as_exact(tiny.similarity(other, array), expected, exact)
                assert tiny.similarity_pairwise(other, array).shape == (3,)
            for half in (torch.float16, torch.bfloat16):  # computed in float32, from what the halves are
                rounded = torch.from_numpy(array).to(half)
                exact = tiny.similarity(rounded.double(), array.astype(np.float64))
                assert_as_exact(tiny.similarity(rounded, array), tiny.similarity(rounded.float(), array), exact)
            quantized = (array * 40).astype(np.int8)
            assert tiny.similarity(quantized, quantized).shape == (3, 3)
    for wrong in (None, ["a"], array.astype(object), array.astype(np.complex64)):
        with pytest.raises(TypeError, match="embeddings2 must be vectors of (real )?numbers, got"):
            tiny.similarity(array, wrong)
    with pytest.raises(ValueError, match="vectors of 32 numbers cannot be compared with vectors of 5"):
        tiny.similarity(array, array[:, :5])
    with pytest.raises(ValueError, match="embeddings1 are 3 vectors and embeddings2 2"):
        tiny.similarity_pairwise(array, array[:2])


@pytest.mark.parametrize("chunk", [1, 4, 500_000])
def test_semantic_search(chunk):
    generator = np.random.default_rng(0)
    queries, corpus = (
        generator.normal(size=(5, 8)).astype(np.float32),
        generator.normal(size=(11, 8)).astype(np.float32),
    )
    options = {"top_k": 3, "corpus_chunk_size": chunk, "query_chunk_size": 2}
    found = semantic_search(queries, corpus, **options)
    theirs, exact = (
        reference_search(torch.tensor(queries, dtype=dtype), torch.tensor(corpus, dtype=dtype), **options)
        for dtype in (torch.float32, torch.float64)
    )
    ids = [[[hit["corpus_id"] for hit in hits] for hits in result] for result in (found, theirs, exact)]
    assert ids[0] == ids[1] == ids[2]
    assert_as_exact(
        *(torch.tensor([[hit["score"] for hit in hits] for hits in result]) for result in (found, theirs)),
        torch.tensor([[hit["score"] for hit in hits] for hits in exact], dtype=torch.float64),
    )
    assert semantic_search(queries[0], corpus, **options) == [found[0]]
    assert [len(hits) for hits in semantic_search(queries, corpus, top_k=50)] == [11] * 5
    assert semantic_search(queries, corpus[:0]) == [[]] * 5
    best = semantic_search(queries, corpus, top_k=1, score_function="dot")
    assert [hits[0]["corpus_id"] for hits in best] == (queries @ corpus.T).argmax(1).tolist()
    assert semantic_search(queries, corpus, top_k=1, score_function=lambda a, b: a @ b.T) == best
    with pytest.raises(ValueError, match="top_k"):
        semantic_search(queries, corpus, top_k=0)


def test_an_optimized_model_can_be_given(tiny, tiny_dir, close):
    plain = BertModel.from_pretrained(tiny_dir)
    encoder = SentenceEncoder(optimize(plain), tiny.tokenizer)
    assert encoder.plain is encoder.transformers_model is plain
    assert encoder.config is plain.config
    assert close(encoder.encode(TEXTS), tiny.encode(TEXTS))
