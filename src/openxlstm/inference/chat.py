"""A conversation in the terminal, or anywhere: input and output are two callables.

The model's state is kept from turn to turn, so a turn costs what its own words cost, however long the
conversation has become. Undoing a turn is going back to the state before it.

Base models have no notion of a conversation. :data:`TRANSCRIPT` makes one by writing the two sides down like
a play and stopping where the user's next line would begin; :data:`PLAIN` adds nothing and lets the model
continue the user's text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from openxlstm.inference.generator import Generator
from openxlstm.inference.sampling import SamplingConfig
from openxlstm.inference.session import Session

HELP = """\
/help         this list
/reset        forget the conversation
/undo         take back the last turn
/retry        answer the last turn again
/save FILE    write the conversation to a file
/load FILE    take up a conversation from a file
/quit         leave (so does the end of the input)
Anything else is said to the model; begin with // to say something that begins with /.
"""


@dataclass(frozen=True)
class ChatTemplate:
    """How a conversation is written down for the model."""

    opening: str = ""
    """Text before the first turn."""
    turn: str = "{text}"
    """A turn of the user and what leads to the answer; ``{text}`` is what the user said."""
    between: str = ""
    """Text between an answer and the next turn."""
    stop: tuple[str, ...] = ()
    """Where an answer ends."""


TRANSCRIPT = ChatTemplate(
    opening="A conversation between a user and a helpful assistant.\n\n",
    turn="User: {text}\nAssistant:",
    between="\n",
    stop=("\nUser:",),
)
"""A written-down dialogue, for base models."""

PLAIN = ChatTemplate()
"""The model simply continues what the user types."""

TEMPLATES = {"transcript": TRANSCRIPT, "plain": PLAIN}
"""Templates by name."""


class Chat:
    """A conversation.

    Args:
        generator: writes the answers.
        sampling: how tokens are chosen; its stop strings are added to the template's.
        template: how the conversation is written down.
        read: returns the user's next line, or ``None`` at the end of the input.
        write: takes text to show, in pieces, as it comes.

    Attributes:
        session: the conversation so far, as the model knows it.
    """

    def __init__(
        self,
        generator: Generator,
        sampling: SamplingConfig | None = None,
        template: ChatTemplate = TRANSCRIPT,
        *,
        read: Callable[[], str | None],
        write: Callable[[str], None],
    ) -> None:
        self.generator, self.template = generator, template
        self.sampling = sampling or SamplingConfig()
        self.read, self.write = read, write
        self._reset()

    def _reset(self) -> None:
        stop = tuple(dict.fromkeys((*self.template.stop, *self.sampling.stop)))
        self.session: Session = self.generator.start(None, self.sampling.updated(stop=stop))
        self._before: Session | None = None
        self._said: str | None = None

    def run(self) -> None:
        """Talk until the user leaves. Mistakes in commands are told and do not end the conversation.

        ``KeyboardInterrupt`` during an answer ends the answer; elsewhere it is passed on.
        """
        while (line := self.read()) is not None:
            try:
                if line.startswith("/") and not line.startswith("//"):
                    if self._command(line) is False:
                        return
                elif line.strip():
                    self.say(line[1:] if line.startswith("//") else line)
            except (ValueError, OSError) as error:
                self.write(f"{error}\n")

    def _command(self, line: str) -> bool | None:
        """Obey one command; ``False`` means leave."""
        name, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        if name in ("/save", "/load") and not argument:
            raise ValueError(f"{name} needs a file name: {name} FILE")
        match name:
            case "/quit" | "/exit":
                return False
            case "/help":
                self.write(HELP)
            case "/reset":
                self._reset()
                self.write("The conversation is forgotten.\n")
            case "/save":
                self.session.save(argument)
                self.write(f"Saved to '{argument}'.\n")
            case "/load":
                self.session = self.generator.resume(argument)
                self._before = self._said = None
                self.write(f"Took up the conversation in '{argument}' ({len(self.session.tokens)} tokens).\n")
            case "/undo":
                self._undo()
                self.write("Took back the last turn.\n")
            case "/retry":
                self.say(self._undo())
            case _:
                raise ValueError(f"unknown command '{name}'; /help lists the commands")
        return None

    def _undo(self) -> str:
        """Go back to before the last turn, with random numbers of its own. Returns what the user said."""
        if self._before is None or self._said is None:
            raise ValueError("there is no turn to take back")
        random_state = self.session.sampler.generator.get_state()
        said, self.session = self._said, self._before
        self.session.sampler.generator.set_state(random_state)
        self._before = self._said = None
        return said

    def say(self, text: str) -> None:
        """One turn: tell the model ``text`` and write its answer as it comes."""
        before = self.session.fork()
        lead = self.template.between if self.session.tokens else self.template.opening
        begun = False
        try:
            self.session.feed(lead + self.template.turn.replace("{text}", text))
            self._before, self._said = before, text
            for piece in self.session.stream():
                piece = piece if begun else piece.lstrip()
                begun = begun or bool(piece)
                self.write(piece)
        except KeyboardInterrupt:
            pass
        self.write(self.session.flush() + "\n")
