"""Word-level tokenizer of the tiny CLIP."""

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ..data.drawn_world.words import CAPTION_WORDS, WORDS

CONTEXT_LENGTH = 16
# The end token must not have id 2: transformers would take it for a legacy CLIP checkpoint and pool the token with
# the highest id instead of the end token.
SPECIAL_TOKENS = ("<pad>", "<bos>", "<unk>", "<eos>")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with all words of the mini-world that ignores case and punctuation."""
    words = sorted({word for words in WORDS.values() for word in words} | set(CAPTION_WORDS))
    ids = {token: number for number, token in enumerate((*SPECIAL_TOKENS, *words))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation("removed"), pre_tokenizers.WhitespaceSplit()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", ids["<bos>"]), ("<eos>", ids["<eos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        eos_token="<eos>",
        model_max_length=CONTEXT_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )
