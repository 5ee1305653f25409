"""SentenceEncoder: the numbers of sentence-transformers, its files, streams, processes, wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import sentence_transformers
import torch
import transformers
from reference import assert_as_exact
from safetensors.torch import save_file

import minibert
from minibert import SentenceEncoder
from minibert.embedding import texts as texts_module
from minibert.embedding.modules import MODES, Pooling
from minibert.embedding.tokens import tokenize

TEXTS = [
    "The bank is closed today.",
    "She sat on the bank of the river and watched the boats go by, one after another, until it was dark.",
    "",
    "Café naïve 東京 🙂",
    "Wolves",
    " and a tab\tand\nlines ",
]
PACKAGE = "sentence_transformers.models"


def largest(a, b) -> float:
    a, b = (np.asarray(x) for x in (a, b))
    assert a.shape == b.shape
    return float(np.abs(a - b).max())


def in_float64(directory, texts, **options) -> torch.Tensor:
    """What sentence-transformers computes in float64: how far both sides may be off is measured by it."""
    peer = sentence_transformers.SentenceTransformer(str(directory), device="cpu").double()
    return peer.encode(texts, convert_to_tensor=True, **options)


def as_exact(ours, theirs, exact) -> None:
    """Two orders of the same sums: see `assert_as_exact`. Eight times, as one vector has few numbers to be off by."""
    ours, theirs = (torch.as_tensor(np.asarray(x)) for x in (ours, theirs))
    assert ours.shape == theirs.shape == exact.shape
    assert_as_exact(ours, theirs, exact, factor=8)


@pytest.fixture(scope="module")
def minilm(minilm_dir) -> SentenceEncoder:
    return SentenceEncoder.from_pretrained(minilm_dir)


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def repository(tiny_dir: Path, directory: Path, modules: dict[str, dict], where: str = "", /, **files: dict) -> Path:
    """A sentence-transformers repository around the tiny BERT: modules by class with their configs, in order."""
    for source in tiny_dir.iterdir():
        (directory / where).mkdir(parents=True, exist_ok=True)
        (directory / where / source.name).write_bytes(source.read_bytes())
    listed = [{"idx": 0, "name": "0", "path": where, "type": f"{PACKAGE}.Transformer"}]
    for number, (kind, config) in enumerate(modules.items(), 1):
        path = f"{number}_{kind}"
        listed.append(
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        )
        write(directory / path / "config.json", config)
        if kind == "Dense":
            torch.manual_seed(number)
            tensors = {"linear.weight": torch.randn(config["out_features"], config["in_features"])}
            tensors |= {"linear.bias": torch.randn(config["out_features"])} if config.get("bias", True) else {}
            if config.get("use_residual") and config["out_features"] != config["in_features"]:
                tensors["residual.weight"] = torch.randn(config["out_features"], config["in_features"])
            save_file(tensors, directory / path / "model.safetensors")
    write(directory / "modules.json", listed)
    for name, content in files.items():
        write(directory / where / f"{name}.json", content)
    return directory


# The numbers


def test_as_written_out_with_transformers(minilm, minilm_dir):
    model = transformers.AutoModel.from_pretrained(minilm_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_dir)
    expected = []
    for text in TEXTS:
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            expected.append(torch.nn.functional.normalize(model(**inputs).last_hidden_state[0].mean(0), dim=0).numpy())
    exact = in_float64(minilm_dir, TEXTS)
    as_exact(minilm.encode(TEXTS), expected, exact)
    slow = SentenceEncoder.from_pretrained(minilm_dir, fast=False)
    assert isinstance(slow.model, minibert.BertModel)
    as_exact(slow.encode(TEXTS), expected, exact)


@pytest.mark.slow
def test_equal_to_sentence_transformers_on_1000_sentences(minilm, minilm_dir, english):
    peer = sentence_transformers.SentenceTransformer(str(minilm_dir), device="cpu")
    sentences = english[::2][:1000]
    as_exact(minilm.encode(sentences), peer.encode(sentences), in_float64(minilm_dir, sentences))


OLD = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False}
DENSE = {"in_features": 32, "out_features": 8, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}
REPOSITORIES = {
    **{mode: ({"Pooling": {"embedding_dimension": 32, "pooling_mode": mode}}, {}) for mode in MODES},
    "max of old": ({"Pooling": {**OLD, "pooling_mode_max_tokens": True}}, {}),
    "cls and mean of old": ({"Pooling": {**OLD, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}}, {}),
    "none of old": ({"Pooling": OLD}, {}),
    "dense": ({"Pooling": {"embedding_dimension": 32}, "Dense": DENSE, "Normalize": {}}, {}),
    "residual": (
        {"Pooling": {"embedding_dimension": 32, "pooling_mode": "cls"},
         "Dense": {**DENSE, "bias": False, "activation_function": "torch.nn.modules.linear.Identity",
                   "use_residual": True}},
        {},
    ),
    "length limit and lower case": (
        {"Pooling": {"embedding_dimension": 32}},
        {"sentence_bert_config": {"max_seq_length": 7, "do_lower_case": True}},
    ),
    "default prompt": (
        {"Pooling": {"embedding_dimension": 32}},
        {"config_sentence_transformers": {"prompts": {"passage": "This says: "}, "default_prompt_name": "passage"}},
    ),
    "prompt left out": (
        {"Pooling": {"embedding_dimension": 32, "include_prompt": False}},
        {"config_sentence_transformers": {"prompts": {"query": "What is"}, "default_prompt_name": "query"}},
    ),
    "fewer numbers": (
        {"Pooling": {"embedding_dimension": 32}, "Normalize": {}},
        {"config_sentence_transformers": {"truncate_dim": 12, "similarity_fn_name": "dot"}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("name", REPOSITORIES)
def test_repositories_as_sentence_transformers_reads_them(name, fast, tiny_dir, tmp_path):
    peers = sentence_transformers
    modules, files = REPOSITORIES[name]
    directory = repository(tiny_dir, tmp_path, modules, **files)
    ours, theirs = SentenceEncoder.from_pretrained(directory, fast=fast), peers.SentenceTransformer(str(directory))
    expected = theirs.encode(TEXTS)
    as_exact(ours.encode(TEXTS), expected, in_float64(directory, TEXTS))
    assert ours.get_embedding_dimension() == theirs.get_embedding_dimension() == expected.shape[1]
    assert ours.max_seq_length == theirs.max_seq_length
    assert ours.similarity_fn_name == theirs.similarity_fn_name
    exact = peers.SentenceTransformer(str(directory), device="cpu").double()
    for task in ("encode_query", "encode_document"):
        found, expected = (getattr(encoder, task)(TEXTS) for encoder in (ours, theirs))
        as_exact(found, expected, getattr(exact, task)(TEXTS, convert_to_tensor=True))


def test_the_encoder_may_lie_in_a_folder(tiny_dir, tmp_path, tiny):
    """As in repositories of 2019."""
    old = {**OLD, "pooling_mode_mean_tokens": True}
    directory = repository(tiny_dir, tmp_path, {"Pooling": old}, "0_BERT", sentence_bert_config={"max_seq_length": 9})
    encoder = SentenceEncoder.from_pretrained(directory)
    assert encoder.max_seq_length == 9
    as_exact(encoder.encode("Wolves"), tiny.encode("Wolves"), in_float64(tiny_dir, "Wolves"))


def test_a_bare_encoder_gets_mean_pooling(tiny, tiny_dir):
    ids, mask = tiny.tokenizer(TEXTS[1], return_tensors="pt")["input_ids"], None
    model = minibert.BertModel.from_pretrained(tiny_dir)
    mean = model(ids, mask).last_hidden_state[0].mean(0).detach()
    as_exact(tiny.encode(TEXTS[1]), mean, in_float64(tiny_dir, TEXTS[1]))
    assert "Pooling(mean)" in repr(tiny)


def test_from_a_model_in_memory(tiny, tiny_dir):
    model = minibert.BertModel.from_pretrained(tiny_dir)
    encoder = SentenceEncoder(minibert.optimize(model), tiny.tokenizer, "mean", prompts={"query": "find: "})
    as_exact(encoder.encode("Wolves"), tiny.encode("Wolves"), in_float64(tiny_dir, "Wolves"))
    as_exact(encoder.encode_query("Wolves"), tiny.encode("find: Wolves"), in_float64(tiny_dir, "find: Wolves"))
    with pytest.raises(TypeError, match="model must be a BertModel"):
        SentenceEncoder(minibert.BertForMaskedLM(model.config), tiny.tokenizer)


@pytest.mark.parametrize(
    ("modules", "files", "message"),
    [
        ({"Pooling": {}, "LSTM": {}}, {}, "modules Transformer, Pooling, LSTM: supported"),
        ({"WordWeights": {}}, {}, "WordWeights"),
        ({"Pooling": {"pooling_mode": "median"}}, {}, "pooling mode 'median'"),
        ({"Pooling": {"embedding_dimension": 768}}, {}, "768 numbers, the encoder gives 32"),
        ({"Pooling": {}, "Dense": {**DENSE, "activation_function": "mine.Act"}}, {}, "activation mine.Act"),
        ({"Pooling": {}, "Normalize": {"module_input_name": "token_embeddings"}}, {}, "token_embeddings"),
        ({"Pooling": {}}, {"config_sentence_transformers": {"model_type": "SparseEncoder"}}, "SparseEncoder"),
        ({"Pooling": {}}, {"config_sentence_transformers": {"default_prompt_name": "x"}}, "prompt_name='x'"),
        ({"Pooling": {}}, {"config_sentence_transformers": {"similarity_fn_name": "maxsim"}}, "maxsim"),
        ({"Pooling": {}}, {"sentence_bert_config": {"transformer_task": "fill-mask"}}, "fill-mask"),
        ({"Pooling": {}}, {"sentence_bert_config": {"max_seq_length": 65}}, "from 3 to 64, got 65"),
        ({"Pooling": {}}, {"modules": {"not": "a list"}}, "must hold a JSON list"),
        ({"Pooling": {}}, {"modules": [{"idx": 0}]}, "no list of modules"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(modules, files, message, tiny_dir, tmp_path):
    with pytest.raises(ValueError, match=message):
        SentenceEncoder.from_pretrained(repository(tiny_dir, tmp_path, modules, **files))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 7, 12, 100])
def test_no_mask_is_a_mask_of_ones_to_the_bit(length, dtype):
    states, ones = torch.randn(3, length, 384, dtype=dtype), torch.ones(3, length, dtype=torch.long)
    for mode in MODES:
        for include_prompt in (True, False):
            pooling = Pooling(mode, include_prompt)
            prompt = 0 if length == 1 else 1
            assert torch.equal(pooling(states, None, prompt), pooling(states, ones, prompt))


def test_half_precision_pooling_sums_exactly():
    states = torch.full((1, 4096, 2), 1.001, dtype=torch.bfloat16)
    pooled = Pooling("mean")(states, torch.ones(1, 4096))
    assert torch.equal(pooled, states[:, 0])


# Encoding


def test_one_text_is_one_vector_and_none_is_no_rows(tiny):
    assert tiny.encode("Wolves").shape == (32,)
    assert tiny.encode([]).shape == (0, 32)
    assert tiny.encode(["Wolves"]).shape == (1, 32)
    assert tiny.encode(np.array(["Wolves", "Bears"])).dtype == np.float32


def test_results_stand_in_the_order_of_the_texts(tiny, tiny_dir):
    texts = [f"{'very ' * (i * 7 % 23)}long {i}" for i in range(1200)]
    together, exact = tiny.encode(texts), in_float64(tiny_dir, texts)
    picked = [0, 1, 511, 512, 1199]
    as_exact([tiny.encode(texts[i]) for i in picked], together[picked], exact[picked])
    assert largest(tiny.encode(iter(texts)), together) == 0
    as_exact(tiny.encode(texts, batch_size=3), together, exact)


def test_options(tiny):
    normalized = tiny.encode(TEXTS, normalize=True)
    lengths = np.linalg.norm(normalized.astype(np.float64), axis=1)
    assert np.abs(lengths - 1).max() <= 32 * np.finfo(np.float32).eps  # a sum of 32 squares
    assert largest(normalized, tiny.encode(TEXTS, normalize_embeddings=True)) == 0
    assert tiny.encode(TEXTS, truncate_dim=5).shape == (6, 5)
    tensor = tiny.encode(TEXTS, convert_to="torch")
    assert isinstance(tensor, torch.Tensor)
    assert torch.equal(tensor, tiny.encode(TEXTS, convert_to_tensor=True))
    assert not tensor.is_inference()  # may take part in training
    assert largest(tiny.encode("x", prompt="a "), tiny.encode("a x")) == 0
    for option in ({"convert_to": "tuple"}, {"batch_size": 0}, {"truncate_dim": -1}, {"processes": 0},
                   {"prompt_name": "nobody"}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(option))):
            tiny.encode(TEXTS, **option)


def test_progress_bar(tiny, capsys):
    tiny.encode(TEXTS, show_progress_bar=True)
    assert "6/6" in capsys.readouterr().err
    tiny.encode(TEXTS)
    assert not capsys.readouterr().err


def test_half_precision_weights_compute_in_float32_on_cpu(tiny, tiny_dir, tmp_path):
    repository(tiny_dir, tmp_path, {"Pooling": {}})
    minibert.BertModel.from_pretrained(tiny_dir, dtype="bfloat16").save_pretrained(tmp_path)
    encoder = SentenceEncoder.from_pretrained(tmp_path)
    assert encoder.encode("Wolves", convert_to="torch").dtype == torch.float32
    assert SentenceEncoder.from_pretrained(tmp_path, fast=False).encode("Wolves").dtype == np.float32


def test_similarity(tiny):
    peers = sentence_transformers
    a, b = np.random.default_rng(0).normal(size=(2, 4, 32)).astype(np.float32)
    for name in ("cosine", "dot", "euclidean", "manhattan"):
        function = peers.SimilarityFunction
        encoder = SentenceEncoder(tiny.model, tiny.tokenizer, similarity_fn_name=name)
        each, pairs = function.to_similarity_fn(name), function.to_similarity_pairwise_fn(name)
        exact = a.astype(np.float64), b.astype(np.float64)
        as_exact(encoder.similarity(a, b[:3]), each(a, b[:3]), each(exact[0], exact[1][:3]))
        as_exact(encoder.similarity_pairwise(a, b), pairs(a, b), pairs(*exact))
    assert tiny.similarity(a[0], torch.tensor(b)).shape == (1, 4)
    with pytest.raises(ValueError, match="embeddings2 must be one vector or several"):
        tiny.similarity(a, a[None])


# Long and wrong texts


def ids_and_cut(encoder, texts):
    tokens = tokenize(encoder.tokenizer, texts, "", encoder.max_seq_length)
    return tokens.ids, tokens.cut


def test_long_texts_are_cut_as_if_tokenized_whole(minilm):
    long = [("word " * 50_000), "x" * 100_000, ". " * 9000, "[MASK]" * 2000, "  " * 20_000 + "late", "a-b" * 5000]
    rows, cut = ids_and_cut(minilm, [*long, "short"])
    whole = minilm.tokenizer([*long, "short"], truncation=True, max_length=256)["input_ids"]
    assert rows == whole
    assert cut == 4
    minilm.tokenizer.truncation_side = "left"
    try:
        expected = minilm.tokenizer(long, truncation=True, max_length=256)["input_ids"]
        assert ids_and_cut(minilm, long)[0] == expected
    finally:
        minilm.tokenizer.truncation_side = "right"


def test_ten_megabytes_cost_no_more_than_their_beginning(minilm, minilm_dir):
    text = "The quick brown fox. " * 500_000
    as_exact(minilm.encode(text), minilm.encode(text[:3000]), in_float64(minilm_dir, text[:3000]))


WRONG = [(None, TypeError, "got None"), (7, TypeError, "got int 7"), (b"bytes", TypeError, "got bytes"),
         (["nested"], TypeError, "got list"), ("a\ud800b", ValueError, "lone surrogate .* at character 1")]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG)
def test_wrong_items_are_named_before_anything_is_computed(wrong, error, message, tiny, monkeypatch):
    monkeypatch.setattr(tiny, "embed", lambda *_: pytest.fail("computed"))
    with pytest.raises(error, match=rf"texts\[2\] (must be a str, )?.*{message}"):
        tiny.encode(["a", "b", wrong, "c"])


@pytest.mark.parametrize("wrong", [None, 3, b"bytes", {"a": "b"}])
def test_wrong_arguments(wrong, tiny):
    with pytest.raises(TypeError, match="texts must be a str or an iterable of str"):
        tiny.encode(wrong)


@pytest.mark.parametrize("failure", [None, KeyboardInterrupt(), OSError("disk")])
def test_what_was_computed_is_not_lost(failure, tiny, tiny_dir):
    def texts():
        yield from ["Wolves"] * 700
        if failure is not None:
            raise failure
        yield None

    with pytest.raises(TypeError if failure is None else type(failure)) as caught:
        tiny.encode(texts())
    rows = caught.value.embeddings
    assert rows.shape == (512 if isinstance(failure, KeyboardInterrupt) else 700, 32)
    as_exact(rows[-1], tiny.encode("Wolves"), in_float64(tiny_dir, "Wolves"))
    stream, count = tiny.encode_stream(texts()), 0
    with pytest.raises(BaseException):  # noqa: B017
        for part in stream:
            count += len(part)
    assert count == len(rows)


def test_streams_read_no_more_than_a_chunk_ahead(tiny, monkeypatch):
    taken = 0

    def texts():
        nonlocal taken
        for taken in range(1, 2001):  # noqa: B007
            yield "Wolves"

    done = 0
    for part in tiny.encode_stream(texts(), chunk_size=64):
        done += len(part)
        assert taken - done <= 0
    assert done == 2000
    monkeypatch.setattr(texts_module, "CHUNK_CHARACTERS", 100)
    assert [len(part) for part in tiny.encode_stream(["x" * 60] * 5)] == [2, 2, 1]


@pytest.mark.slow
def test_processes(tiny, tiny_dir):
    texts = [f"{'very ' * (i % 11)}long {i}" for i in range(1300)]
    as_exact(tiny.encode(iter(texts), processes=2), tiny.encode(texts), in_float64(tiny_dir, texts))

    def failing():
        yield from texts
        yield 5

    with pytest.raises(TypeError, match=r"texts\[1300\] must be a str, got int 5") as caught:
        tiny.encode(failing(), processes=2)
    assert len(caught.value.embeddings) == 1300


@pytest.mark.slow
def test_a_failing_process_is_told_with_its_texts(tiny, tiny_dir):
    encoder = SentenceEncoder.from_pretrained(tiny_dir)
    encoder.pooling = Failing()
    with pytest.raises(RuntimeError, match=r"texts\[0\] to texts\[1\]: OSError: no pooling today"):
        encoder.encode(["a", "b"], processes=1)
    encoder.pooling = Dying()
    with pytest.raises(RuntimeError, match=r"texts\[0\] to texts\[1\]: a process ended"):
        encoder.encode(["a", "b"], processes=1)


class Failing(Pooling):
    def forward(self, *_):
        raise OSError("no pooling today")


class Dying(Pooling):
    def forward(self, *_):
        import os

        os._exit(1)
