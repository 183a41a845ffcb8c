"""Which chat template a workflow uses."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from luthier.data.chat import get_chat_template
from luthier.errors import UnsupportedError
from luthier.terminal import say


def with_template(
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin, name: str | None = None, system_message: str | None = None
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """The tokenizer with the template called ``name``, else its own, else chatml."""
    if name is None and tokenizer.chat_template:
        if system_message:
            raise UnsupportedError(
                "system_message needs a chat_template beside it (--chat-template NAME): this tokenizer brings a template of "
                "its own, which is not ours to write into. Or put the message into the rows, as a turn of the role system."
            )
        return tokenizer
    if name is None:
        say("The tokenizer has no chat template: chatml is used (--chat-template chooses another).")
    return get_chat_template(tokenizer, name or "chatml", system_message=system_message)
