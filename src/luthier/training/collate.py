"""Whether rows may share a sequence, and how they are put into one.

A padding-free batch, and a packed row, hold several rows end to end; ``position_ids`` that start again at 0 mark where
each begins. Attention keeps them apart by that mark. A layer that carries a state along the sequence does not look at it.
"""

from __future__ import annotations

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from trl import pack_dataset

from luthier import adapters
from luthier.errors import UnsupportedError
from luthier.model.accelerate import base_model
from luthier.terminal import notice_once
from luthier.training.arguments import TrainingArguments

SEPARABLE_LAYERS = {"full_attention", "sliding_attention"}


def mixes_rows(model: PreTrainedModel) -> str | None:
    """Why rows of one sequence would see each other in ``model``; None if attention keeps them apart."""
    base = base_model(model)
    config = base.config.get_text_config()
    other_layers = set(getattr(config, "layer_types", None) or ()) - SEPARABLE_LAYERS
    if base._is_stateful or other_layers:
        kinds = f" ({', '.join(sorted(other_layers))})" if other_layers else ""
        return f"{config.model_type} has layers that are not plain attention{kinds} and carry one row into the next"
    if config is not base.config:
        return f"{base.config.model_type} takes images, whose tokens have positions of their own"
    if base.config._attn_implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
        return f"attn_implementation={base.config._attn_implementation!r} has no mask that keeps rows apart"
    return None


def settle_padding(args: TrainingArguments, model: PreTrainedModel, has_collator: bool) -> None:
    """Decide ``args.padding_free`` where the user left it open, and refuse what would train wrong.

    Raises:
        UnsupportedError: packing or padding-free batches for a model that would mix the rows, or with a data collator.
    """
    wanted = "packing" if args.packing else "padding_free" if args.padding_free else None
    reason = mixes_rows(model)
    if wanted and reason:
        raise UnsupportedError(f"{wanted}=True would train wrong: {reason}. Leave {wanted} out; batches are then padded.")
    if wanted and has_collator:
        raise UnsupportedError(f"{wanted}=True builds its own batches: leave out data_collator, or {wanted}.")
    if args.packing and args.packing_strategy == "wrapped":
        raise UnsupportedError("packing_strategy='wrapped' cuts rows in the middle: use 'bfd', which keeps every row whole.")
    if args.padding_free is not None:
        return
    known = adapters.find(base_model(model).config) is not None
    args.padding_free = not has_collator and reason is None and known
    if not has_collator and not args.padding_free:
        reason = reason or f"{base_model(model).config.model_type} has no file in luthier/adapters, so nobody has tested it"
        notice_once(base_model(model), "padding", f"Batches are padded, not padding-free: {reason}.")


def pack_rows(rows: Dataset | IterableDataset, args: TrainingArguments, max_length: int | None) -> Dataset | IterableDataset:
    """Rows packed to at most ``max_length`` tokens, none of them cut; ``seq_lengths`` says where each begins."""
    if max_length is None:
        raise ValueError("packing=True needs a length to pack to: set max_length")
    how = {"num_proc": args.dataset_num_proc, "desc": "Packing"} if isinstance(rows, Dataset) else {}
    return pack_dataset(rows.select_columns(["input_ids", "labels"]), max_length, args.packing_strategy, how)
