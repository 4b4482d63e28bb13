"""Exported GGUF files, opened and asked by llama.cpp (`pip install llama-cpp-python`, which compiles it)."""

from __future__ import annotations

from ctypes import byref
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from openm6.compress.convert import export_model, import_model
from tests.weights.checkpoints import ODDITIES, foreign_tokenizer, network, save
from tests.weights.test_gguf_file import IN_GGUF

F32 = 0  # of GGML: by default keys and values are rounded to fp16


@pytest.mark.parametrize("oddity", IN_GGUF)
def test_llama_cpp_gives_the_same_answers(oddity: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    family, changes = ODDITIES[oddity]
    theirs = network(family, eos_token_id=1, **changes)
    import_model(save(theirs, tmp_path / "theirs"), tmp_path / "ours", "none", 0, 64)
    export_model(tmp_path / "ours", tmp_path / "out", "gguf")
    opened = llama_cpp.Llama(
        str(tmp_path / "out" / "out-F32.gguf"), n_ctx=128, n_threads=1, logits_all=True, verbose=False,
        type_k=F32, type_v=F32,
    )  # fmt: skip
    text = "the cat sat on 12 mats,\n dog's <think> 猫!"
    ids = opened.tokenize(text.encode(), add_bos=False, special=False)
    assert ids == foreign_tokenizer().encode(text).ids
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
        answer = theirs.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0, len(ids) :].tolist()
    opened.eval(ids)
    np.testing.assert_allclose(opened.scores[: len(ids)], expected, atol=1e-3, rtol=1e-3)
    opened.reset()
    found = opened.generate(ids, temp=0.0, repeat_penalty=1.0)
    assert [next(found) for _ in answer] == answer
    opened.close()


def test_q8_0_is_that_of_llama_cpp_byte_by_byte(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    import_model(save(network("llama", eos_token_id=1), tmp_path / "theirs"), tmp_path / "ours", "none", 0, 64)
    for dtype in ("f32", "q8_0"):
        export_model(tmp_path / "ours", tmp_path / dtype, "gguf", dtype)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread, options.pure = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, 1, True
    source, expected = tmp_path / "f32" / "f32-F32.gguf", tmp_path / "expected.gguf"
    assert not llama_cpp.llama_model_quantize(str(source).encode(), str(expected).encode(), byref(options))
    files = tmp_path / "q8_0" / "q8_0-Q8_0.gguf", expected
    found, theirs = ({one.name: one.data.tobytes() for one in GGUFReader(file).tensors} for file in files)
    assert found == theirs
