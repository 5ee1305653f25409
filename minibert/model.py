"""BERT, top to bottom as data flows: embeddings, attention, feed-forward, layer, encoder, pooler, BertModel.

Sections and figures are those of Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers" (arXiv
1810.04805). Names are those of transformers, operations and their order too, so that results are equal to the last bit;
some classes exist only so that parameters carry the names that every checkpoint has.

Letters, in every comment of the package:
    B batch   T tokens   D hidden size   H heads   K head size (D = H * K)   F feed-forward size   V vocabulary

Read config.py before this file and heads.py after it. What else is BERT: text/wordpiece.py cuts text into the tokens
whose ids come in here, pretraining/ makes pairs of sentences and masks words. `python -m minibert.model` runs an
example.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from minibert.activations import Activation
from minibert.base import BertPreTrainedModel
from minibert.config import BertConfig
from minibert.inputs import as_ids, check_inputs, kernel_mask
from minibert.outputs import BaseModelOutput


class BertEmbeddings(nn.Module):
    """Word + segment + position embeddings, normalised (section 3, figure 2). Ids (B, T) -> (B, T, D)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)  # (B, T) -> (B, T, D)
        B, T, _ = inputs_embeds.shape
        if position_ids is None:
            position_ids = torch.arange(T, device=inputs_embeds.device)[None]  # (1, T)
        if token_type_ids is None:
            token_type_ids = torch.zeros(B, T, dtype=torch.long, device=inputs_embeds.device)
        # Floating-point sums depend on their order: word + segment first, then position
        embeddings = inputs_embeds + self.token_type_embeddings(token_type_ids)
        embeddings = embeddings + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(embeddings))


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float = 0.0) -> Tensor:
    """softmax(query key^T / sqrt(K)) value, the only place that calls torch's kernel for it.

    query, key, value: (B, H, T, K); mask: None, boolean (True: may be attended) or a number added to the scores,
    broadcastable to (B, H, T, T). Returns (B, H, T, K); a row that may attend to nothing is zeros.
    """
    scale = query.shape[-1] ** -0.5
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p, scale=scale)


def attention_probabilities(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """The attention map: the weights that `attention` gives each value, (B, H, T, T), without dropout.

    Written as transformers' eager attention is, to give its bits. A row that may attend to nothing is uniform.
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * query.shape[-1] ** -0.5
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, torch.finfo(scores.dtype).min)
        scores = scores + mask
    return functional.softmax(scores, dim=-1)


def attention_through(probabilities: Tensor, value: Tensor, context: Tensor, dropout_p: float) -> Tensor:
    """The context as a product of the attention map, so that the map gets a gradient.

    probabilities (B, H, T, T), value (B, H, T, K), context (B, H, T, K) as the kernel computed it. Returns its bits
    (asking for maps changes no result) with the product's gradient; with dropout, which nobody can draw twice alike,
    the product.
    """
    product = functional.dropout(probabilities, dropout_p) @ value
    return product if dropout_p else context.detach() + (product - product.detach())


class BertSelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2.2). (B, T, D) -> (B, T, D)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)  # holds the rate; the kernel applies it

    def forward(self, hidden_states: Tensor, mask: Tensor | None, maps: list[Tensor] | None = None) -> Tensor:
        B, T, D = hidden_states.shape
        heads = (B, T, -1, self.attention_head_size)
        query = self.query(hidden_states).view(heads).transpose(1, 2)  # (B, T, D) -> (B, T, H, K) -> (B, H, T, K)
        key = self.key(hidden_states).view(heads).transpose(1, 2)  # (B, T, D) -> (B, T, H, K) -> (B, H, T, K)
        value = self.value(hidden_states).view(heads).transpose(1, 2)  # (B, T, D) -> (B, T, H, K) -> (B, H, T, K)
        dropout_p = self.dropout.p if self.training else 0.0
        context = attention(query, key, value, mask, dropout_p)  # (B, H, T, K)
        if maps is not None:
            maps.append(attention_probabilities(query, key, mask))
            if maps[-1].requires_grad:
                context = attention_through(maps[-1], value, context, dropout_p)
        return context.transpose(1, 2).reshape(B, T, D)  # (B, H, T, K) -> (B, T, H, K) -> (B, T, D)


class BertResidualOutput(nn.Module):
    """Project back to D, drop out, add what came in, normalise: how both halves of a layer end.

    x (B, T, D or F), residual (B, T, D) -> (B, T, D).
    """

    def __init__(self, config: BertConfig, in_features: int):
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class BertAttention(nn.Module):
    """The first half of a layer: tokens look at each other. (B, T, D) -> (B, T, D)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertResidualOutput(config, config.hidden_size)

    def forward(self, hidden_states: Tensor, mask: Tensor | None, maps: list[Tensor] | None = None) -> Tensor:
        return self.output(self.self(hidden_states, mask, maps), hidden_states)


class BertIntermediate(nn.Module):
    """The second half begins: each token for itself, widened. (B, T, D) -> (B, T, F)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = Activation(config.hidden_act)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.intermediate_act_fn(self.dense(hidden_states))  # (B, T, D) -> (B, T, F)


class BertLayer(nn.Module):
    """One Transformer block, normalised after each half (post-norm). (B, T, D) -> (B, T, D)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertResidualOutput(config, config.intermediate_size)

    def forward(self, hidden_states: Tensor, mask: Tensor | None, maps: list[Tensor] | None = None) -> Tensor:
        hidden_states = self.attention(hidden_states, mask, maps)
        return self.output(self.intermediate(hidden_states), hidden_states)


class BertEncoder(nn.Module):
    """The layers, one after the other. (B, T, D) -> (B, T, D)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None,
        states: list[Tensor] | None = None,
        maps: list[Tensor] | None = None,
    ) -> Tensor:
        """What is on the way goes into the lists, if there are any: N+1 states, the embeddings first, and N maps."""
        for layer in self.layer:
            if states is not None:
                states.append(hidden_states)
            if self.gradient_checkpointing and self.training:  # keep only what enters a layer, compute the rest again
                hidden_states = checkpoint(layer, hidden_states, mask, maps, use_reentrant=False)
            else:
                hidden_states = layer(hidden_states, mask, maps)
        if states is not None:
            states.append(hidden_states)
        return hidden_states


class BertPooler(nn.Module):
    """The sentence vector: a tanh layer on the first token, [CLS] (section 3.1, task 2). (B, T, D) -> (B, D)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.activation(self.dense(hidden_states[:, 0]))  # (B, T, D) -> (B, D)


class BertModel(BertPreTrainedModel):
    """The encoder, with the pooler on top unless `add_pooling_layer` is False. See `forward` for shapes."""

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Encode a batch of token sequences.

        input_ids (B, T) or inputs_embeds (B, T, D); token_type_ids (B, T), the segment, 0 if not given; position_ids
        (B, T) or (1, T). attention_mask: (B, T), 1 for tokens and 0 for padding; or who attends to whom, (B, T, T) or
        (B, H, T, T) with sizes 1 allowed, boolean or 0/1 (True: may be attended), or floating point (added to the
        scores). A mask of ones is the same as none. Attention maps are probabilities before dropout.

        Raises ValueError naming the argument, what came and what is allowed, before anything is computed.
        """
        check_inputs(self.config, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        wants_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        wants_maps = self.config.output_attentions if output_attentions is None else output_attentions
        states: list[Tensor] | None = [] if wants_states else None
        maps: list[Tensor] | None = [] if wants_maps else None
        ids = (as_ids(x) for x in (input_ids, token_type_ids, position_ids))
        embeddings = self.embeddings(*ids, inputs_embeds)  # (B, T, D)
        last = self.encoder(embeddings, kernel_mask(attention_mask, embeddings.dtype), states, maps)  # (B, T, D)
        output = BaseModelOutput(
            last_hidden_state=last,
            pooler_output=None if self.pooler is None else self.pooler(last),
            hidden_states=None if states is None else tuple(states),
            attentions=None if maps is None else tuple(maps),
        )
        return self.finish(output, return_dict)


if __name__ == "__main__":
    model = BertModel(BertConfig(vocab_size=100, hidden_size=12, num_hidden_layers=2, num_attention_heads=3)).eval()
    out = model(torch.tensor([[2, 71, 8, 28, 3]]), output_hidden_states=True, output_attentions=True)
    print("last_hidden_state (B, T, D)", tuple(out.last_hidden_state.shape))
    print("pooler_output (B, D)", tuple(out.pooler_output.shape))
    print("hidden_states, one more than layers:", len(out.hidden_states))
    print("attentions, one a layer, (B, H, T, T)", tuple(out.attentions[0].shape))
    print("each token's attention sums to", out.attentions[0].sum(-1).mean().item())
