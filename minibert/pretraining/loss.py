"""What is minimised: the joint loss of both tasks (section 3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.heads import IGNORED, BertForPreTraining


class PretrainingLoss(nn.Module):
    """The loss of `BertForPreTraining`, with the vocabulary projected only where a word is to be predicted.

    Google's original gathers these positions too: the (B, T, V) logits, most of them without a label, are never made.
    With `dense` all are, and loss and gradients are those of transformers to the bit.
    """

    def __init__(self, model: BertForPreTraining, *, dense: bool = False) -> None:
        super().__init__()
        self.model, self.dense = model, dense

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
        """Takes the fields of a `Batch`. Returns (4,), sums in float32, of a float64 model in float64: the MLM loss and
        the right answers over the tokens to predict, the NSP loss and the right answers over the pairs.
        """
        mask = pair[:, :, None] == pair[:, None, :] if packed else (pair > 0).long()
        encoded = self.model.bert(input_ids, mask, token_type_ids, position_ids)
        hidden, pooled = encoded.last_hidden_state.flatten(0, 1), encoded.pooler_output  # (R * T, D), (R, D)
        if packed:
            pooled = self.model.bert.pooler(hidden[cls_positions, None])  # (B, 1, D) -> (B, D)
        if self.dense:
            labels = torch.full_like(input_ids.flatten(), IGNORED).scatter(0, masked_positions, masked_labels)
        else:
            hidden, labels = hidden[masked_positions], masked_labels  # (P, D), (P,)
        words = _at_least_float32(self.model.cls.predictions(hidden))  # (P, V)
        nexts = _at_least_float32(self.model.cls.seq_relationship(pooled))  # (B, 2)
        return torch.stack(
            [
                F.cross_entropy(words, labels, ignore_index=IGNORED, reduction="sum"),
                (words.detach().argmax(-1) == labels).sum().to(words.dtype),
                F.cross_entropy(nexts, next_sentence_label, reduction="sum"),
                (nexts.detach().argmax(-1) == next_sentence_label).sum().to(words.dtype),
            ]
        )


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def pretraining_loss(model: BertForPreTraining, device: torch.device, *, dense: bool, fsdp: bool) -> nn.Module:
    """`PretrainingLoss`, or on a GPU the same sums with FlashAttention within pairs and a fused cross-entropy."""
    if device.type == "cuda" and not dense and not fsdp:
        from minibert.fast.pretraining import PackedPretrainingLoss

        return PackedPretrainingLoss(model)
    return PretrainingLoss(model, dense=dense)


def pair_lengths(pair: Tensor) -> list[int]:
    """Tokens of every pair of a batch; pair (R, T) has its number within its row for each token, 0 for padding."""
    rows = torch.arange(len(pair), device=pair.device)[:, None] * (int(pair.max()) + 1)
    return (rows + pair)[pair > 0].unique(return_counts=True)[1].tolist()
