"""``openxlstm eval harness``: lm-evaluation-harness with the models of this library."""

from __future__ import annotations

from collections.abc import Sequence

HELP = """usage: openxlstm eval harness [options of lm_eval]

The command line of lm-evaluation-harness (pip install 'openxlstm[eval]') with one more model, `openxlstm`,
which is the default. It reads shared beginnings of prompts once and keeps the state.

--model_args:
  pretrained=...   checkpoint directory or hub id
  dtype=...        numeric type of the weights; as stored unless given
  max_length=...   forget what lies further back; never unless given

examples:
  openxlstm eval harness --model_args pretrained=runs/demo/model --tasks my_task --include_path tasks/
  openxlstm eval harness --help_lm_eval"""


def run(name: str, arguments: Sequence[str]) -> int:
    """Run the command."""
    words = ["--help" if word == "--help_lm_eval" else word for word in arguments]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return 0
    try:
        from openxlstm.evaluation.harness import run_harness
    except ImportError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        raise ImportError("lm-evaluation-harness is not here", name="lm_eval") from None
    run_harness(words)
    return 0
