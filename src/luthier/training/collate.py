"""Whether rows may share a sequence, and how they are put into one.

A padding-free batch, and a packed row, hold several rows end to end; ``position_ids`` that start again at 0 mark where
each begins. A model keeps them apart only if all of its layers look at that mark, which is tried, not believed:
transformers 5.17 builds the masks of gpt_oss, opt, falcon and others without it, and their rows see each other.
"""

from __future__ import annotations

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel
from transformers.distributed.fsdp import is_fsdp_enabled
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from luthier.errors import UnsupportedError
from luthier.model.accelerate import base_model
from luthier.terminal import notice_once
from luthier.training.arguments import TrainingArguments

SEPARABLE_LAYERS = {"full_attention", "sliding_attention"}
FIRST, SECOND = (5, 6, 7, 8, 9, 10), (11, 12, 13, 14, 15)  # token ids that every vocabulary has
APART = 0.01  # of what the first row changes in the second where both are one row: rounding is far below, a leak near 1


def mixes_rows(model: PreTrainedModel) -> str | None:
    """Why rows of one sequence would see each other in ``model``; None if they do not.

    What the config tells comes first; then two tiny rows are tried on the model itself, except where its weights are
    spread over processes and cannot be.
    """
    base = base_model(model)
    config = base.config.get_text_config()
    other_layers = set(getattr(config, "layer_types", None) or ()) - SEPARABLE_LAYERS
    if base._is_stateful or other_layers:
        kinds = ", ".join(sorted(other_layers)) or "recurrent"
        return f"{config.model_type} has layers that do not tell the rows of one sequence apart ({kinds})"
    if config is not base.config:
        return f"{base.config.model_type} takes images, whose tokens have positions of their own"
    if not is_sharded() and leak(base) > APART:
        implementation = config._attn_implementation
        return f"{config.model_type} with attn_implementation={implementation!r} lets rows of one sequence see each other"
    return None


def is_sharded() -> bool:
    """Whether this run spreads the weights over processes (FSDP, DeepSpeed)."""
    return is_fsdp_enabled() or PartialState().distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


@torch.no_grad()
def leak(base: PreTrainedModel) -> float:
    """How much one row changes the next one in a padding-free batch: 0 not at all, 1 as if both were one row.

    The larger of two differences in the logits of the second row, over the difference that the first row makes where it
    does stand before it: to the second row behind another first row, and to the second row alone.
    """

    def second(*rows: tuple[int, ...], joined: bool = False) -> torch.Tensor:
        rows = (sum(rows, ()),) if joined else rows
        batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([{"input_ids": list(row)} for row in rows])
        inputs = {name: value.to(base.device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        del inputs["labels"]
        return base(**inputs, use_cache=False).logits[0, -len(SECOND) :].float()

    was_training = base.training
    base.eval()
    try:
        alone, behind, behind_other = second(SECOND), second(FIRST, SECOND), second(FIRST[::-1], SECOND)
        as_one = (second(FIRST, SECOND, joined=True) - alone).norm()
        return float(torch.maximum((behind - behind_other).norm(), (behind - alone).norm()) / as_one)
    finally:
        base.train(was_training)


def settle_padding(args: TrainingArguments, model: PreTrainedModel, has_collator: bool) -> None:
    """Decide ``args.padding_free`` where the user left it open, and refuse what would train wrong.

    Raises:
        UnsupportedError: packing or padding-free batches for a model that would mix the rows, or with a data collator.
    """
    wanted = "packing" if args.packing else "padding_free" if args.padding_free else None
    if args.packing and args.packing_strategy == "wrapped":
        raise UnsupportedError("packing_strategy='wrapped' cuts rows in the middle: use 'bfd', which keeps every row whole.")
    if wanted and has_collator:
        raise UnsupportedError(f"{wanted}=True builds its own batches: leave out data_collator, or {wanted}.")
    if args.padding_free is None and args.per_device_train_batch_size == 1:
        args.padding_free = False  # one row has nothing to be padded to
    if has_collator or (args.padding_free is False and not args.packing):
        args.padding_free = False
        return
    reason = mixes_rows(model)
    if wanted and reason:
        raise UnsupportedError(f"{wanted}=True would train wrong: {reason}. Leave {wanted} out; batches are then padded.")
    if args.padding_free is None:
        args.padding_free = reason is None
        if reason:
            notice_once(base_model(model), "padding", f"Batches are padded, not padding-free: {reason}.")


def pack_rows(rows: Dataset | IterableDataset, args: TrainingArguments, max_length: int | None) -> Dataset | IterableDataset:
    """Rows packed to at most ``max_length`` tokens, none of them cut; ``seq_lengths`` says where each begins."""
    if max_length is None:
        raise ValueError("packing=True needs a length to pack to: set max_length")
    how = {"num_proc": args.dataset_num_proc, "desc": "Packing"} if isinstance(rows, Dataset) else {}
    return pack_dataset(rows.select_columns(["input_ids", "labels"]), max_length, args.packing_strategy, how)
