"""Tokenizers as training needs them: a pad token of its own, one BOS, and the same special ids in model and tokenizer.

A pad token that is also the end of text is masked together with it, so the model never learns to stop; a second BOS
shifts every training row away from what the model saw in pretraining. Both run without an error.
"""

from __future__ import annotations

import re
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from luthier.model.vocab import resize_embeddings

NEW_PAD = "<|pad|>"
# Tokens of published vocabularies that exist to be unused, best first; none of them occurs in a chat.
PAD_PATTERNS = (
    r"(<\|?|\[)_?(finetune_right_)?pad(_id|_token|ding)?(\|?>|\])",
    r"<\|vision_pad\|>",
    r"(<\|?|\[)_?(reserved|unused|dummy|placeholder|extra)\w*(\|?>|\])",
)


def load_tokenizer(directory: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint directory, padding on the right."""
    try:
        # padding_side has to be given here: set later, it would not be saved
        return AutoTokenizer.from_pretrained(directory, padding_side="right", trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{directory} has no tokenizer that can be read ({error}). Copy tokenizer.json and tokenizer_config.json of the "
            "model into it."
        ) from error


def repair_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """Repair the pad token, a doubled BOS, and the special ids of ``model`` -> (tokenizer, what was changed)."""
    changes = []
    if needs_pad(tokenizer):
        changes.append(_set_pad(tokenizer, model))
    if doubles_bos(tokenizer):
        tokenizer = single_bos(tokenizer)
        changes.append(f"a text that begins with {tokenizer.bos_token!r} (as rendered chats do) no longer gets a second one")
    changes += _same_special_ids(tokenizer, model)
    return tokenizer, changes


def needs_pad(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether padding would hide a token that must be learned: none, the end of text, or one that occurs in a chat."""
    pad = tokenizer.pad_token
    return pad is None or pad in (tokenizer.eos_token, tokenizer.bos_token) or pad in _template_text(tokenizer)


def _template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    template = tokenizer.chat_template
    return "".join(template.values()) if isinstance(template, dict) else template or ""


def _set_pad(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> str:
    old = tokenizer.pad_token
    rows = model.get_input_embeddings().weight.shape[0]
    pad = _unused_token(tokenizer, rows)
    if pad is not None:
        tokenizer.pad_token = pad
    else:
        pad = NEW_PAD
        tokenizer.add_special_tokens({"pad_token": pad})
        if len(tokenizer) > rows:  # a padded vocabulary has a row for it already
            resize_embeddings(model, len(tokenizer))
    return f"pad token {pad!r} instead of {old!r}, which would hide the end of an answer from training"


def _unused_token(tokenizer: PreTrainedTokenizerBase, rows: int) -> str | None:
    """A token of the vocabulary that may be masked everywhere."""
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    template = _template_text(tokenizer)
    special = [str(token) for id, token in sorted(tokenizer.added_tokens_decoder.items()) if id < rows]
    free = [token for token in special if token not in taken and token not in template]
    for pattern in PAD_PATTERNS:
        for token in free:
            if re.fullmatch(pattern, token, re.IGNORECASE):
                return token
    unk = tokenizer.unk_token
    return unk if unk is not None and unk not in taken and unk not in template else None


def _same_special_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[str]:
    """Pad and BOS of model and generation become the tokenizer's; its EOS joins those that end a generation."""
    changes = []
    generation = model.generation_config
    for config in filter(None, (model.config.get_text_config(), model.config, generation)):
        config.pad_token_id = tokenizer.pad_token_id
        if tokenizer.bos_token_id is not None:
            config.bos_token_id = tokenizer.bos_token_id
    if tokenizer.eos_token_id is not None and generation is not None:
        stops = generation.eos_token_id
        stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
        if tokenizer.eos_token_id not in stops:
            generation.eos_token_id = [tokenizer.eos_token_id, *stops] if stops else tokenizer.eos_token_id
            changes.append(f"generation also stops at the tokenizer's {tokenizer.eos_token!r}")
    return changes


def doubles_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether encoding a text that begins with the BOS token gives two of them."""
    bos = tokenizer.bos_token
    return bos is not None and tokenizer(bos + "a").input_ids[:2] == [tokenizer.bos_token_id] * 2


class SingleBos:
    """Mixed into a tokenizer's own class: a text that already begins with BOS does not get another one."""

    def __call__(self, text=None, *args, add_special_tokens: bool = True, **kwargs):
        if add_special_tokens and _begins_with(self.bos_token, text):
            text = _without(self.bos_token, text)
        return super().__call__(text, *args, add_special_tokens=add_special_tokens, **kwargs)

    def encode(self, text, *args, add_special_tokens: bool = True, **kwargs):
        if add_special_tokens and _begins_with(self.bos_token, text):
            text = _without(self.bos_token, text)
        return super().encode(text, *args, add_special_tokens=add_special_tokens, **kwargs)

    def __reduce__(self):
        stock = type(self).__mro__[2]
        plain = stock.__new__(stock)
        plain.__dict__ = self.__dict__
        return single_bos, (plain,)


def single_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give this tokenizer (not its class) the rule that a text never begins with two BOS. What it saves stays the same."""
    if not isinstance(tokenizer, SingleBos):
        stock = type(tokenizer)
        tokenizer.__class__ = type(stock.__name__, (SingleBos, stock), {"__module__": stock.__module__})
    return tokenizer


def _begins_with(bos: str, text: object) -> bool:
    if isinstance(text, str):
        return text.startswith(bos)
    return isinstance(text, list | tuple) and any(isinstance(item, str) and item.startswith(bos) for item in text)


def _without(bos: str, text: str | list) -> str | list:
    if isinstance(text, str):
        return text.removeprefix(bos)
    return [item.removeprefix(bos) if isinstance(item, str) else item for item in text]
