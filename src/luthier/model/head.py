"""The language-model head that does not materialise logits.

In training mode ``model(input_ids, labels=...)`` gives the loss through ops.linear_cross_entropy; its output's
``logits`` are computed when somebody reads them. Without labels, or in eval mode, the stock forward runs.

The stock forward does everything else: it is called for the logits of no position at all, and what its backbone gave is
caught on the way. So whatever a family's forward does (images, router losses, extra outputs) stays as it is.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import ModelOutput

from luthier.adapters.spec import Head, Spec
from luthier.model.backbone import cache_of
from luthier.model.read_layer import is_hooked, unwrapped
from luthier.ops.linear_cross_entropy import CHUNK_BYTES, linear_cross_entropy, shape_logits
from luthier.ops.unchanged import Unchanged

WIDE = 1 << 17  # the vocabulary of a head that says nothing of its own


class LazyLogits:
    """Stands for logits inside an output until they are read. It is no tensor: what maps over tensors passes it by.

    They have a gradient, and run in autocast, if they had where the output was made, wherever they are read.
    """

    def __init__(self, hidden: Tensor, lm_head: nn.Module, shaping: dict) -> None:
        self.hidden, self.lm_head, self.shaping = hidden, lm_head, shaping
        self.trained = Unchanged([parameter for parameter in lm_head.parameters() if parameter.requires_grad])
        device = hidden.device.type
        self.with_grad = torch.is_grad_enabled()
        self.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

    def compute(self) -> Tensor:
        if not self.trained.are_unchanged:
            warnings.warn(
                "Logits are computed when they are first read, and the head has changed since the forward: these are the new "
                "head's. Read output.logits before the optimizer's step.",
                UserWarning,
                stacklevel=3,
            )
        modes = torch.inference_mode(False), torch.set_grad_enabled(self.with_grad), torch.autocast(*self.autocast)
        with modes[0], modes[1], modes[2]:
            return shape_logits(self.lm_head(self.hidden), **self.shaping)


class LazyOutput:
    """Mixed into a stock ModelOutput class: ``output.logits``, ``output["logits"]``, ``output[1]`` and ``to_tuple()``
    compute the logits; ``items()`` and tree-maps see the placeholder, so that a wrapper does not compute them by accident.
    """

    @property
    def logits(self) -> Tensor | None:
        value = self.__dict__.get("logits")
        if isinstance(value, LazyLogits):
            value = self.logits = value.compute()
        return value

    @logits.setter
    def logits(self, value: Tensor | LazyLogits | None) -> None:
        self.__dict__["logits"] = value

    def __getitem__(self, key):
        if isinstance(key, slice):
            return tuple(self[name] for name in list(self.keys())[key])
        name = list(self.keys())[key] if isinstance(key, int) else key
        return self.logits if name == "logits" else super().__getitem__(name)

    def get(self, key: str, default: object = None) -> object:
        return self[key] if key in self.keys() else default

    def __reduce__(self):  # what is pickled or copied is the stock output, with its logits
        return _rebuild, (type(self).__mro__[2], {name: self[name] for name in self.keys()})


def _rebuild(stock: type[ModelOutput], fields: dict) -> ModelOutput:
    return stock(**fields)


@functools.cache
def lazy_output_class(stock: type[ModelOutput]) -> type[ModelOutput]:
    """A subclass of a stock output class whose logits may be a placeholder."""
    return type(stock.__name__, (LazyOutput, stock), {"__module__": stock.__module__, "__qualname__": stock.__qualname__})


def head_class_members(stock: type[PreTrainedModel], spec: Spec) -> dict:
    """The methods that make a subclass of a model class (LlamaForCausalLM) compute its loss here."""

    @functools.wraps(stock.forward)  # trainers and generate read its signature
    def forward(self, *args, **kwargs):
        return training_forward(self, stock, spec, args, kwargs)

    return {"forward": forward}


def training_forward(model: PreTrainedModel, stock: type[PreTrainedModel], spec: Spec, args: tuple, kwargs: dict):
    """``stock.forward(model, *args, **kwargs)``, with the loss computed chunk by chunk where there is one to compute."""
    call = _by_name(stock, model, args, kwargs)
    labels = call.get("labels")
    if model.training and torch.is_grad_enabled() and call.get("use_cache") is None and cache_of(call) is None:
        call["use_cache"] = False  # a cache would keep every key and value alive, and turn packed rows into one
    usual_loss = model.loss_function is ForCausalLMLoss and isinstance(call.get("logits_to_keep", 0), int)
    if not model.training or labels is None or call.get("logits_to_keep") or not usual_loss:
        return stock.forward(model, **call)
    if not labels.numel():
        raise ValueError(f"The batch holds no token: its labels are of shape {tuple(labels.shape)}. Leave it out.")

    loss_arguments = {key: call.pop(key, None) for key in ("labels", "shift_labels", "num_items_in_batch")}
    ignore_index, return_dict = call.pop("ignore_index", -100), call.pop("return_dict", None)
    call["logits_to_keep"] = torch.empty(0, dtype=torch.long, device=labels.device)
    router = call.get("output_router_logits")
    counts_tokens = model.config.output_router_logits if spec.mlp == "experts" and router is None else router
    # a mask tells packed positions from others, and the caller may look at what padding gives
    asks_more = call.get("position_ids") is not None or call.get("output_hidden_states") or call.get("output_attentions")
    causal_text = spec.vision is None and not counts_tokens and cache_of(call) is None
    if causal_text and loss_arguments["shift_labels"] is None and not asks_more:
        call["attention_mask"] = needed_mask(call.get("attention_mask"), labels, ignore_index)
    with _caught_output(model.base_model) as caught:
        output = stock.forward(model, **call, return_dict=True)
    backbone = caught.pop()
    hidden = backbone["last_hidden_state"] if isinstance(backbone, ModelOutput) else backbone[0]

    shaping = head_values(model.config.get_text_config(), spec.head)
    lm_head = model.get_output_embeddings()
    loss = causal_loss(hidden, lm_head, shaping, **loss_arguments, ignore_index=ignore_index)
    if output.get("aux_loss") is not None:
        loss = loss + model.router_aux_loss_coef * output["aux_loss"].to(loss.device)
    found = {**dict(output.items()), "loss": loss, "logits": LazyLogits(hidden, lm_head, shaping)}
    output = lazy_output_class(type(output))(**found)
    wants_tuple = return_dict is False or (return_dict is None and not model.config.return_dict)
    return output.to_tuple() if wants_tuple else output


def needed_mask(mask: Tensor | None, labels: Tensor, ignore_index: int) -> Tensor | None:
    """The attention mask, or None if it changes nothing that the loss sees: padding on the right, without labels.

    No token attends to what stands to its right, so causal attention without a mask, which has the fastest kernels, gives
    every position that counts the same. (Costs one synchronisation, as looking for padding in the mask does anyway.)
    """
    if not isinstance(mask, Tensor) or mask.shape != labels.shape:
        return mask
    seen = mask.bool()
    on_the_right = (seen[:, 1:] <= seen[:, :-1]).all() & seen[:, 0].all()
    return None if bool(on_the_right & ((labels == ignore_index) | seen).all()) else mask


def causal_loss(
    hidden: Tensor,
    lm_head: nn.Module,
    shaping: dict,
    labels: Tensor,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """transformers' ForCausalLMLoss of ``lm_head(hidden)``: fp32 scalar, hidden (B, T, D), labels (B, T).

    The mean over valid labels, or their sum over ``num_items_in_batch``; a differentiable zero where none is valid.
    """
    targets = shift_labels
    if targets is None:
        targets = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    device = next(lm_head.parameters()).device
    hidden, targets = hidden.to(device), targets.to(device)
    linear = plain_linear(lm_head)
    if linear is None:
        total = _loss_through_module(hidden, lm_head, targets, shaping, ignore_index)
    else:
        total = linear_cross_entropy(
            hidden, _whole(linear.weight), targets, _whole(linear.bias), **shaping, ignore_index=ignore_index
        )
    if num_items_in_batch is None:
        num_items_in_batch = (targets != ignore_index).sum().clamp(min=1)
    elif isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(device)
    return total / num_items_in_batch


def head_values(config, head: Head) -> dict:
    """The numbers that shape this model's logits, by the names of ops.linear_cross_entropy."""
    softcap = getattr(config, head.softcap) if head.softcap else None
    scale = getattr(config, head.scale) if head.scale else 1.0
    return {"softcap": softcap, "scale": scale / getattr(config, head.divisor) if head.divisor else scale}


def plain_linear(lm_head: nn.Module) -> nn.Linear | None:
    """The linear layer that a head is, also one trained through modules_to_save; None if its call does more than that."""
    if is_hooked(lm_head) or nn.modules.module._has_any_global_hook():
        return None
    lm_head = unwrapped(lm_head)
    return lm_head if type(lm_head) is nn.Linear and not is_hooked(lm_head) else None


def _loss_through_module(hidden: Tensor, lm_head: nn.Module, targets: Tensor, shaping: dict, ignore_index: int) -> Tensor:
    """The same sum for any head (LoRA, quantised, hooked): its chunks are computed again in the backward."""

    def chunk_loss(chunk: Tensor, target: Tensor) -> Tensor:
        logits = shape_logits(lm_head(chunk).float(), **shaping)
        return nn.functional.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")

    index = (targets.reshape(-1) != ignore_index).nonzero().squeeze(1)
    width = getattr(getattr(lm_head, "original_module", lm_head), "out_features", WIDE)
    rows = max(1, CHUNK_BYTES // (4 * width))
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    total = hidden.sum().float() * 0.0  # keeps the graph where no target is valid
    for part in index.split(rows):
        total = total + checkpoint(chunk_loss, flat[part], targets[part], use_reentrant=False)
    return total


@contextlib.contextmanager
def _caught_output(backbone: nn.Module) -> Iterator[list]:
    """What ``backbone`` returns while the context is open, in a list."""
    caught: list = []
    handle = backbone.register_forward_hook(lambda module, args, output: caught.append(output))
    try:
        yield caught
    finally:
        handle.remove()


def _by_name(stock: type, model: nn.Module, args: tuple, kwargs: dict) -> dict:
    """All arguments of a call of ``stock.forward`` by their names."""
    signature = _signature(stock)
    arguments = dict(signature.bind(model, *args, **kwargs).arguments)
    arguments.pop("self")
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    return arguments


@functools.cache
def _signature(stock: type) -> inspect.Signature:
    return inspect.signature(stock.forward)


def _whole(parameter: Tensor | None) -> Tensor | None:
    """A parameter that FSDP2 has sharded, gathered; any other as it is."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
