"""The model under FSDP2, in real processes: the same parameters, losses and gradients as in one."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from pretrainkit import models
from pretrainkit.config import LossConfig
from pretrainkit.models.documents import DocumentBoundary

KEYS = {
    "block_size": 32, "n_layer": 2, "n_embd": 32, "n_head": 4, "n_query_groups": 2, "padded_vocab_size": 97,
    "vocab_size": 97, "mlp_class_name": "LLaMAMLP", "norm_class_name": "RMSNorm", "intermediate_size": 49,
    "parallel_residual": False,
}  # fmt: skip


def build(tie_embeddings, document_boundary, **changes):
    with torch.device("meta"):
        return models.build_model(
            models.resolve_config(None, KEYS | changes),
            loss=LossConfig(z_loss=1e-3, chunk_tokens=11),
            tie_embeddings=tie_embeddings,
            document_boundary=document_boundary,
        )


def counting_backend():
    """A backend for the compiler that keeps the graphs it is given, and the list of them."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    return backend, graphs


def compare_with_one_process(rank, world_size, store):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    tokens = torch.randint(0, 97, (2, 33), generator=torch.Generator().manual_seed(0))
    for tie_embeddings, boundary in [(False, None), (True, DocumentBoundary(rule="eos", eos_id=5))]:
        whole, sharded = build(tie_embeddings, boundary), build(tie_embeddings, boundary)
        backend, graphs = counting_backend()
        for block in sharded.transformer.h:
            block.compile(backend=backend)
            fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        for model in (whole, sharded):
            model.to_empty(device="cpu")
            models.initialize_parameters(model, seed=3)
            model(tokens).loss.backward()
        assert len(graphs) == 1, "FSDP's hooks must stay outside of what is compiled, once for all blocks"
        assert (sharded.transformer.wte.weight is sharded.lm_head.weight) == tie_embeddings
        for (name, part), (same_name, reference) in zip(
            sharded.named_parameters(), whole.named_parameters(), strict=True
        ):
            assert name == same_name
            assert torch.equal(part.full_tensor(), reference), name
            torch.testing.assert_close(part.grad.full_tensor(), reference.grad, rtol=1e-6, atol=1e-6, msg=name)
    dist.destroy_process_group()
    os._exit(0)  # see pretrainkit/leave.py


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sharded_model_is_the_model_of_one_process(tmp_path):
    torch.multiprocessing.spawn(compare_with_one_process, args=(2, tmp_path / "store"), nprocs=2)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")  # what the compiler says about itself
@pytest.mark.parametrize("what", ["none", "attention", "mlp", "block"])
def test_all_blocks_share_one_compiled_graph_whatever_is_computed_again(what):
    """More blocks than the compiler makes versions of one function: it runs what is beyond that uncompiled."""
    from pretrainkit.train.parallel import checkpoint_activations

    backend, graphs = counting_backend()
    model = build(False, DocumentBoundary(rule="eos", eos_id=5), n_layer=10)
    model.to_empty(device="cpu")
    models.initialize_parameters(model, seed=3)
    tokens = torch.randint(0, 97, (2, 33), generator=torch.Generator().manual_seed(0))
    expected = model(tokens).loss
    checkpoint_activations(model, what)
    for block in model.transformer.h:
        block.compile(fullgraph=True, backend=backend)
    loss = model(tokens).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert len(graphs) == 1
    again = [node for node in graphs[0].graph.nodes if node.target is torch.ops.higher_order.tag_activation_checkpoint]
    assert len(again) == (what != "none")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # the compiler's own
def test_compiled_loss_equals_the_uncompiled_one():
    from pretrainkit.models.loss import linear_cross_entropy

    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 32, generator=generator), torch.randn(500, 32, generator=generator)
    targets = torch.randint(0, 500, (64,), generator=generator)
    losses, gradients = [], []
    for fused in (False, True):
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss, _, _ = linear_cross_entropy(
            *inputs, None, targets, z_loss=0.01, softcap=5.0, chunk_tokens=16, fused=fused
        )
        loss.backward()
        losses.append(loss)
        gradients.append([tensor.grad for tensor in inputs])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)
