"""The pretraining loss on a GPU: FlashAttention within each pair, words projected where one is to be predicted, the
loss of these in one pass over their logits.

It runs the modules of the plain model, on tokens in one long row, so it trains the same parameters and keeps their
dropout. Shapes do not depend on what the batch holds, and nothing is copied back to the host: the encoder compiles
once, and the GPU need not wait.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from minibert.fast.varlen import varlen_obstacle
from minibert.fast.words import word_losses
from minibert.heads import BertForPreTraining
from minibert.model import BertLayer, attention


class PackedPretrainingLoss(nn.Module):
    """Takes what `minibert.training`'s PretrainingLoss takes, and gives the same sums up to rounding.

    `compile(...)` compiles the encoder, the part that gains. FSDP is not supported: it watches the calls of the plain
    model's layers, whose parts are called here.
    """

    def __init__(self, model: BertForPreTraining) -> None:
        super().__init__()
        self.model = model

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """torch.compile the encoder, with the arguments of torch.compile."""
        self._encode = torch.compile(self._encode, *args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor,
        pair: Tensor,
        cls_positions: Tensor,
        next_sentence_label: Tensor,
        masked_positions: Tensor,
        masked_labels: Tensor,
        packed: bool = False,
    ) -> Tensor:
        """(R, T): input_ids, token_type_ids, position_ids, and `pair`, whose number a token's own attends to. Places in
        the flattened batch: cls_positions (B,), masked_positions (P,), with next_sentence_label and masked_labels.

        Returns (4,), sums in float32: the MLM loss and the right answers over the tokens to predict, the NSP loss and
        the right answers over the pairs.
        """
        model, config = self.model, self.model.config
        head_size = config.hidden_size // config.num_attention_heads
        use_varlen = not varlen_obstacle(pair.device, _computed_dtype(model.dtype, pair.device), head_size)
        starts = pair_starts(pair, len(cls_positions)) if use_varlen else None
        hidden = self._encode(input_ids, token_type_ids, position_ids, pair, starts)  # (R * T, D)
        pooled = model.bert.pooler(hidden[cls_positions, None])  # (B, 1, D) -> (B, D)
        losses, hits = self._words(hidden[masked_positions], masked_labels)
        nexts = model.cls.seq_relationship(pooled).float()  # (B, 2)
        nsp_loss = F.cross_entropy(nexts, next_sentence_label, reduction="sum")
        nsp_hits = (nexts.detach().argmax(-1) == next_sentence_label).sum()
        return torch.stack([losses.sum(), hits.sum().float(), nsp_loss, nsp_hits.float()])

    def _encode(
        self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor, pair: Tensor, starts: Tensor | None
    ) -> Tensor:
        """(R, T) -> (R * T, D); starts is None where there is no FlashAttention."""
        bert = self.model.bert
        x_ND = bert.embeddings(input_ids, token_type_ids, position_ids).flatten(0, 1)
        mask = None if starts is not None else (pair[:, :, None] == pair[:, None, :])[:, None]  # (R, 1, T, T)
        for layer in bert.encoder.layer:
            if bert.encoder.gradient_checkpointing and self.training:
                x_ND = checkpoint(_layer, layer, x_ND, pair.shape, starts, mask, use_reentrant=False)
            else:
                x_ND = _layer(layer, x_ND, pair.shape, starts, mask)
        return x_ND

    def _words(self, hidden_PD: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Losses and hits of the words to predict, (P,) each."""
        head, V = self.model.cls.predictions, self.model.config.vocab_size
        transformed = head.transform(hidden_PD)
        # A width of 30522 makes for slow products and unaligned rows: the next multiple of 64, as tensor cores want it
        extra = -V % 64
        weight, bias = F.pad(head.decoder.weight, (0, 0, 0, extra)), F.pad(head.bias, (0, extra))
        return word_losses(F.linear(transformed, weight, bias), labels, V)


def pair_starts(pair: Tensor, pairs: int) -> Tensor:
    """Where each pair, and each row's padding, starts in the flattened (R, T) batch; then R * T over and over.

    Its length, int32, is a multiple of 64 above what `pairs` and the rows can need, so that it seldom changes. Computed
    on the device, without a wait.
    """
    R, T = pair.shape
    size = 64 * ((pairs + R) // 64 + 1)
    changes = torch.ones_like(pair)
    changes[:, 1:] = pair[:, 1:] != pair[:, :-1]
    number = changes.flatten().cumsum(0) - 1
    token = torch.arange(R * T, device=pair.device)
    return torch.full((size,), R * T, device=pair.device).scatter_reduce_(0, number, token, "amin").int()


def _layer(
    layer: BertLayer, x_ND: Tensor, shape: tuple[int, int], starts: Tensor | None, mask: Tensor | None
) -> Tensor:
    """BertLayer.forward on tokens in one row."""
    own = layer.attention.self
    parts = (own.query, own.key, own.value)
    weight, bias = (torch.cat([getattr(part, name) for part in parts]) for name in ("weight", "bias"))
    dropout = own.dropout.p if layer.training else 0.0
    qkv = F.linear(x_ND, weight, bias).view(len(x_ND), 3, -1, own.attention_head_size)  # (N, 3, H, K)
    if starts is None:
        query, key, value = qkv.view(*shape, *qkv.shape[1:]).permute(2, 0, 3, 1, 4)  # 3 times (R, H, T, K)
        context = attention(query, key, value, mask, dropout).transpose(1, 2)  # (R, T, H, K)
    else:
        context = _flash(*qkv.unbind(1), starts, shape[1], dropout)  # (N, H, K)
    x_ND = layer.attention.output(context.reshape(x_ND.shape), x_ND)
    return layer.output(layer.intermediate(x_ND), x_ND)


def _flash(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, dropout: float) -> Tensor:
    """(N, H, K) each -> (N, H, K)."""
    if dropout == 0.0:
        return varlen_attn(query, key, value, starts, starts, longest, longest)
    # What varlen_attn calls, which leaves dropout out
    return torch.ops.aten._flash_attention_forward(
        query, key, value, starts, starts, longest, longest, dropout, False, False
    )[0]


def _computed_dtype(own: torch.dtype, device: torch.device) -> torch.dtype:
    """What matrix products are computed in, autocast considered."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else own
