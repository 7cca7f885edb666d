"""The text prompt of a conversation, as tokens."""

from pathlib import Path

from ..convert.errors import UserError, reason
from ..convert.source.architecture import Architecture
from ..convert.source.tokenizer import open_tokenizer

VOICE = "NATF2"
PROMPT = "You are a wise and friendly teacher. Answer questions or provide advice in a clear and engaging way."


def _tagged(text: str) -> str:
    """Return a prompt between its tags, as the reference has it: none around nothing, none twice."""
    text = text.strip()
    tagged = text.startswith("<system>") and text.endswith("<system>")
    return text if tagged or not text else f"<system> {text} <system>"


def prompt_tokens(model_file: Path, architecture: Architecture, text: str) -> list[int]:
    """Return the tokens of a text prompt as the reference tags it; raises UserError for an unusable tokenizer."""
    processor = open_tokenizer(model_file)
    try:
        text.encode()
        tokens = [int(token) for token in processor.encode(_tagged(text))]
    except UnicodeEncodeError:
        raise UserError("the text prompt is not text that can be written as UTF-8: type it again") from None
    except (RuntimeError, OSError, TypeError, ValueError) as error:
        raise UserError(f"{model_file}: cannot encode the prompt ({reason(error)}): download it again") from None
    if not all(0 <= token < architecture.text_card for token in tokens):
        raise UserError(f"{model_file}: gives tokens that this model does not have: it belongs to another one")
    return tokens
