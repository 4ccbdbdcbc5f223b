"""Training of a byte-pair encoding: a tokenizer.json over bytes that splits words as DeepSeek does."""

from collections.abc import Iterable

from dsmini.text.tokenizer import END_TOKENS, FIM_TOKENS

# DeepSeek's special tokens in the order of their ids: begin and end of sentence, padding, fill-in-the-middle
SPECIAL_TOKENS = ("<｜begin▁of▁sentence｜>", END_TOKENS[0], "<｜▁pad▁｜>", *FIM_TOKENS)
SMALLEST = 256 + len(SPECIAL_TOKENS)
"""Smallest number of token ids: the bytes and the special tokens."""

# as in DeepSeek-V3: up to three digits; Chinese and Japanese; a sign with its word; signs with their line breaks
SPLITS = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def train_bpe(texts: Iterable[bytes], vocab_size: int) -> str:
    """Return the text of a tokenizer.json trained on these texts. The same texts give the same file.

    The vocabulary is smaller than vocab_size if the texts are too short to have that many pairs.

    Raises: ValueError if the tokenizers library is not installed.
    """
    try:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise ValueError(
            "training a tokenizer needs the tokenizers library; install it with: pip install 'tokenizers>=0.20'"
        ) from None
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in SPLITS]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.decode("utf-8", errors="replace") for text in texts), trainer)
    return tokenizer.to_str(pretty=True) + "\n"
