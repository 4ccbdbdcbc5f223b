"""Text as bytes: the token id is the byte. No training, no files, every text in every language."""

import codecs

import numpy as np
from numpy.typing import NDArray


class ByteTokenizer:
    """UTF-8 bytes as token ids 0 to 255. The NUL byte, which no text contains, ends a document."""

    vocab_size = 256
    end_of_document = 0

    def encode(self, text: str) -> NDArray[np.uint8]:
        """The text's UTF-8 bytes; those that Python could not decode in an argument come back as they were."""
        return np.frombuffer(text.encode("utf-8", errors="surrogateescape"), dtype=np.uint8)

    def decode(self, tokens: bytes | list[int]) -> str:
        """The text of the bytes; a byte sequence that is no UTF-8 becomes U+FFFD."""
        return bytes(tokens).decode("utf-8", errors="replace")

    def stream(self) -> codecs.IncrementalDecoder:
        """A decoder for tokens that come one by one: it holds back a character's bytes until the last of them."""
        return codecs.getincrementaldecoder("utf-8")(errors="replace")
