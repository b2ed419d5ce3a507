"""States as values: select, stack, fork, detach, move, save, load."""

from __future__ import annotations

import pytest
import torch

from openxlstm import state as states
from openxlstm.state import LayerState, ModelState, mLSTMState, sLSTMState


def make(batch: int = 3, seed: int = 0) -> ModelState:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=g)

    first = LayerState(conv=normal(3, 8), cell=mLSTMState(normal(2, 4, 4), normal(2, 4), normal(2)))
    second = LayerState(conv=normal(0, 8), cell=sLSTMState(*(normal(2, 4) for _ in range(4))))
    return ModelState((first, second))


def equal(a: ModelState, b: ModelState) -> bool:
    return type(a) is type(b) and all(
        torch.equal(x, y) for x, y in zip(states.leaves(a), states.leaves(b), strict=True)
    )


def test_select_keeps_rows_in_the_order_asked():
    state = make()
    picked = state.select([2, 0, 2])
    assert picked.batch_size == 3
    assert torch.equal(picked.blocks[0].cell.c, state.blocks[0].cell.c[[2, 0, 2]])
    assert equal(state.select(1), state.select([1]))
    assert state.select([]).batch_size == 0
    mask = torch.tensor([True, False, True])
    assert equal(state.select(mask), state.select([0, 2]))
    with pytest.raises(IndexError, match="state has 3 rows, asked for"):
        state.select(3)
    with pytest.raises(ValueError, match="one entry for each of 3 rows"):
        state.select(mask[:2])
    with pytest.raises(ValueError, match="list of integers"):
        state.select(torch.tensor([0.5]))


def test_stack_undoes_select():
    state = make()
    assert equal(ModelState.stack([state.select(n) for n in range(3)]), state)


def test_stack_refuses_other_models():
    other = ModelState((make().blocks[0],))
    with pytest.raises(ValueError, match="different models"):
        ModelState.stack([make(), other])
    wide = states.map_state(lambda t: torch.cat([t, t], -1), make())
    with pytest.raises(ValueError, match="different models"):
        ModelState.stack([make(), wide])
    with pytest.raises(ValueError, match="at least one"):
        ModelState.stack([])


def test_fork_repeats_rows_side_by_side():
    state = make(2)
    assert equal(state.fork(2), state.select([0, 0, 1, 1]))


def test_detach_and_clone():
    state = states.map_state(lambda t: t.clone().requires_grad_(), make())
    assert not any(t.requires_grad for t in states.leaves(state.detach()))
    copy = state.detach().clone()
    copy.blocks[0].conv.zero_()
    assert state.blocks[0].conv.any()


def test_is_a_pytree():
    state = make()
    leaves, spec = torch.utils._pytree.tree_flatten(state)
    assert len(leaves) == 9
    assert equal(torch.utils._pytree.tree_unflatten(leaves, spec), state)


def test_save_and_load(tmp_path):
    state = make()
    path = tmp_path / "state.safetensors"
    state.save(path)
    assert equal(ModelState.load(path), state)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ModelState.load(tmp_path / "missing")
    path = tmp_path / "state.safetensors"
    make().save(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="not a readable state file"):
        ModelState.load(path)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a saved model state"):
        ModelState.load(path)


def test_save_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "state.safetensors"
    make().save(path)
    before = path.read_bytes()
    with pytest.raises(OSError):
        make().save(tmp_path / "no_folder" / "state.safetensors")
    assert path.read_bytes() == before
