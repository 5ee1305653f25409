"""BERTs with one fault each: what a certificate must call a bug, at the line that is marked `# fault`."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.model import BertSelfAttention

Fault = Callable[[nn.Module], None]
FAULTS: dict[str, Fault] = {}


def fault(function: Fault) -> Fault:
    FAULTS[function.__name__.replace("_", " ")] = function
    return function


def encoder(model: nn.Module) -> nn.Module:
    return getattr(model, "bert", model)


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    module.forward = types.MethodType(forward, module)


def attentions(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, BertSelfAttention)]


def with_attention(model: nn.Module, kernel: Callable[..., Tensor], swap: bool = False) -> None:
    def forward(self: Any, hidden_states: Tensor, mask: Any, *rest: Any, **more: Any) -> Any:
        B, T, D = hidden_states.shape
        heads = (B, T, -1, self.attention_head_size)
        query = self.query(hidden_states).view(heads).transpose(1, 2)
        key = self.key(hidden_states).view(heads).transpose(1, 2)
        value = self.value(hidden_states).view(heads).transpose(1, 2)
        if swap:
            query, key = key, query  # fault
        context = kernel(query, key, value, mask)
        return context.transpose(1, 2).reshape(B, T, D)

    for module in attentions(model):
        replace_forward(module, forward)


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float = 1.0, dim: int = -1,
          hidden: float | None = None, invert: bool = False) -> Tensor:  # fmt: skip
    scores = torch.matmul(query, key.transpose(2, 3)) * (query.shape[-1] ** -0.5 * scale)
    if mask is not None:
        keep = ~mask if invert else mask
        lowest = torch.finfo(scores.dtype).min if hidden is None else hidden
        scores = scores + torch.zeros_like(keep, dtype=scores.dtype).masked_fill(~keep, lowest)
    return torch.matmul(F.softmax(scores, dim=dim), value)


@fault
def tanh_gelu(model):
    for layer in encoder(model).encoder.layer:
        replace_forward(layer.intermediate.intermediate_act_fn, lambda self, x: F.gelu(x, approximate="tanh"))  # fault


@fault
def eps_1e_5(model):
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5


@fault
def eps_1e_7(model):
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-7


@fault
def pre_norm(model):
    def forward(self, hidden_states, mask=None, *rest, **more):
        normed = self.attention.output.LayerNorm(hidden_states)  # fault
        x = hidden_states + self.attention.output.dense(self.attention.self(normed, mask))
        return x + self.output.dense(self.intermediate(self.output.LayerNorm(x)))

    for layer in encoder(model).encoder.layer:
        replace_forward(layer, forward)


@fault
def mask_by_minus_1e4(model):
    with_attention(model, lambda *args: plain(*args, hidden=-1e4))


@fault
def mask_inverted(model):
    with_attention(model, lambda *args: plain(*args, invert=True))


@fault
def mask_ignored(model):
    with_attention(model, lambda query, key, value, mask: plain(query, key, value, None))


@fault
def query_and_key_swapped(model):
    with_attention(model, plain, swap=True)


@fault
def missing_scale(model):
    with_attention(model, lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask, scale=1.0))  # fault


@fault
def scale_by_hidden_size(model):
    with_attention(model, lambda *args: plain(*args, scale=3**-0.5))


@fault
def softmax_over_queries(model):
    with_attention(model, lambda *args: plain(*args, dim=-2))


@fault
def softmax_in_half_precision(model):
    def kernel(query, key, value, mask):
        scores = torch.matmul(query, key.transpose(2, 3)) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = F.softmax(scores.bfloat16(), dim=-1).to(value.dtype)  # fault
        return torch.matmul(weights, value)

    with_attention(model, kernel)


@fault
def heads_not_put_back(model):
    def forward(self, hidden_states, mask=None, *rest, **more):
        B, T, D = hidden_states.shape
        heads = (B, T, -1, self.attention_head_size)
        parts = [f(hidden_states).view(heads).transpose(1, 2) for f in (self.query, self.key, self.value)]
        context = F.scaled_dot_product_attention(*parts, attn_mask=mask)
        return context.reshape(B, T, D)  # fault

    for module in attentions(model):
        replace_forward(module, forward)


@fault
def transposed_head(model):
    """The query weight of one head, transposed."""
    module = attentions(model)[0]
    K = module.attention_head_size
    with torch.no_grad():
        module.query.weight[:K, :K] = module.query.weight[:K, :K].T.clone()


@fault
def wrong_segment_row(model):
    table = encoder(model).embeddings.token_type_embeddings
    replace_forward(table, lambda self, ids: F.embedding(1 - ids, self.weight))  # fault


@fault
def segments_ignored(model):
    table = encoder(model).embeddings.token_type_embeddings
    replace_forward(table, lambda self, ids: F.embedding(ids * 0, self.weight))  # fault


def shift_positions(by):
    def change(model):
        table = encoder(model).embeddings.position_embeddings
        replace_forward(table, lambda self, ids: F.embedding((ids + by) % len(self.weight), self.weight))  # fault

    return change


FAULTS["positions off by one"] = shift_positions(1)
FAULTS["positions off by two"] = shift_positions(2)


@fault
def pooler_on_second_token(model):
    def forward(self, hidden_states):
        return self.activation(self.dense(hidden_states[:, 1 % hidden_states.shape[1]]))  # fault

    replace_forward(encoder(model).pooler, forward)


@fault
def pooler_on_last_token(model):
    def forward(self, hidden_states):
        return self.activation(self.dense(hidden_states[:, -1]))  # fault

    replace_forward(encoder(model).pooler, forward)


@fault
def tanh_missing(model):
    def forward(self, hidden_states):
        return self.dense(hidden_states[:, 0])  # fault

    replace_forward(encoder(model).pooler, forward)


@fault
def activation_missing(model):
    for layer in encoder(model).encoder.layer:
        replace_forward(layer.intermediate, lambda self, hidden_states: self.dense(hidden_states))  # fault


@fault
def dropout_left_on(model):
    encoder(model).embeddings.dropout.p = 0.1
    encoder(model).embeddings.dropout.train()


@fault
def attention_dropout_left_on(model):
    for module in attentions(model):
        module.dropout.p = 0.1
        module.train()


def residual(forward):
    def change(model):
        for layer in encoder(model).encoder.layer:
            replace_forward(layer.output, forward)

    return change


FAULTS["missing residual"] = residual(lambda self, x, residual: self.LayerNorm(self.dense(x)))  # fault
FAULTS["residual twice"] = residual(lambda self, x, residual: self.LayerNorm(self.dense(x) + 2 * residual))  # fault
FAULTS["norm missing"] = residual(lambda self, x, residual: self.dense(x) + residual)  # fault


@fault
def wrong_norm_weight(model):
    for layer in encoder(model).encoder.layer:
        layer.output.LayerNorm = layer.attention.output.LayerNorm


@fault
def norm_without_bias(model):
    norm = encoder(model).encoder.layer[1].output.LayerNorm
    replace_forward(norm, lambda self, x: F.layer_norm(x, self.normalized_shape, self.weight, None, self.eps))  # fault


@fault
def bias_dropped(model):
    for layer in encoder(model).encoder.layer:
        replace_forward(layer.attention.self.value, lambda self, x: F.linear(x, self.weight))  # fault


@fault
def bias_dropped_where_it_is_zero(model):
    layer = encoder(model).encoder.layer[0]
    with torch.no_grad():
        layer.output.dense.bias.zero_()
    replace_forward(layer.output.dense, lambda self, x: F.linear(x, self.weight))  # fault


@fault
def layers_in_another_order(model):
    layers = encoder(model).encoder.layer
    encoder(model).encoder.layer = nn.ModuleList([layers[1], layers[0], *layers[2:]])


@fault
def layers_run_backwards(model):
    backbone = encoder(model).encoder
    replace_forward(backbone, lambda self, x, *a, **k: run_layers(list(self.layer)[::-1], x, *a))


@fault
def layer_shared(model):
    backbone = encoder(model).encoder
    replace_forward(backbone, lambda self, x, *a, **k: run_layers([self.layer[0]] * len(self.layer), x, *a))


def run_layers(layers, hidden_states, mask=None, *rest):
    for layer in layers:
        hidden_states = layer(hidden_states, mask)
    return hidden_states


@fault
def a_layer_left_out(model):
    backbone = encoder(model).encoder
    replace_forward(backbone, lambda self, x, *a, **k: run_layers(list(self.layer)[:-1], x, *a))


@fault
def one_weight_changed(model):
    with torch.no_grad():
        encoder(model).encoder.layer[1].intermediate.dense.weight[3, 3] += 0.01


@fault
def norm_with_unbiased_variance(model):
    def forward(self, x):
        return (x - x.mean(-1, True)) / (x.var(-1, keepdim=True) + self.eps).sqrt() * self.weight + self.bias  # fault

    for layer in encoder(model).encoder.layer:
        replace_forward(layer.output.LayerNorm, forward)


@fault
def mask_on_queries(model):
    with_attention(model, lambda q, k, v, mask: plain(q, k, v, None if mask is None else mask.mT))


@fault
def mask_after_softmax(model):
    def kernel(query, key, value, mask):
        weights = F.softmax(torch.matmul(query, key.transpose(2, 3)) * query.shape[-1] ** -0.5, dim=-1)  # fault
        return torch.matmul(weights if mask is None else weights * mask, value)

    with_attention(model, kernel)


@fault
def values_of_another_head(model):
    with_attention(model, lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v.roll(1, 1), mask))  # fault


@fault
def segments_and_positions_exchanged(model):
    def forward(self, input_ids, token_type_ids=None, position_ids=None, inputs_embeds=None):
        positions = torch.arange(input_ids.shape[1])[None]
        segments = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(positions % 2)  # fault
        return self.LayerNorm(x + self.position_embeddings(segments))

    replace_forward(encoder(model).embeddings, forward)


@fault
def embeddings_without_norm(model):
    def forward(self, input_ids, token_type_ids=None, position_ids=None, inputs_embeds=None):
        positions = torch.arange(input_ids.shape[1])[None]
        segments = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(segments)
        return x + self.position_embeddings(positions)  # fault

    replace_forward(encoder(model).embeddings, forward)


@fault
def next_sentence_exchanged(model):
    replace_forward(model.cls.seq_relationship, lambda self, x: F.linear(x, self.weight, self.bias).flip(-1))  # fault


@fault
def decoder_untied(model):
    head = model.cls.predictions
    head.decoder.weight = nn.Parameter(head.decoder.weight.detach().clone())


@fault
def decoder_without_bias(model):
    replace_forward(model.cls.predictions.decoder, lambda self, x: F.linear(x, self.weight))  # fault


@fault
def transform_without_norm(model):
    def forward(self, hidden_states):
        return self.transform_act_fn(self.dense(hidden_states))  # fault

    replace_forward(model.cls.predictions.transform, forward)


@fault
def activation_twice(model):
    for layer in encoder(model).encoder.layer:
        replace_forward(layer.intermediate.intermediate_act_fn, lambda self, x: F.gelu(F.gelu(x)))  # fault
