"""``openxlstm inspect MODEL --text TEXT``: what gates and heads do on a real text."""

from __future__ import annotations

import json
from itertools import chain, islice
from pathlib import Path
from typing import Any

from openxlstm.runtime import atomic_write_text

TOP = 5


def look_inside(
    model_name: str, text: Path, tokens: int, output: Path, loaded: tuple[Any, Any] | None = None
) -> None:
    """Print half-lives and retrieved tokens per head, and draw gates over time.

    Args:
        model_name: checkpoint directory or hub id.
        text: as for ``openxlstm eval text``.
        tokens: how many of them.
        output: directory of plots and figures.
        loaded: the model and its tokenizer, if they are at hand.

    Raises:
        ValueError: fewer than 2 tokens, or a text without any.
    """
    if not 2 <= tokens <= 4096:
        raise ValueError(f"--tokens must lie between 2 and 4096 (time grows with its square), got {tokens}")
    import torch

    from openxlstm.cli.eval_text import documents_of, load
    from openxlstm.evaluation.probes import probe
    from openxlstm.evaluation.text import first_token

    model, tokenizer = loaded or load(model_name, "auto")
    pieces = chain.from_iterable(documents_of(text, tokenizer))
    ids = list(islice(chain.from_iterable(piece.tokens for piece in pieces), tokens))
    if len(ids) < 2:
        raise ValueError(f"'{text}' has {len(ids)} tokens; looking at gates over time needs at least 2")
    first = first_token(tokenizer)
    row = torch.tensor([[*([] if first is None else [first]), *ids]])
    names = [json.dumps(tokenizer.decode([token], skip_special=False))[1:-1] for token in row[0].tolist()]
    probes = probe(model, row)
    output.mkdir(parents=True, exist_ok=True)
    print(f"\n{len(ids)} tokens of '{text}'")
    print(
        "block  kind   head  half-life  forget gate  input gate  goes back  retrieves most at the last token"
    )
    figures: list[dict[str, Any]] = []
    for found in probes:
        for head in range(len(found.half_life)):
            forget, gate = found.forget_gate[head], found.input_gate[head]
            line = f"{found.block:>5}  {found.kind}  {head:>4}  {float(found.half_life[head]):>9,.1f}  "
            line += f"{float(forget.mean()):>11.4f}  {float(gate.mean()):>10.2f}  "
            about = {
                "block": found.block,
                "kind": found.kind,
                "head": head,
                "half_life": float(found.half_life[head]),
                "forget_gate": forget.tolist(),
                "input_gate": gate.tolist(),
            }
            if found.retrieval is not None and found.distance is not None:
                weights, places = found.retrieval[head, -1].topk(min(TOP, row.shape[1]))
                most = [
                    (names[place], row.shape[1] - 1 - place, weight)
                    for place, weight in zip(places.tolist(), weights.tolist(), strict=True)
                ]
                about |= {"distance": float(found.distance[head]), "retrieves": most}
                line += f"{float(found.distance[head]):>9.1f}  "
                line += "  ".join(f"{name}@-{back} {weight:.2f}" for name, back, weight in most)
            figures.append(about)
            print(line.rstrip())
    atomic_write_text(output / "inside.json", json.dumps({"tokens": names, "heads": figures}))
    _draw(probes, output)
    print(f"plots: {output}")


def _draw(probes: Any, output: Path) -> None:
    """Gates over time of every block, and what the head of each mLSTM block that goes back furthest
    retrieves."""
    from openxlstm.plots import plot_matrix

    for found in probes:
        rows = [f"head {head}" for head in range(len(found.half_life))]
        name = f"block {found.block} ({found.kind})"
        input_gate = found.input_gate
        for what, values, limits in (
            ("forget gate", found.forget_gate, (0.0, 1.0)),
            ("input gate pre-activation", input_gate, (float(input_gate.min()), float(input_gate.max()))),
        ):
            plot_matrix(
                values.tolist(),
                output / f"block{found.block}-{what.split()[0]}.png",
                rows=rows,
                x_label="token",
                title=f"{name}: {what}",
                limits=limits,
                numbers=False,
            )
        if found.retrieval is not None:
            head = int(found.distance.argmax())
            plot_matrix(
                found.retrieval[head].tolist(),
                output / f"block{found.block}-retrieval.png",
                x_label="retrieved token",
                y_label="token",
                title=f"{name}, head {head}: where its output comes from",
                limits=(0.0, float(found.retrieval[head].quantile(0.999))),
                numbers=False,
            )
