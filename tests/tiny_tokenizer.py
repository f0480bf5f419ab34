"""A tokenizer of single bytes, made on the fly: it knows every text, in 260 ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

from checks import randomise, tiny_bert

PAD, CLS, SEP, UNK = range(4)
SIZE = 260


def byte_tokenizer(known: bool = True) -> transformers.PreTrainedTokenizerFast:
    """[CLS] bytes [SEP], or of a pair [CLS] bytes [SEP] bytes [SEP]; `known=False` knows no letter."""
    special = {"[PAD]": PAD, "[CLS]": CLS, "[SEP]": SEP, "[UNK]": UNK}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet()) if known else []
    made = tokenizers.Tokenizer(
        models.BPE({**special, **{c: i + len(special) for i, c in enumerate(letters)}}, [], unk_token="[UNK]")
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def ids_of(text: str) -> list[int]:
    """What the tokenizer makes of an ASCII text, without [CLS] and [SEP]."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [letters.index("Ġ" if c == " " else c) + 4 for c in text]


def saved_with_tokenizer(folder: Path, model: Any = None, known: bool = True) -> Any:
    """A model loaded from a folder that holds a tokenizer: a tiny BERT, or `model` re-randomised."""
    (tiny_bert(vocab=SIZE) if model is None else randomise(model)).save_pretrained(folder)
    byte_tokenizer(known).save_pretrained(folder)
    cls = transformers.AutoModel if model is None else type(model)
    return cls.from_pretrained(folder).eval()
