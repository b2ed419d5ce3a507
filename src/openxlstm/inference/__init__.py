"""Text generation: sampling, streaming, batches, sessions that can be saved, chat."""

from openxlstm.inference.chat import PLAIN, TEMPLATES, TRANSCRIPT, Chat, ChatTemplate
from openxlstm.inference.generator import GenerationResult, Generator
from openxlstm.inference.sampling import SamplingConfig
from openxlstm.inference.session import Session

__all__ = [
    "PLAIN",
    "TEMPLATES",
    "TRANSCRIPT",
    "Chat",
    "ChatTemplate",
    "GenerationResult",
    "Generator",
    "SamplingConfig",
    "Session",
]
