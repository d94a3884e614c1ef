"""Codes as text, one character for each code, as codec-bpe reads it."""

import numpy as np
import pytest

from mimi_jax.tokenization import from_unicode, to_unicode


def test_text_has_one_character_for_each_code_frame_by_frame():
    codes = np.array([[0, 1], [2, 3]], np.uint16)
    text = to_unicode(codes, codebook_size=256)
    assert [ord(character) - 0x4E00 for character in text] == [0, 256 + 2, 1, 256 + 3]
    np.testing.assert_array_equal(from_unicode(text, 2, 256), codes)


def test_any_codes_survive_as_text():
    codes = np.random.default_rng(0).integers(0, 2048, (8, 100), np.uint16)
    np.testing.assert_array_equal(from_unicode(to_unicode(codes, 2048), 8, 2048), codes)
    large = np.random.default_rng(0).integers(0, 2048, (32, 100), np.uint16)
    with pytest.raises(ValueError, match="set unicode_offset=0xE000"):
        to_unicode(large, 2048)
    np.testing.assert_array_equal(from_unicode(to_unicode(large, 2048, 0xE000), 32, 2048, 0xE000), large)


def test_other_text_and_other_codes_are_refused():
    text = to_unicode(np.zeros((2, 3), np.uint16), 256)
    for broken, error in (
        (text[1:], "must be a multiple of num_codebooks=2, got 5"),
        (text[1:] + text[0], "outside its codebooks"),
    ):
        with pytest.raises(ValueError, match=error):
            from_unicode(broken, 2, 256)
    with pytest.raises(ValueError, match=r"must lie in \[0, 256\), got 0 to 300"):
        to_unicode(np.array([[0, 300]]), 256)
    with pytest.raises(ValueError, match=r"must be integers \[codebooks, frames\]"):
        to_unicode(np.zeros(3), 256)
