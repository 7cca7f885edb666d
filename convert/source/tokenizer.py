"""The sentencepiece model of a source or bundle: opened, and refused where it is something else."""

from pathlib import Path
from typing import Any

from ..errors import UserError, reason
from ..hints import Hint
from ..regular_files import read_regular

_LARGEST = 32 << 20  # bytes; PersonaPlex's has half a million


def open_tokenizer(path: Path) -> Any:
    """Return the ``SentencePieceProcessor`` of a model file; raises UserError for any other file."""
    import sentencepiece  # not where a program only prints its help

    data = read_regular(path, _LARGEST)
    if not data:
        raise UserError(f"{path}: is empty", Hint.DOWNLOAD_AGAIN)
    try:
        processor: Any = sentencepiece.SentencePieceProcessor(model_proto=data)
        pieces = len(processor)
    except (RuntimeError, OSError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a sentencepiece model ({reason(error)})", Hint.DOWNLOAD_AGAIN) from None
    if not pieces:
        raise UserError(f"{path}: a sentencepiece model without pieces", Hint.DOWNLOAD_AGAIN)
    return processor
