"""What each step of BERT is called elsewhere: its equation, its shapes in letters, its place in the papers and in
Google's TensorFlow code (google-research/bert, modeling.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

PAPERS = {
    "BERT": "Devlin et al. 2019, arXiv 1810.04805",
    "Transformer": "Vaswani et al. 2017, arXiv 1706.03762",
    "LayerNorm": "Ba et al. 2016, arXiv 1607.06450",
    "GELU": "Hendrycks and Gimpel 2016, arXiv 1606.08415",
}


class Kind(NamedTuple):
    """One kind of step; `enters` and `leaves` are shapes in the letters of model.py (L labels, N tokens picked)."""

    equation: str
    enters: str
    leaves: str
    paper: str  # a name in PAPERS and its section
    google: str  # the function of Google's code that computes it


# The end of a step's name; equation; shape that enters; shape that leaves; paper and section; Google's function
_TABLE = r"""
embeddings.word_embeddings;        E_word[id];                B T;      B T D;    BERT 3, figure 2;     embedding_lookup
embeddings.token_type_embeddings;  E_segment[0 or 1];         B T;      B T D;    BERT 3, figure 2;     embedding_postprocessor
embeddings.words_and_segments;     word + segment;            B T D;    B T D;    BERT 3, figure 2;     embedding_postprocessor
embeddings.position_embeddings;    E_position[0 ... T-1];     B T;      B T D;    BERT 3, figure 2;     embedding_postprocessor
embeddings.sum;                    word + segment + position; B T D;    B T D;    BERT 3, figure 2;     embedding_postprocessor
embeddings.LayerNorm;              NORM;                      B T D;    B T D;    LayerNorm 3;          layer_norm_and_dropout
self.query;                        Q = x W_Q^T + b_Q;         B T D;    B T D;    Transformer 3.2.2;    attention_layer
self.key;                          K = x W_K^T + b_K;         B T D;    B T D;    Transformer 3.2.2;    attention_layer
self.value;                        V = x W_V^T + b_V;         B T D;    B T D;    Transformer 3.2.2;    attention_layer
self.scores;                       Q K^T / sqrt(K) + mask;    B H T K;  B H T T;  Transformer 3.2.1;    attention_layer
self.weights;                      softmax(scores);           B H T T;  B H T T;  Transformer 3.2.1;    attention_layer
self.context;                      weights V;                 B H T T;  B H T K;  Transformer 3.2.1;    attention_layer
attention.output.dense;            concat(heads) W_O^T + b_O; B T D;    B T D;    Transformer 3.2.2;    transformer_model
output.residual;                   dense + x;                 B T D;    B T D;    Transformer 3.1;      transformer_model
output.LayerNorm;                  NORM;                      B T D;    B T D;    Transformer 3.1;      layer_norm
intermediate.dense;                x W_1^T + b_1;             B T D;    B T F;    Transformer 3.3;      transformer_model
intermediate.intermediate_act_fn;  ACT(x);                    B T F;    B T F;    GELU 2;               gelu
output.dense;                      x W_2^T + b_2;             B T F;    B T D;    Transformer 3.3;      transformer_model
pooler.dense;                      x_[CLS] W^T + b;           B D;      B D;      BERT 3.1, task 2;     BertModel
pooler.activation;                 tanh(x);                   B D;      B D;      BERT 3.1, task 2;     BertModel
transform.dense;                   x W^T + b;                 B T D;    B T D;    BERT 3.1, task 1;     get_masked_lm_output
transform.transform_act_fn;        ACT(x);                    B T D;    B T D;    GELU 2;               get_masked_lm_output
transform.LayerNorm;               NORM;                      B T D;    B T D;    BERT 3.1, task 1;     get_masked_lm_output
predictions.decoder;               x E_word^T + b;            B T D;    B T V;    BERT 3.1, task 1;     get_masked_lm_output
seq_relationship;                  x W^T + b;                 B D;      B 2;      BERT 3.1, task 2;     get_next_sentence_output
classifier;                        x W^T + b;                 B D;      B L;      BERT 4;               create_model
qa_outputs;                        x W^T + b;                 B T D;    B T 2;    BERT 4.2;             create_model
cross_entropy;                     mean -log softmax(x)[label]; ;       ;         BERT A.2;             get_masked_lm_output
mse_loss;                          mean (x - target)^2;       ;         ;         BERT 4.1;             create_model
binary_cross_entropy_with_logits;  mean -log sigmoid(+-x);    ;         ;         BERT 4.1;             create_model
"""  # noqa: E501
# Heads whose variables have names of their own, and what these begin with
_OUTPUTS = {
    "cls.predictions": "cls/predictions/",
    "cls.predictions.decoder": "cls/predictions/",
    "cls.seq_relationship": "cls/seq_relationship/",
    "qa_outputs": "cls/squad/",
    "classifier": "",
}
_NORM = "(x - mean) / sqrt(variance + eps) * gamma + beta"
_ROWS = [[cell.strip() for cell in row.split(";")] for row in _TABLE.strip().splitlines()]
_KINDS = {end: Kind(*rest)._replace(equation=rest[0].replace("NORM", _NORM)) for end, *rest in _ROWS}


def kind_of(name: str, activation: str = "gelu") -> Kind:
    """The kind of the step of this name; an empty one for what is not BERT's own, such as an adapter."""
    parts = re.sub(r"#\d+$", "", name).split(".")
    for size in (3, 2, 1):
        if kind := _KINDS.get(".".join(parts[-size:])):
            return kind._replace(equation=kind.equation.replace("ACT", activation))
    return Kind("", "", "", "", "")


def spell(shape: Sequence[int], pattern: str, sizes: Mapping[str, int]) -> str:
    """A shape in letters: `pattern` where the numbers agree with it, a number where they do not."""
    letters = pattern.split()
    if len(letters) == len(shape) + 1 and letters[:2] == ["B", "T"]:
        letters = ["N", *letters[2:]]  # only the tokens that have a label
    elif len(letters) == len(shape) - 1 and letters[:1] == ["B"]:
        letters = ["B", "T", *letters[1:]]
    if len(letters) != len(shape):
        return str(tuple(shape))
    return f"({', '.join(x if sizes.get(x, n) == n else str(n) for x, n in zip(letters, shape, strict=True))})"


def google_variable(parameter: str) -> str:
    """The variable of a Google TensorFlow checkpoint that holds this parameter; kernels are stored transposed.

    Tied parameters have the name of what they are tied to. "classifier" is Google's of sentences; token classification
    and multiple choice, which have one too, are others' heads.
    """
    path, _, last = parameter.rpartition(".")
    if parameter == "cls.predictions.decoder.weight":
        return "bert/embeddings/word_embeddings"
    if path in _OUTPUTS:
        return f"{_OUTPUTS[path]}output_{'weights' if last == 'weight' else last}"
    if path.endswith("LayerNorm"):
        last = {"weight": "gamma", "bias": "beta"}[last]
    elif last == "weight":
        last = "" if path.endswith("_embeddings") else "kernel"
    return f"{_scope(path)}/{last}".rstrip("/")


def _scope(module: str) -> str:
    """What TensorFlow's variables of a module begin with."""
    return re.sub(r"layer\.(\d+)", r"layer_\1", module).replace(".", "/")


class Name(NamedTuple):
    """A module or parameter, `shape` None for a module, and what Google's TensorFlow code calls it."""

    name: str
    shape: tuple[int, ...] | None
    google: str | None
    transposed: bool


def names(model: nn.Module) -> list[Name]:
    """Every module and every parameter of a model once, in the order of the tree, a tied parameter under each name."""
    rows = []
    for path, module in model.named_modules():
        rows.append(Name(path, None, _scope(path) or None, False))
        for last, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{last}".lstrip(".")
            variable = google_variable(name)
            rows.append(Name(name, tuple(parameter.shape), variable, variable.endswith("/kernel")))
    return rows
