"""Tokenizers of the kinds that real checkpoints bring, trained on the spot, and text that is hard to tokenise."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from pydoc_data import topics

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from luthier.gguf.tokenizer import PRE_TOKENIZERS

CUTS = {name: cuts for cuts, name in PRE_TOKENIZERS.items()}
SPECIALS = ["<|pad|>", "<|bos|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PIECES = [
    "Hello", " world", "  two", "   three spaces", "\t", "\n", "\n\n", "\r\n", " \n ", "don't", "I'LL",
    "they've", "we'RE", "'s", "123", "1234567", "3.14159", "1,000,000", "0x1F", "é", "naïve", "Straße",
    "ПРИВЕТ", "мир", "你好", "世界。", "日本語", "한국어", "العربية", "עברית", "हिन्दी", "ไทย", "🙂",
    "👩‍👩‍👧", "🇩🇪", "…", "—", "«»", "\u00a0", "\u200b", "\u3000", "\u0301", "a\u0308", "foo_bar",
    "CamelCase", "snake_case(x)", "==", "!=", "->", "{}[]()", "//", "/* */", "#include <x>", "\\n",
    '"quoted"', "`", "~", "http://a.b/c?d=e&f=g", "user@example.com", "...", "!!!", "?!", "€100", "½", "²",
    "ﬁ", "ǅ", "\ufeff", "\x00", "\x7f", "A", "z", "<|im_start|>", "<|im_end|>", "<|endoftext|>",
    "<|im_start|>user\n", "<tool>", "</tool>", " <tool> ", "<|not_a_token|>",
]  # fmt: skip


# words in which a cut at capitals or at combining marks shows
CASED = (
    "éÉcole", "ÉCOLE", "École", "straßeÄrger", "приветМир", "ПРИВЕТ", "e\u0301cole", "E\u0301COLE", "हिन्दी", "العَرَبِيَّة", "שָׁלוֹם",
    "ภาษาไทย", "ǅungla", "aʰB", "ABC日本語abc", " \u0301a", "ÉCOLE's", "1É2é", "camelCase", "l'École",
)  # fmt: skip


def joined(pre: str, lines: Sequence[str]) -> Tokenizer:
    """A byte-level BPE that cuts as ``pre`` does, whose merges would join every line into one token."""
    tokenizer = Tokenizer(models.BPE())
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = whole, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, min_frequency=1, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    cuts = [pre_tokenizers.Split(Regex(cut), behavior="isolated") for cut in CUTS[pre]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, whole])
    return tokenizer


@functools.cache
def difficult_lines() -> tuple[str, ...]:
    """Some four hundred lines: every piece alone, random joins of pieces, and paragraphs of English with code."""
    rng = random.Random(7)
    lines = list(PIECES)
    lines += ["".join(rng.choice(PIECES) for _ in range(rng.randint(2, 9))) for _ in range(200)]
    lines += [" ".join(rng.choice(PIECES) for _ in range(rng.randint(2, 9))) for _ in range(60)]
    lines += [topics.topics[name][:300] for name in sorted(topics.topics)[:60]]
    return tuple(lines)


def _corpus() -> list[str]:
    lines = [line.replace("\x00", "") for line in difficult_lines() if "<|" not in line]  # no SentencePiece has NUL as a piece
    return [topics.topics[name] for name in sorted(topics.topics)][:40] + lines


def byte_level(pre: str = "llama-bpe", vocab_size: int = 800, ignore_merges: bool = False, bos: bool = False) -> Tokenizer:
    """A byte-level BPE that cuts its text as the pre-tokenizer ``pre`` does, with special and added tokens."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if pre == "gpt-2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif pre == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    else:
        cuts = [pre_tokenizers.Split(Regex(cut), behavior="isolated") for cut in CUTS[pre]]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        _corpus(),
        trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("</tool>", normalized=False)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
    return tokenizer


def sentencepiece(style: str = "llama", vocab_size: int = 900) -> Tokenizer:
    """A SentencePiece BPE as converted to tokenizer.json: byte fallback, every split of a piece a merge.

    ``style``: "llama" (a space before the text), "phi-3" (the same, and special tokens swallow
    the white space behind them), "mistral" (a space by Metaspace), "gemma" (none).
    """
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    learner.train_from_iterator(_corpus(), trainers.BpeTrainer(vocab_size=vocab_size - 261, show_progress=False))
    learned = [token for token, _ in sorted(learner.get_vocab().items(), key=lambda item: item[1])]
    pieces = [piece for piece in learned if len(piece) > 1] + ["▁▁", "▁▁▁"]
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))])}
    for piece in [*pieces, *(piece for piece in learned if len(piece) == 1)]:
        vocab.setdefault(piece, len(vocab))
    merges = [(p[:i], p[i:]) for p in pieces for i in range(1, len(p)) if p[:i] in vocab and p[i:] in vocab]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if style in ("llama", "phi-3"):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif style == "mistral":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    plain = ("<unk>", "<s>", "<|endoftext|>")
    for token in ("<unk>", "<s>", "</s>", *SPECIALS[2:]):
        swallows = style == "phi-3" and token not in plain
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False, rstrip=swallows)])
    for token in ("<tool>", "</tool>"):
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=style == "phi-3", rstrip=style == "phi-3")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer
