"""Which of the decoders answers for a model."""

from typing import Any

from llm_itemtok.decoding.encoder_decoder import EncoderDecoderTree
from llm_itemtok.decoding.recursive import RecursiveDecoder
from llm_itemtok.decoding.replicated import ReplicatedDecoder
from llm_itemtok.decoding.tree import BeamDecoder, TreeDecoder, takes_tree_masks
from llm_itemtok.model.item_lm import ItemTokenModel


def decoder_for(model: ItemTokenModel) -> BeamDecoder[Any]:
    """The fastest decoder that is right for a model, which should be in evaluation mode; its `name` says which."""
    if model.recursion is not None:
        return RecursiveDecoder(model)
    if model.answer_start is not None:
        # The one attention of the library that ignores such masks, FlashAttention, is not there for T5.
        return EncoderDecoderTree(model)
    return TreeDecoder(model) if takes_tree_masks(model) else ReplicatedDecoder(model)
