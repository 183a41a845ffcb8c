"""llama.cpp as a test oracle, through the C library inside the ``xllamacpp`` wheel. Never used at run time.

Parameter structs are passed as opaque blocks of bytes: only the few fields that the tests set are named, by offset, and
their defaults are checked, so a llama.cpp with another layout fails here and not by a wrong number.
"""

from __future__ import annotations

import ctypes as c
import functools
from pathlib import Path

import numpy as np
import xllamacpp


class Params(c.Structure):
    _fields_ = [("data", c.c_uint8 * 1024)]

    def set(self, offset: int, default: int, value: int) -> None:
        field = c.c_int32.from_buffer(self, offset)
        assert field.value == default, f"llama.cpp changed its parameter struct: {field.value} at offset {offset}"
        field.value = value


class InputText(c.Structure):
    _fields_ = [("text", c.c_char_p), ("add_special", c.c_bool), ("parse_special", c.c_bool)]


class Batch(c.Structure):
    _fields_ = [
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.POINTER(c.c_float)),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    ]


# name -> (result, arguments)
SIGNATURES = {
    "llama_backend_init": (None, []),
    "llama_model_default_params": (Params, []),
    "llama_context_default_params": (Params, []),
    "llama_model_load_from_file": (c.c_void_p, [c.c_char_p, Params]),
    "llama_init_from_model": (c.c_void_p, [c.c_void_p, Params]),
    "llama_model_get_vocab": (c.c_void_p, [c.c_void_p]),
    "llama_model_free": (None, [c.c_void_p]),
    "llama_free": (None, [c.c_void_p]),
    "llama_batch_init": (Batch, [c.c_int32, c.c_int32, c.c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (c.c_int32, [c.c_void_p, Batch]),
    "llama_get_logits": (c.POINTER(c.c_float), [c.c_void_p]),
    "llama_vocab_n_tokens": (c.c_int32, [c.c_void_p]),
    "llama_vocab_bos": (c.c_int32, [c.c_void_p]),
    "llama_vocab_eos": (c.c_int32, [c.c_void_p]),
    "llama_vocab_eot": (c.c_int32, [c.c_void_p]),
    "llama_vocab_pad": (c.c_int32, [c.c_void_p]),
    "llama_vocab_get_add_bos": (c.c_bool, [c.c_void_p]),
    "llama_vocab_is_eog": (c.c_bool, [c.c_void_p, c.c_int32]),
    "llama_tokenize": (c.c_int32, [c.c_void_p, c.c_char_p, c.c_int32, c.POINTER(c.c_int32), c.c_int32, c.c_bool, c.c_bool]),
    "llama_model_chat_template": (c.c_char_p, [c.c_void_p, c.c_char_p]),
    "llama_adapter_lora_init": (c.c_void_p, [c.c_void_p, c.c_char_p]),
    "llama_set_adapters_lora": (c.c_int32, [c.c_void_p, c.POINTER(c.c_void_p), c.c_size_t, c.POINTER(c.c_float)]),
    "ggml_quantize_chunk": (
        c.c_size_t,
        [c.c_int, c.c_void_p, c.c_void_p, c.c_int64, c.c_int64, c.c_int64, c.c_void_p],
    ),
}
MTMD_SIGNATURES = {
    "mtmd_context_params_default": (Params, []),
    "mtmd_init_from_file": (c.c_void_p, [c.c_char_p, c.c_void_p, Params]),
    "mtmd_free": (None, [c.c_void_p]),
    "mtmd_default_marker": (c.c_char_p, []),
    "mtmd_bitmap_init": (c.c_void_p, [c.c_uint32, c.c_uint32, c.c_char_p]),
    "mtmd_bitmap_free": (None, [c.c_void_p]),
    "mtmd_input_chunks_init": (c.c_void_p, []),
    "mtmd_input_chunks_free": (None, [c.c_void_p]),
    "mtmd_tokenize": (c.c_int32, [c.c_void_p, c.c_void_p, c.POINTER(InputText), c.POINTER(c.c_void_p), c.c_size_t]),
    "mtmd_input_chunks_size": (c.c_size_t, [c.c_void_p]),
    "mtmd_input_chunks_get": (c.c_void_p, [c.c_void_p, c.c_size_t]),
    "mtmd_input_chunk_get_type": (c.c_int, [c.c_void_p]),
    "mtmd_input_chunk_get_n_tokens": (c.c_size_t, [c.c_void_p]),
    "mtmd_encode_chunk": (c.c_int32, [c.c_void_p, c.c_void_p]),
    "mtmd_get_output_embd": (c.POINTER(c.c_float), [c.c_void_p]),
}
LOG_CALLBACK = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
messages: list[str] = []


@functools.cache
def library() -> c.CDLL:
    lib = c.CDLL(xllamacpp.xllamacpp.__file__)
    for name, (result, arguments) in (SIGNATURES | MTMD_SIGNATURES).items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    # kept alive by the library object: llama.cpp's chatter goes to `messages`, for a failing test to show
    lib.log = LOG_CALLBACK(lambda level, text, data: messages.append(text.decode("utf8", "replace")))
    lib.llama_log_set(lib.log, None)
    lib.mtmd_log_set(lib.log, None)
    lib.mtmd_helper_log_set(lib.log, None)
    lib.llama_backend_init()
    return lib


class Llama:
    """One loaded GGUF file: ``with Llama(path) as llama: llama.logits(ids)``. F32 KV cache, no flash attention."""

    def __init__(self, path: str | Path, context: int = 512, lora: str | Path | None = None) -> None:
        self.lib = library()
        messages.clear()
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        assert self.model, "".join(messages[-12:])
        params = self.lib.llama_context_default_params()
        params.set(0, 512, context)
        params.set(28, 4, 1)  # threads
        params.set(32, 4, 1)
        params.set(52, -1, 0)  # flash attention off
        params.set(104, 1, 0)  # K cache in F32
        params.set(108, 1, 0)  # V cache in F32
        self.size = context
        self.params = params
        self.vocab = self.lib.llama_model_get_vocab(self.model)
        self.adapter = None
        if lora is not None:
            self.adapter = self.lib.llama_adapter_lora_init(self.model, str(lora).encode())
            assert self.adapter, "".join(messages[-12:])

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *exc: object) -> None:
        self.lib.llama_model_free(self.model)

    @property
    def vocab_size(self) -> int:
        return self.lib.llama_vocab_n_tokens(self.vocab)

    def special(self, name: str) -> int:
        """The id of ``bos``, ``eos``, ``eot`` or ``pad``; -1 if there is none."""
        return getattr(self.lib, f"llama_vocab_{name}")(self.vocab)

    def adds_bos(self) -> bool:
        return self.lib.llama_vocab_get_add_bos(self.vocab)

    def ends_generation(self, token: int) -> bool:
        return self.lib.llama_vocab_is_eog(self.vocab, token)

    def chat_template(self) -> str | None:
        text = self.lib.llama_model_chat_template(self.model, None)
        return None if text is None else text.decode()

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """Token ids, control tokens in the text parsed, BOS and EOS added as the file says if ``special``."""
        data = text.encode()
        out = (c.c_int32 * (len(data) + 8))()
        n = self.lib.llama_tokenize(self.vocab, data, len(data), out, len(out), special, True)
        assert n >= 0
        return list(out[:n])

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits at every position, float32 ``[len(ids), vocab]``."""
        context = self.lib.llama_init_from_model(self.model, self.params)
        assert context, "".join(messages[-12:])
        if self.adapter:
            scale, adapter = c.c_float(1.0), c.c_void_p(self.adapter)
            assert self.lib.llama_set_adapters_lora(context, c.byref(adapter), 1, c.byref(scale)) == 0
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), i, 1, 1
            batch.seq_id[i][0] = 0
        assert self.lib.llama_decode(context, batch) == 0, "".join(messages[-12:])
        shape = (len(ids), self.vocab_size)
        result = np.ctypeslib.as_array(self.lib.llama_get_logits(context), shape).copy()
        self.lib.llama_batch_free(batch)
        self.lib.llama_free(context)
        return result

    def greedy(self, ids: list[int], new_tokens: int) -> list[int]:
        ids = list(ids)
        for _ in range(new_tokens):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids


def encode_picture(llama: Llama, mmproj: str | Path, pixels: np.ndarray, width: int) -> np.ndarray:
    """What the vision part makes of a picture, uint8 ``[height, width, 3]``: float32 ``[tokens, width]``."""
    lib = llama.lib
    messages.clear()
    params = lib.mtmd_context_params_default()
    params.set(20, 4, 1)  # threads
    params.set(40, -1, 0)  # flash attention off
    context = lib.mtmd_init_from_file(str(mmproj).encode(), llama.model, params)
    assert context, "".join(messages[-12:])
    bitmap = c.c_void_p(lib.mtmd_bitmap_init(pixels.shape[1], pixels.shape[0], np.ascontiguousarray(pixels).tobytes()))
    chunks = lib.mtmd_input_chunks_init()
    text = InputText(lib.mtmd_default_marker(), False, True)
    assert lib.mtmd_tokenize(context, chunks, c.byref(text), c.byref(bitmap), 1) == 0, "".join(messages[-12:])
    found = [lib.mtmd_input_chunks_get(chunks, i) for i in range(lib.mtmd_input_chunks_size(chunks))]
    (picture,) = (chunk for chunk in found if lib.mtmd_input_chunk_get_type(chunk) == 1)
    assert lib.mtmd_encode_chunk(context, picture) == 0, "".join(messages[-12:])
    shape = (lib.mtmd_input_chunk_get_n_tokens(picture), width)
    result = np.ctypeslib.as_array(lib.mtmd_get_output_embd(context), shape).copy()
    lib.mtmd_input_chunks_free(chunks)
    lib.mtmd_bitmap_free(bitmap)
    lib.mtmd_free(context)
    return result


def quantize_chunk(type_id: int, values: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """llama.cpp's own quantiser: float32 ``[rows, columns]`` -> uint8 ``[rows, bytes of a row]``."""
    rows, columns = values.shape
    values = np.ascontiguousarray(values, np.float32)
    out = np.zeros(values.size * 4 + 64, np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    size = library().ggml_quantize_chunk(
        type_id, values.ctypes.data, out.ctypes.data, 0, rows, columns, None if weights is None else weights.ctypes.data
    )
    return out[:size].reshape(rows, -1)
