"""Checkpoint directories exactly as other programs write them, built without the code under test.

Tests reach these functions through the fixture ``forge``.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from openxlstm.models import xLSTMLarge, xLSTMLargeConfig

Tensors = dict[str, Tensor]

OLD_HF_CONFIG: dict[str, Any] = {
    "add_embedding_dropout": False,
    "add_forward_backend_padding": False,
    "add_out_norm": True,
    "add_post_blocks_norm": True,
    "add_qk_norm": False,
    "architectures": ["xLSTMForCausalLM"],
    "autocast_kernel_dtype": "bfloat16",
    "bos_token_id": 0,
    "cell_norm_eps": 1e-06,
    "chunk_size": 64,
    "chunkwise_kernel": "chunkwise--triton_xl_chunk",
    "embedding_dim": 4096,
    "eos_token_id": 2,
    "eps": 1e-06,
    "ffn_proj_factor": 2.667,
    "ffn_round_up_to_multiple_of": 64,
    "force_bos_token_insert": True,
    "forward_backend_name": "chunkwise--triton_limit_chunk",
    "gate_soft_cap": 15.0,
    "head_dim": 512,
    "igate_bias_init_range": -10.0,
    "inference_state_dtype": "float32",
    "max_inference_chunksize": 16384,
    "mlstm_round_up_to_multiple_of": 64,
    "mode": "inference",
    "model_type": "xlstm",
    "norm_eps": 1e-06,
    "norm_reduction_force_float32": True,
    "num_blocks": 32,
    "num_heads": 8,
    "output_logit_soft_cap": 30.0,
    "pad_token_id": 1,
    "qk_dim_factor": 0.5,
    "return_last_states": True,
    "sequence_kernel": "native_sequence__triton",
    "step_backend_name": "triton",
    "step_kernel": "triton",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.48.0.dev0",
    "use_bias": False,
    "use_cache": True,
    "v_dim_factor": 1.0,
    "vocab_size": 50304,
    "weight_mode": "single",
}
"""The published configuration of xLSTM-7b."""


def large_shapes(
    width: int, blocks: int, heads: int, qk: int, v: int, hidden: int, vocab: int, embedding: str
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published weights."""
    shapes: dict[str, tuple[int, ...]] = {embedding: (vocab, width)}
    for n in range(blocks):
        block = {
            "norm_mlstm.weight": (width,),
            "mlstm_layer.q.weight": (qk, width),
            "mlstm_layer.k.weight": (qk, width),
            "mlstm_layer.v.weight": (v, width),
            "mlstm_layer.ogate_preact.weight": (v, width),
            "mlstm_layer.igate_preact.weight": (heads, width),
            "mlstm_layer.igate_preact.bias": (heads,),
            "mlstm_layer.fgate_preact.weight": (heads, width),
            "mlstm_layer.fgate_preact.bias": (heads,),
            "mlstm_layer.multihead_norm.weight": (v,),
            "mlstm_layer.out_proj.weight": (width, v),
            "norm_ffn.weight": (width,),
            "ffn.proj_up_gate.weight": (hidden, width),
            "ffn.proj_up.weight": (hidden, width),
            "ffn.proj_down.weight": (width, hidden),
        }
        shapes |= {f"backbone.blocks.{n}.{name}": shape for name, shape in block.items()}
    return shapes | {"backbone.out_norm.weight": (width,), "lm_head.weight": (vocab, width)}


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator) * 0.2 + (1.0 if "norm" in name else 0.0)
        for name, shape in shapes.items()
    }


def random_large(**fields: Any) -> xLSTMLarge:
    """A small xLSTMLarge all of whose parameters matter."""
    fields = {"embedding_dim": 64, "num_heads": 2, "num_blocks": 2, "vocab_size": 50} | fields
    model = xLSTMLarge(xLSTMLargeConfig(**fields)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    return model


def write_hf(directory: Path, config: dict[str, Any], tensors: Tensors, shards: int = 1) -> None:
    """A Hugging Face directory, sharded as the hub's tools do it."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    generation = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    places: dict[str, str] = {}
    names = list(tensors)
    for n in range(shards):
        file = f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
        part = names[n * len(names) // shards : (n + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_numbered(directory: Path, tensors: Tensors, shards: int) -> None:
    """Weight files ``model_{n}.safetensors``, as the reference package and the scaling-law models."""
    names = list(tensors)
    for n in range(shards):
        part = names[n * len(names) // shards : (n + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, directory / f"model_{n}.safetensors")


def write_reference(directory: Path, config: dict[str, Any], tensors: Tensors, shards: int = 1) -> None:
    """A directory of the reference package."""
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
    else:
        write_numbered(directory, tensors, shards)


def fused(tensors: Tensors) -> Tensors:
    """Fused weights from single ones, written down from the specification."""
    result = dict(tensors)
    for n in range(sum(name.endswith("norm_ffn.weight") for name in tensors)):
        layer, ffn = f"backbone.blocks.{n}.mlstm_layer.", f"backbone.blocks.{n}.ffn."
        for kind in ("weight", "bias"):
            if f"{layer}q.{kind}" in tensors:
                parts = ("q", "k", "v", "ogate_preact")
                rows = [result.pop(f"{layer}{part}.{kind}") for part in parts]
                result[f"{layer}qkv_opreact.{kind}"] = torch.cat(rows)
                rows = [result.pop(f"{ffn}{part}.{kind}") for part in ("proj_up_gate", "proj_up")]
                result[f"{ffn}proj_up_gate_z.{kind}"] = torch.cat(rows)
            rows = [result.pop(f"{layer}{part}.{kind}") for part in ("igate_preact", "fgate_preact")]
            result[f"{layer}ifgate_preact.{kind}"] = torch.cat(rows)
    return result


def cuda_slstm(tensors: Tensors) -> Tensors:
    """The layout of the published CUDA cells from that of the vanilla ones, index by index."""
    result = dict(tensors)
    for name, recurrent in tensors.items():
        if not name.endswith("_recurrent_kernel_"):
            continue
        heads, rows, width = recurrent.shape
        bias_name = name.replace("_recurrent_kernel_", "_bias_")
        bias, new_bias = tensors[bias_name], torch.empty(4 * heads * width)
        new = torch.empty(heads, width, rows)
        for h in range(heads):
            for g in range(4):
                for d in range(width):
                    new_bias[(h * 4 + g) * width + d] = bias[(g * heads + h) * width + d]
                    new[h, :, g * width + d] = recurrent[h, g * width + d, :]
        result[name], result[bias_name] = new, new_bias
    return result


def parameters_of(case: dict[str, Tensor]) -> Tensors:
    """The published state dict of a reference case."""
    return {n.removeprefix("param."): t.clone() for n, t in case.items() if n.startswith("param.")}


@pytest.fixture(scope="session")
def forge() -> SimpleNamespace:
    """All of the above."""
    return SimpleNamespace(
        old_config=OLD_HF_CONFIG,
        large_shapes=large_shapes,
        random_tensors=random_tensors,
        random_large=random_large,
        write_hf=write_hf,
        write_numbered=write_numbered,
        write_reference=write_reference,
        fused=fused,
        cuda_slstm=cuda_slstm,
        parameters_of=parameters_of,
    )


@pytest.fixture
def transformers_model() -> Iterator[Callable[[Path], Any]]:
    """``AutoModelForCausalLM.from_pretrained`` without the library's own warnings; refuses partial loads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()

        def load(directory: Path) -> Any:
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                directory, output_loading_info=True, dtype="auto"
            )
            assert not any(info.values()), info
            return model.eval()

        yield load
