"""Codes as text, one character for each code: the input of byte-pair encoding with `codec-bpe`."""

import numpy as np

from mimi_jax.files.codes import check_range

UNICODE_OFFSET = 0x4E00  # that of codec-bpe, from the acoustic BPE of Shen et al. (arXiv 2310.14580)
SURROGATES = range(0xD800, 0xE000)  # numbers that stand for no character


def to_unicode(codes: np.ndarray, codebook_size: int, unicode_offset: int = UNICODE_OFFSET) -> str:
    """Write codes as text, frame after frame, as `codec-bpe` does to train its tokenizers.

    Code c of codebook k becomes the character number unicode_offset + k * codebook_size + c.

    Args:
        codes: integers [codebooks, frames] in [0, codebook_size).
        codebook_size: number of codes in a codebook.
        unicode_offset: number of the first character. Use 0xE000 if the characters would otherwise reach the
            surrogates, which start at 0xD800.

    Returns:
        A text of codebooks * frames characters.

    Raises:
        ValueError: the codes have another shape, type or range, or some of the characters do not exist.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2:
        raise ValueError(f"codes must be integers [codebooks, frames], got {codes.dtype} {list(codes.shape)}")
    check_range(codes, codebook_size)
    offsets = _offsets(len(codes), codebook_size, unicode_offset)
    return (codes + offsets).T.astype("<u4").tobytes().decode("utf-32-le")


def from_unicode(
    text: str, num_codebooks: int, codebook_size: int, unicode_offset: int = UNICODE_OFFSET
) -> np.ndarray:
    """Read codes back from the text that `to_unicode` made of them.

    Args:
        text: the text.
        num_codebooks: number of codebooks in the codes.
        codebook_size, unicode_offset: as they were for `to_unicode`.

    Returns:
        uint16 codes [codebooks, frames].

    Raises:
        ValueError: the text was not made from such codes, or ends inside a frame.
    """
    numbers = np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.int64)
    if len(numbers) % num_codebooks:
        raise ValueError(
            f"the length of the text must be a multiple of num_codebooks={num_codebooks}, got {len(numbers)}"
        )
    codes = numbers.reshape(-1, num_codebooks).T - _offsets(num_codebooks, codebook_size, unicode_offset)
    if codes.size and not (codes.min() >= 0 and codes.max() < codebook_size):
        raise ValueError(
            "the text has characters outside its codebooks; give the num_codebooks, codebook_size and"
            " unicode_offset it was made with"
        )
    return codes.astype(np.uint16)


def _offsets(num_codebooks: int, codebook_size: int, unicode_offset: int) -> np.ndarray:
    """The number of each codebook's first character, [codebooks, 1]."""
    last = unicode_offset + num_codebooks * codebook_size
    if last > 0x110000 or (unicode_offset < SURROGATES.stop and last > SURROGATES.start):
        raise ValueError(
            f"not all characters from {unicode_offset:#x} to {last:#x} exist; set unicode_offset=0xE000 or"
            " keep fewer codebooks"
        )
    return unicode_offset + codebook_size * np.arange(num_codebooks)[:, None]
