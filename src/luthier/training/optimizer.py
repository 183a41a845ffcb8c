"""A learning rate of their own for the embeddings and the head."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel


def embedding_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """The trainable parameters of the input embeddings and the head, however they train.

    That is the whole matrix (full fine-tuning, ``modules_to_save``), a LoRA on it, or rows of it (trainable tokens). A tied
    head counts once.
    """
    found = {}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            found.update({id(parameter): parameter for parameter in module.parameters() if parameter.requires_grad})
    return list(found.values())


def require_embeddings(model: PreTrainedModel, learning_rate: float) -> None:
    """Raise ``ValueError`` if ``learning_rate`` would apply to nothing."""
    if not embedding_parameters(model):
        raise ValueError(
            f"embedding_learning_rate={learning_rate} applies to nothing: neither the embeddings nor the head train. Train "
            "them with get_peft_model(..., modules_to_save=['embed_tokens', 'lm_head']), or leave embedding_learning_rate out."
        )


def set_embedding_learning_rate(optimizer: torch.optim.Optimizer, model: PreTrainedModel, learning_rate: float) -> None:
    """Move embeddings and head into parameter groups of ``learning_rate``; every other setting of their group stays.

    Call it before the scheduler is made: a scheduler scales the rate that each group has then.
    """
    embeddings = {id(parameter) for parameter in embedding_parameters(model)}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in embeddings]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in embeddings]
            optimizer.add_param_group({**group, "params": moved, "lr": learning_rate})
            embeddings -= {id(parameter) for parameter in moved}
    if embeddings:
        raise ValueError(
            f"embedding_learning_rate={learning_rate} cannot be used with {type(optimizer).__name__}: its parameter groups do "
            "not hold the embeddings. Choose another optim, such as 'adamw_torch'."
        )
