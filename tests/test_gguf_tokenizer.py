"""Exported tokenizers against the originals, with llama.cpp doing the tokenising."""

import itertools
import json

import pytest
import tiny
from gguf_tokenizers import CASED, CUTS, byte_level, difficult_lines, joined, sentencepiece
from llama_oracle import Llama
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from luthier.errors import UnsupportedError
from luthier.gguf import GGUFFile, convert_to_gguf
from luthier.gguf.tokenizer import fix_sentencepiece_gguf, tokenizer_metadata
from luthier.proof.export import verify
from luthier.proof.gguf_tokenizer import CUTS as CUTS_OF_FILES
from luthier.proof.gguf_tokenizer import PUBLISHED, GGUFTokenizer
from luthier.proof.tokens import CAPITALS, COMPOSED

VOCAB = 1024
TEMPLATE = "{%- for m in messages -%}\n  {{- m.role }}: {%- if m.role == 'assistant' -%}{%- generation -%}{{- m.content }}é{%- endgeneration -%}{%- endif -%}\n{%- endfor -%}\n"  # noqa: E501


def save_tokenizer(tokenizer, directory, **options):
    bos = "<|bos|>" if tokenizer.token_to_id("<|bos|>") is not None else "<s>"
    options = {"bos_token": bos, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", **options}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
    fast.save_pretrained(directory)
    return fast


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A function: a tokenizer with a small model around it -> its GGUF file."""
    model_dir = tmp_path_factory.mktemp("model")
    config = tiny.tiny_config("qwen3")
    config.vocab_size = VOCAB
    AutoModelForCausalLM.from_config(config).save_pretrained(model_dir)

    def convert(tokenizer, chat_template=None, **options):
        directory = tmp_path_factory.mktemp("tokenizer")
        for file in ("config.json", "model.safetensors"):
            (directory / file).symlink_to(model_dir / file)
        save_tokenizer(tokenizer, directory, chat_template=chat_template, **options)
        return convert_to_gguf(directory, directory / "x.gguf", "q8_0")[0]

    return convert


def differences(tokenizer, file, lines):
    with Llama(file) as llama:
        found = {line: llama.tokenize(line) for line in lines}
    return [(line, tokenizer.encode(line).ids, found[line]) for line in lines if found[line] != tokenizer.encode(line).ids]


@pytest.mark.parametrize("pre", CUTS)
def test_byte_level_tokens_are_equal(pre, export):
    tokenizer = byte_level(pre)
    assert differences(tokenizer, export(tokenizer), difficult_lines()) == []


def test_whole_words_and_bos(export):
    """Llama 3: words that are in the vocabulary are taken whole, and every text begins with BOS."""
    tokenizer = byte_level("llama-bpe", ignore_merges=True, bos=True)
    file = export(tokenizer)
    assert GGUFFile(file).metadata["tokenizer.ggml.pre"] == "llama-bpe"
    assert differences(tokenizer, file, difficult_lines()) == []


def with_unmade_words(pre, ignore_merges):
    """A tokenizer with two words in its vocabulary that its merges do not make."""
    state = json.loads(byte_level(pre, ignore_merges=ignore_merges).to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < 800]
    state["model"]["vocab"] |= {"Ġworldwide": 800, "HelloThere": 801}
    return Tokenizer.from_str(json.dumps(state))


@pytest.mark.parametrize("pre, whole", [("tekken", True), ("llama-bpe", True), ("llama-bpe", False), ("qwen2", False)])
def test_words_that_no_merge_makes(pre, whole, export, recwarn):
    tokenizer = with_unmade_words(pre, whole)
    assert differences(tokenizer, export(tokenizer), ["a worldwide web", "HelloThere", "Hello there"]) == []
    assert not any("merges make" in str(warning.message) for warning in recwarn)


@pytest.mark.parametrize("pre, whole", [("tekken", False), ("qwen2", True)])
def test_words_that_llama_cpp_cuts_otherwise_are_named(pre, whole, export):
    with pytest.warns(UserWarning, match="2 tokens such as 'Ġworldwide' are not what the tokenizer's merges make"):
        file = export(with_unmade_words(pre, whole))
    with Llama(file) as llama:
        assert GGUFTokenizer(GGUFFile(file)).encode("a worldwide web") == llama.tokenize("a worldwide web")


SPELLED = {  # as tiktoken's converters write it, with every case; as tiktoken itself writes GPT-4's; as BLOOM's file does
    "qwen2": CUTS["qwen2"][0].replace(
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    ),
    "llama-bpe": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "bloom": r" ?[^(\s|[.,!?…。，、।۔،])]+",
}


@pytest.mark.parametrize("pre", SPELLED)
def test_the_spelling_of_a_regex_does_not_matter(pre, export):
    """And what the pattern finds may be what is kept."""
    tokenizer = byte_level(pre, ignore_merges=pre == "llama-bpe")
    behavior = {"behavior": "isolated"} if pre == "bloom" else {"behavior": "removed", "invert": True}
    cut = pre_tokenizers.Split(Regex(SPELLED[pre]), **behavior)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    file = export(tokenizer)
    assert GGUFFile(file).metadata["tokenizer.ggml.pre"] == pre
    assert differences(tokenizer, file, difficult_lines()) == []


@pytest.mark.parametrize("pre", [pre for pre in CUTS if pre != "gpt-2"])
def test_capitals_and_marks_are_cut_as_llama_cpp_cuts_them(pre, export):
    """Where that is not how the tokenizer does it, the proof knows, and says it of the user's own texts."""
    lines = [*CASED, *map("".join, itertools.pairwise(CASED))]
    tokenizer = joined(pre, lines)
    file = export(tokenizer)
    rebuilt = GGUFTokenizer(GGUFFile(file))
    with Llama(file) as llama:
        assert [line for line in lines if rebuilt.encode(line) != llama.tokenize(line)] == []
    published = GGUFTokenizer(GGUFFile(file), CUTS_OF_FILES | PUBLISHED)
    assert [line for line in lines if published.encode(line) != tokenizer.encode(line).ids] == []
    differ = [line for line in lines if rebuilt.encode(line) != tokenizer.encode(line).ids]
    assert bool(differ) == (pre in PUBLISHED)
    proof = verify(file, file.parent, ["plain words", *differ])
    assert not proof.failures
    assert (CAPITALS in proof.notes) == (pre in PUBLISHED)


@pytest.mark.parametrize("style", ["llama", "phi-3", "gemma"])
def test_sentencepiece_tokens_are_equal(style, export):
    tokenizer = sentencepiece(style)
    lines = difficult_lines()
    if style == "phi-3":  # of the white space behind a special token, llama.cpp swallows ASCII only
        lines = [line for line in lines if "\u00a0" not in line and "\u3000" not in line]
    assert differences(tokenizer, export(tokenizer), lines) == []


def test_sentencepiece_with_metaspace(export):
    """llama.cpp puts a space before any text that does not begin with a special token; this one not before a space."""
    tokenizer = sentencepiece("mistral")
    lines = [line for line in difficult_lines() if not line.startswith(" ") and "<" not in line]
    assert len(lines) > 150
    assert differences(tokenizer, export(tokenizer), lines) == []


def test_special_tokens(export):
    tokenizer = byte_level(bos=True)
    file = export(tokenizer, chat_template=TEMPLATE)
    with Llama(file) as llama:
        assert [llama.special(name) for name in ("bos", "eos", "pad")] == [1, 2, 2]
        assert llama.adds_bos() and llama.ends_generation(2) and not llama.ends_generation(1)
        assert llama.vocab_size == VOCAB
        assert llama.tokenize("<|bos|>", special=False) == [1] and llama.tokenize("<tool>", special=False) == [800]
    metadata = GGUFFile(file).metadata
    assert metadata["tokenizer.ggml.tokens"][-1] == f"[PAD{VOCAB - 1}]"
    assert metadata["tokenizer.ggml.token_type"][[0, 5, 800, VOCAB - 1]].tolist() == [3, 1, 4, 5]
    assert not metadata["tokenizer.ggml.add_eos_token"]


def test_no_bos_is_added_where_the_tokenizer_adds_none(export):
    with Llama(export(byte_level())) as llama:
        assert not llama.adds_bos()


def test_the_chat_template_is_embedded_as_it_renders(export):
    file = export(byte_level(), chat_template=TEMPLATE)
    with Llama(file) as llama:
        embedded = llama.chat_template()
    assert "generation" not in embedded
    fast = PreTrainedTokenizerFast(tokenizer_object=byte_level())
    messages = [{"role": "user", "content": " hi \n"}, {"role": "assistant", "content": "ho"}]
    render = [fast.apply_chat_template(messages, chat_template=text, tokenize=False) for text in (TEMPLATE, embedded)]
    assert render[0] == render[1]


def test_named_templates_are_embedded_too(export):
    file = export(byte_level(), chat_template={"default": "{{ messages }}", "tool_use": "{{ tools }}"})
    metadata = GGUFFile(file).metadata
    assert metadata["tokenizer.chat_template"] == "{{ messages }}"
    assert metadata["tokenizer.chat_template.tool_use"] == "{{ tools }}"
    assert metadata["tokenizer.chat_templates"] == ["tool_use"]


@pytest.mark.parametrize("text, note", [("Ve\u0301lo", True), ("V\u00e9lo", False)])
def test_accents_written_apart_are_noted(text, note, export):
    tokenizer = byte_level("qwen2")
    tokenizer.normalizer = normalizers.NFC()
    file = export(tokenizer)
    proof = verify(file, file.parent, [text])
    assert not proof.failures and (COMPOSED in proof.notes) == note


def test_special_tokens_of_older_files(tmp_path):
    """bos_token as a dictionary, and the special tokens in a file of their own."""
    save_tokenizer(byte_level(), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|bos|>", "eos_token": "<|endoftext|>"}))
    metadata = tokenizer_metadata(tmp_path, VOCAB)
    assert metadata["tokenizer.ggml.eos_token_id"] == 4 and metadata["tokenizer.ggml.bos_token_id"] == 1


def test_more_tokens_than_embeddings_are_refused(tmp_path):
    save_tokenizer(byte_level(), tmp_path)
    with pytest.raises(ValueError, match="'</tool>' with the id 801, but the model has 700 rows"):
        tokenizer_metadata(tmp_path, 700)


def broken(change):
    state = json.loads(byte_level().to_str())
    change(state)
    return state


def spaced(change):
    state = json.loads(sentencepiece("llama").to_str())
    change(state)
    return state


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


def replaces(text, content):
    return {"type": "Replace", "pattern": {"String": text}, "content": content}


def splits(regex):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def write_state(state, directory):
    (directory / "tokenizer.json").write_text(json.dumps(state))
    bos = {"bos_token": "<s>"} if "<s>" in state["model"]["vocab"] else {}
    (directory / "tokenizer_config.json").write_text(json.dumps(bos))


def adds(tokenizer, *tokens, **conditions):
    tokenizer.add_tokens([AddedToken(token, **{"normalized": False, **conditions}) for token in tokens])
    return json.loads(tokenizer.to_str())


@pytest.mark.parametrize(
    "state, message",
    [
        (broken(lambda s: s["model"]["vocab"].update({"[EOS]": 900})), r"takes \[EOS\] for control tokens"),
        (broken(lambda s: s["model"]["vocab"].pop("Ā")), "no token for 1 bytes of rare letters"),
        (adds(byte_level(), "AB", "BCD"), "overlap: of ABCD llama.cpp takes the longest first"),
        (adds(byte_level(), "a <tool> b", normalized=True), "overlap: of a <tool> b"),
        (adds(sentencepiece("llama"), "<call>", normalized=True), "looks for <call> behind spaces only"),
        (spaced(lambda s: s.update(normalizer=None, pre_tokenizer=METASPACE)), "first word of a text only"),
        (spaced(lambda s: s["model"]["merges"].sort()), "not in a row"),
        (adds(sentencepiece("gemma"), "x▁"), "1 tokens such as 'x▁' can be made in llama.cpp of halves"),
        (
            spaced(lambda s: s["model"].update(ignore_merges=True, vocab=s["model"]["vocab"] | {"t▁t▁t": 990})),
            "'t▁t▁t' are not what",
        ),
    ],
)
def test_what_llama_cpp_finds_elsewhere_is_said(state, message, tmp_path):
    write_state(state, tmp_path)
    with pytest.warns(UserWarning, match=message):
        tokenizer_metadata(tmp_path, VOCAB)


def test_runs_of_white_space_do_not_overlap(tmp_path, recwarn):
    state = adds(byte_level(), *(" " * n for n in range(2, 32)), *("\t" * n for n in range(2, 10)))
    write_state(state, tmp_path)
    tokenizer_metadata(tmp_path, VOCAB)
    assert not recwarn.list


def test_one_id_for_two_tokens(tmp_path):
    state = broken(lambda s: s["added_tokens"][-1].update(id=700))
    write_state(state, tmp_path)
    with pytest.raises(ValueError, match="the id 700 stands for .* and '</tool>'"):
        tokenizer_metadata(tmp_path, VOCAB)


def test_metaspace_of_older_files(tmp_path):
    """Without prepend_scheme it always puts a space before a text."""
    step = {"type": "Metaspace", "replacement": "▁", "split": False, "add_prefix_space": True}
    write_state(spaced(lambda s: s.update(normalizer=None, pre_tokenizer=step)), tmp_path)
    assert tokenizer_metadata(tmp_path, VOCAB)["tokenizer.ggml.add_space_prefix"]


def test_overlapping_tokens_are_found_as_llama_cpp_finds_them(export):
    """The longest first, wherever they stand."""
    tokenizer = byte_level()
    adds(tokenizer, "AB", "BCD", "foo", "oobar")
    with pytest.warns(UserWarning, match="overlap"):
        file = export(tokenizer)
    lines = ["xABCDy", "foobar", "fooobar AB<tool>BCD", "<|im_start|>ABCD"]
    rebuilt = GGUFTokenizer(GGUFFile(file))
    with Llama(file) as llama:
        found = [llama.tokenize(line) for line in lines]
    assert [rebuilt.encode(line) for line in lines] == found
    assert found != [tokenizer.encode(line).ids for line in lines]


def test_added_runs_of_spaces_are_merged_where_the_tokenizer_merges_them(export):
    """Gemma: they are added tokens as they stand, and merges make them of spaces."""
    tokenizer = sentencepiece("gemma")
    adds(tokenizer, "▁▁", "▁▁▁")
    lines = [line for line in difficult_lines() if "▁" not in line] + [" " * n + "two" for n in range(1, 20)]
    file = export(tokenizer)
    assert differences(tokenizer, file, lines) == []
    metadata = GGUFFile(file).metadata
    assert metadata["tokenizer.ggml.token_type"][metadata["tokenizer.ggml.tokens"].index("▁▁")] == 1


@pytest.mark.parametrize("style", ["llama", "gemma"])
def test_the_unknown_token_is_found_whole(style, export):
    file = export(sentencepiece(style))
    with Llama(file) as llama:
        assert GGUFTokenizer(GGUFFile(file)).encode("a<unk> b") == llama.tokenize("a<unk> b")


def test_tokens_that_only_the_configuration_has(tmp_path):
    """transformers adds them, and takes their conditions from there."""
    save_tokenizer(byte_level(), tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["added_tokens"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"801": {"content": "<late>", "special": True, "normalized": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"extra_special_tokens": ["<|never|>"]}))
    assert AutoTokenizer.from_pretrained(tmp_path)("<late>")["input_ids"] == [801]
    with pytest.warns(UserWarning, match=r"names <\|never\|>, which tokenizer.json does not have"):
        metadata = tokenizer_metadata(tmp_path, VOCAB)
    assert metadata["tokenizer.ggml.tokens"][801] == "<late>" and metadata["tokenizer.ggml.token_type"][801] == 3


def sentence_cut_at_spaces():
    tokenizer = sentencepiece("mistral")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    return tokenizer


def post_processor(*around):
    tokens = [{"id": token, "ids": [i], "tokens": [token]} for token, i in (("<|bos|>", 1), ("<|im_start|>", 3))]
    single = [*({"SpecialToken": {"id": token, "type_id": 0}} for token in around), {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token["id"]: token for token in tokens},
    }


@pytest.mark.parametrize("pad", ["<|endoftext|>", "<|pad|>"])
def test_padding_that_a_file_remembers_is_no_eos(pad, tmp_path):
    """As transformers saves it after a call with padding="max_length"."""
    fast = save_tokenizer(byte_level(bos=True), tmp_path, pad_token=pad)
    fast("a", padding="max_length", max_length=8)
    fast.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["padding"] is not None
    metadata = tokenizer_metadata(tmp_path, VOCAB)
    assert metadata["tokenizer.ggml.add_bos_token"] and not metadata["tokenizer.ggml.add_eos_token"]


def with_conditions(tokenizer, **conditions):
    tokenizer.add_tokens([AddedToken("<call>", normalized=False, **conditions)])
    return tokenizer


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_conditions_of_added_tokens_that_llama_cpp_does_not_know_are_said(flag, tmp_path):
    save_tokenizer(with_conditions(byte_level(), **{flag: True}), tmp_path)
    with pytest.warns(UserWarning, match=f"{flag}=True for <call>"):
        tokenizer_metadata(tmp_path, VOCAB)


def test_what_phi_3_does_is_not_said(tmp_path, recwarn):
    save_tokenizer(sentencepiece("phi-3"), tmp_path)
    tokenizer_metadata(tmp_path, VOCAB)
    assert not recwarn.list


def trained_metaspace(split):
    """As somebody makes one with the tokenizers library: one merge a token, where SentencePiece has one a pair of halves."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=split)
    alphabet = ["<unk>", "<s>", "<|endoftext|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    lines = [line for line in difficult_lines() if "<" not in line]
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=900, special_tokens=alphabet, show_progress=False))
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # the bytes are no special tokens
    return Tokenizer.from_str(json.dumps(state))


def test_merges_that_llama_cpp_adds_are_said(tmp_path):
    save_tokenizer(trained_metaspace(split=False), tmp_path)
    with pytest.warns(UserWarning, match="can be made in llama.cpp of halves that this tokenizer does not merge"):
        tokenizer_metadata(tmp_path, VOCAB)


@pytest.mark.parametrize(
    "state, message",
    [
        (broken(lambda s: s.update(post_processor=post_processor("<|bos|>", "<|bos|>"))), "nothing around a text but one BOS"),
        (broken(lambda s: s.update(post_processor=post_processor("<|im_start|>"))), "change its post_processor"),
        (broken(lambda s: s["pre_tokenizer"]["pretokenizers"].reverse()), "once more after ByteLevel"),
        (broken(lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed")), "this step.*Removed"),
        (json.loads(sentence_cut_at_spaces().to_str()), "cuts its text at every space, and has '▁▁'"),
        (json.loads(Tokenizer(models.Unigram([("a", 0.0)], 0, False)).to_str()), "kind Unigram"),
        (json.loads(Tokenizer(models.WordPiece({"a": 0})).to_str()), "kind WordPiece"),
        (broken(lambda s: s["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+")), "no name for the way.*w"),
        (broken(lambda s: s["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True)), "add_prefix_space"),
        (broken(lambda s: s.update(normalizer={"type": "Lowercase"})), "normalizer.*Lowercase"),
        (broken(lambda s: s.update(pre_tokenizer={"type": "Whitespace"})), "without byte_fallback"),
        (broken(lambda s: s["model"].update(dropout=0.5)), "dropout 0.5"),
        (broken(lambda s: s["model"].update(end_of_word_suffix="</w>")), "end_of_word_suffix '</w>'"),
        (broken(lambda s: s["model"].update(continuing_subword_prefix="##")), "continuing_subword_prefix"),
        (broken(lambda s: s["model"]["vocab"].pop("Ł")), r"no token for 1 of 256 bytes \(Ł"),
        (spaced(lambda s: s["model"]["vocab"].pop("<0xF0>")), "no token <0xF0>"),
        (spaced(lambda s: s["normalizer"]["normalizers"][0].update(prepend="x")), "this step.*Prepend"),
        (spaced(lambda s: s["normalizer"]["normalizers"].append(replaces("’", "'"))), "this step.*’"),
        (spaced(lambda s: s["normalizer"]["normalizers"].pop()), "does not write a space"),
        (spaced(lambda s: s.update(pre_tokenizer=splits("\\d"))), "this step.*Split"),
        (spaced(lambda s: s.update(pre_tokenizer=METASPACE | {"replacement": "_"})), "this step.*Metaspace"),
    ],
)
def test_other_tokenizers_are_refused_by_name(state, message, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UnsupportedError, match=message):
        tokenizer_metadata(tmp_path, VOCAB)


def test_a_directory_without_tokenizer_json(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json does not exist"):
        tokenizer_metadata(tmp_path, VOCAB)


def test_nothing_has_to_be_fixed(tmp_path, capsys):
    save_tokenizer(sentencepiece("llama"), tmp_path)
    fix_sentencepiece_gguf(tmp_path)
    assert "tokenizer.model is not read" in capsys.readouterr().err
