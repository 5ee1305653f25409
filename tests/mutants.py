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
def heads_of_the_key_interleaved(model):
    def forward(self, hidden_states, mask=None, *rest, **more):
        B, T, D = hidden_states.shape
        heads = (B, T, -1, self.attention_head_size)
        query = self.query(hidden_states).view(heads).transpose(1, 2)
        key = self.key(hidden_states).view(B, T, self.attention_head_size, -1).permute(0, 3, 1, 2)  # fault
        value = self.value(hidden_states).view(heads).transpose(1, 2)
        return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).reshape(B, T, D)

    for module in attentions(model):
        replace_forward(module, forward)


@fault
def value_by_the_key(model):
    """One projection twice, another never."""

    def forward(self, hidden_states, mask=None, *rest, **more):
        B, T, D = hidden_states.shape
        heads = (B, T, -1, self.attention_head_size)
        query = self.query(hidden_states).view(heads).transpose(1, 2)
        key = self.key(hidden_states).view(heads).transpose(1, 2)
        value = self.key(hidden_states).view(heads).transpose(1, 2)  # fault
        return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).reshape(B, T, D)

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
def embeddings_changed_through_a_view(model):
    def body(self, ids, segments, positions):
        words = self.word_embeddings(ids)
        words[:, 0] += 0.01 * self.LayerNorm.weight  # fault
        return self.LayerNorm(words + self.token_type_embeddings(segments) + self.position_embeddings(positions))

    embed(body)(model)


@fault
def silu_by_hand(model):
    def forward(self, hidden_states):
        x = self.dense(hidden_states)
        return x * torch.sigmoid(x)  # fault

    for layer in encoder(model).encoder.layer:
        replace_forward(layer.intermediate, forward)


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


def embed(body):
    """Embeddings whose forward is `body(self, ids, segments, positions)`."""

    def forward(self, input_ids, token_type_ids=None, position_ids=None, inputs_embeds=None):
        segments = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        return body(self, input_ids, segments, torch.arange(input_ids.shape[1])[None])

    return lambda model: replace_forward(encoder(model).embeddings, forward)


FAULTS["segments missing"] = embed(
    lambda self, ids, segments, positions: self.LayerNorm(
        self.word_embeddings(ids) + self.position_embeddings(positions)  # fault
    )
)
FAULTS["positions missing"] = embed(
    lambda self, ids, segments, positions: self.LayerNorm(
        self.word_embeddings(ids) + self.token_type_embeddings(segments)  # fault
    )
)


@fault
def residual_from_the_layers_input(model):
    def forward(self, hidden_states, mask=None, *rest, **more):
        return self.output(self.intermediate(self.attention(hidden_states, mask)), hidden_states)

    for layer in encoder(model).encoder.layer:
        replace_forward(layer, forward)


@fault
def attention_output_left_out(model):
    for layer in encoder(model).encoder.layer:
        replace_forward(layer.attention.output, lambda self, x, residual: self.LayerNorm(x + residual))  # fault


@fault
def transform_left_out(model):
    replace_forward(model.cls.predictions.transform, lambda self, hidden_states: hidden_states)


@fault
def pooler_with_relu(model):
    replace_forward(encoder(model).pooler.activation, lambda self, x: F.relu(x))  # fault


@fault
def one_key_too_many(model):
    """The softmax with one more, empty, key."""

    def kernel(query, key, value, mask):
        mask = None if mask is None else F.pad(mask, (0, 1), value=True)
        return F.scaled_dot_product_attention(query, *(F.pad(x, (0, 0, 0, 1)) for x in (key, value)), mask)  # fault

    with_attention(model, kernel)


@fault
def heads_permuted(model):
    with_attention(model, lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask).flip(1))  # fault


@fault
def sigmoid_for_softmax(model):
    def kernel(query, key, value, mask):
        scores = torch.matmul(query, key.transpose(2, 3)) * query.shape[-1] ** -0.5
        scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        return torch.matmul(torch.sigmoid(scores), value)  # fault

    with_attention(model, kernel)


@fault
def query_in_half_precision(model):
    for layer in encoder(model).encoder.layer:
        replace_forward(
            layer.attention.self.query,
            lambda self, x: F.linear(x.bfloat16(), self.weight.bfloat16(), self.bias.bfloat16()).to(x.dtype),  # fault
        )


@fault
def autocast(model):
    """Half precision that float64 does not show: torch's autocast leaves float64 alone."""

    def forward(self, x, *rest, **more):
        with torch.autocast("cpu", torch.bfloat16):
            return run_layers(self.layer, x, *rest).to(x.dtype)

    replace_forward(encoder(model).encoder, forward)


@fault
def result_depends_on_the_batch(model):
    dense = encoder(model).encoder.layer[1].intermediate.dense
    replace_forward(dense, lambda self, x: F.linear(x - 1e-3 * x.mean(0, True), self.weight, self.bias))  # fault


@fault
def residual_changed_in_place(model):
    """What is added later is the same tensor, changed meanwhile."""

    def forward(self, hidden_states):
        widened = self.dense(hidden_states)
        hidden_states.mul_(1.01)  # fault
        return self.intermediate_act_fn(widened)

    for layer in encoder(model).encoder.layer:
        replace_forward(layer.intermediate, forward)


@fault
def residual_changed_through_a_view(model):
    def forward(self, hidden_states):
        widened = self.dense(hidden_states)
        hidden_states[:, 0].mul_(1.01)  # fault
        return self.intermediate_act_fn(widened)

    for layer in encoder(model).encoder.layer:
        replace_forward(layer.intermediate, forward)


@fault
def padding_masked_by_its_id(model):
    """A mask is made of the ids where none is given: text that has the padding token in it loses it."""

    def forward(self, input_ids=None, attention_mask=None, *rest, **more):
        mask = (input_ids != 0).long() if attention_mask is None else attention_mask
        return type(self).forward(self, input_ids, mask, *rest, **more)

    replace_forward(encoder(model), forward)


def span_exchanged(self, *inputs, **more):
    """The forward of a question-answering head that takes the end for the start."""
    output = type(self).forward(self, *inputs, **more)
    output.start_logits, output.end_logits = output.end_logits, output.start_logits
    return output


# Faults that a forward pass does not show: what the check "gradients" must call a bug
HIDDEN: dict[str, Fault] = {}


def hidden(function: Fault) -> Fault:
    HIDDEN[function.__name__.replace("_", " ")] = function
    return function


@hidden
def residual_detached(model):
    residual(lambda self, x, residual: self.LayerNorm(self.dense(x) + residual.detach()))(model)


@hidden
def gradient_scaled(model):
    dense = encoder(model).encoder.layer[1].intermediate.dense
    replace_forward(dense, lambda self, x: (y := F.linear(x, self.weight, self.bias)).detach() + 2 * (y - y.detach()))


@hidden
def embeddings_frozen(model):
    encoder(model).embeddings.position_embeddings.weight.requires_grad_(False)


@hidden
def padding_token_is_no_label(model):
    """The loss leaves out labels that are 0, where -100 is what means nothing."""

    def forward(self, *inputs, labels=None, **more):
        kept = None if labels is None else torch.where(labels == 0, -100, labels)
        return type(self).forward(self, *inputs, labels=kept, **more)

    replace_forward(model, forward)


@hidden
def next_sentence_labels_exchanged(model):
    def forward(self, *inputs, next_sentence_label=None, **more):
        flipped = None if next_sentence_label is None else 1 - next_sentence_label
        return type(self).forward(self, *inputs, next_sentence_label=flipped, **more)

    replace_forward(model, forward)


# Other ways to compute the same: rounding
WAYS: dict[str, Fault] = {
    "positions added first": embed(
        lambda self, ids, segments, positions: self.LayerNorm(
            self.position_embeddings(positions) + self.token_type_embeddings(segments) + self.word_embeddings(ids)
        )
    ),
    "positions for each row": embed(
        lambda self, ids, segments, positions: self.LayerNorm(
            self.word_embeddings(ids)
            + self.token_type_embeddings(segments)
            + self.position_embeddings(positions.expand_as(ids))
        )
    ),
    "residual within the product": residual(
        lambda self, x, residual: self.LayerNorm(
            torch.baddbmm(residual + self.dense.bias, x, self.dense.weight.T.expand(len(x), -1, -1))
        )
    ),
}


def way(function: Fault) -> Fault:
    WAYS[function.__name__.replace("_", " ")] = function
    return function


@way
def row_by_row(model):
    def forward(self, x):
        return torch.cat(
            [self.intermediate_act_fn(F.linear(row, self.dense.weight, self.dense.bias)) for row in x[:, None]]
        )

    for layer in encoder(model).encoder.layer:
        replace_forward(layer.intermediate, forward)


@way
def head_by_head(model):
    def kernel(query, key, value, mask):
        mask = None if mask is None else mask[:, 0]
        parts = [x.unbind(1) for x in (query, key, value)]
        return torch.stack([F.scaled_dot_product_attention(*head, mask) for head in zip(*parts, strict=True)], 1)

    with_attention(model, kernel)


@way
def attention_in_two_halves(model):
    """The keys' halves apart, each with its own softmax, then together by their weights, as fused kernels do."""

    def kernel(query, key, value, mask):
        scores = torch.matmul(query, key.transpose(2, 3)) * query.shape[-1] ** -0.5
        scores = scores if mask is None else scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        halves = list(zip(scores.chunk(2, -1), value.chunk(2, 2), strict=True))
        sums = torch.cat([half.logsumexp(-1, True) for half, _ in halves], -1)
        parts = [torch.matmul(half.softmax(-1), values) for half, values in halves]
        shares = sums.softmax(-1)
        return sum(shares[..., i : i + 1] * part for i, part in enumerate(parts))

    with_attention(model, kernel)


@way
def query_key_and_value_in_one(model):
    def forward(self, hidden_states, mask=None, *rest, **more):
        B, T, D = hidden_states.shape
        parts = (self.query, self.key, self.value)
        fused = F.linear(hidden_states, torch.cat([x.weight for x in parts]), torch.cat([x.bias for x in parts]))
        heads = [x.view(B, T, -1, self.attention_head_size).transpose(1, 2) for x in fused.chunk(3, -1)]
        return F.scaled_dot_product_attention(*heads, mask).transpose(1, 2).reshape(B, T, D)

    for module in attentions(model):
        replace_forward(module, forward)


@way
def nothing_computed_for_padding(model):
    def forward(self, hidden_states, mask=None, *rest, **more):
        x = self.attention(hidden_states, mask)
        real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask.expand(len(x), 1, 1, -1)[:, 0, 0]
        rows = x[real]
        return torch.zeros_like(x).masked_scatter(real[..., None], self.output(self.intermediate(rows), rows))

    for layer in encoder(model).encoder.layer:
        replace_forward(layer, forward)


@way
def rows_packed(model):
    """All texts behind each other in one row, and none sees another."""

    def forward(self, x, mask=None, *rest):
        real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask.expand(len(x), 1, 1, -1)[:, 0, 0]
        text = torch.arange(len(x))[:, None].expand_as(real)[real]
        packed = run_layers(self.layer, x[real][None], (text[:, None] == text)[None, None])
        return torch.zeros_like(x).masked_scatter(real[..., None], packed)

    replace_forward(encoder(model).encoder, forward)


@way
def embeddings_added_in_slices(model):
    def body(self, ids, segments, positions):
        words = self.word_embeddings(ids)
        for row, segment in zip(words, segments, strict=True):
            row += self.token_type_embeddings(segment) + self.position_embeddings(positions[0])
        return self.LayerNorm(words)

    embed(body)(model)


@way
def key_without_bias(model):
    """What is added to all scores of a query alike changes no weight."""
    for layer in encoder(model).encoder.layer:
        replace_forward(layer.attention.self.key, lambda self, x: F.linear(x, self.weight))


@way
def words_by_a_product(model):
    table = encoder(model).embeddings.word_embeddings
    replace_forward(table, lambda self, ids: F.one_hot(ids, len(self.weight)).to(self.weight.dtype) @ self.weight)


@way
def residual_added_in_place(model):
    residual(lambda self, x, residual: self.LayerNorm(self.dense(x).add_(residual)))(model)


@way
def sum_backwards(model):
    for layer in encoder(model).encoder.layer:
        replace_forward(layer.output.dense, lambda self, x: F.linear(x.flip(-1), self.weight.flip(-1), self.bias))


@way
def norm_by_hand(model):
    def forward(self, x):
        variance = x.var(-1, keepdim=True, unbiased=False)
        return (x - x.mean(-1, True)) / (variance + self.eps).sqrt() * self.weight + self.bias

    for layer in encoder(model).encoder.layer:
        replace_forward(layer.output.LayerNorm, forward)


@way
def mask_by_infinity(model):
    def kernel(query, key, value, mask):
        scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(2, 3))
        return torch.matmul(F.softmax(scores if mask is None else scores.masked_fill(~mask, -torch.inf), -1), value)

    with_attention(model, kernel)


@way
def texts_one_by_one(model):
    def forward(self, x, mask=None, *rest):
        masks = [None] * len(x) if mask is None else mask.expand(len(x), -1, -1, -1).split(1)
        return torch.cat([run_layers(self.layer, *each) for each in zip(x.split(1), masks, strict=True)])

    replace_forward(encoder(model).encoder, forward)


class Turned(nn.Module):
    def forward(self, weight):
        return weight.mT

    right_inverse = forward


@way
def weight_kept_transposed(model):
    """A parameter of another name that holds the same numbers."""
    dense = encoder(model).encoder.layer[0].output.dense
    nn.utils.parametrize.register_parametrization(dense, "weight", Turned())


@way
def module_within_a_module(model):
    layer = encoder(model).encoder.layer[0]
    layer.intermediate = nn.Sequential(layer.intermediate)
